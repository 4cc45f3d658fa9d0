//! What is known of a file besides what it holds, and changes of that.

use super::super::inode::Time;
use super::inode::{BLOCK, CHARACTER, FLAG_APPEND, FLAG_IMMUTABLE, FLAG_NOATIME, Inode, Moment};
use super::{Mounted, Tx, errno};
use crate::error::{Error, Result};

/// What is known of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    /// The number of its inode.
    pub inode: u32,
    /// Type and permissions, as `st_mode`.
    pub mode: u16,
    /// The owner.
    pub uid: u32,
    /// The owning group.
    pub gid: u32,
    /// Length in bytes.
    pub size: u64,
    /// Space that it takes, in units of 512 bytes.
    pub sectors: u64,
    /// Names of it.
    pub links: u32,
    /// Major and minor number, of a device.
    pub device: (u32, u32),
    /// Last reading of the contents.
    pub accessed: Time,
    /// Last change of the contents.
    pub modified: Time,
    /// Last change of contents or inode.
    pub changed: Time,
    /// When it was made; zero where the inode is too small to say.
    pub created: Time,
    /// Another one for each file that has the number.
    pub generation: u32,
    /// What `lsattr` shows.
    pub flags: u32,
}

/// What to change of a file. `None` leaves it as it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Change {
    /// The permissions.
    pub mode: Option<u16>,
    /// The owner.
    pub uid: Option<u32>,
    /// The owning group.
    pub gid: Option<u32>,
    /// The length in bytes.
    pub size: Option<u64>,
    /// Last reading of the contents.
    pub accessed: Option<Time>,
    /// Last change of the contents.
    pub modified: Option<Time>,
    /// Last change of contents or inode; now, where it is not given.
    pub changed: Option<Time>,
}

/// How full a file system is.
#[derive(Debug, Clone, Copy)]
pub struct Statistics {
    /// Bytes of a block.
    pub block_size: u32,
    /// Blocks for files and directories.
    pub blocks: u64,
    /// Those that are free.
    pub free: u64,
    /// Those that are free and not kept for root.
    pub available: u64,
    /// Inodes.
    pub inodes: u32,
    /// Those that are free.
    pub free_inodes: u32,
}

impl Inode {
    /// What is known of it; `block` is the file system's block size.
    pub fn attributes_of(&self, block: usize) -> Attributes {
        let is_device = matches!(self.kind(), BLOCK | CHARACTER);
        Attributes {
            inode: self.number,
            mode: self.mode(),
            uid: self.uid(),
            gid: self.gid(),
            size: self.size(),
            sectors: self.sectors(block),
            links: self.links().into(),
            device: if is_device { self.device() } else { (0, 0) },
            accessed: self.time(Moment::Accessed),
            modified: self.time(Moment::Modified),
            changed: self.time(Moment::Changed),
            created: self.time(Moment::Created),
            generation: self.generation(),
            flags: self.flags(),
        }
    }
}

impl Tx<'_> {
    /// The inode of a file that is there, with a name or held open.
    pub fn file(&mut self, number: u32) -> Result<Inode> {
        let inode = self.inode(number)?;
        if inode.mode() == 0 || !self.has_inode(number)? {
            return Err(Error::corrupt(format!("ext4: inode {number} is no file"))
                .with_os_error(libc::ESTALE));
        }
        Ok(inode)
    }
}

impl Mounted {
    /// What is known of a file.
    pub fn attributes(&self, inode: u32) -> Result<Attributes> {
        self.look(|tx| Ok(tx.file(inode)?.attributes_of(self.sb.block_size)))
    }

    /// Changes what is known of a file; returns how it is then.
    pub fn set_attributes(&self, number: u32, change: &Change) -> Result<Attributes> {
        if let Some(size) = change.size {
            self.truncate(number, size)?;
        }
        self.change(|tx| {
            let mut inode = tx.file(number)?;
            if inode.has(FLAG_IMMUTABLE | FLAG_APPEND) {
                return Err(errno(libc::EPERM, "the file is immutable"));
            }
            if let Some(mode) = change.mode {
                inode.set_mode(inode.kind() | mode & 0o7777);
                tx.chmod_list(&mut inode)?;
            }
            let owner = (change.uid.unwrap_or(inode.uid()), change.gid.unwrap_or(inode.gid()));
            inode.set_owner(owner.0, owner.1);
            for (moment, time) in
                [(Moment::Accessed, change.accessed), (Moment::Modified, change.modified)]
            {
                if let Some(time) = time {
                    inode.set_time(moment, time);
                }
            }
            inode.set_time(Moment::Changed, change.changed.unwrap_or(tx.now));
            tx.put_inode(&mut inode)?;
            Ok(inode.attributes_of(self.sb.block_size))
        })
    }

    /// Notes that a file was read, as seldom as `relatime` has it; returns whether it did.
    pub fn note_access(&self, number: u32) -> Result<bool> {
        const DAY: i64 = 24 * 60 * 60;
        if self.read_only {
            return Ok(false);
        }
        let time = self.clock.now();
        let stale = self.look(|tx| {
            let inode = tx.file(number)?;
            let accessed = inode.time(Moment::Accessed);
            let newer = [Moment::Modified, Moment::Changed].map(|moment| inode.time(moment));
            let stale = newer.iter().any(|newer| accessed <= *newer) || time.0 - accessed.0 >= DAY;
            Ok(stale && !inode.has(FLAG_NOATIME | FLAG_IMMUTABLE))
        })?;
        if stale {
            self.change(|tx| {
                let mut inode = tx.file(number)?;
                inode.set_time(Moment::Accessed, time);
                tx.put_inode(&mut inode)
            })?;
        }
        Ok(stale)
    }

    /// How full it is.
    pub fn statistics(&self) -> Statistics {
        let counts = self.state().counts;
        let sb = &self.sb;
        // What the file system needs for itself is not for files.
        let table = u64::from(sb.inodes_per_group) * sb.inode_size as u64 / sb.block_size as u64;
        let groups = sb.groups();
        let copies: u64 =
            if groups > 1 << 20 { 0 } else { (0..groups).map(|group| sb.base_blocks(group)).sum() };
        let overhead = sb.first_data_block + copies + groups * (2 + table) + self.journal_blocks();
        Statistics {
            block_size: self.block_size(),
            blocks: sb.blocks.saturating_sub(overhead),
            free: counts.free_blocks,
            available: counts.free_blocks.saturating_sub(sb.reserved_blocks),
            inodes: sb.inodes,
            free_inodes: counts.free_inodes,
        }
    }
}
