//! Makes an empty ext4 file system (kernel: Documentation/filesystems/ext4/, the layout of mke2fs with meta_bg).
//!
//! Nothing in it comes from the host: the same options give the same bytes everywhere. Descriptors of block groups stand
//! with their groups (meta_bg), so that a file system grows without moving anything; tables of inodes are not
//! written, since what they stand on reads as zeroes.

pub(super) mod grow;

use std::io::IoSlice;
use std::sync::Arc;

use super::super::bytes::{put, put16, put32};
use super::super::checksum::checksum;
use super::super::superblock::{self, Superblock};
use super::group::bitmap;
use super::group::{BLOCK_UNINIT, INODE_UNINIT, INODE_ZEROED};
use super::inode::{DIRECTORY, FLAG_EXTENTS, Inode, REGULAR};
use super::map::extents;
use super::{Clock, Mounted, New, Options, ROOT, Tx};
use crate::block::BlockDevice;
use crate::error::{Error, Result};

pub(super) const BLOCK: u64 = 4096;
pub(super) const BLOCKS_PER_GROUP: u64 = 8 * BLOCK;
pub(super) const INODE_SIZE: u64 = 256;
pub(super) const DESCRIPTOR: u64 = 64;
/// What is smaller gets no file system.
const LEAST: u64 = 16 << 20;
/// Inodes that are not for files: the first ten.
const RESERVED_INODES: u32 = 10;
const JOURNAL: u32 = 8;
/// has_journal, ext_attr, dir_index.
const COMPAT: u32 = 0x4 | 0x8 | 0x20;
/// filetype, meta_bg, extents, 64bit.
const INCOMPAT: u32 = 0x2 | 0x10 | 0x40 | 0x80;
/// sparse_super, large_file, huge_file, dir_nlink, extra_isize, metadata_csum.
const RO_COMPAT: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x400;

/// How an empty file system is to be.
#[derive(Debug, Clone, Copy)]
pub struct Format {
    /// Its id.
    pub uuid: [u8; 16],
    /// What the hashes of names begin with.
    pub hash_seed: [u8; 16],
    /// When it was made, in seconds since 1970.
    pub seconds: i64,
}

/// How many there are of everything.
pub(super) struct Geometry {
    pub blocks: u64,
    pub groups: u64,
    inodes_per_group: u64,
    journal: u64,
}

impl Geometry {
    /// For a disk of `len` bytes.
    fn of(len: u64) -> Result<Geometry> {
        if len < LEAST {
            let text = format!("a file system takes {} MiB at least", LEAST >> 20);
            return Err(Error::invalid(text));
        }
        let blocks = len / BLOCK;
        let bytes_per_inode = if len < 512 << 20 { 4096 } else { 16384 };
        let groups = blocks.div_ceil(BLOCKS_PER_GROUP);
        let inodes = (blocks * BLOCK / bytes_per_inode).div_ceil(groups);
        // Whole blocks of inodes, and whole bytes of bitmaps.
        let inodes_per_group = inodes.next_multiple_of(BLOCK / INODE_SIZE).min(8 * BLOCK);
        let journal = if len < 512 << 20 { 1024 } else { 4096 };
        Ok(Geometry { journal, ..Geometry::grown(len, inodes_per_group)? })
    }

    /// For a disk of `len` bytes on which a file system with so many inodes in a group grows.
    pub(super) fn grown(len: u64, inodes_per_group: u64) -> Result<Geometry> {
        let mut blocks = len / BLOCK;
        let tail = blocks % BLOCKS_PER_GROUP;
        // A last group that would hold little but its own tables is left out, as mke2fs does.
        let least = inodes_per_group * INODE_SIZE / BLOCK + 54;
        if blocks > BLOCKS_PER_GROUP && tail > 0 && tail < least {
            blocks -= tail;
        }
        let groups = blocks.div_ceil(BLOCKS_PER_GROUP);
        if groups.checked_mul(inodes_per_group).is_none_or(|all| u32::try_from(all).is_err()) {
            return Err(Error::invalid("a file system of more than 64 TiB cannot be made here"));
        }
        Ok(Geometry { blocks, groups, inodes_per_group, journal: 0 })
    }

    fn table(&self) -> u64 {
        self.inodes_per_group * INODE_SIZE / BLOCK
    }

    pub(super) fn blocks_in(&self, group: u64) -> u64 {
        (self.blocks - group * BLOCKS_PER_GROUP).min(BLOCKS_PER_GROUP)
    }
}

/// Makes an empty file system of the first `len` bytes of `device`, which is made to read as zeroes
/// first. It is durable then.
///
/// # Errors
/// [`ErrorKind::Invalid`](crate::error::ErrorKind::Invalid) where `len` is less than 16 MiB or more than 64 TiB.
pub fn format(device: &Arc<dyn BlockDevice>, len: u64, format: &Format) -> Result<()> {
    let geometry = Geometry::of(len)?;
    if len > device.size() {
        return Err(Error::invalid("the disk is smaller than the file system"));
    }
    device.write_zeroes(0, geometry.blocks * BLOCK, true)?;
    let mut raw = superblock(&geometry, format);
    let sb = Superblock::parse(&raw)?;
    write_groups(device.as_ref(), &geometry, &sb)?;
    device.write_at(superblock::AT, &[IoSlice::new(&raw)])?;
    let clock = Clock::Fixed { seconds: format.seconds, generation: 0 };
    let options = Options { unjournaled: true, clock, ..Options::default() };
    let fs = Mounted::open(device.clone(), 0, geometry.blocks * BLOCK, options)?;
    let journal = fs.fill(&geometry)?;
    fs.close()?;
    fs.part.read(0, superblock::AT, &mut raw)?;
    name_journal(&mut raw, &journal);
    write_superblocks(&fs, raw, &geometry)?;
    fs.part.flush()
}

/// The superblock of a file system in which nothing is yet, not even a journal.
fn superblock(geometry: &Geometry, format: &Format) -> Vec<u8> {
    let mut raw = vec![0; superblock::LEN];
    let inodes = geometry.groups * geometry.inodes_per_group;
    let words = [
        (0x0, inodes as u32),
        (0x4, geometry.blocks as u32),
        (0x10, inodes as u32 - RESERVED_INODES),
        (0x18, 2),
        (0x1c, 2),
        (0x20, BLOCKS_PER_GROUP as u32),
        (0x24, BLOCKS_PER_GROUP as u32),
        (0x28, geometry.inodes_per_group as u32),
        (0x30, format.seconds as u32),
        (0x40, format.seconds as u32),
        (0x4c, 1),
        (0x54, RESERVED_INODES + 1),
        (0x5c, COMPAT & !0x4),
        (0x60, INCOMPAT),
        (0x64, RO_COMPAT),
        // User attributes and access lists.
        (0x100, 0xc),
        (0x108, format.seconds as u32),
        (0x150, (geometry.blocks >> 32) as u32),
        // Names are hashed as signed characters, as on x86.
        (0x160, 1),
    ];
    for (at, value) in words {
        put32(&mut raw, at, value);
    }
    let halves = [
        // Checked after no number of mounts; clean; goes on after errors.
        (0x36, 0xffff),
        (0x38, 0xef53),
        (0x3a, 1),
        (0x3c, 1),
        (0x58, INODE_SIZE as u16),
        (0xfe, DESCRIPTOR as u16),
        (0x15c, 32),
        (0x15e, 32),
    ];
    for (at, value) in halves {
        put16(&mut raw, at, value);
    }
    put(&mut raw, 0x68, &format.uuid);
    put(&mut raw, 0xec, &format.hash_seed);
    // Half of MD4; checksums are CRC32C.
    put(&mut raw, 0xfc, &[1]);
    put(&mut raw, 0x175, &[1]);
    let free: u64 = (0..geometry.groups)
        .map(|group| geometry.blocks_in(group) - 2 - geometry.table())
        .sum::<u64>();
    // What copies and descriptors take is counted once the numbers above can be read.
    let base = Superblock::parse(&raw)
        .map_or(0, |sb| (0..geometry.groups).map(|group| sb.base_blocks(group)).sum());
    put32(&mut raw, 0xc, (free - base) as u32);
    put32(&mut raw, 0x158, ((free - base) >> 32) as u32);
    raw
}

/// Writes the descriptors of all groups, and the bitmaps that are not to be made later.
fn write_groups(device: &dyn BlockDevice, geometry: &Geometry, sb: &Superblock) -> Result<()> {
    let per_block = BLOCK / DESCRIPTOR;
    for first in (0..geometry.groups).step_by(per_block as usize) {
        let mut block = vec![0; BLOCK as usize];
        for group in first..(first + per_block).min(geometry.groups) {
            let at = ((group - first) * DESCRIPTOR) as usize;
            let raw = block.get_mut(at..at + DESCRIPTOR as usize).unwrap_or_default();
            write_group(device, geometry, sb, group, raw)?;
        }
        let (place, _) = sb.descriptor(first as u32).unwrap_or_default();
        device.write_at(place * BLOCK, &[IoSlice::new(&block)])?;
    }
    Ok(())
}

pub(super) fn write_group(
    device: &dyn BlockDevice,
    geometry: &Geometry,
    sb: &Superblock,
    group: u64,
    raw: &mut [u8],
) -> Result<()> {
    let (base, count) = (sb.base_blocks(group), geometry.blocks_in(group));
    let first = group * BLOCKS_PER_GROUP;
    let blocks = first + base;
    let used = base + 2 + geometry.table();
    let reserved = if group == 0 { RESERVED_INODES } else { 0 };
    let free_inodes = geometry.inodes_per_group as u32 - reserved;
    for (low, high, place) in
        [(0x0, 0x20, blocks), (0x4, 0x24, blocks + 1), (0x8, 0x28, blocks + 2)]
    {
        put32(raw, low, place as u32);
        put32(raw, high, (place >> 32) as u32);
    }
    put16(raw, 0xc, (count - used) as u16);
    put16(raw, 0xe, free_inodes as u16);
    put16(raw, 0x10, u16::from(group == 0));
    put16(raw, 0x1c, free_inodes as u16);
    // The first is used at once; of the last one, others expect the bitmap.
    let mut flags = INODE_ZEROED;
    if group != 0 && group + 1 != geometry.groups {
        flags |= BLOCK_UNINIT;
    } else {
        let mut bits = vec![0; BLOCK as usize];
        bitmap::set(&mut bits, 0, used);
        bitmap::set(&mut bits, count, BLOCKS_PER_GROUP - count);
        device.write_at(blocks * BLOCK, &[IoSlice::new(&bits)])?;
    }
    if group != 0 {
        flags |= INODE_UNINIT;
    } else {
        let mut bits = vec![0; BLOCK as usize];
        bitmap::set(&mut bits, 0, RESERVED_INODES.into());
        let per = geometry.inodes_per_group;
        bitmap::set(&mut bits, per, 8 * BLOCK - per);
        device.write_at((blocks + 1) * BLOCK, &[IoSlice::new(&bits)])?;
    }
    put16(raw, 0x12, flags);
    Ok(())
}

impl Mounted {
    /// Makes the root, lost+found and the journal; returns the journal's inode.
    fn fill(&self, geometry: &Geometry) -> Result<Inode> {
        let journal = self.change(|tx| {
            for group in 0..geometry.groups as u32 {
                // None of them has its checksums yet.
                tx.st.touched.insert(group);
                tx.st.checked.extend([(group, false), (group, true)]);
            }
            let mut root = tx.new_inode(ROOT, DIRECTORY | 0o755);
            tx.begin_extents(&mut root);
            root.set_links(2);
            tx.fill_first(&mut root, ROOT)?;
            tx.put_inode(&mut root)?;
            tx.make_journal(geometry.journal)
        })?;
        let new = New { mode: DIRECTORY | 0o700, ..New::default() };
        self.create(ROOT, b"lost+found", &new)?;
        Ok(journal)
    }
}

impl Tx<'_> {
    fn begin_extents(&self, inode: &mut Inode) {
        inode.set_flags(FLAG_EXTENTS);
        extents::clear(inode.map_mut());
    }

    fn make_journal(&mut self, blocks: u64) -> Result<Inode> {
        let mut inode = self.new_inode(JOURNAL, REGULAR | 0o600);
        self.begin_extents(&mut inode);
        inode.set_links(1);
        inode.set_size(blocks * BLOCK);
        let (place, len) = self.grow(&mut inode, 0, blocks, true)?;
        if len < blocks {
            return Err(Error::invalid("the file system is too small for its journal"));
        }
        self.put_inode(&mut inode)?;
        // Its superblock (Documentation/filesystems/ext4/journal.rst): nothing is left to do.
        let mut raw = vec![0; BLOCK as usize];
        let words =
            [(0x0, 0xc03b_3998), (0x4, 4), (0xc, BLOCK as u32), (0x10, blocks as u32), (0x14, 1)];
        for (at, value) in words.into_iter().chain([(0x18, 1), (0x40, 1)]) {
            put(&mut raw, at, &u32::to_be_bytes(value));
        }
        put(&mut raw, 0x30, &self.fs.sb.uuid);
        self.fs.part.write(place, 0, &raw)?;
        Ok(inode)
    }
}

/// Says in the superblock where the journal is, and keeps a copy of its map there.
fn name_journal(raw: &mut [u8], journal: &Inode) {
    put32(raw, 0x5c, COMPAT);
    put32(raw, 0xe0, JOURNAL);
    put(raw, 0xfd, &[1]);
    put(raw, 0x10c, journal.map());
    put32(raw, 0x10c + 64, journal.size() as u32);
    put32(raw, 0x10c + 60, (journal.size() >> 32) as u32);
}

/// Writes the superblock, and the copies of it and of the descriptors.
pub(super) fn write_superblocks(fs: &Mounted, mut raw: Vec<u8>, geometry: &Geometry) -> Result<()> {
    let per_block = BLOCK / DESCRIPTOR;
    for group in (0..geometry.groups).rev() {
        let first = group * BLOCKS_PER_GROUP;
        let copy = fs.sb.has_copy(group);
        if copy {
            put16(&mut raw, 0x5a, group as u16);
            put32(&mut raw, 0x3fc, 0);
            let sum = checksum(u32::MAX, raw.get(..0x3fc).unwrap_or_default());
            put32(&mut raw, 0x3fc, sum);
            let skip = if group == 0 { superblock::AT } else { 0 };
            fs.part.write(first, skip, &raw)?;
        }
        if matches!(group % per_block, 1) || group % per_block == per_block - 1 {
            let (place, _) = fs.sb.descriptor(group as u32).unwrap_or_default();
            let mut block = vec![0; BLOCK as usize];
            fs.part.read(place, 0, &mut block)?;
            fs.part.write(first + u64::from(copy), 0, &block)?;
        }
    }
    Ok(())
}
