//! Whether two files hold the same, reading as little as can tell it.

use super::{Ext4, Inode};
use crate::error::Result;

/// Bytes at the begin of a block of extended attributes that say nothing of them.
const ATTRIBUTES_HEADER: usize = 32;

/// Two moments of a file system, and what of the disk was written between them.
pub struct Moments<'a, 'd> {
    /// The earlier one.
    pub before: &'a Ext4<'d>,
    /// The later one.
    pub after: &'a Ext4<'d>,
    /// Whether bytes of the disk, from an offset on, may have been written between the two.
    pub written: &'a dyn Fn(u64, u64) -> bool,
}

impl Moments<'_, '_> {
    /// Whether what the files hold is the same: contents, a link's target, a device's number.
    pub(super) fn same_contents(&self, old: &Inode, new: &Inode) -> Result<bool> {
        if old.size != new.size {
            return Ok(false);
        }
        if old.is_inline() || new.is_inline() {
            return Ok(self.inline(self.before, old)? == self.inline(self.after, new)?);
        }
        if old.is_blockless() || new.is_blockless() {
            return Ok(old.is_blockless() == new.is_blockless() && old.block == new.block);
        }
        let size = self.after.block_size() as u64;
        let blocks = new.size.div_ceil(size);
        let mut at = 0;
        while at < blocks {
            self.after.go_on()?;
            let (one, two) = (old.run(self.before, at)?, new.run(self.after, at)?);
            let len = one.len.min(two.len).min(blocks - at);
            if !self.is_untouched(one.place, two.place, len) {
                for number in 0..len {
                    self.after.go_on()?;
                    let left = (new.size - (at + number) * size).min(size) as usize;
                    let one = block(self.before, one.place.map(|place| place + number), left)?;
                    let two = block(self.after, two.place.map(|place| place + number), left)?;
                    if one != two {
                        return Ok(false);
                    }
                }
            }
            at += len;
        }
        Ok(true)
    }

    /// Whether blocks stand where they stood, and nobody has written there.
    fn is_untouched(&self, old: Option<u64>, new: Option<u64>, len: u64) -> bool {
        match (old, new) {
            (None, None) => true,
            (Some(old), Some(new)) if old == new => {
                let (start, bytes) = self.after.range(new, len);
                let journal = |fs: &Ext4<'_>| (0..len).any(|n| fs.is_in_journal(new + n));
                !(self.written)(start, bytes) && !journal(self.before) && !journal(self.after)
            }
            _ => false,
        }
    }

    fn inline(&self, fs: &Ext4<'_>, inode: &Inode) -> Result<Vec<u8>> {
        if inode.is_inline() {
            let all = inode.block.iter().chain(inode.inline_rest());
            return Ok(all.copied().take(inode.size as usize).collect());
        }
        if inode.is_blockless() {
            return Ok(inode.block.iter().copied().take(inode.size as usize).collect());
        }
        // What has become too long for the inode, or short enough, is one block at most.
        let first = inode.run(fs, 0)?.place;
        block(fs, first, inode.size.min(fs.block_size() as u64) as usize)
    }

    /// Whether the files have the same extended attributes.
    pub(super) fn same_attributes(&self, old: &Inode, new: &Inode) -> Result<bool> {
        // What is inline stands among them, and is compared as contents.
        if !old.is_inline() && !new.is_inline() && old.extra != new.extra {
            return Ok(false);
        }
        let list = |fs: &Ext4<'_>, inode: &Inode| match inode.attributes {
            0 => Ok(Vec::new()),
            place => {
                fs.block(place).map(|b| b.get(ATTRIBUTES_HEADER..).unwrap_or_default().to_vec())
            }
        };
        Ok(list(self.before, old)? == list(self.after, new)?)
    }
}

/// The first `len` bytes of a block, zeroes where it is not stored.
fn block(fs: &Ext4<'_>, place: Option<u64>, len: usize) -> Result<Vec<u8>> {
    match place {
        Some(place) => Ok(fs.block(place)?.get(..len).unwrap_or_default().to_vec()),
        None => Ok(vec![0; len]),
    }
}
