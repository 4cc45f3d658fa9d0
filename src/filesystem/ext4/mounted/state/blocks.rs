//! Blocks of metadata in memory: what was read, what an operation changes, what a commit takes.
//!
//! An operation that fails takes back all that it changed: the first change of a block keeps what
//! the block was. Blocks that are changed, or that only the journal holds yet, are never dropped.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use foldhash::fast::RandomState;

use crate::error::{Error, Result};
use crate::filesystem::ext4::mounted::part::Part;

/// Bytes of unchanged blocks that are kept.
const CLEAN: usize = 12 << 20;

/// A block's bytes, shared with whoever looks at them while they change.
pub type Block = Arc<Vec<u8>>;
type Map<V> = HashMap<u64, V, RandomState>;

/// How the block in memory stands to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The same is on the disk.
    Clean,
    /// The journal has it, its place does not.
    Logged,
    /// Changed since the last commit.
    Dirty,
}

#[derive(Debug, Clone)]
struct Entry {
    bytes: Block,
    state: State,
    used: bool,
}

/// What a commit is to make durable.
#[derive(Debug, Default)]
pub struct Batch {
    /// Changed blocks, in order.
    pub blocks: Vec<(u64, Block)>,
    /// Blocks of metadata that are none any more.
    pub gone: HashSet<u64>,
    /// Whether more than the times of files has changed.
    pub beyond_times: bool,
}

/// The blocks in memory.
#[derive(Default)]
pub struct Blocks {
    map: Map<Entry>,
    /// The size of a block.
    size: usize,
    /// Blocks of the file system.
    count: u64,
    clean: usize,
    dirty: HashSet<u64, RandomState>,
    gone: HashSet<u64>,
    /// Whether more than the times of files has changed since the last commit.
    beyond_times: bool,
    /// What blocks were before the operation that is under way.
    before: Map<Option<Entry>>,
    gone_before: Vec<u64>,
}

impl Blocks {
    /// No blocks of a file system of `count` blocks of `size` bytes.
    pub fn new(size: usize, count: u64) -> Blocks {
        Blocks { size, count, ..Blocks::default() }
    }

    /// A block as it is now.
    pub fn read(&mut self, part: &Part, number: u64) -> Result<Block> {
        if let Some(entry) = self.map.get_mut(&number) {
            entry.used = true;
            return Ok(entry.bytes.clone());
        }
        if number >= self.count {
            return Err(Error::corrupt(format!("ext4: block {number} is not in the file system")));
        }
        let mut bytes = vec![0; self.size];
        part.read(number, 0, &mut bytes)?;
        self.shrink();
        let bytes = Arc::new(bytes);
        let entry = Entry { bytes: bytes.clone(), state: State::Clean, used: true };
        self.map.insert(number, entry);
        self.clean += self.size;
        Ok(bytes)
    }

    /// A block to change in place.
    pub fn edit(&mut self, part: &Part, number: u64) -> Result<&mut Vec<u8>> {
        self.beyond_times = true;
        self.edit_times(part, number)
    }

    /// The same where nothing but the times of a file are changed.
    pub fn edit_times(&mut self, part: &Part, number: u64) -> Result<&mut Vec<u8>> {
        if !self.map.contains_key(&number) {
            self.read(part, number)?;
        }
        let lost = || Error::corrupt("ext4: a block went missing in memory");
        let entry = self.map.get_mut(&number).ok_or_else(lost)?;
        self.before.entry(number).or_insert_with(|| Some(entry.clone()));
        if entry.state == State::Clean {
            self.clean = self.clean.saturating_sub(self.size);
        }
        entry.state = State::Dirty;
        entry.used = true;
        self.dirty.insert(number);
        Ok(Arc::make_mut(&mut entry.bytes))
    }

    /// A block that begins anew, as zeroes.
    pub fn fresh(&mut self, number: u64) -> Result<&mut Vec<u8>> {
        if number >= self.count {
            return Err(Error::corrupt(format!("ext4: block {number} is not in the file system")));
        }
        self.beyond_times = true;
        let old = self.map.remove(&number);
        if old.as_ref().is_some_and(|entry| entry.state == State::Clean) {
            self.clean = self.clean.saturating_sub(self.size);
        }
        self.before.entry(number).or_insert(old);
        self.dirty.insert(number);
        let bytes = Arc::new(vec![0; self.size]);
        let entry =
            self.map.entry(number).or_insert(Entry { bytes, state: State::Dirty, used: true });
        Ok(Arc::make_mut(&mut entry.bytes))
    }

    /// Says that a block of metadata is none any more.
    pub fn forget(&mut self, number: u64) {
        self.beyond_times = true;
        let old = self.map.remove(&number);
        if old.as_ref().is_some_and(|entry| entry.state == State::Clean) {
            self.clean = self.clean.saturating_sub(self.size);
        }
        self.before.entry(number).or_insert(old);
        self.dirty.remove(&number);
        if self.gone.insert(number) {
            self.gone_before.push(number);
        }
    }

    /// What was changed stays.
    pub fn keep(&mut self) {
        self.before.clear();
        self.gone_before.clear();
    }

    /// What was changed since the last [`keep`](Blocks::keep) is as it was before.
    pub fn take_back(&mut self) {
        for (number, old) in self.before.drain() {
            if self.map.remove(&number).is_some_and(|entry| entry.state == State::Clean) {
                self.clean = self.clean.saturating_sub(self.size);
            }
            self.dirty.remove(&number);
            if let Some(old) = old {
                match old.state {
                    State::Dirty => drop(self.dirty.insert(number)),
                    State::Clean => self.clean += self.size,
                    State::Logged => {}
                }
                self.map.insert(number, old);
            }
        }
        for number in self.gone_before.drain(..) {
            self.gone.remove(&number);
        }
    }

    /// How many blocks the next commit writes.
    pub fn dirty(&self) -> usize {
        self.dirty.len()
    }

    /// Whether anything was changed since the last commit.
    pub fn changed(&self) -> bool {
        !self.dirty.is_empty() || !self.gone.is_empty()
    }

    /// Whether more than the times of files was changed since the last commit, or tried to.
    pub fn beyond_times(&self) -> bool {
        self.beyond_times
    }

    /// Everything changed since the last commit. It counts as logged from now on.
    pub fn take(&mut self) -> Batch {
        let mut blocks = Vec::with_capacity(self.dirty.len());
        for number in self.dirty.drain() {
            if let Some(entry) = self.map.get_mut(&number) {
                entry.state = State::Logged;
                blocks.push((number, entry.bytes.clone()));
            }
        }
        blocks.sort_unstable_by_key(|(number, _)| *number);
        let beyond_times = std::mem::take(&mut self.beyond_times);
        Batch { blocks, gone: std::mem::take(&mut self.gone), beyond_times }
    }

    /// Blocks are at their places now.
    pub fn settled(&mut self, numbers: impl Iterator<Item = u64>) {
        for number in numbers {
            if let Some(entry) = self.map.get_mut(&number)
                && entry.state == State::Logged
            {
                entry.state = State::Clean;
                self.clean += self.size;
            }
        }
        self.shrink();
    }

    /// Drops blocks that nobody has looked at for a while.
    fn shrink(&mut self) {
        if self.clean < CLEAN {
            return;
        }
        let (mut clean, size) = (0, self.size);
        self.map.retain(|_, entry| {
            let stay = entry.state != State::Clean || entry.used && clean < CLEAN / 2;
            entry.used = false;
            clean += if stay && entry.state == State::Clean { size } else { 0 };
            stay
        });
        self.clean = clean;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filesystem::ram::Ram;

    #[test]
    fn what_fails_is_taken_back_and_what_is_kept_is_committed() {
        let part = Part::new(Arc::new(Ram(vec![7; 8192])), 0, 8192, 1024);
        let mut blocks = Blocks::new(1024, 8);
        blocks.edit(&part, 3).unwrap()[0] = 1;
        blocks.keep();
        blocks.edit(&part, 3).unwrap()[0] = 2;
        blocks.fresh(4).unwrap()[0] = 9;
        blocks.forget(5);
        blocks.take_back();
        assert_eq!(blocks.read(&part, 3).unwrap()[0], 1);
        assert_eq!(blocks.read(&part, 4).unwrap()[0], 7);
        blocks.forget(5);
        blocks.keep();
        let batch = blocks.take();
        assert_eq!((batch.blocks.len(), batch.blocks[0].0), (1, 3));
        assert!(batch.gone.contains(&5) && blocks.dirty() == 0);
        blocks.edit(&part, 3).unwrap()[0] = 3;
        blocks.settled([3].into_iter());
        assert_eq!(blocks.take().blocks[0].1[0], 3, "changed again before it settled");
        assert!(blocks.read(&part, 8).is_err());
    }
}
