//! What a change of a file takes from it: the bits and attributes that let a program run with
//! rights of its own.

use vdisk_fuse::files::Caller;

use super::DiskFiles;
use crate::error::Result;
use crate::filesystem::ext4::mounted::{Change, Need};

const TYPE: u16 = 0o170_000;
const DIRECTORY: u16 = 0o040_000;
const SET_USER: u16 = 0o4000;
const GROUP_EXECUTES: u16 = 0o010;
/// Set-user-id and set-group-id.
const SET_ID: u16 = 0o6000;
const CAPABILITY: &[u8] = b"security.capability";

/// The type and the permissions that are left once this caller has changed what a file of group
/// `gid` holds.
pub(super) fn without(caller: Caller, mode: u16, gid: u32) -> u16 {
    if mode & TYPE == DIRECTORY {
        return mode;
    }
    caller.without_privileges(mode.into(), gid) as u16
}

/// The same, once the caller has given a file to another owner or group.
pub(super) fn without_after_chown(caller: Caller, mode: u16, gid: u32) -> u16 {
    // Set-group-id without execution is a mark for locks, which whoever may set it leaves.
    if mode & TYPE != DIRECTORY && mode & GROUP_EXECUTES == 0 && caller.keeps_set_id() {
        return mode & !SET_USER;
    }
    without(caller, mode, gid)
}

impl DiskFiles {
    /// As [`drop_privileges`](DiskFiles::drop_privileges), where the kernel does not say whether the caller may
    /// keep them. To find that out takes long; few files have any.
    pub(super) fn drop_privileges_of(&self, inode: u32, caller: Caller) -> Result<()> {
        let any = self.fs.attributes(inode)?.mode & SET_ID != 0;
        self.drop_privileges(inode, (any && !caller.keeps_set_id()).then_some(caller))
    }

    /// Takes capabilities from a file, and with them set-user-id and set-group-id where it was
    /// `caller` who changed it and may not keep them.
    pub(super) fn drop_privileges(&self, inode: u32, caller: Option<Caller>) -> Result<()> {
        // A directory's mean nothing, and stay.
        if self.fs.attribute(inode, CAPABILITY)?.is_some()
            && self.fs.attributes(inode)?.mode & TYPE != DIRECTORY
        {
            self.fs.set_attribute(inode, CAPABILITY, None, Need::Either)?;
        }
        let Some(caller) = caller else { return Ok(()) };
        let known = self.fs.attributes(inode)?;
        if known.mode & SET_ID == 0 {
            return Ok(());
        }
        let mode = without(caller, known.mode, known.gid);
        if mode != known.mode {
            let change = Change { mode: Some(mode), ..Change::default() };
            self.fs.set_attributes(inode, &change)?;
        }
        Ok(())
    }
}
