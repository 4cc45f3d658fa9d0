//! Inodes as they stand on the disk, read and changed (kernel:
//! Documentation/filesystems/ext4/inodes.rst).

use super::super::bytes::{le16, le32, put, put16, put32, wide};
use super::super::checksum::checksum;
use super::super::inode::Time;
use super::Tx;
use crate::error::{Error, Result};

pub const FLAG_IMMUTABLE: u32 = 0x10;
pub const FLAG_APPEND: u32 = 0x20;
pub const FLAG_NOATIME: u32 = 0x80;
pub const FLAG_INDEX: u32 = 0x1000;
pub const FLAG_HUGE: u32 = 0x4_0000;
pub const FLAG_EXTENTS: u32 = 0x8_0000;
pub const FLAG_VERITY: u32 = 0x10_0000;
pub const FLAG_EA_INODE: u32 = 0x20_0000;
pub const FLAG_ENCRYPT: u32 = 0x800;
pub const FLAG_CASEFOLD: u32 = 0x4000_0000;
pub const FLAG_INLINE: u32 = 0x1000_0000;
/// What a file has from its directory: secrm, unrm, compr, sync, nodump, noatime, nocompr,
/// journal_data, notail, dirsync, projinherit.
pub const FLAGS_INHERITED: u32 =
    0x1 | 0x2 | 0x4 | 0x8 | 0x40 | 0x80 | 0x400 | 0x4000 | 0x8000 | 0x1_0000 | 0x2000_0000;

pub const TYPE_MASK: u16 = 0xf000;
pub const FIFO: u16 = 0x1000;
pub const CHARACTER: u16 = 0x2000;
pub const DIRECTORY: u16 = 0x4000;
pub const BLOCK: u16 = 0x6000;
pub const REGULAR: u16 = 0x8000;
pub const SYMLINK: u16 = 0xa000;
pub const SOCKET: u16 = 0xc000;

/// Where the blocks of a file stand in its inode.
pub const MAP: std::ops::Range<usize> = 0x28..0x64;
/// The longest target of a link that stands in the inode.
pub const SHORT_LINK: usize = 59;

/// Which of the times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    Accessed,
    Changed,
    Modified,
    Created,
}

/// An inode's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    /// Its number.
    pub number: u32,
    pub raw: Vec<u8>,
}

impl Inode {
    pub fn mode(&self) -> u16 {
        le16(&self.raw, 0)
    }

    pub fn set_mode(&mut self, mode: u16) {
        put16(&mut self.raw, 0, mode);
    }

    pub fn kind(&self) -> u16 {
        self.mode() & TYPE_MASK
    }

    pub fn is_directory(&self) -> bool {
        self.kind() == DIRECTORY
    }

    pub fn is_regular(&self) -> bool {
        self.kind() == REGULAR
    }

    pub fn uid(&self) -> u32 {
        u32::from(le16(&self.raw, 0x78)) << 16 | u32::from(le16(&self.raw, 2))
    }

    pub fn gid(&self) -> u32 {
        u32::from(le16(&self.raw, 0x7a)) << 16 | u32::from(le16(&self.raw, 0x18))
    }

    pub fn set_owner(&mut self, uid: u32, gid: u32) {
        put16(&mut self.raw, 2, uid as u16);
        put16(&mut self.raw, 0x78, (uid >> 16) as u16);
        put16(&mut self.raw, 0x18, gid as u16);
        put16(&mut self.raw, 0x7a, (gid >> 16) as u16);
    }

    /// Length in bytes. Of what is no file and no directory, the upper half says something else.
    pub fn size(&self) -> u64 {
        let high =
            if matches!(self.kind(), REGULAR | DIRECTORY) { le32(&self.raw, 0x6c) } else { 0 };
        // No file is longer, and sums with a length do not overflow.
        wide(high, le32(&self.raw, 4)).min(1 << 62)
    }

    pub fn set_size(&mut self, size: u64) {
        put32(&mut self.raw, 4, size as u32);
        if matches!(self.kind(), REGULAR | DIRECTORY) {
            put32(&mut self.raw, 0x6c, (size >> 32) as u32);
        }
    }

    pub fn links(&self) -> u16 {
        le16(&self.raw, 0x1a)
    }

    pub fn set_links(&mut self, links: u16) {
        put16(&mut self.raw, 0x1a, links);
    }

    pub fn flags(&self) -> u32 {
        le32(&self.raw, 0x20)
    }

    pub fn set_flags(&mut self, flags: u32) {
        put32(&mut self.raw, 0x20, flags);
    }

    pub fn has(&self, flag: u32) -> bool {
        self.flags() & flag != 0
    }

    pub fn generation(&self) -> u32 {
        le32(&self.raw, 0x64)
    }

    /// The block of its extended attributes, or 0.
    pub fn attributes(&self) -> u64 {
        wide(le16(&self.raw, 0x76).into(), le32(&self.raw, 0x68))
    }

    pub fn set_attributes(&mut self, block: u64) {
        put32(&mut self.raw, 0x68, block as u32);
        put16(&mut self.raw, 0x76, (block >> 32) as u16);
    }

    /// When it was deleted, or the next orphan.
    pub fn deleted(&self) -> u32 {
        le32(&self.raw, 0x14)
    }

    pub fn set_deleted(&mut self, value: u32) {
        put32(&mut self.raw, 0x14, value);
    }

    /// The space that it takes, in units of 512 bytes.
    pub fn sectors(&self, block: usize) -> u64 {
        let count = wide(le16(&self.raw, 0x74).into(), le32(&self.raw, 0x1c));
        if self.has(FLAG_HUGE) { count.saturating_mul(block as u64 / 512) } else { count }
    }

    /// Says that it takes `delta` blocks more, or less.
    pub fn add_blocks(&mut self, delta: i64, block: usize) {
        let sectors = delta.saturating_mul(block as i64 / 512);
        let count = self.sectors(block).saturating_add_signed(sectors);
        let huge = count >= 1 << 48;
        let flags = if huge { self.flags() | FLAG_HUGE } else { self.flags() & !FLAG_HUGE };
        self.set_flags(flags);
        let count = if huge { count / (block as u64 / 512) } else { count };
        put32(&mut self.raw, 0x1c, count as u32);
        put16(&mut self.raw, 0x74, (count >> 32) as u16);
    }

    /// Bytes in use beyond the first 128.
    pub fn extra(&self) -> usize {
        if self.raw.len() <= 128 {
            return 0;
        }
        let extra = usize::from(le16(&self.raw, 0x80));
        if extra.is_multiple_of(4) && 128 + extra <= self.raw.len() { extra } else { 0 }
    }

    fn place(moment: Moment) -> (usize, usize) {
        match moment {
            Moment::Accessed => (0x8, 0x8c),
            Moment::Changed => (0xc, 0x84),
            Moment::Modified => (0x10, 0x88),
            Moment::Created => (0x90, 0x94),
        }
    }

    pub fn time(&self, moment: Moment) -> Time {
        let (at, more) = Inode::place(moment);
        let fits = |at: usize| at < 128 || at + 4 <= 128 + self.extra();
        if !fits(at) {
            return (0, 0);
        }
        let more = if fits(more) { le32(&self.raw, more) } else { 0 };
        let low = i64::from(le32(&self.raw, at) as i32);
        (low + (i64::from(more & 3) << 32), (more >> 2).min(999_999_999))
    }

    /// Sets a time, as near as the inode can say it.
    pub fn set_time(&mut self, moment: Moment, (seconds, nanoseconds): Time) {
        let (at, more) = Inode::place(moment);
        let end = 128 + self.extra();
        let fits = |at: usize| at < 128 || at + 4 <= end;
        if !fits(at) {
            return;
        }
        let most = if fits(more) { 0x3_7fff_ffff } else { i64::from(i32::MAX) };
        let clamped = seconds.clamp(i32::MIN.into(), most);
        let nanoseconds = if clamped == seconds { nanoseconds } else { 0 };
        put32(&mut self.raw, at, clamped as u32);
        if fits(more) {
            let epoch = (clamped - i64::from(clamped as i32)) >> 32;
            put32(&mut self.raw, more, nanoseconds << 2 | epoch as u32 & 3);
        }
    }

    /// The major and minor number of a device.
    pub fn device(&self) -> (u32, u32) {
        let (old, new) = (le32(&self.raw, 0x28), le32(&self.raw, 0x2c));
        match old {
            0 => ((new & 0xf_ff00) >> 8, new & 0xff | (new >> 12) & 0xf_ff00),
            old => (old >> 8 & 0xff, old & 0xff),
        }
    }

    pub fn set_device(&mut self, major: u32, minor: u32) {
        if major < 256 && minor < 256 {
            put32(&mut self.raw, 0x28, major << 8 | minor);
            put32(&mut self.raw, 0x2c, 0);
        } else {
            put32(&mut self.raw, 0x28, 0);
            let coded = minor & 0xff | (major & 0xfff) << 8 | (minor & !0xff) << 12;
            put32(&mut self.raw, 0x2c, coded);
        }
    }

    /// Where its blocks stand, or what it holds.
    pub fn map(&self) -> &[u8] {
        self.raw.get(MAP).unwrap_or_default()
    }

    /// The same, to change.
    pub fn map_mut(&mut self) -> &mut [u8] {
        self.raw.get_mut(MAP).unwrap_or_default()
    }

    /// Whether it is a link whose target stands in it.
    pub fn is_short_link(&self) -> bool {
        let block_there = !self.has(FLAG_EXTENTS) && self.size() as usize <= SHORT_LINK;
        self.kind() == SYMLINK && !self.has(FLAG_INLINE) && block_there
    }

    /// Whether it can have blocks.
    pub fn has_map(&self) -> bool {
        matches!(self.kind(), REGULAR | DIRECTORY | SYMLINK)
            && !self.has(FLAG_INLINE)
            && !self.is_short_link()
    }
}

/// Whether two states of an inode differ in nothing but when it was read and changed, and in the checksum.
fn differ_in_times(old: &[u8], new: &[u8]) -> bool {
    // What is not in use of the second half holds attributes.
    let further = new.len() > 128 && le16(new, 0x80) >= 16;
    let skipped = |at: usize| match at {
        0x8..0x14 | 0x7c..0x7e => true,
        0x82..0x90 => further,
        _ => false,
    };
    old.len() == new.len()
        && old.iter().zip(new).enumerate().all(|(at, (old, new))| old == new || skipped(at))
}

impl Tx<'_> {
    /// The inode of that number, whatever it is.
    pub fn inode(&mut self, number: u32) -> Result<Inode> {
        let (block, at) = self.inode_place(number)?;
        let bytes = self.read(block)?;
        let size = self.fs.sb.inode_size;
        let raw = bytes.get(at..at + size).unwrap_or_default().to_vec();
        let inode = Inode { number, raw };
        if self.fs.has_checksums() && !self.has_right_sum(&inode) {
            let text = format!("ext4: inode {number} does not have its checksum");
            return Err(Error::corrupt(text).with_os_error(libc::EBADMSG));
        }
        Ok(inode)
    }

    fn has_right_sum(&self, inode: &Inode) -> bool {
        let mut copy = inode.clone();
        self.seal_inode(&mut copy);
        // Of what was never an inode there is no checksum.
        copy.raw == inode.raw || inode.raw.iter().all(|byte| *byte == 0)
    }

    fn seal_inode(&self, inode: &mut Inode) {
        let high = inode.extra() >= 4;
        put16(&mut inode.raw, 0x7c, 0);
        if high {
            put16(&mut inode.raw, 0x82, 0);
        }
        let sum = checksum(self.inode_seed(inode), &inode.raw);
        put16(&mut inode.raw, 0x7c, sum as u16);
        if high {
            put16(&mut inode.raw, 0x82, (sum >> 16) as u16);
        }
    }

    fn inode_place(&mut self, number: u32) -> Result<(u64, usize)> {
        let sb = &self.fs.sb;
        let (per, size, block) = (sb.inodes_per_group, sb.inode_size as u64, sb.block_size as u64);
        let none = || Error::corrupt(format!("ext4: there is no inode {number}"));
        let index = number.checked_sub(1).filter(|at| *at < sb.inodes).ok_or_else(none)?;
        let group = self.group(index / per)?;
        let byte = u64::from(index % per) * size;
        let place = group.inode_table.checked_add(byte / block).ok_or_else(none)?;
        Ok((place, (byte % block) as usize))
    }

    /// What the checksums of an inode's metadata begin with.
    pub fn inode_seed(&self, inode: &Inode) -> u32 {
        let seed = checksum(self.fs.sb.seed, &inode.number.to_le_bytes());
        checksum(seed, &inode.generation().to_le_bytes())
    }

    /// Stores an inode.
    pub fn put_inode(&mut self, inode: &mut Inode) -> Result<()> {
        if self.fs.has_checksums() {
            self.seal_inode(inode);
        }
        let (block, at) = self.inode_place(inode.number)?;
        let bytes = self.read(block)?;
        let old = bytes.get(at..at + inode.raw.len()).unwrap_or_default();
        let only_times = differ_in_times(old, &inode.raw);
        // Not to be copied.
        drop(bytes);
        let bytes = match only_times {
            true => self.st.blocks.edit_times(&self.fs.part, block)?,
            false => self.edit(block)?,
        };
        put(bytes, at, &inode.raw);
        Ok(())
    }

    /// A new inode of that number, which is zeroes but for its times, generation and mode.
    pub fn new_inode(&mut self, number: u32, mode: u16) -> Inode {
        let mut inode = Inode { number, raw: vec![0; self.fs.sb.inode_size] };
        if inode.raw.len() > 128 {
            let room = inode.raw.len() - 128;
            let extra = usize::from(self.fs.sb.extra_size).clamp(28, 32).min(room) & !3;
            put16(&mut inode.raw, 0x80, extra as u16);
        }
        inode.set_mode(mode);
        put32(&mut inode.raw, 0x64, self.fs.next_generation());
        for moment in [Moment::Accessed, Moment::Changed, Moment::Modified, Moment::Created] {
            inode.set_time(moment, self.now);
        }
        inode
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_devices_come_back_as_they_were_set() {
        let mut inode = Inode { number: 12, raw: vec![0; 256] };
        put16(&mut inode.raw, 0x80, 32);
        for time in [(0, 0), (-1, 999_999_999), (-2_147_483_648, 1), (2_147_483_648, 5)] {
            inode.set_time(Moment::Modified, time);
            assert_eq!(inode.time(Moment::Modified), time);
        }
        inode.set_time(Moment::Modified, (1 << 40, 3));
        assert_eq!(inode.time(Moment::Modified), (0x3_7fff_ffff, 0));
        for device in [(8, 1), (259, 70000), (0, 0), (4095, 0xf_ffff), (1, 256)] {
            inode.set_device(device.0, device.1);
            assert_eq!(inode.device(), device);
        }
        inode.add_blocks(3, 4096);
        assert_eq!(inode.sectors(4096), 24);
        inode.add_blocks(-1, 4096);
        assert_eq!(inode.sectors(4096), 16);
    }
}
