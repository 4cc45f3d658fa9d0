//! Block groups: which blocks and inodes are taken, and by how many (kernel:
//! Documentation/filesystems/ext4/group_descr.rst, bitmaps.rst).
//!
//! A block that was freed is given to nobody before the commit that freed it is durable: until
//! then a crash brings its old owner back.

pub(super) mod bitmap;

use super::super::bytes::{le16, le32, put16, put32, wide};
use super::super::checksum::{checksum, crc16};
use super::{Tx, no_space};
use crate::error::{Error, Result};
use bitmap::Shadow;

/// No inode of the group was ever used, nor its bitmap written.
pub const INODE_UNINIT: u16 = 1;
/// No block of the group was ever given away, nor its bitmap written.
pub const BLOCK_UNINIT: u16 = 2;
/// What of the table of inodes was never used reads as zeroes.
pub const INODE_ZEROED: u16 = 4;
/// Longer runs than this are not looked for.
const LONGEST: u64 = 32768;
/// How many groups are searched for a run of the wanted length before a shorter one is taken.
const SEARCHED: u64 = 16;

/// What a group's descriptor says.
#[derive(Debug, Clone, Copy)]
pub struct Group {
    pub block_bitmap: u64,
    pub inode_bitmap: u64,
    pub inode_table: u64,
    pub free_blocks: u32,
    pub free_inodes: u32,
    pub directories: u32,
    flags: u16,
    /// Inodes at the table's end that were never used.
    unused: u32,
}

impl Tx<'_> {
    fn descriptor(&self, group: u32) -> Result<(u64, usize)> {
        let place = self.fs.sb.descriptor(group);
        place.ok_or_else(|| Error::corrupt(format!("ext4: there is no block group {group}")))
    }

    /// What the descriptor of a group says.
    pub fn group(&mut self, group: u32) -> Result<Group> {
        let (block, at) = self.descriptor(group)?;
        let bytes = self.read(block)?;
        let raw = bytes.get(at..at + self.fs.sb.descriptor_size).unwrap_or_default();
        let long = raw.len() >= 64;
        let high = |at: usize| if long { le32(raw, at) } else { 0 };
        let half = |low: usize, at: usize| {
            u32::from(le16(raw, low)) | if long { u32::from(le16(raw, at)) << 16 } else { 0 }
        };
        Ok(Group {
            block_bitmap: wide(high(0x20), le32(raw, 0)),
            inode_bitmap: wide(high(0x24), le32(raw, 4)),
            inode_table: wide(high(0x28), le32(raw, 8)),
            free_blocks: half(0xc, 0x2c),
            free_inodes: half(0xe, 0x2e),
            directories: half(0x10, 0x30),
            flags: if self.fs.has_group_checksums() { le16(raw, 0x12) } else { 0 },
            unused: if self.fs.has_group_checksums() { half(0x1c, 0x32) } else { 0 },
        })
    }

    pub(super) fn set_group(&mut self, number: u32, group: &Group) -> Result<()> {
        let (block, at) = self.descriptor(number)?;
        let size = self.fs.sb.descriptor_size;
        let sums = self.fs.has_group_checksums();
        let raw = self.edit(block)?;
        let raw = raw.get_mut(at..at + size).unwrap_or_default();
        let long = raw.len() >= 64;
        let mut halves = |low: usize, high: usize, value: u32| {
            put16(raw, low, value as u16);
            if long {
                put16(raw, high, (value >> 16) as u16);
            }
        };
        halves(0xc, 0x2c, group.free_blocks);
        halves(0xe, 0x2e, group.free_inodes);
        halves(0x10, 0x30, group.directories);
        if sums {
            halves(0x1c, 0x32, group.unused);
            put16(raw, 0x12, group.flags);
        }
        self.st.touched.insert(number);
        Ok(())
    }

    /// The blocks of a group, the last one's fewer.
    fn blocks_in(&self, group: u32) -> u64 {
        let sb = &self.fs.sb;
        let first = sb.first_data_block + u64::from(group) * sb.blocks_per_group;
        sb.blocks.saturating_sub(first).min(sb.blocks_per_group)
    }

    fn first_block(&self, group: u32) -> u64 {
        self.fs.sb.first_data_block + u64::from(group) * self.fs.sb.blocks_per_group
    }

    /// The group that a block is in, and its number there.
    pub fn group_of(&self, block: u64) -> (u32, u64) {
        let at = block.saturating_sub(self.fs.sb.first_data_block);
        let per = self.fs.sb.blocks_per_group;
        (u32::try_from(at / per).unwrap_or(u32::MAX), at % per)
    }

    /// Makes a group's bitmap of blocks true that was never written.
    pub(super) fn ready_blocks(&mut self, number: u32, group: &mut Group) -> Result<()> {
        if group.flags & BLOCK_UNINIT == 0 {
            return self.check_bitmap(number, group.block_bitmap, 0);
        }
        let (sb, first, count) = (&self.fs.sb, self.first_block(number), self.blocks_in(number));
        let base = sb.base_blocks(number.into());
        let table = u64::from(sb.inodes_per_group) * sb.inode_size as u64 / sb.block_size as u64;
        let own = [(group.block_bitmap, 1), (group.inode_bitmap, 1), (group.inode_table, table)];
        let bits = sb.block_size as u64 * 8;
        let bitmap = self.st.blocks.fresh(group.block_bitmap)?;
        bitmap::set(bitmap, 0, base.min(count));
        for (start, len) in own {
            let (from, to) = (start.max(first), start.saturating_add(len).min(first + count));
            if from < to {
                bitmap::set(bitmap, from - first, to - from);
            }
        }
        bitmap::set(bitmap, count, bits.saturating_sub(count));
        group.flags &= !BLOCK_UNINIT;
        self.st.touched.insert(number);
        self.st.checked.insert((number, false));
        Ok(())
    }

    /// Fails where a bitmap, which nobody has looked at yet, does not have its checksum: of blocks,
    /// or of inodes where `which` is 1.
    fn check_bitmap(&mut self, number: u32, place: u64, which: usize) -> Result<()> {
        if !self.fs.has_checksums() || !self.st.checked.insert((number, which == 1)) {
            return Ok(());
        }
        let sb = &self.fs.sb;
        let bits = [sb.blocks_per_group, sb.inodes_per_group.into()][which.min(1)];
        let (block, at) = self.descriptor(number)?;
        let raw = self.read(block)?;
        let raw = raw.get(at..at + sb.descriptor_size).unwrap_or_default();
        let low = le16(raw, 0x18 + 2 * which);
        let high = if raw.len() >= 64 { Some(le16(raw, 0x38 + 2 * which)) } else { None };
        let bitmap = self.read(place)?;
        let sum = checksum(sb.seed, bitmap.get(..bits as usize / 8).unwrap_or(&bitmap));
        match low == sum as u16 && high.is_none_or(|high| high == (sum >> 16) as u16) {
            true => Ok(()),
            false => {
                self.st.checked.remove(&(number, which == 1));
                let text = format!("ext4: a bitmap of group {number} does not have its checksum");
                Err(Error::corrupt(text).with_os_error(libc::EBADMSG))
            }
        }
    }

    /// Takes up to `want` blocks that follow one another, `goal` the first of them if it is free.
    pub fn allocate(&mut self, goal: u64, want: u64) -> Result<(u64, u64)> {
        let want = want.clamp(1, LONGEST);
        let groups = u32::try_from(self.fs.sb.groups()).unwrap_or(u32::MAX);
        let (home, at) = match goal {
            0 => (0, 0),
            goal => self.group_of(goal),
        };
        let home = if home < groups { home } else { 0 };
        let mut best: Option<(u32, u64, u64)> = None;
        for step in 0..groups {
            let number = ((u64::from(home) + u64::from(step)) % u64::from(groups)) as u32;
            let mut group = self.group(number)?;
            if group.free_blocks == 0 {
                continue;
            }
            self.ready_blocks(number, &mut group)?;
            let count = self.blocks_in(number);
            let from = if step == 0 && at < count { at } else { 0 };
            let bitmap = self.read(group.block_bitmap)?;
            let shadow = self.st.shadow(number);
            let taken = bitmap::Taken { bitmap: &bitmap, shadow };
            let found = taken.find(from, count, want, step == 0);
            if let Some((start, len)) = found
                && best.is_none_or(|(.., most)| len > most)
            {
                best = Some((number, start, len));
            }
            let enough = best.is_some_and(|(.., len)| len >= want);
            if enough || best.is_some() && u64::from(step) >= SEARCHED {
                break;
            }
        }
        let Some((number, start, len)) = best else { return Err(no_space()) };
        self.take_blocks(number, start, len)?;
        Ok((self.first_block(number) + start, len))
    }

    fn take_blocks(&mut self, number: u32, start: u64, len: u64) -> Result<()> {
        let mut group = self.group(number)?;
        self.ready_blocks(number, &mut group)?;
        let bitmap = self.edit(group.block_bitmap)?;
        bitmap::set(bitmap, start, len);
        let free = u64::from(group.free_blocks).saturating_sub(len);
        group.free_blocks = free as u32;
        self.set_group(number, &group)?;
        self.st.counts.free_blocks = self.st.counts.free_blocks.saturating_sub(len);
        Ok(())
    }

    /// Gives blocks back, which may span groups.
    pub fn free(&mut self, start: u64, len: u64) -> Result<()> {
        let (mut at, end) = (start, start.saturating_add(len));
        if at < self.fs.sb.first_data_block || end > self.fs.sb.blocks {
            return Err(Error::corrupt("ext4: a file has blocks that are not in the file system"));
        }
        while at < end {
            let (number, bit) = self.group_of(at);
            let run = (end - at).min(self.fs.sb.blocks_per_group - bit);
            let mut group = self.group(number)?;
            self.ready_blocks(number, &mut group)?;
            let bits = self.fs.sb.block_size * 8;
            let bitmap = self.edit(group.block_bitmap)?;
            let was = bitmap::clear(bitmap, bit, run);
            if was != run {
                return Err(Error::corrupt("ext4: a file has blocks that are free"));
            }
            Shadow::note(&mut self.st.freed, number, bits, bit, run);
            group.free_blocks = group.free_blocks.saturating_add(run as u32);
            self.set_group(number, &group)?;
            self.st.counts.free_blocks += run;
            at += run;
        }
        Ok(())
    }

    /// Gives back a block of metadata.
    pub fn free_metadata(&mut self, block: u64) -> Result<()> {
        self.free(block, 1)?;
        self.st.blocks.forget(block);
        Ok(())
    }

    /// Takes an inode, near the one of `parent`; returns its number.
    pub fn allocate_inode(&mut self, parent: u32, directory: bool) -> Result<u32> {
        let sb = &self.fs.sb;
        let groups = u32::try_from(sb.groups()).unwrap_or(u32::MAX);
        let (per, first, bits) = (sb.inodes_per_group, sb.first_inode, sb.block_size as u64 * 8);
        let home = parent.saturating_sub(1) / per;
        for step in 0..groups {
            let number = ((u64::from(home) + u64::from(step)) % u64::from(groups)) as u32;
            let mut group = self.group(number)?;
            if group.free_inodes == 0 {
                continue;
            }
            if group.flags & INODE_UNINIT != 0 {
                let bitmap = self.st.blocks.fresh(group.inode_bitmap)?;
                bitmap::set(bitmap, per.into(), bits.saturating_sub(per.into()));
                group.flags &= !INODE_UNINIT;
                self.st.checked.insert((number, true));
            }
            self.check_bitmap(number, group.inode_bitmap, 1)?;
            let bitmap = self.read(group.inode_bitmap)?;
            let taken = bitmap::Taken { bitmap: &bitmap, shadow: [None, None] };
            let from = if number == 0 { u64::from(first.saturating_sub(1)) } else { 0 };
            let Some((bit, _)) = taken.find(from, per.into(), 1, false) else { continue };
            let bitmap = self.edit(group.inode_bitmap)?;
            bitmap::set(bitmap, bit, 1);
            let used = bit as u32 + 1;
            group.free_inodes -= 1;
            group.directories += u32::from(directory);
            group.unused = group.unused.min(per - used);
            self.set_group(number, &group)?;
            self.st.counts.free_inodes = self.st.counts.free_inodes.saturating_sub(1);
            return Ok(number * per + used);
        }
        Err(no_space())
    }

    /// Gives an inode back.
    pub fn free_inode(&mut self, inode: u32, directory: bool) -> Result<()> {
        let per = self.fs.sb.inodes_per_group;
        let (number, bit) = ((inode - 1) / per, (inode - 1) % per);
        let mut group = self.group(number)?;
        self.check_bitmap(number, group.inode_bitmap, 1)?;
        let bitmap = self.edit(group.inode_bitmap)?;
        if bitmap::clear(bitmap, bit.into(), 1) != 1 {
            return Err(Error::corrupt(format!("ext4: inode {inode} is free already")));
        }
        group.free_inodes += 1;
        group.directories = group.directories.saturating_sub(u32::from(directory));
        self.set_group(number, &group)?;
        self.st.counts.free_inodes += 1;
        Ok(())
    }

    /// Whether an inode is in use.
    pub fn has_inode(&mut self, inode: u32) -> Result<bool> {
        let per = self.fs.sb.inodes_per_group;
        let Some(index) = inode.checked_sub(1).filter(|at| *at < self.fs.sb.inodes) else {
            return Ok(false);
        };
        let group = self.group(index / per)?;
        let bitmap = self.read(group.inode_bitmap)?;
        Ok(group.flags & INODE_UNINIT == 0 && bitmap::is_set(&bitmap, (index % per).into()))
    }

    /// Makes the checksums of groups true that were changed.
    pub fn seal_groups(&mut self) -> Result<()> {
        let sb = &self.fs.sb;
        let size = sb.descriptor_size;
        for number in std::mem::take(&mut self.st.touched) {
            let group = self.group(number)?;
            let (block, at) = self.descriptor(number)?;
            let mut sums = [0; 2];
            if self.fs.has_checksums() {
                let bytes = [sb.blocks_per_group as usize / 8, sb.inodes_per_group as usize / 8];
                let uninit = [BLOCK_UNINIT, INODE_UNINIT];
                for (which, place) in [group.block_bitmap, group.inode_bitmap].iter().enumerate() {
                    if group.flags & uninit[which] == 0 {
                        let bitmap = self.read(*place)?;
                        let covered = bitmap.get(..bytes[which]).unwrap_or(&bitmap);
                        sums[which] = checksum(sb.seed, covered);
                    }
                }
            }
            let fs = self.fs;
            let raw = self.edit(block)?;
            let raw = raw.get_mut(at..at + size).unwrap_or_default();
            if fs.has_checksums() {
                for (low, high, sum) in [(0x18, 0x38, sums[0]), (0x1a, 0x3a, sums[1])] {
                    put16(raw, low, sum as u16);
                    if size >= 64 {
                        put16(raw, high, (sum >> 16) as u16);
                    }
                }
            }
            fs.seal_descriptor(number, raw);
        }
        Ok(())
    }
}

impl super::Mounted {
    /// Puts in the checksum of a group's descriptor.
    pub(super) fn seal_descriptor(&self, number: u32, raw: &mut [u8]) {
        put16(raw, 0x1e, 0);
        if self.has_checksums() {
            let sum = checksum(checksum(self.sb.seed, &number.to_le_bytes()), raw);
            put16(raw, 0x1e, sum as u16);
        } else if self.has_group_checksums() {
            let start = crc16(crc16(u16::MAX, &self.sb.uuid), &number.to_le_bytes());
            let sum = crc16(start, raw.get(..0x1e).unwrap_or_default());
            put16(raw, 0x1e, crc16(sum, raw.get(0x20..).unwrap_or_default()));
        }
    }

    /// Puts in the checksum of the superblock.
    pub(super) fn seal_superblock(&self, raw: &mut [u8]) {
        if self.has_checksums() {
            let sum = checksum(u32::MAX, raw.get(..0x3fc).unwrap_or_default());
            put32(raw, 0x3fc, sum);
        }
    }
}
