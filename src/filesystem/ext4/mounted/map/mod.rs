//! Where a file's blocks stand, whichever way its inode says it.

pub(super) mod extents;
pub(super) mod indirect;

use super::Tx;
use super::inode::{FLAG_EXTENTS, Inode};
use crate::error::{Error, Result};
use extents::{Extent, LONGEST, MAX_BLOCKS};

/// Blocks of a file that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// The first one's place; `None` in a hole.
    pub place: Option<u64>,
    /// How many, never 0.
    pub len: u64,
    /// Whether they hold anything; else they read as zeroes.
    pub written: bool,
}

impl Tx<'_> {
    /// What block `at` of a file is, and how many from there on are alike.
    pub fn stretch(&mut self, inode: &Inode, at: u64) -> Result<Stretch> {
        if !inode.has_map() {
            return Ok(Stretch { place: None, len: u64::MAX - at, written: false });
        }
        // Sizes may be damaged: what lies past all blocks that a file can have is one hole.
        if at >= self.most_blocks(inode) {
            return Ok(Stretch { place: None, len: u64::MAX - at, written: false });
        }
        if inode.has(FLAG_EXTENTS) {
            let (extent, len) = self.extent_at(inode, at)?;
            let place = extent.map(|extent| extent.place + (at - u64::from(extent.at)));
            let sb = &self.fs.sb;
            if place.is_some_and(|place| {
                place < sb.first_data_block || place.saturating_add(len) > sb.blocks
            }) {
                let text = "ext4: a file has blocks that are not in the file system";
                return Err(Error::corrupt(text));
            }
            return Ok(Stretch {
                place,
                len,
                written: extent.is_some_and(|extent| extent.written),
            });
        }
        let (place, len) = self.indirect_at(inode, at)?;
        Ok(Stretch { place, len, written: place.is_some() })
    }

    /// The place of block `at` of a file that has to be there.
    pub fn block_of(&mut self, inode: &Inode, at: u64) -> Result<u64> {
        let place = self.stretch(inode, at)?.place;
        let number = inode.number;
        place.ok_or_else(|| Error::corrupt(format!("ext4: inode {number} lacks its block {at}")))
    }

    /// Blocks of a file at most.
    pub fn most_blocks(&self, inode: &Inode) -> u64 {
        if inode.has(FLAG_EXTENTS) { MAX_BLOCKS } else { self.most_indirect() }
    }

    /// Gives up to `want` blocks to a file from block `at` on, which is a hole of at least that;
    /// returns the place and how many. The inode is not stored.
    pub fn grow(
        &mut self,
        inode: &mut Inode,
        at: u64,
        want: u64,
        written: bool,
    ) -> Result<(u64, u64)> {
        let most = if written { LONGEST } else { LONGEST - 1 };
        let goal = self.goal(inode, at)?;
        let (place, len) = self.allocate(goal, want.min(most.into()))?;
        let size = self.fs.sb.block_size;
        if inode.has(FLAG_EXTENTS) {
            let extent = Extent { at: at as u32, len: len as u32, place, written };
            self.map_extents(inode, at..at + len, &[extent])?;
        } else {
            for step in 0..len {
                self.set_indirect(inode, at + step, place + step)?;
            }
        }
        inode.add_blocks(len as i64, size);
        Ok((place, len))
    }

    /// Where the next block of a file had best stand: after the one before it.
    fn goal(&mut self, inode: &Inode, at: u64) -> Result<u64> {
        if at > 0
            && let Some(place) = self.stretch(inode, at - 1)?.place
        {
            return Ok(place + 1);
        }
        Ok(self.fs.goal_of(inode.number))
    }

    /// Says that blocks of a file, which were given to it as unwritten, hold something now.
    pub fn mark_written(&mut self, inode: &mut Inode, at: u64, place: u64, len: u64) -> Result<()> {
        let mut left = Vec::new();
        let mut step = 0;
        while step < len {
            let run = (len - step).min(LONGEST.into());
            let at = (at + step) as u32;
            left.push(Extent { at, len: run as u32, place: place + step, written: true });
            step += run;
        }
        self.map_extents(inode, at..at + len, &left).map(drop)
    }

    /// Makes blocks `from..to` of a file a hole and gives back what stood there. The inode is not
    /// stored.
    pub fn unmap(&mut self, inode: &mut Inode, from: u64, to: u64) -> Result<()> {
        if from >= to || !inode.has_map() {
            return Ok(());
        }
        // Names and targets of links go through the journal, contents do not.
        let metadata = !inode.is_regular();
        let (mut count, size) = (0, self.fs.sb.block_size);
        if inode.has(FLAG_EXTENTS) {
            for old in self.map_extents(inode, from..to.min(MAX_BLOCKS + 1), &[])? {
                self.free(old.place, old.len.into())?;
                if metadata {
                    (0..old.len.into()).for_each(|n| self.st.blocks.forget(old.place + n));
                }
                count += i64::from(old.len);
            }
        } else {
            for place in self.clear_indirect(inode, from, to)? {
                self.free(place, 1)?;
                if metadata {
                    self.st.blocks.forget(place);
                }
                count += 1;
            }
        }
        inode.add_blocks(-count, size);
        Ok(())
    }
}
