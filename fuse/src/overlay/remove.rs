//! Names go: from the upper layer, and from sight where a lower layer has them.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;

use rustix::fs::OFlags;

use super::marks::{hidden_by, is_whiteout, whiteout_name};
use super::node::{Node, State};
use super::{Overlay, Upper, clear};
use crate::files::Name;
use crate::host::HostDir;

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

impl Overlay {
    /// Removes a file that is no directory.
    pub(crate) fn remove_file(&self, name: Name<'_>) -> io::Result<()> {
        let parent = self.nodes.get(name.parent)?;
        let _names = parent.directory()?.changing();
        let node = self.child(&parent, name.name, 0)?.ok_or_else(|| errno(libc::ENOENT))?;
        let removed = self.remove_name(&parent, name.name, &node);
        self.nodes.forget(node.id, 0);
        removed
    }

    fn remove_name(&self, parent: &Arc<Node>, name: &OsStr, node: &Arc<Node>) -> io::Result<()> {
        if node.is_dir() {
            return Err(errno(libc::EISDIR));
        }
        let upper = self.upper()?;
        self.copy_up(parent)?;
        let place = parent.upper_dir(&self.recent)?;
        self.before_name_goes(node)?;
        let mut state = node.lock();
        let which = Self::which(&state, parent, name).ok_or_else(|| errno(libc::ENOENT))?;
        self.keep_open(node, &mut state, which)?;
        let in_upper = state.names.get(which).is_some_and(|alias| alias.upper);
        let below = self.lower_has(parent, name)?;
        match (in_upper, below) {
            (true, false) => place.unlink(name)?,
            (_, true) => self.white_out(upper, parent, &place, name, in_upper)?,
            (false, false) => {}
        }
        self.name_went(parent, name, node, &mut state, which);
        self.count_down(node, &mut state)
    }

    /// A file with several names of which only the lower layer knows is counted in the index from
    /// the first change of its names on.
    pub(crate) fn before_name_goes(&self, node: &Arc<Node>) -> io::Result<()> {
        if node.has_upper() || node.is_dir() || self.upper()?.index.is_none() {
            return Ok(());
        }
        let lower = node.lock().lower.clone();
        let Some(lower) = lower else { return Ok(()) };
        let get = lower.dir.get(&self.recent)?;
        if get.attr(Some(&lower.name))?.is_some_and(|attr| attr.nlink > 1)
            && get.handle(Some(&lower.name))?.is_some()
        {
            self.copy_up(node)?;
        }
        Ok(())
    }

    /// Keeps an upper file open that is about to lose the last name that is known to lead to it:
    /// the kernel may go on to use it, open or not.
    pub(crate) fn keep_open(
        &self,
        node: &Arc<Node>,
        state: &mut State,
        going: usize,
    ) -> io::Result<()> {
        let others = state.names.iter().enumerate().any(|(i, alias)| i != going && alias.upper);
        if node.has_upper() && state.orphan.is_none() && !others {
            let file = self.held(node, state)?.spot().open(OFlags::PATH)?;
            state.orphan = Some(Arc::new(file.into()));
        }
        Ok(())
    }

    /// Forgets a name that is gone.
    pub(crate) fn name_went(
        &self,
        parent: &Arc<Node>,
        name: &OsStr,
        node: &Arc<Node>,
        state: &mut State,
        which: usize,
    ) {
        if which < state.names.len() {
            state.names.swap_remove(which);
        }
        state.removed = state.names.is_empty() && (node.is_dir() || state.index.is_none());
        self.nodes.remove_name(parent.id, name);
        self.unlisted(parent, name);
    }

    /// One name less for a file in the index; after the last, the index lets go of it.
    pub(crate) fn count_down(&self, node: &Arc<Node>, state: &mut State) -> io::Result<()> {
        let Some(index) = &mut state.index else { return Ok(()) };
        index.links = index.links.saturating_sub(1);
        if index.links > 0 {
            return self.keep_links(node, state);
        }
        state.removed = true;
        match &self.upper()?.index {
            Some(dir) => dir.unlink(&index.name),
            None => Ok(()),
        }
    }

    /// Hides what lower layers have under a name; `occupied` says that an upper file that is no
    /// directory stands there, which goes.
    pub(crate) fn white_out(
        &self,
        upper: &Upper,
        parent: &Node,
        place: &HostDir,
        name: &OsStr,
        occupied: bool,
    ) -> io::Result<()> {
        if !upper.devices {
            self.hide_by_name(parent, place, name)?;
            return if occupied { place.unlink(name) } else { Ok(()) };
        }
        if !occupied {
            return match place.mknod(name, libc::S_IFCHR, 0) {
                // Hidden already.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                result => result,
            };
        }
        let temporary = upper.temporary();
        upper.work.mknod(&temporary, libc::S_IFCHR, 0)?;
        upper.work.rename(&temporary, place, name, 0).inspect_err(|_| {
            let _ = upper.work.unlink(&temporary);
        })
    }

    /// The same where device nodes cannot be made.
    pub(crate) fn hide_by_name(
        &self,
        parent: &Node,
        place: &HostDir,
        name: &OsStr,
    ) -> io::Result<()> {
        parent.directory()?.whiteouts.set(true);
        match place.create(&whiteout_name(name), OFlags::WRONLY, 0o600) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result.map(drop),
        }
    }

    /// Removes an empty directory.
    pub(crate) fn remove_directory(&self, name: Name<'_>) -> io::Result<()> {
        let parent = self.nodes.get(name.parent)?;
        let _names = parent.directory()?.changing();
        let node = self.child(&parent, name.name, 0)?.ok_or_else(|| errno(libc::ENOENT))?;
        let removed = self.remove_empty(&parent, name.name, &node);
        self.nodes.forget(node.id, 0);
        removed
    }

    fn remove_empty(&self, parent: &Arc<Node>, name: &OsStr, node: &Arc<Node>) -> io::Result<()> {
        let dir = node.directory()?;
        let _inside = dir.changing();
        if !self.list(node)?.is_empty() {
            return Err(errno(libc::ENOTEMPTY));
        }
        let upper = self.upper()?;
        self.copy_up(parent)?;
        let place = parent.upper_dir(&self.recent)?;
        let mut state = node.lock();
        let which = Self::which(&state, parent, name).ok_or_else(|| errno(libc::ENOENT))?;
        let below = self.lower_has(parent, name)?;
        if node.has_upper() {
            // Whoever stands in it goes on to.
            dir.open.pin(Arc::new(place.child(name)?));
            self.remove_upper_directory(upper, parent, &place, name, below)?;
        } else if below {
            self.white_out(upper, parent, &place, name, false)?;
        }
        self.name_went(parent, name, node, &mut state, which);
        *dir.listing() = None;
        Ok(())
    }

    /// Removes an upper directory that holds nothing but whiteouts.
    fn remove_upper_directory(
        &self,
        upper: &Upper,
        parent: &Node,
        place: &HostDir,
        name: &OsStr,
        below: bool,
    ) -> io::Result<()> {
        if !below && place.rmdir(name).is_ok() {
            return Ok(());
        }
        let temporary = upper.temporary();
        if below && upper.devices {
            upper.work.mknod(&temporary, libc::S_IFCHR, 0)?;
            let exchange = libc::RENAME_EXCHANGE;
            upper.work.rename(&temporary, place, name, exchange).inspect_err(|_| {
                let _ = upper.work.unlink(&temporary);
            })?;
        } else {
            if below {
                self.hide_by_name(parent, place, name)?;
            }
            place.rename(name, &upper.work, &temporary, 0)?;
        }
        remove_emptied(&upper.work, &temporary)
    }

    /// Makes an upper directory that shows nothing hold nothing: it is exchanged for an empty one
    /// that hides what is below.
    pub(crate) fn empty(
        &self,
        upper: &Upper,
        node: &Arc<Node>,
        place: &HostDir,
        name: &OsStr,
    ) -> io::Result<()> {
        let old = place.child(name)?;
        let names = old.names()?;
        if names.is_empty() {
            return Ok(());
        }
        for entry in &names {
            let attr = old.look(&entry.name)?;
            let whiteout = attr.is_some_and(|attr| is_whiteout(&attr));
            if !whiteout && hidden_by(&entry.name).is_none() {
                return Err(errno(libc::ENOTEMPTY));
            }
        }
        let attr = old.this().stat()?;
        let temporary = upper.temporary();
        upper.work.mkdir(&temporary, 0o700)?;
        let fresh = upper.work.at(&temporary);
        let exchanged = self.mark(fresh, &self.words.opaque, b"y").and_then(|()| {
            self.give(fresh, attr.uid, attr.gid)?;
            fresh.chmod(attr.mode)?;
            upper.work.rename(&temporary, place, name, libc::RENAME_EXCHANGE)
        });
        if exchanged.is_err() {
            let _ = upper.work.rmdir(&temporary);
            return exchanged;
        }
        node.directory()?.open.pin(Arc::new(old));
        remove_emptied(&upper.work, &temporary)
    }
}

/// Removes a directory in the work directory that holds nothing but whiteouts.
pub(crate) fn remove_emptied(work: &HostDir, name: &OsStr) -> io::Result<()> {
    let dir = work.child(name)?;
    // It is out of sight: what cannot be removed now is with the next mount.
    if clear(&dir, 0).is_ok() {
        let _ = work.rmdir(name);
    }
    Ok(())
}
