//! The older map of a file: numbers of blocks, and blocks of numbers (kernel:
//! Documentation/filesystems/ext4/ifork.rst). ext2 and ext3 have no other.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::filesystem::ext4::bytes::{le32, put32};
use crate::filesystem::ext4::mounted::Tx;
use crate::filesystem::ext4::mounted::inode::Inode;

/// Numbers that stand in the inode itself.
const DIRECT: u64 = 12;

impl Tx<'_> {
    fn per_block(&self) -> u64 {
        self.fs.sb.block_size as u64 / 4
    }

    /// How many blocks a file can have here.
    pub fn most_indirect(&self) -> u64 {
        let per = self.per_block();
        DIRECT + per + per * per + per * per * per
    }

    /// Which entry of the inode leads to block `at`, how many blocks are below it, and which of
    /// them it is.
    fn branch(&self, at: u64) -> Result<(usize, u64, u64)> {
        if at < DIRECT {
            return Ok((at as usize, 1, 0));
        }
        let (mut left, mut span) = (at - DIRECT, 1);
        for level in 0..3 {
            span *= self.per_block();
            if left < span {
                return Ok((DIRECT as usize + level, span, left));
            }
            left -= span;
        }
        Err(Error::corrupt("ext4: a file is longer than its blocks can be")
            .with_os_error(libc::EFBIG))
    }

    /// Where block `at` of a file stands, and how many blocks from there on are alike.
    pub fn indirect_at(&mut self, inode: &Inode, at: u64) -> Result<(Option<u64>, u64)> {
        let (index, mut span, mut left) = self.branch(at)?;
        let per = self.per_block();
        let mut place = le32(inode.map(), index * 4);
        if span == 1 {
            let wanted = |step: u64| u64::from(place) + if place == 0 { 0 } else { step };
            let same = |step: &u64| {
                u64::from(le32(inode.map(), (at + step) as usize * 4)) == wanted(*step)
            };
            let run = (1..DIRECT - at).take_while(same).count() as u64 + 1;
            return Ok(((place != 0).then_some(place.into()), run));
        }
        while span > 1 {
            if place == 0 {
                return Ok((None, span - left));
            }
            let node = self.read(place.into())?;
            span /= per;
            let slot = left / span;
            left %= span;
            place = le32(&node, slot as usize * 4);
            if span == 1 {
                let wanted = |step: u64| u64::from(place) + if place == 0 { 0 } else { step };
                let same = |step: &u64| {
                    u64::from(le32(&node, (slot + step) as usize * 4)) == wanted(*step)
                };
                let run = (1..per - slot).take_while(same).count() as u64 + 1;
                return Ok(((place != 0).then_some(place.into()), run));
            }
        }
        Err(Error::corrupt("ext4: a map of blocks is damaged"))
    }

    /// Puts block `at` of a file at `place`, where nothing stood. The inode is not stored.
    pub fn set_indirect(&mut self, inode: &mut Inode, at: u64, place: u64) -> Result<()> {
        let (index, mut span, mut left) = self.branch(at)?;
        let (per, size) = (self.per_block(), self.fs.sb.block_size);
        let small = |block: u64| {
            u32::try_from(block).map_err(|_| Error::corrupt("ext4: a block has too high a number"))
        };
        let value = small(place)?;
        if span == 1 {
            put32(inode.map_mut(), index * 4, value);
            return Ok(());
        }
        let mut node = u64::from(le32(inode.map(), index * 4));
        if node == 0 {
            node = self.new_node(place)?;
            inode.add_blocks(1, size);
            put32(inode.map_mut(), index * 4, small(node)?);
        }
        loop {
            span /= per;
            let slot = (left / span) as usize * 4;
            left %= span;
            if span == 1 {
                put32(self.edit(node)?, slot, value);
                return Ok(());
            }
            let mut below = u64::from(le32(&self.read(node)?, slot));
            if below == 0 {
                below = self.new_node(place)?;
                inode.add_blocks(1, size);
                let below = small(below)?;
                put32(self.edit(node)?, slot, below);
            }
            node = below;
        }
    }

    fn new_node(&mut self, goal: u64) -> Result<u64> {
        let (block, _) = self.allocate(goal, 1)?;
        self.st.blocks.fresh(block)?;
        Ok(block)
    }

    /// Makes `from..to` of a file holes; returns which blocks stood there. The inode is not stored.
    pub fn clear_indirect(&mut self, inode: &mut Inode, from: u64, to: u64) -> Result<Vec<u64>> {
        let mut gone = Vec::new();
        let to = to.min(self.most_indirect());
        for at in from..to.min(DIRECT).max(from) {
            let place = le32(inode.map(), at as usize * 4);
            if place != 0 {
                gone.push(place.into());
                put32(inode.map_mut(), at as usize * 4, 0);
            }
        }
        let (mut start, mut span) = (DIRECT, 1);
        for level in 0..3 {
            span *= self.per_block();
            let (low, high) = (from.max(start), to.min(start + span));
            let slot = (DIRECT as usize + level) * 4;
            let node = u64::from(le32(inode.map(), slot));
            if low < high && node != 0 {
                let range = low - start..high - start;
                if self.clear_node(inode, node, span, range, &mut gone)? {
                    put32(inode.map_mut(), slot, 0);
                }
            }
            start += span;
        }
        Ok(gone)
    }

    /// Clears a stretch below a node of `span` blocks; returns whether the node went too.
    fn clear_node(
        &mut self,
        inode: &mut Inode,
        node: u64,
        span: u64,
        range: Range<u64>,
        gone: &mut Vec<u64>,
    ) -> Result<bool> {
        let Range { start: from, end: to } = range;
        let per = self.per_block();
        let below = span / per;
        let bytes = self.read(node)?;
        let mut left: Vec<u32> = (0..per as usize).map(|slot| le32(&bytes, slot * 4)).collect();
        for slot in from / below..to.div_ceil(below).min(per) {
            let place = left.get(slot as usize).copied().unwrap_or(0);
            if place == 0 {
                continue;
            }
            let start = slot * below;
            let emptied = match below {
                1 => {
                    gone.push(place.into());
                    true
                }
                _ => {
                    let range = from.max(start) - start..to.min(start + below) - start;
                    self.clear_node(inode, place.into(), below, range, gone)?
                }
            };
            if emptied && let Some(entry) = left.get_mut(slot as usize) {
                *entry = 0;
            }
        }
        if left.iter().all(|place| *place == 0) {
            self.free_metadata(node)?;
            let size = self.fs.sb.block_size;
            inode.add_blocks(-1, size);
            return Ok(true);
        }
        let raw = self.edit(node)?;
        left.iter().enumerate().for_each(|(slot, place)| put32(raw, slot * 4, *place));
        Ok(false)
    }
}
