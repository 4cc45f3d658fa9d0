//! Attributes and extended attributes of an overlay's files. Knows no open file but where a
//! length is cut through one.

use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::Arc;

use super::Overlay;
use super::node::{Node, State};
use crate::attr::{Attr, SetAttr, SetTime, StatFs};
use crate::files::{Caller, SetXattr};
use crate::host::{Spot, split_names, statfs};

const DEFAULT_ACL: &str = "system.posix_acl_default";
const ACCESS_ACL: &str = "system.posix_acl_access";
const CAPABILITY: &str = "security.capability";

impl Overlay {
    /// The attributes of a node.
    pub(crate) fn attr(&self, node: &Node) -> io::Result<Attr> {
        self.attr_of(node, &node.lock())
    }

    /// The same, with its state locked already.
    pub(crate) fn attr_of(&self, node: &Node, state: &State) -> io::Result<Attr> {
        let gone = || io::Error::from_raw_os_error(libc::ENOENT);
        let attr = if node.has_upper() {
            self.held(node, state)?.spot().stat()?
        } else if let Some(dir) = &node.dir {
            let lower = dir.lowers.first().ok_or_else(gone)?;
            lower.get(&self.recent)?.attr(None)?.ok_or_else(gone)?
        } else {
            let lower = state.lower.as_ref().ok_or_else(gone)?;
            lower.dir.get(&self.recent)?.attr(Some(&lower.name))?.ok_or_else(gone)?
        };
        self.shown_as(node, state, attr)
    }

    /// What the overlay shows of the attributes that a node has in its layer.
    pub(crate) fn shown_as(&self, node: &Node, state: &State, mut attr: Attr) -> io::Result<Attr> {
        attr.ino = node.ino;
        if self.notes_owners() {
            (attr.uid, attr.gid) = (0, 0);
        }
        if let Some(data) = &state.data
            && let Some(lower) = data.dir.get(&self.recent)?.attr(Some(&data.name))?
        {
            attr.blocks = lower.blocks;
        }
        if let Some(index) = &state.index {
            attr.nlink = index.links;
        }
        if let Some(dir) = &node.dir
            && dir.lowers.len() + usize::from(node.has_upper()) > 1
        {
            // Nobody counts the directories in a merged one; 1 says so to those who would.
            attr.nlink = 1;
        }
        Ok(attr)
    }

    /// Changes attributes.
    pub(crate) fn change(
        &self,
        caller: Caller,
        node: &Arc<Node>,
        handle: Option<u64>,
        change: &SetAttr,
    ) -> io::Result<Attr> {
        let below = match change.size {
            Some(_) if !node.has_upper() => Some(self.attr(node)?.size),
            _ => None,
        };
        self.copy_up_until(node, change.size.unwrap_or(u64::MAX))?;
        let state = node.lock();
        let held = self.held(node, &state)?;
        let spot = held.spot();
        if *change == SetAttr::default() && node.kind == libc::S_IFREG {
            self.kill_privileges(caller, spot)?;
        }
        if let Some(size) = change.size {
            let open = handle.and_then(|handle| self.open.upper_writable(handle));
            match open {
                Some(file) => rustix::fs::ftruncate(&*file, size)?,
                None => spot.truncate(size)?,
            }
            if below.is_some_and(|below| below != size) {
                // What is cut off was not even copied: to the file system it is no change.
                spot.set_times(None, Some(SetTime::Now))?;
            }
            if change.kill_privileges {
                self.kill_privileges(caller, spot)?;
            }
        }
        if self.notes_owners() && (change.uid.is_some() || change.gid.is_some()) {
            self.give_away(spot, change.uid, change.gid)?;
        } else if change.uid.is_some() || change.gid.is_some() {
            // Set-user-id goes by itself. Whether a mark for locks does depends on who asks.
            let before = spot.stat()?;
            spot.chown(change.uid, change.gid)?;
            let mark = before.mode & (libc::S_ISGID | libc::S_IXGRP) == libc::S_ISGID;
            if mark && !before.is_dir() && !caller.keeps_set_id() && !caller.is_in_group(before.gid)
            {
                spot.chmod(before.mode & !(libc::S_ISUID | libc::S_ISGID))?;
            }
        }
        if let Some(mode) = change.mode
            && node.kind != libc::S_IFLNK
        {
            self.change_mode(node, spot, mode)?;
        }
        if change.atime.is_some() || change.mtime.is_some() {
            spot.set_times(change.atime, change.mtime)?;
        }
        self.attr_of(node, &state)
    }

    fn change_mode(&self, node: &Node, spot: Spot<'_>, mode: u32) -> io::Result<()> {
        let changed = spot.chmod(mode).and_then(|()| self.note_mode(spot));
        if let Some(dir) = &node.dir {
            dir.set_gid.forget();
        }
        changed
    }

    /// Takes set-user-id and set-group-id from a file that was written to.
    pub(crate) fn kill_privileges(&self, caller: Caller, spot: Spot<'_>) -> io::Result<()> {
        let attr = spot.stat()?;
        let mode = caller.without_privileges(attr.mode, attr.gid);
        if mode == attr.mode {
            Ok(())
        } else {
            spot.chmod(mode).and_then(|()| self.note_mode(spot))
        }
    }

    pub(crate) fn target(&self, node: &Node) -> io::Result<OsString> {
        let state = node.lock();
        if node.has_upper() {
            return self.held(node, &state)?.spot().readlink();
        }
        let lower = state.lower.as_ref();
        let lower = lower.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        lower.dir.get(&self.recent)?.readlink(&lower.name)
    }

    pub(crate) fn file_system(&self) -> io::Result<StatFs> {
        match (&self.upper, self.lowers.first()) {
            (Some(upper), _) => statfs(std::os::fd::AsFd::as_fd(&**upper.layer.directory())),
            (None, Some(lower)) => lower.layer.statfs(),
            (None, None) => Ok(StatFs::default()),
        }
    }

    /// An extended attribute by its name in the layer; `None` where there is none.
    fn inner_xattr(&self, node: &Node, key: &OsStr) -> io::Result<Option<Vec<u8>>> {
        let state = node.lock();
        if node.has_upper() {
            return match self.held(node, &state)?.spot().get_xattr(key) {
                Ok(value) => Ok(Some(value)),
                Err(e) if e.raw_os_error() == Some(libc::ENODATA) => Ok(None),
                Err(e) => Err(e),
            };
        }
        let gone = || io::Error::from_raw_os_error(libc::ENOENT);
        if let Some(dir) = &node.dir {
            return dir.lowers.first().ok_or_else(gone)?.get(&self.recent)?.xattr(None, key);
        }
        let lower = state.lower.as_ref().ok_or_else(gone)?;
        lower.dir.get(&self.recent)?.xattr(Some(&lower.name), key)
    }

    pub(crate) fn xattr(&self, node: &Node, key: &OsStr) -> io::Result<Vec<u8>> {
        let none = || io::Error::from_raw_os_error(libc::ENODATA);
        let of_interest = key == CAPABILITY;
        if of_interest && node.lock().incapable {
            return Err(none());
        }
        let value = self.inner_xattr(node, &self.words.inner(key))?;
        if of_interest && value.is_none() {
            node.lock().incapable = true;
        }
        value.ok_or_else(none)
    }

    pub(crate) fn xattrs(&self, caller: Caller, node: &Node) -> io::Result<Vec<u8>> {
        let state = node.lock();
        let gone = || io::Error::from_raw_os_error(libc::ENOENT);
        let names: Vec<OsString> = if node.has_upper() {
            let list = self.held(node, &state)?.spot().list_xattrs()?;
            split_names(&list).map(OsStr::to_owned).collect()
        } else if let Some(dir) = &node.dir {
            dir.lowers.first().ok_or_else(gone)?.get(&self.recent)?.xattrs(None)?
        } else {
            let lower = state.lower.as_ref().ok_or_else(gone)?;
            lower.dir.get(&self.recent)?.xattrs(Some(&lower.name))?
        };
        let mut list = Vec::new();
        let mut sees_trusted = None;
        for name in names.iter().filter_map(|name| self.words.outer(name)) {
            let bytes = name.as_encoded_bytes();
            let shown = !bytes.starts_with(b"trusted.")
                || *sees_trusted.get_or_insert_with(|| caller.is_administrator());
            if shown {
                list.extend_from_slice(bytes);
                list.push(0);
            }
        }
        Ok(list)
    }

    pub(crate) fn set_xattr(
        &self,
        node: &Arc<Node>,
        key: &OsStr,
        set: &SetXattr<'_>,
    ) -> io::Result<()> {
        self.copy_up(node)?;
        let mut state = node.lock();
        state.incapable &= key != CAPABILITY;
        let held = self.held(node, &state)?;
        held.spot().set_xattr(&self.words.inner(key), set.value, set.flags)?;
        forget_given(node, key);
        if key == ACCESS_ACL {
            let mode = held.spot().stat()?.mode;
            match set.kill_sgid && mode & libc::S_ISGID != 0 {
                true => self.change_mode(node, held.spot(), mode & !libc::S_ISGID)?,
                false => self.note_mode(held.spot())?,
            }
        }
        Ok(())
    }

    pub(crate) fn remove_xattr(&self, node: &Arc<Node>, key: &OsStr) -> io::Result<()> {
        let inner = self.words.inner(key);
        if !node.has_upper() && self.inner_xattr(node, &inner)?.is_none() {
            // Nothing to remove is no reason to copy up.
            return Err(io::Error::from_raw_os_error(libc::ENODATA));
        }
        self.copy_up(node)?;
        let state = node.lock();
        self.held(node, &state)?.spot().remove_xattr(&inner)?;
        forget_given(node, key);
        Ok(())
    }

    /// Whether what is made in an upper directory inherits an ACL.
    pub(crate) fn inherits_acl(&self, parent: &Node, upper: Spot<'_>) -> io::Result<bool> {
        let look = || Ok(upper.xattr(OsStr::new(DEFAULT_ACL))?.is_some());
        parent.directory()?.default_acl.find(look)
    }
}

/// Forgets what a directory gave to what was made in it before this attribute was changed.
fn forget_given(node: &Node, key: &OsStr) {
    let Some(dir) = &node.dir else { return };
    if key == DEFAULT_ACL {
        dir.default_acl.forget();
    } else if key == ACCESS_ACL {
        // It says the mode, too, and who sets it may not keep the mark.
        dir.set_gid.forget();
    }
}
