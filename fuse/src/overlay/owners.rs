//! Owners in the upper layer where the kernel knows one user only: all files are shown as root's, and
//! whose they are to be is noted beside them, for who puts the changes elsewhere.

use std::ffi::OsStr;
use std::io;
use std::sync::atomic::Ordering;

use super::Overlay;
use super::marks::{OWNER, owner_value, parse_owner};
use crate::host::Spot;

impl Overlay {
    /// From now on shows root as every file's owner and group, and notes others in the upper layer
    /// ([`OWNER`]); the upper directory itself says that it has such notes, and is root's.
    ///
    /// # Errors
    /// Where there can be no such notes.
    pub fn note_owners(&self) -> io::Result<()> {
        self.notes_owners.store(true, Ordering::Relaxed);
        let upper = self.upper()?.layer.directory().this();
        let value = owner_value(0, 0, upper.stat()?.mode & 0o7777);
        upper.set_xattr(OsStr::new(OWNER), value.as_bytes(), 0)
    }

    pub(crate) fn notes_owners(&self) -> bool {
        self.notes_owners.load(Ordering::Relaxed)
    }

    /// Gives the file that stat(2) shows this number of to another owner, as chown(2) does; who is
    /// not given stays.
    ///
    /// # Errors
    /// What chown(2) would fail with.
    pub fn give_inode(&self, ino: u64, user: Option<u32>, group: Option<u32>) -> io::Result<()> {
        let node = self.nodes.numbered(ino);
        let node = node.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
        self.copy_up(&node)?;
        let state = node.lock();
        self.give_away(self.held(&node, &state)?.spot(), user, group)?;
        drop(state);
        if let Some(kernel) = self.kernel.get() {
            // What the kernel does not know it keeps nothing of.
            let _ = kernel.forget_attributes(node.id);
        }
        Ok(())
    }

    /// Changes who is noted, and takes the rights that a program has by its owner.
    pub(crate) fn give_away(
        &self,
        spot: Spot<'_>,
        user: Option<u32>,
        group: Option<u32>,
    ) -> io::Result<()> {
        let attr = spot.stat()?;
        let rights = libc::S_ISUID | if attr.mode & libc::S_IXGRP != 0 { libc::S_ISGID } else { 0 };
        if attr.kind() == libc::S_IFREG && attr.mode & rights != 0 {
            spot.chmod(attr.mode & !rights)?;
        }
        let (old_user, old_group) = noted(spot)?.unwrap_or_default();
        self.note(spot, user.unwrap_or(old_user), group.unwrap_or(old_group))
    }

    /// Notes whose a file is to be; nothing for root's. A link's owner is not noted: there are no
    /// such attributes of links, and nobody's rights depend on it.
    pub(crate) fn note(&self, spot: Spot<'_>, user: u32, group: u32) -> io::Result<()> {
        let key = OsStr::new(OWNER);
        let attr = spot.stat()?;
        if attr.kind() == libc::S_IFLNK {
            return Ok(());
        }
        if (user, group) == (0, 0) {
            return match noted(spot)? {
                Some(_) => spot.remove_xattr(key),
                None => Ok(()),
            };
        }
        spot.set_xattr(key, owner_value(user, group, attr.mode & 0o7777).as_bytes(), 0)
    }

    /// Has the note say the mode that the file has now.
    pub(crate) fn note_mode(&self, spot: Spot<'_>) -> io::Result<()> {
        match self.notes_owners().then(|| noted(spot)).transpose()?.flatten() {
            Some((user, group)) => self.note(spot, user, group),
            None => Ok(()),
        }
    }
}

/// Who is noted as a file's owner.
fn noted(spot: Spot<'_>) -> io::Result<Option<(u32, u32)>> {
    match spot.xattr(OsStr::new(OWNER)) {
        Ok(value) => Ok(value.and_then(|value| parse_owner(&value))),
        // No such attributes of what it is, or where it is.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP)) => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_in_the_form_that_others_read() {
        assert_eq!(owner_value(33, 34, 0o755), "33:34:0755");
        assert_eq!(parse_owner(b"33:34:0755"), Some((33, 34)));
        // Newer ones say what kind of file it is besides.
        assert_eq!(parse_owner(b"1:2:0644:file"), Some((1, 2)));
        assert_eq!(parse_owner(b"1"), None);
        assert_eq!(parse_owner(b"a:b:c"), None);
    }
}
