//! Copy-up: a lower file or directory comes to stand in the upper layer before it is changed. A
//! copy is made whole in the work directory, without a name where it can be, and then takes its place in
//! one step.

mod contents;
pub(super) mod order;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::OFlags;

use super::marks::Origin;
use super::node::UPPER_DEVICE;
use super::node::{Alias, Held, Index, Lent, LowerDir, LowerFile, Node, State, Tri};
use super::{Overlay, Upper};
use crate::attr::{Attr, SetTime};
use crate::host::{HostDir, Spot, split_names};
use crate::layer::{LayerDir, LayerFile};
use contents::{Copied, copy_data};

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// What a copy is made of.
struct Source<'a> {
    dir: Arc<dyn LayerDir>,
    /// `None` for the directory itself.
    name: Option<Box<OsStr>>,
    attr: Attr,
    origin: Option<Origin>,
    /// How many bytes of it are wanted.
    len: u64,
    /// Whether its file system may share bytes with the upper one.
    clones: &'a Tri,
}

impl Source<'_> {
    /// The index and the name there of a file that has several.
    fn place_in_index<'a>(&self, upper: &'a Upper) -> Option<(&'a HostDir, OsString)> {
        let linked = self.attr.nlink > 1 && self.name.is_some();
        let name = self.origin.as_ref().filter(|_| linked).and_then(Origin::index_name);
        upper.index.as_ref().zip(name)
    }
}

/// A copy that is no directory and has no place yet.
struct Made {
    /// What it is called in the work directory; `None` where it has no name at all.
    temporary: Option<OsString>,
    /// A regular file, open for reading and writing.
    file: Option<File>,
    /// Whether it has its contents already.
    filled: bool,
}

impl Upper {
    /// Makes what is to become a copy.
    fn make(&self, source: &Source<'_>) -> io::Result<Made> {
        let regular = source.attr.is_file();
        // A place in the index may have been taken by one whose other names a crash has cut off.
        if regular && self.unnamed.get() != Some(false) && source.place_in_index(self).is_none() {
            // It costs the work directory nothing, which else were made durable with each file.
            match self.work.tmpfile(OFlags::RDWR, 0o600) {
                Ok(file) => return Ok(Made { temporary: None, file: Some(file), filled: false }),
                Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
                    self.unnamed.set(false);
                }
                Err(e) => return Err(e),
            }
        }
        let (name, attr) = (self.temporary(), &source.attr);
        let mut file = None;
        match attr.kind() {
            libc::S_IFREG => file = Some(self.work.create(&name, OFlags::RDWR, 0o600)?),
            libc::S_IFLNK => {
                let own = source.name.as_deref().unwrap_or_default();
                self.work.symlink(&name, &source.dir.readlink(own)?)?;
            }
            _ => self.work.mknod(&name, attr.mode & !0o7777 | 0o600, attr.rdev)?,
        }
        Ok(Made { temporary: Some(name), file, filled: false })
    }

    /// Takes the copy of a file that the kernel reads in a stand-in: all of it, as whoever has it open goes on in
    /// it, also where it then finds no place.
    fn take(&self, lent: &mut Lent, lower: &LowerFile) -> io::Result<Made> {
        let name = match &lent.copy {
            Some(name) => name.clone(),
            None => {
                let stand_in = self.stand_in(lent.layer).ok_or_else(|| errno(libc::EIO))?;
                let name = self.temporary();
                stand_in.copy(&lent.file, &lower.path(), &self.work, &name)?;
                lent.copy.insert(name).clone()
            }
        };
        let file = self.work.at(&name).open(OFlags::RDWR)?;
        Ok(Made { temporary: Some(name), file: Some(file), filled: true })
    }
}

impl Made {
    fn spot<'a>(&'a self, upper: &'a Upper) -> Spot<'a> {
        match (&self.file, &self.temporary) {
            (Some(file), _) => Spot::File(file.as_fd()),
            (None, name) => upper.work.at(name.as_deref().unwrap_or_default()),
        }
    }

    /// Gives it its name in a directory.
    fn put(&self, upper: &Upper, place: &HostDir, name: &OsStr) -> io::Result<()> {
        match (&self.temporary, &self.file) {
            (None, Some(file)) => place.link(Spot::File(file.as_fd()), name),
            (temporary, _) => {
                upper.work.rename(temporary.as_deref().unwrap_or_default(), place, name, 0)
            }
        }
    }

    /// Takes away the name that it has in the work directory.
    fn discard(&self, upper: &Upper) -> io::Result<()> {
        self.temporary.as_ref().map_or(Ok(()), |name| upper.work.unlink(name))
    }
}

impl Overlay {
    /// Sees to it that a node stands in the upper layer, with all its contents.
    pub(crate) fn copy_up(&self, node: &Arc<Node>) -> io::Result<()> {
        self.copy_up_until(node, u64::MAX)
    }

    /// As [`copy_up`](Overlay::copy_up), but of a regular file's contents only the first `len`
    /// bytes need come along: the rest is about to be cut off.
    pub(crate) fn copy_up_until(&self, node: &Arc<Node>, len: u64) -> io::Result<()> {
        self.copy_up_open(node, len).map(drop)
    }

    /// The same; returns the upper file, open for reading and writing, where it has just been made.
    pub(crate) fn copy_up_open(&self, node: &Arc<Node>, len: u64) -> io::Result<Option<File>> {
        let upper = self.upper()?;
        if node.has_upper() {
            return self.complete(node, len).map(|()| None);
        }
        let parent = node.lock().names.first().map(|alias| alias.parent.clone());
        if let Some(parent) = &parent {
            self.copy_up(parent)?;
        }
        let mut state = node.lock();
        if node.has_upper() {
            drop(state);
            return self.complete(node, len).map(|()| None);
        }
        let made = match node.is_dir() {
            true => self.copy_directory(upper, node, &state).map(|()| None)?,
            false => self.copy_file(upper, node, &mut state, len)?,
        };
        node.set_upper();
        Ok(made)
    }

    fn source(&self, dir: &LowerDir, name: Option<&OsStr>, len: u64) -> io::Result<Source<'_>> {
        let get = dir.get(&self.recent)?;
        let attr = get.attr(name)?.ok_or_else(|| errno(libc::ENOENT))?;
        let lower = self.lowers.get(usize::from(dir.layer)).ok_or_else(|| errno(libc::EIO))?;
        let origin = get.handle(name)?;
        let origin = origin.map(|handle| Origin { uuid: lower.layer.uuid(), handle });
        let (name, clones) = (name.map(Into::into), &lower.clones);
        Ok(Source { dir: get, name, attr, origin, len, clones })
    }

    fn copy_directory(&self, upper: &Upper, node: &Node, state: &State) -> io::Result<()> {
        let lower = node.directory()?.lowers.first().ok_or_else(|| errno(libc::EIO))?;
        let source = self.source(lower, None, 0)?;
        let Some(alias) = state.names.first() else {
            // Removed while somebody stands in it: it gets no name any more.
            let temporary = upper.temporary();
            upper.work.mkdir(&temporary, 0o700)?;
            let copied = self.copy_attributes(upper.work.at(&temporary), &source, None);
            node.directory()?.open.pin(Arc::new(upper.work.child(&temporary)?));
            upper.work.rmdir(&temporary)?;
            return copied;
        };
        let place = alias.parent.upper_dir(&self.recent)?;
        let temporary = upper.temporary();
        upper.work.mkdir(&temporary, 0o700)?;
        let made = || {
            self.copy_attributes(upper.work.at(&temporary), &source, None)?;
            let put = || upper.work.rename(&temporary, &place, &alias.name, 0);
            self.put(&alias.parent, &place, &source, put)
        };
        made().inspect_err(|_| {
            let _ = upper.work.rmdir(&temporary);
        })
    }

    fn copy_file(
        &self,
        upper: &Upper,
        node: &Arc<Node>,
        state: &mut State,
        len: u64,
    ) -> io::Result<Option<File>> {
        let lower = state.lower.clone().ok_or_else(|| errno(libc::EIO))?;
        let source = self.source(&lower.dir, Some(&lower.name), len)?;
        let made = match &mut state.access.lent {
            Some(lent) => upper.take(lent, &lower)?,
            None => upper.make(&source)?,
        };
        let mut fill = || {
            self.fill(upper, &made, &source, state.data.as_ref())?;
            if state.names.is_empty() {
                // Removed while somebody has it open: it gets no name any more.
                let fd = made.spot(upper).open(OFlags::PATH)?;
                state.orphan = Some(Arc::new(fd.into()));
                return made.discard(upper);
            }
            self.put_file(upper, node, state, &made, &source)
        };
        match fill() {
            Ok(()) => {
                state.access.lent = None;
                Ok(made.file)
            }
            Err(e) => {
                // Whoever has it open is in that copy already: the next to change it goes on from there.
                if !made.filled {
                    let _ = made.discard(upper);
                }
                Err(e)
            }
        }
    }

    /// Makes the copy of a file that is no directory what the file is.
    fn fill(
        &self,
        upper: &Upper,
        made: &Made,
        source: &Source<'_>,
        data: Option<&LowerFile>,
    ) -> io::Result<()> {
        let own = source.name.as_deref().unwrap_or_default();
        match &made.file {
            Some(to) if made.filled => {
                if source.origin.is_none() {
                    let _ = Spot::File(to.as_fd()).remove_xattr(&self.words.origin);
                }
                self.copy_attributes(Spot::File(to.as_fd()), source, None)?;
                self.settle(upper, to, Copied::Until(source.len))
            }
            Some(to) => {
                let len = source.len.min(source.attr.size);
                // Of nothing, nothing is missing.
                let (mut open, mut copied) = (None, Copied::Shared);
                if len > 0 {
                    let from = match data {
                        Some(file) => file.dir.get(&self.recent)?.open(&file.name)?,
                        None => source.dir.open(own)?,
                    };
                    copied = copy_data(from.as_ref(), to, len, source.clones)?;
                    if copied != Copied::Until(len) {
                        rustix::fs::ftruncate(to, len)?;
                    }
                    open = data.is_none().then_some(from);
                }
                // By the open files: their directories need not be looked at again.
                self.copy_attributes(Spot::File(to.as_fd()), source, open.as_deref())?;
                self.settle(upper, to, copied)
            }
            None => self.copy_attributes(made.spot(upper), source, None),
        }
    }

    /// Sees to it that no crash shows a copy without what was copied. What two files share is on the
    /// disk: the file system sees to that.
    fn settle(&self, upper: &Upper, to: &File, copied: Copied) -> io::Result<()> {
        if copied == Copied::Shared || !self.durable.load(Ordering::Relaxed) {
            return Ok(());
        }
        upper.order.keep(to)
    }

    /// Owner, permissions, attributes, times: in the order in which none takes another back. `open`
    /// is the source, where it is open.
    fn copy_attributes(
        &self,
        to: Spot<'_>,
        source: &Source<'_>,
        open: Option<&dyn LayerFile>,
    ) -> io::Result<()> {
        let attr = &source.attr;
        if self.upper()?.owner != Some((attr.uid, attr.gid)) {
            self.give(to, attr.uid, attr.gid)?;
        }
        if attr.kind() != libc::S_IFLNK {
            to.chmod(attr.mode)?;
            self.note_mode(to)?;
        }
        let name = source.name.as_deref();
        let keys = match open.and_then(LayerFile::fd) {
            Some(fd) => {
                let list = Spot::File(fd).list_xattrs()?;
                split_names(&list).map(OsStr::to_owned).collect()
            }
            None => source.dir.xattrs(name)?,
        };
        for key in keys {
            if self.words.private(&key) {
                continue;
            }
            let Some(value) = source.dir.xattr(name, &key)? else { continue };
            match to.set_xattr(&key, &value, 0) {
                // What this user may not set, or this file system not keep, stays behind.
                Err(e) if may_stay(&key, &e) => {}
                result => result?,
            }
        }
        if let Some(value) = source.origin.as_ref().and_then(Origin::value) {
            self.mark(to, &self.words.origin, &value)?;
        }
        to.set_times(Some(SetTime::To(attr.atime)), Some(SetTime::To(attr.mtime)))
    }

    /// Sets one of the overlay's own attributes, where there can be any.
    pub(crate) fn mark(&self, to: Spot<'_>, key: &OsStr, value: &[u8]) -> io::Result<()> {
        if !self.upper()?.xattrs {
            return Ok(());
        }
        match to.set_xattr(key, value, 0) {
            // `user.*` is for regular files and directories only.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP)) => Ok(()),
            result => result,
        }
    }

    /// Sets the owner. One who may not give files away keeps them: all files of an ordinary
    /// user's overlay belong to him.
    pub(crate) fn give(&self, to: Spot<'_>, uid: u32, gid: u32) -> io::Result<()> {
        if self.notes_owners() {
            // Nothing is noted of a file that has just been made.
            return if (uid, gid) == (0, 0) { Ok(()) } else { self.note(to, uid, gid) };
        }
        match to.chown(Some(uid), Some(gid)) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EINVAL)) => {
                match rustix::process::geteuid().is_root() {
                    true => Err(e),
                    false => Ok(()),
                }
            }
            result => result,
        }
    }

    /// Puts a finished copy in its place in a directory, as `put` does, and leaves the directory's times
    /// as they were.
    fn put(
        &self,
        parent: &Node,
        place: &HostDir,
        source: &Source<'_>,
        put: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let times = place.this().stat()?;
        if source.origin.is_some() {
            self.set_impure(parent, place)?;
        }
        put()?;
        place.this().set_times(Some(SetTime::To(times.atime)), Some(SetTime::To(times.mtime)))
    }

    /// Notes that files with an origin stand in a directory.
    pub(crate) fn set_impure(&self, parent: &Node, place: &HostDir) -> io::Result<()> {
        let dir = parent.directory()?;
        if dir.impure.get() != Some(true) {
            self.mark(place.this(), &self.words.impure, b"y")?;
            dir.impure.set(true);
        }
        Ok(())
    }

    fn put_file(
        &self,
        upper: &Upper,
        node: &Arc<Node>,
        state: &mut State,
        made: &Made,
        source: &Source<'_>,
    ) -> io::Result<()> {
        let Some((index, name)) = source.place_in_index(upper) else {
            let alias = state.names.first_mut().ok_or_else(|| errno(libc::ENOENT))?;
            let place = alias.parent.upper_dir(&self.recent)?;
            self.put(&alias.parent, &place, source, || made.put(upper, &place, &alias.name))?;
            alias.upper = true;
            return Ok(());
        };
        let copy = made.spot(upper).stat()?;
        // As the kernel's overlayfs: into the index first, then to its place as a link of that.
        let links = source.attr.nlink;
        self.mark(made.spot(upper), &self.words.nlink, b"L+0")?;
        made.put(upper, index, &name)?;
        state.index = Some(Index { links, name: name.as_os_str().into() });
        state.orphan = Some(Arc::new(index.at(&name).open(OFlags::PATH)?.into()));
        self.nodes.add_inode(node, state, (UPPER_DEVICE, copy.ino));
        self.link_up(node, state, 0)
    }

    /// Gives a file that stands in the index one more of its names in the upper layer.
    pub(crate) fn link_up(
        &self,
        node: &Arc<Node>,
        state: &mut State,
        which: usize,
    ) -> io::Result<()> {
        let held = self.held(node, state)?;
        let Some(alias) = state.names.get_mut(which) else { return Ok(()) };
        if alias.upper {
            return Ok(());
        }
        self.copy_up(&alias.parent)?;
        let place = alias.parent.upper_dir(&self.recent)?;
        let times = place.this().stat()?;
        self.set_impure(&alias.parent, &place)?;
        // Against the lower file's number, which does not change with the link.
        if let (Some(index), Some(lower)) = (&state.index, &state.lower) {
            let attr = lower.dir.get(&self.recent)?.attr(Some(&lower.name))?;
            let lower = attr.map_or(index.links, |attr| attr.nlink);
            let kept = format!("L{:+}", i64::from(index.links) - i64::from(lower));
            self.mark(held.spot(), &self.words.nlink, kept.as_bytes())?;
        }
        place.link(held.spot(), &alias.name)?;
        alias.upper = true;
        self.keep_links(node, state)?;
        place.this().set_times(Some(SetTime::To(times.atime)), Some(SetTime::To(times.mtime)))
    }

    /// The upper file, see [`Node::upper`].
    pub(crate) fn held(&self, node: &Node, state: &State) -> io::Result<Held> {
        node.upper(state, &self.recent)
    }

    /// Brings the contents of an upper file along that has only attributes so far.
    fn complete(&self, node: &Arc<Node>, len: u64) -> io::Result<()> {
        if node.is_dir() {
            return Ok(());
        }
        let mut state = node.lock();
        let Some(data) = state.data.clone() else { return Ok(()) };
        let held = self.held(node, &state)?;
        let attr = held.spot().stat()?;
        let to = held.spot().open(OFlags::WRONLY)?;
        let len = len.min(attr.size);
        if len > 0 {
            let from = data.dir.get(&self.recent)?.open(&data.name)?;
            let copied = copy_data(from.as_ref(), &to, len, &Tri::default())?;
            self.settle(self.upper()?, &to, copied)?;
        }
        let spot = Spot::Open(to.as_fd());
        spot.set_times(Some(SetTime::To(attr.atime)), Some(SetTime::To(attr.mtime)))?;
        spot.remove_xattr(&self.words.metacopy)?;
        state.data = None;
        Ok(())
    }

    /// Which of a node's names this is.
    pub(crate) fn which(state: &State, parent: &Node, name: &OsStr) -> Option<usize> {
        let same = |alias: &Alias| alias.parent.id == parent.id && *alias.name == *name;
        state.names.iter().position(same)
    }
}

/// Whether an attribute may be left behind where it could not be set.
fn may_stay(key: &OsStr, error: &io::Error) -> bool {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => true,
        Some(libc::EPERM) => {
            let key = key.as_encoded_bytes();
            key.starts_with(b"trusted.") || key.starts_with(b"security.")
        }
        _ => false,
    }
}
