//! Files that are to be deleted, or cut, once nobody uses them: a list through their inodes, which
//! a crash leaves to the next who opens the file system.

use std::collections::{HashMap, VecDeque};
use std::sync::PoisonError;

use super::inode::{FLAG_EA_INODE, Inode};
use super::{Clock, Mounted, Tx};
use crate::error::{Error, Result};

/// Blocks of a file that are given back in one operation: a commit has to have room for it.
const STEP: u64 = 1 << 18;
/// Files that may be on the list.
const LONGEST: u32 = 1 << 20;

/// Files that are in use, by inode.
#[derive(Default)]
pub(super) struct Held {
    /// How often each is.
    counts: HashMap<u32, u64>,
    /// Those and others that were, about in the order in which their use began.
    order: VecDeque<u32>,
}

impl Held {
    fn add(&mut self, inode: u32, times: u64) {
        let fresh = !self.counts.contains_key(&inode);
        let count = self.counts.entry(inode).or_insert(0);
        *count = count.saturating_add(times);
        if fresh {
            self.order.push_back(inode);
            if self.order.len() > 2 * self.counts.len() + 4096 {
                self.order = self.counts.keys().copied().collect();
            }
        }
    }

    fn oldest(&mut self, most: usize) -> Vec<u32> {
        let mut oldest = Vec::with_capacity(most);
        for _ in 0..self.order.len() {
            let Some(inode) = self.order.pop_front() else { break };
            if self.counts.contains_key(&inode) {
                self.order.push_back(inode);
                oldest.push(inode);
            }
            if oldest.len() == most {
                break;
            }
        }
        oldest
    }
}

impl Tx<'_> {
    /// Puts an inode in front of the list. It is not stored.
    pub fn add_orphan(&mut self, inode: &mut Inode) {
        inode.set_deleted(self.st.counts.orphan);
        self.st.counts.orphan = inode.number;
    }

    /// Takes an inode out of the list. It is not stored.
    pub fn remove_orphan(&mut self, inode: &mut Inode) -> Result<()> {
        let next = inode.deleted();
        inode.set_deleted(0);
        if self.st.counts.orphan == inode.number {
            self.st.counts.orphan = next;
            return Ok(());
        }
        let mut at = self.st.counts.orphan;
        for _ in 0..self.fs.sb.inodes.min(LONGEST) {
            let mut other = match at {
                0 => break,
                at => self.inode(at)?,
            };
            at = other.deleted();
            if at == inode.number {
                other.set_deleted(next);
                return self.put_inode(&mut other);
            }
        }
        Err(Error::corrupt("ext4: the list of deleted files is damaged"))
    }

    /// Deletes a file that nobody uses and that is on no list, all that is left of it.
    fn delete(&mut self, inode: &mut Inode) -> Result<()> {
        self.unmap(inode, 0, u64::MAX)?;
        self.drop_attributes(inode)?;
        let directory = inode.is_directory();
        inode.set_links(0);
        inode.set_size(0);
        // Numbers of inodes would be taken for links of the list, also when the file system has grown.
        let least = match self.fs.clock {
            Clock::Host => self.fs.sb.inodes.saturating_add(1),
            Clock::Fixed { .. } => self.fs.sb.inodes.saturating_add(1).max(i32::MAX as u32),
        };
        inode.set_deleted((self.now.0 as u32).max(least));
        self.put_inode(inode)?;
        self.free_inode(inode.number, directory)
    }

    /// What to do with an inode that has lost a name: deleted when that was the last one and
    /// nobody holds it.
    pub fn unlinked(&mut self, mut inode: Inode, held: bool) -> Result<bool> {
        if inode.links() > 0 {
            self.put_inode(&mut inode)?;
            return Ok(false);
        }
        let size = self.fs.sb.block_size;
        if !held && inode.sectors(size) <= 2 * STEP {
            self.delete(&mut inode)?;
            return Ok(false);
        }
        self.add_orphan(&mut inode);
        self.put_inode(&mut inode)?;
        Ok(!held)
    }
}

impl Mounted {
    /// Says that a file is used `times` times more: opened, or known by its number.
    pub fn hold(&self, inode: u32, times: u64) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).add(inode, times);
    }

    /// Where more than `many` files are in use: up to `most` of those that have been the longest, for
    /// whoever can let go of some. The next call names others.
    pub fn longest_held(&self, many: usize, most: usize) -> Vec<u32> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.counts.len() > many { held.oldest(most) } else { Vec::new() }
    }

    /// Takes back [`hold`](Mounted::hold); what has no name and no user any more is deleted.
    pub fn release(&self, inode: u32, times: u64) -> Result<()> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(count) = held.counts.get_mut(&inode) else { return Ok(()) };
        *count = count.saturating_sub(times);
        if *count > 0 {
            return Ok(());
        }
        held.counts.remove(&inode);
        drop(held);
        if self.read_only {
            return Ok(());
        }
        let gone = self.look(|tx| {
            let inode = tx.inode(inode)?;
            Ok(inode.links() == 0 && inode.mode() != 0 && tx.has_inode(inode.number)?)
        })?;
        if gone { self.reap(inode) } else { Ok(()) }
    }

    /// Whether anybody uses a file.
    pub(super) fn is_held(&self, inode: u32) -> bool {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).counts.contains_key(&inode)
    }

    /// Deletes a file of the list, in as many steps as it takes.
    pub(super) fn reap(&self, number: u32) -> Result<()> {
        self.cut(number, 0)?;
        self.change(|tx| {
            let mut inode = tx.inode(number)?;
            if inode.links() > 0 || !tx.has_inode(number)? {
                return Ok(());
            }
            tx.remove_orphan(&mut inode)?;
            tx.delete(&mut inode)
        })
    }

    /// Gives back the blocks of a file from block `from` on, the last ones first, step by step.
    pub(super) fn cut(&self, number: u32, from: u64) -> Result<()> {
        let size = self.sb.block_size as u64;
        let blocks = self.look(|tx| {
            let inode = tx.inode(number)?;
            let most = tx.most_blocks(&inode);
            // More may stand past its end.
            let end = inode
                .size()
                .div_ceil(size)
                .saturating_add(inode.sectors(size as usize) * 512 / size);
            Ok(if inode.has_map() { end.min(most) } else { 0 })
        })?;
        let mut end = blocks;
        while end > from.saturating_add(STEP) {
            end = (end - 1) / STEP * STEP;
            let start = end.max(from);
            self.change(|tx| {
                let mut inode = tx.inode(number)?;
                tx.unmap(&mut inode, start, u64::MAX)?;
                tx.put_inode(&mut inode)
            })?;
        }
        Ok(())
    }

    /// Does what a crash left undone: deletes files without a name, and cuts others.
    pub(super) fn settle_orphans(&self) -> Result<()> {
        let size = self.sb.block_size as u64;
        for _ in 0..self.sb.inodes {
            let first = self.state().counts.orphan;
            if first == 0 {
                return Ok(());
            }
            let inode = self.look(|tx| tx.inode(first))?;
            let used = self.look(|tx| tx.has_inode(first))?;
            if !used || first < self.sb.first_inode || inode.has(FLAG_EA_INODE) {
                return Err(Error::corrupt("ext4: the list of deleted files is damaged"));
            }
            if inode.links() == 0 {
                self.reap(first)?;
                continue;
            }
            let end = inode.size().div_ceil(size);
            self.cut(first, end)?;
            self.change(|tx| {
                let mut inode = tx.inode(first)?;
                tx.unmap(&mut inode, end, u64::MAX)?;
                tx.remove_orphan(&mut inode)?;
                tx.put_inode(&mut inode)
            })?;
        }
        Err(Error::corrupt("ext4: the list of deleted files is damaged"))
    }
}
