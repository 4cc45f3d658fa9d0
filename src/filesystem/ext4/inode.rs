//! Inodes, and where the blocks of a file stand (kernel:
//! Documentation/filesystems/ext4/inodes.rst, ifork.rst).

use super::Ext4;
use super::bytes::{le16, le32, wide};
use crate::error::{Error, Result};

const FLAG_EXTENTS: u32 = 0x8_0000;
const FLAG_INLINE: u32 = 0x1000_0000;
/// The deepest tree of extents that the format allows.
const MAX_DEPTH: u16 = 5;
const EXTENT_MAGIC: u16 = 0xf30a;
/// Longer extents are of blocks that were never written.
const MAX_WRITTEN: u16 = 32768;

/// A moment: seconds since 1970 and nanoseconds.
pub type Time = (i64, u32);

/// What the file system says of a file besides its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    /// Its number.
    pub number: u32,
    /// Type and permissions, as `st_mode`.
    pub mode: u16,
    /// The owner.
    pub uid: u32,
    /// The owning group.
    pub gid: u32,
    /// Length in bytes.
    pub size: u64,
    /// Names of it.
    pub links: u16,
    /// Last change of the contents.
    pub modified: Time,
    /// Last change of contents or of the inode.
    pub changed: Time,
    /// When it was made; zero where the inode is too small to say.
    pub created: Time,
    /// Another one for each file that has the number.
    pub generation: u32,
    /// Where its blocks stand, or what it holds.
    pub(super) block: [u8; 60],
    flags: u32,
    /// The block of its extended attributes, or 0.
    pub(super) attributes: u64,
    /// Extended attributes in the inode itself.
    pub(super) extra: Vec<u8>,
}

/// Blocks of a file that stand one after the other, or are not stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first one's place in the file system; `None` for zeroes.
    pub place: Option<u64>,
    /// How many, never 0.
    pub len: u64,
}

impl Inode {
    pub(super) fn parse(number: u32, raw: &[u8]) -> Inode {
        let extra = if raw.len() > 128 { usize::from(le16(raw, 0x80)) } else { 0 };
        // What lies beyond the part that is in use says nothing.
        let field = |at: usize| if at + 4 <= 128 + extra { le32(raw, at) } else { 0 };
        let time = |at: usize, more: usize| {
            let (low, more) = (le32(raw, at) as i32, field(more));
            (i64::from(low) + (i64::from(more & 3) << 32), more >> 2)
        };
        let mut block = [0; 60];
        if let Some(bytes) = raw.get(0x28..0x64) {
            block.copy_from_slice(bytes);
        }
        let halves =
            |low: usize, high: usize| u32::from(le16(raw, high)) << 16 | u32::from(le16(raw, low));
        Inode {
            number,
            mode: le16(raw, 0),
            uid: halves(0x2, 0x78),
            gid: halves(0x18, 0x7a),
            size: wide(le32(raw, 0x6c), le32(raw, 0x4)),
            links: le16(raw, 0x1a),
            modified: time(0x10, 0x88),
            changed: time(0xc, 0x84),
            created: (
                i64::from(field(0x90) as i32) + (i64::from(field(0x94) & 3) << 32),
                field(0x94) >> 2,
            ),
            generation: le32(raw, 0x64),
            block,
            flags: le32(raw, 0x20),
            attributes: wide(le16(raw, 0x76).into(), le32(raw, 0x68)),
            extra: raw.get(128 + extra..).unwrap_or_default().to_vec(),
        }
    }

    /// The type, as the upper bits of `st_mode`.
    pub fn kind(&self) -> u16 {
        self.mode & 0xf000
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.kind() == 0x4000
    }

    /// Whether it is a regular file.
    pub fn is_regular(&self) -> bool {
        self.kind() == 0x8000
    }

    /// Whether what it holds stands in the inode itself, all or the beginning.
    pub(super) fn is_inline(&self) -> bool {
        self.flags & FLAG_INLINE != 0
    }

    /// Whether it has no blocks: devices, pipes, short links, inline data.
    pub(super) fn is_blockless(&self) -> bool {
        let short_link = self.kind() == 0xa000 && self.size < 60 && self.flags & FLAG_EXTENTS == 0;
        let special = !matches!(self.kind(), 0x4000 | 0x8000 | 0xa000);
        self.is_inline() || short_link || special
    }

    /// The stretch of blocks that begins with block `number` of the file.
    pub fn run(&self, fs: &Ext4<'_>, number: u64) -> Result<Run> {
        if number > u32::MAX.into() {
            return Err(self.corrupt("is longer than a file can be"));
        }
        if self.flags & FLAG_EXTENTS != 0 {
            self.extent(fs, number)
        } else {
            self.indirect(fs, number)
        }
    }

    fn corrupt(&self, what: &str) -> Error {
        Error::corrupt(format!("ext4: inode {}: {what}", self.number))
    }

    fn extent(&self, fs: &Ext4<'_>, number: u64) -> Result<Run> {
        let mut node: Vec<u8> = self.block.to_vec();
        let mut depth = le16(&node, 6).min(MAX_DEPTH + 1);
        // Where what is known to be mapped elsewhere begins.
        let mut limit = u64::from(u32::MAX) + 1;
        loop {
            let entries = self.entries(&node, depth)?;
            let next = entries.iter().position(|entry| u64::from(le32(entry, 0)) > number);
            if let Some(entry) = next.and_then(|at| entries.get(at)) {
                limit = limit.min(le32(entry, 0).into());
            }
            let hole = Run { place: None, len: limit.saturating_sub(number).max(1) };
            let at = next.unwrap_or(entries.len()).checked_sub(1);
            let Some(entry) = at.and_then(|at| entries.get(at)) else { return Ok(hole) };
            if depth > 0 {
                let child = wide(le16(entry, 8).into(), le32(entry, 4));
                node = fs.block(child)?.to_vec();
                depth -= 1;
                continue;
            }
            let (first, long) = (u64::from(le32(entry, 0)), le16(entry, 4));
            let written = long <= MAX_WRITTEN;
            let len = u64::from(if written { long } else { long - MAX_WRITTEN });
            let Some(left) = (first + len).checked_sub(number).filter(|left| *left > 0) else {
                return Ok(hole);
            };
            let place = wide(le16(entry, 6).into(), le32(entry, 8)) + (number - first);
            let len = left.min(hole.len);
            return Ok(Run { place: written.then_some(place), len });
        }
    }

    /// The entries of a node of the tree of extents.
    fn entries<'n>(&self, node: &'n [u8], depth: u16) -> Result<Vec<&'n [u8]>> {
        if le16(node, 0) != EXTENT_MAGIC || le16(node, 6) != depth || depth > MAX_DEPTH {
            return Err(self.corrupt("its tree of extents is damaged"));
        }
        let entries = node.get(12..).unwrap_or_default().chunks_exact(12);
        Ok(entries.take(le16(node, 2).into()).collect())
    }

    fn indirect(&self, fs: &Ext4<'_>, number: u64) -> Result<Run> {
        let per = fs.block_size() as u64 / 4;
        let run = |place: u32, len| Run { place: (place != 0).then_some(place.into()), len };
        if number < 12 {
            return Ok(run(le32(&self.block, number as usize * 4), 1));
        }
        let (mut left, mut span) = (number - 12, 1);
        for level in 0..3 {
            span *= per;
            if left >= span {
                left -= span;
                continue;
            }
            let mut place = le32(&self.block, (12 + level) * 4);
            while span > 1 {
                if place == 0 {
                    return Ok(run(0, span - left % span));
                }
                let node = fs.block(place.into())?;
                span /= per;
                place = le32(&node, (left / span % per) as usize * 4);
            }
            return Ok(run(place, 1));
        }
        Err(self.corrupt("is longer than its blocks can be"))
    }

    /// The value of the attribute that holds what of inline data does not fit into the inode's
    /// blocks.
    pub(super) fn inline_rest(&self) -> &[u8] {
        const MAGIC: u32 = 0xea02_0000;
        const SYSTEM: u8 = 7;
        let extra = &self.extra;
        let Some(entries) = extra.get(4..).filter(|_| le32(extra, 0) == MAGIC) else { return &[] };
        let mut at = 0;
        while let Some(entry) = entries.get(at..).filter(|e| le32(e, 0) != 0) {
            let name_len = usize::from(entry.first().copied().unwrap_or(0));
            let index = entry.get(1).copied();
            if index == Some(SYSTEM) && entry.get(16..16 + name_len) == Some(b"data") {
                let (start, len) = (usize::from(le16(entry, 2)), le32(entry, 8) as usize);
                let end = start.checked_add(len);
                return end.and_then(|end| entries.get(start..end)).unwrap_or_default();
            }
            at += (16 + name_len).next_multiple_of(4);
        }
        &[]
    }
}
