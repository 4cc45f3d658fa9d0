//! What is in memory and not yet durable, and how it becomes so.

pub(super) mod blocks;
pub(super) mod log;

use std::collections::{BTreeSet, HashSet};
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

use super::super::bytes::{le16, le32, put16, put32};
use super::super::superblock;
use super::group::bitmap::Freed;
use super::{Mounted, Tx};
use crate::error::Result;
use blocks::{Batch, Blocks};
use log::{Log, write_in_place};

const INCOMPAT_RECOVER: u32 = 0x4;
const STATE_VALID: u16 = 1;
/// Changed blocks at most before a commit.
pub const MOST: usize = 2048;
/// So few changed blocks are written while nobody changes anything, and so often others have been written
/// before at most.
const FEW: usize = 16;
const ROUNDS: u32 = 8;

/// The metadata in memory.
pub struct State {
    pub blocks: Blocks,
    pub counts: Counts,
    /// Groups whose checksums are stale.
    pub touched: BTreeSet<u32>,
    /// Bitmaps that had their checksums when they were first looked at, by group; true for those
    /// of inodes.
    pub checked: HashSet<(u32, bool)>,
    /// Blocks that were freed since the last commit.
    pub freed: Freed,
    /// Blocks that the commit under way frees.
    pub freeing: Freed,
    /// Whether the superblock on the disk says that the file system is in use.
    pub in_use: bool,
    /// Changed blocks at most before a commit.
    pub most: usize,
    /// Whether nothing may be changed for a while.
    pub frozen: bool,
}

/// What the superblock counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    pub free_blocks: u64,
    pub free_inodes: u32,
    /// The first of the inodes that wait to be deleted, or 0.
    pub orphan: u32,
}

impl State {
    /// Blocks of a group that are free and cannot be had yet.
    pub fn shadow(&self, group: u32) -> [Option<&Vec<u8>>; 2] {
        [self.freed.get(&group), self.freeing.get(&group)]
    }

    pub fn frees_are_pending(&self) -> bool {
        !self.freed.is_empty() || !self.freeing.is_empty()
    }
}

impl Tx<'_> {
    /// Where the superblock stands: its block, and the byte in it.
    fn superblock_place(&self) -> (u64, usize) {
        let size = self.fs.sb.block_size as u64;
        (superblock::AT / size, (superblock::AT % size) as usize)
    }

    /// Puts the counts, and whether it is in use, into the superblock.
    fn seal(&mut self, in_use: bool, journal: bool) -> Result<Vec<u8>> {
        self.seal_groups()?;
        let (block, at) = self.superblock_place();
        let (counts, fs) = (self.st.counts, self.fs);
        let bytes = self.edit(block)?;
        let raw = bytes.get_mut(at..at + superblock::LEN).unwrap_or_default();
        put32(raw, 0xc, counts.free_blocks as u32);
        if fs.sb.incompat & 0x80 != 0 {
            put32(raw, 0x158, (counts.free_blocks >> 32) as u32);
        }
        put32(raw, 0x10, counts.free_inodes);
        put32(raw, 0xe8, counts.orphan);
        put32(raw, 0x30, fs.clock.now().0 as u32);
        let incompat = le32(raw, 0x60) & !INCOMPAT_RECOVER;
        let valid = le16(raw, 0x3a) & !STATE_VALID;
        if journal {
            put32(raw, 0x60, incompat | if in_use { INCOMPAT_RECOVER } else { 0 });
        } else {
            let clean = if in_use { 0 } else { fs.sb.state & STATE_VALID };
            put16(raw, 0x3a, valid | clean);
        }
        fs.seal_superblock(raw);
        Ok(raw.to_vec())
    }
}

impl Mounted {
    fn log(&self) -> MutexGuard<'_, Option<Log>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Commits where so much was changed that an operation may not fit into the journal.
    pub(super) fn make_room(&self) -> Result<()> {
        let state = self.state();
        let full = state.blocks.dirty() >= state.most;
        drop(state);
        if full { self.sync() } else { Ok(()) }
    }

    /// Makes everything durable that was done before.
    pub fn sync(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        // Whoever waited here may have waited for a commit that failed.
        let mut log = self.log();
        self.writable()?;
        self.say_in_use(log.is_some())?;
        let batch = loop {
            let gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
            let mut state = self.state();
            if !state.blocks.changed() {
                drop((state, gate));
                return self.fail(self.part.flush());
            }
            if let Some(journal) = log.as_mut()
                && !journal.fits(state.blocks.dirty() + state.touched.len() + 8, MOST)
            {
                drop((state, gate));
                self.fail(self.settle(journal))?;
                continue;
            }
            break self.fail(self.take(&mut state, log.is_some()))?;
        };
        self.fail(self.make_durable(log.as_mut(), &batch))?;
        self.state().freeing.clear();
        Ok(())
    }

    /// Makes durable what files hold, and what it takes to read that: when they were changed may be lost.
    pub fn sync_data(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        // What a commit under way holds is durable when it has ended, unless it failed; no other begins
        // before it is known whether one is needed.
        let log = self.log();
        self.writable()?;
        let beyond_times = self.state().blocks.beyond_times();
        drop(log);
        match beyond_times {
            true => self.sync(),
            false => self.fail(self.part.flush()),
        }
    }

    /// Everything changed, for a commit. Says on the disk first that the file system is in use.
    fn take(&self, state: &mut State, journal: bool) -> Result<Batch> {
        let beyond_times = state.blocks.beyond_times();
        let mut tx = Tx { fs: self, st: state, now: (0, 0) };
        tx.seal(true, journal)?;
        if !state.in_use {
            self.mark_in_use(journal)?;
            state.in_use = true;
        }
        state.blocks.keep();
        state.freeing = std::mem::take(&mut state.freed);
        Ok(Batch { beyond_times, ..state.blocks.take() })
    }

    /// Says on the disk that the file system is in use where something was changed since it came to rest,
    /// while others go on: to be durable may take long. Whoever calls has the log.
    fn say_in_use(&self, journal: bool) -> Result<()> {
        let state = self.state();
        let needed = !state.in_use && state.blocks.changed();
        drop(state);
        if needed {
            self.fail(self.mark_in_use(journal))?;
            self.state().in_use = true;
        }
        Ok(())
    }

    /// Says on the disk that the file system is in use, and nothing else: what it counts there is
    /// still true.
    fn mark_in_use(&self, journal: bool) -> Result<()> {
        let size = self.sb.block_size as u64;
        let mut raw = vec![0; superblock::LEN];
        self.part.read(superblock::AT / size, superblock::AT % size, &mut raw)?;
        if journal {
            let incompat = le32(&raw, 0x60) | INCOMPAT_RECOVER;
            put32(&mut raw, 0x60, incompat);
        } else {
            let state = le16(&raw, 0x3a) & !STATE_VALID;
            put16(&mut raw, 0x3a, state);
        }
        self.seal_superblock(&mut raw);
        self.write_superblock(&raw)?;
        self.part.flush()
    }

    fn write_superblock(&self, raw: &[u8]) -> Result<()> {
        let size = self.sb.block_size as u64;
        self.part.write(superblock::AT / size, superblock::AT % size, raw)
    }

    fn make_durable(&self, log: Option<&mut Log>, batch: &Batch) -> Result<()> {
        match log {
            Some(log) => log.commit(&self.part, batch),
            None => {
                // What the metadata lead to is there before them. Times lead to nothing.
                if batch.beyond_times {
                    self.part.flush()?;
                }
                write_in_place(&self.part, &batch.blocks)?;
                self.part.flush()?;
                self.state().blocks.settled(batch.blocks.iter().map(|(number, _)| *number));
                Ok(())
            }
        }
    }

    fn settle(&self, log: &mut Log) -> Result<()> {
        let settled = log.checkpoint(&self.part)?;
        self.state().blocks.settled(settled.into_iter());
        Ok(())
    }

    /// Runs `work` while the file system on the disk is complete, with no journal to replay, and
    /// nobody changes it.
    pub fn at_rest<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        if self.read_only {
            return Ok(work());
        }
        self.come_near_rest()?;
        let mut log = self.log();
        self.writable()?;
        let gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state();
        self.fail(self.come_to_rest(&mut state, log.as_mut()))?;
        let done = work();
        drop((state, gate));
        Ok(done)
    }

    /// Writes all that can be written while others go on, to its place, too: what is left is what they
    /// have changed meanwhile.
    fn come_near_rest(&self) -> Result<()> {
        for _ in 0..ROUNDS {
            self.sync()?;
            let mut log = self.log();
            self.writable()?;
            if let Some(log) = log.as_mut().filter(|log| !log.is_empty()) {
                self.fail(self.settle(log))?;
            }
            drop(log);
            if self.state().blocks.dirty() <= FEW {
                break;
            }
        }
        Ok(())
    }

    fn come_to_rest(&self, state: &mut State, mut log: Option<&mut Log>) -> Result<()> {
        if state.blocks.changed() {
            if let Some(log) = log.as_deref_mut()
                && !log.fits(state.blocks.dirty() + state.touched.len() + 8, MOST)
            {
                let settled = log.checkpoint(&self.part)?;
                state.blocks.settled(settled.into_iter());
            }
            let batch = self.take(state, log.is_some())?;
            match log.as_deref_mut() {
                Some(log) => log.commit(&self.part, &batch)?,
                None => {
                    self.part.flush()?;
                    write_in_place(&self.part, &batch.blocks)?;
                    state.blocks.settled(batch.blocks.iter().map(|(number, _)| *number));
                }
            }
            state.freeing.clear();
        }
        let journal = log.is_some();
        if let Some(log) = log.filter(|log| !log.is_empty()) {
            let settled = log.checkpoint(&self.part)?;
            state.blocks.settled(settled.into_iter());
        }
        if state.in_use {
            self.part.flush()?;
            let mut tx = Tx { fs: self, st: state, now: (0, 0) };
            let superblock = tx.seal(false, journal)?;
            self.write_superblock(&superblock)?;
            let (block, _) = tx.superblock_place();
            state.blocks.keep();
            // It is at its place: nothing of it is left to commit.
            state.blocks.take();
            state.blocks.settled(std::iter::once(block));
            state.in_use = false;
        }
        self.part.flush()
    }

    /// As [`at_rest`](Mounted::at_rest), until [`thaw`](Mounted::thaw): whoever wants to change
    /// something waits. Returns since when.
    pub fn freeze(&self) -> Result<Instant> {
        if self.read_only {
            return Ok(Instant::now());
        }
        self.come_near_rest()?;
        let mut log = self.log();
        self.writable()?;
        let since = Instant::now();
        let gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state();
        self.fail(self.come_to_rest(&mut state, log.as_mut()))?;
        state.frozen = true;
        drop((state, gate));
        Ok(since)
    }

    /// Lets those go on who waited.
    pub fn thaw(&self) {
        self.state().frozen = false;
        self.thawed.notify_all();
    }

    /// The state, once it may be changed.
    pub(super) fn state_to_change(&self) -> MutexGuard<'_, State> {
        let state = self.state();
        let waited = self.thawed.wait_while(state, |state| state.frozen);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes everything durable, and the file system one that needs no recovery.
    pub fn close(&self) -> Result<()> {
        self.at_rest(|| ())
    }
}
