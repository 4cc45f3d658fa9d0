//! The files in an ext2, ext3 or ext4 file system, read from a flat disk without mounting it.
//!
//! Knows a [`BlockDevice`], no layer and no image format, and writes nothing. The disk comes from
//! a guest, and often from one that was running: every number is checked, what is kept in memory is
//! bounded, and what stands only in the journal is read from there. The crates there are for this
//! read no journal, or one that has never wrapped around, and tell no inode numbers and change
//! times, without which a renamed file is two files; so the reading is done here.

mod bytes;
mod checksum;
pub mod compare;
mod contents;
mod directory;
#[cfg(test)]
mod hostile;
mod inode;
mod journal;
pub mod mounted;
mod superblock;

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::IoSliceMut;
use std::rc::Rc;

use crate::block::BlockDevice;
use crate::error::{Error, ErrorKind, Result};

pub use contents::Moments;
pub use directory::Entry;
pub use inode::{Inode, Run, Time};
use journal::Journal;
use superblock::Superblock;

/// Bytes of blocks that are kept in memory.
const CACHE: usize = 8 << 20;
/// The root directory's inode.
pub const ROOT: u32 = 2;

/// A file system on a part of a disk.
pub struct Ext4<'d> {
    device: &'d dyn BlockDevice,
    offset: u64,
    len: u64,
    superblock: Superblock,
    journal: Journal,
    cache: RefCell<HashMap<u64, Rc<[u8]>>>,
    stop: &'d dyn Fn() -> bool,
}

impl<'d> Ext4<'d> {
    /// Opens the file system in the `len` bytes of `device` from `offset` on. Whatever takes long
    /// ends early where `stop` says so.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for what is no file system; [`ErrorKind::Unsupported`] names what it
    /// has that cannot be read.
    pub fn open(
        device: &'d dyn BlockDevice,
        offset: u64,
        len: u64,
        stop: &'d dyn Fn() -> bool,
    ) -> Result<Ext4<'d>> {
        let mut raw = [0; superblock::LEN];
        let there = device.size().saturating_sub(offset).min(len);
        if there < superblock::AT + superblock::LEN as u64 {
            return Err(Error::corrupt("ext4: there is no superblock"));
        }
        device.read_at(offset + superblock::AT, &mut [IoSliceMut::new(&mut raw)])?;
        let mut fs = Ext4 {
            device,
            offset,
            len: there,
            superblock: Superblock::parse(&raw)?,
            journal: Journal::default(),
            cache: RefCell::default(),
            stop,
        };
        if let Some(journal) = fs.superblock.journal {
            fs.journal = Journal::read(&fs, &fs.inode(journal)?)?;
            fs.cache.borrow_mut().clear();
            // It may have grown.
            let (block, at) = (superblock::AT as usize / fs.block_size(), superblock::AT as usize);
            let newer = fs.block(block as u64)?;
            let at = at % fs.block_size();
            let newer = newer.get(at..at + superblock::LEN).unwrap_or(&raw);
            fs.superblock = Superblock::parse(newer)?;
        }
        Ok(fs)
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> usize {
        self.superblock.block_size
    }

    /// Blocks of the file system.
    pub fn blocks(&self) -> u64 {
        self.superblock.blocks
    }

    /// Whether the last seconds before may be missing: it was in use, and makes commits that are
    /// not read.
    pub fn may_be_behind(&self) -> bool {
        self.journal.fast_commits
    }

    /// A block as it is once the journal is replayed.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where there is none of that number.
    pub fn block(&self, number: u64) -> Result<Rc<[u8]>> {
        if let Some(block) = self.cache.borrow().get(&number) {
            return Ok(block.clone());
        }
        let copy = self.journal.copy(number);
        let place = copy.map_or(number, |copy| copy.place);
        let size = self.block_size();
        let end = place.checked_add(1).and_then(|end| end.checked_mul(size as u64));
        if end.is_none_or(|end| end > self.len) || place >= self.superblock.blocks {
            return Err(Error::corrupt(format!("ext4: block {number} is not in the file system")));
        }
        let mut block = vec![0; size];
        let at = self.offset + place * size as u64;
        self.device.read_at(at, &mut [IoSliceMut::new(&mut block)])?;
        if copy.is_some_and(|copy| copy.escaped) {
            block[..4].copy_from_slice(&journal::ESCAPED);
        }
        let block: Rc<[u8]> = block.into();
        let mut cache = self.cache.borrow_mut();
        if cache.len() * size >= CACHE {
            cache.clear();
        }
        cache.insert(number, block.clone());
        Ok(block)
    }

    /// Whether a block is read from the journal.
    pub fn is_in_journal(&self, number: u64) -> bool {
        self.journal.copy(number).is_some()
    }

    /// Where on the disk blocks stand, in bytes.
    pub fn range(&self, place: u64, blocks: u64) -> (u64, u64) {
        let size = self.block_size() as u64;
        (self.offset.saturating_add(place.saturating_mul(size)), blocks.saturating_mul(size))
    }

    /// What is in the journal, for who reads the file system without this.
    pub(self) fn into_journal(self) -> Journal {
        self.journal
    }

    /// The inode with that number.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where there is none.
    pub fn inode(&self, number: u32) -> Result<Inode> {
        let none = || Error::corrupt(format!("ext4: there is no inode {number}"));
        let index = number.checked_sub(1).filter(|index| *index < self.superblock.inodes);
        let index = index.ok_or_else(none)?;
        let (group, index) =
            (index / self.superblock.inodes_per_group, index % self.superblock.inodes_per_group);
        let (block, at) = self.superblock.descriptor(group).ok_or_else(none)?;
        let table = self.superblock.inode_table(self.block(block)?.get(at..).ok_or_else(none)?);
        let size = self.superblock.inode_size as u64;
        let byte = u64::from(index) * size;
        let block = table.checked_add(byte / self.block_size() as u64).ok_or_else(none)?;
        let at = (byte % self.block_size() as u64) as usize;
        let block = self.block(block)?;
        let raw = block.get(at..at + size as usize).ok_or_else(none)?;
        Ok(Inode::parse(number, raw))
    }

    /// Fails where the user has asked to stop.
    pub(self) fn go_on(&self) -> Result<()> {
        match (self.stop)() {
            true => Err(Error::new(ErrorKind::Interrupted, "interrupted")),
            false => Ok(()),
        }
    }
}
