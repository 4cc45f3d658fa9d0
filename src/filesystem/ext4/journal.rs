//! The journal of a file system that was in use: what it says of blocks that were not written to
//! their places yet (kernel: Documentation/filesystems/ext4/journal.rst).
//!
//! Nothing is written: whoever reads a block is sent to its copy in the journal. As the kernel
//! does, only transactions count that end with a commit, and a copy does not that a later
//! transaction revokes.

use std::collections::HashMap;

use super::bytes::{be16, be32, wide};
use super::{Ext4, Inode};
use crate::error::{Error, Result};

const MAGIC: u32 = 0xc03b_3998;
/// The most blocks of a journal: 32 GiB of 4 KiB.
const MAX_BLOCKS: u32 = 1 << 23;
/// The most blocks whose copies are remembered.
const MAX_COPIES: usize = 1 << 22;

const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const SUPERBLOCK_1: u32 = 3;
const SUPERBLOCK_2: u32 = 4;
const REVOKE: u32 = 5;

const INCOMPAT_64BIT: u32 = 0x2;
const INCOMPAT_ASYNC_COMMIT: u32 = 0x4;
const INCOMPAT_CSUM_2: u32 = 0x8;
const INCOMPAT_CSUM_3: u32 = 0x10;
const INCOMPAT_FAST_COMMIT: u32 = 0x20;
const KNOWN: u32 = 0x1 | INCOMPAT_64BIT | INCOMPAT_CSUM_2 | INCOMPAT_CSUM_3 | INCOMPAT_FAST_COMMIT;

const TAG_ESCAPED: u32 = 1;
const TAG_SAME_UUID: u32 = 2;
const TAG_LAST: u32 = 8;

/// Where a block's newest copy is.
#[derive(Debug, Clone, Copy)]
pub struct Copy {
    /// The block of the file system that holds it.
    pub place: u64,
    /// Whether its first four bytes were taken out: they look like the journal's own.
    pub escaped: bool,
}

/// The first four bytes of an escaped block.
pub const ESCAPED: [u8; 4] = MAGIC.to_be_bytes();

/// What is not at its place yet.
#[derive(Debug, Default)]
pub struct Journal {
    copies: HashMap<u64, Copy>,
    /// Whether the file system makes commits besides the journal proper, which are not read.
    pub fast_commits: bool,
    /// The number after that of the last transaction.
    pub next: u32,
}

impl Journal {
    /// Reads the journal in the file `inode` of `fs`, which knows of no journal yet.
    pub fn read(fs: &Ext4<'_>, inode: &Inode) -> Result<Journal> {
        let Some(log) = Log::open(fs, inode)? else { return Ok(Journal::default()) };
        let transactions = log.transactions()?;
        let next = log.sequence.wrapping_add(u32::try_from(transactions.len()).unwrap_or(0));
        let mut journal = Journal { fast_commits: log.fast_commits, next, ..Journal::default() };
        let mut revoked: HashMap<u64, usize> = HashMap::new();
        for (number, transaction) in transactions.iter().enumerate() {
            for block in &transaction.revoked {
                revoked.insert(*block, number);
            }
        }
        for (number, transaction) in transactions.iter().enumerate() {
            for (block, copy) in &transaction.copies {
                if revoked.get(block).is_none_or(|last| *last < number) {
                    journal.copies.insert(*block, *copy);
                }
            }
        }
        Ok(journal)
    }

    /// Whether every block is at its place.
    pub fn is_empty(&self) -> bool {
        self.copies.is_empty()
    }

    /// The blocks that are not at their places yet.
    pub fn blocks(&self) -> impl Iterator<Item = u64> {
        self.copies.keys().copied()
    }

    /// Where to read a block instead of at its place.
    pub fn copy(&self, block: u64) -> Option<Copy> {
        self.copies.get(&block).copied()
    }
}

#[derive(Default)]
struct Transaction {
    copies: Vec<(u64, Copy)>,
    revoked: Vec<u64>,
}

/// The journal as a ring of blocks.
struct Log<'a, 'd> {
    fs: &'a Ext4<'d>,
    inode: &'a Inode,
    first: u32,
    /// One past the last block of the ring.
    end: u32,
    start: u32,
    sequence: u32,
    features: u32,
    fast_commits: bool,
}

impl<'a, 'd> Log<'a, 'd> {
    /// `None` where nothing is left in it.
    fn open(fs: &'a Ext4<'d>, inode: &'a Inode) -> Result<Option<Log<'a, 'd>>> {
        let mut log = Log {
            fs,
            inode,
            first: 0,
            end: 1,
            start: 0,
            sequence: 0,
            features: 0,
            fast_commits: false,
        };
        let raw = log.block(0)?;
        let corrupt = |what: &str| Error::corrupt(format!("ext4: the journal's {what}"));
        if be32(&raw, 0) != MAGIC {
            return Err(corrupt("superblock is damaged"));
        }
        log.features = match be32(&raw, 4) {
            SUPERBLOCK_1 => 0,
            SUPERBLOCK_2 => be32(&raw, 0x28),
            _ => return Err(corrupt("superblock is damaged")),
        };
        let unknown = log.features & !KNOWN;
        if unknown & INCOMPAT_ASYNC_COMMIT != 0 {
            let text = "ext4: was in use with journal_async_commit: mount it once to replay that";
            return Err(Error::unsupported(text));
        }
        if unknown != 0 {
            let text = format!("ext4: the journal has features {unknown:#x}");
            return Err(Error::unsupported(text));
        }
        log.fast_commits = log.features & INCOMPAT_FAST_COMMIT != 0;
        let fast = match (log.fast_commits, be32(&raw, 0x54)) {
            (false, _) => 0,
            (true, 0) => 256,
            (true, blocks) => blocks,
        };
        let (blocks, first) = (be32(&raw, 0x10), be32(&raw, 0x14));
        (log.sequence, log.start) = (be32(&raw, 0x18), be32(&raw, 0x1c));
        if log.start == 0 {
            return Ok(None);
        }
        (log.first, log.end) = (first, blocks.saturating_sub(fast));
        let sound = first > 0 && (first..log.end).contains(&log.start) && blocks <= MAX_BLOCKS;
        if !sound || be32(&raw, 0xc) as usize != fs.block_size() {
            return Err(corrupt("superblock is not believable"));
        }
        Ok(Some(log))
    }

    fn place(&self, number: u32) -> Result<u64> {
        let run = self.inode.run(self.fs, number.into())?;
        run.place.ok_or_else(|| Error::corrupt("ext4: the journal has a hole"))
    }

    fn block(&self, number: u32) -> Result<std::rc::Rc<[u8]>> {
        self.fs.block(self.place(number)?)
    }

    fn after(&self, number: u32) -> u32 {
        if number + 1 >= self.end { self.first } else { number + 1 }
    }

    /// All that were committed, oldest first.
    fn transactions(&self) -> Result<Vec<Transaction>> {
        let (mut found, mut current) = (Vec::new(), Transaction::default());
        let (mut at, mut sequence) = (self.start, self.sequence);
        let (mut seen, mut copies) = (0, 0);
        while seen < self.end - self.first {
            self.fs.go_on()?;
            let raw = self.block(at)?;
            if be32(&raw, 0) != MAGIC || be32(&raw, 8) != sequence {
                break;
            }
            (at, seen) = (self.after(at), seen + 1);
            match be32(&raw, 4) {
                DESCRIPTOR => {
                    for (block, flags) in self.tags(&raw) {
                        let escaped = flags & TAG_ESCAPED != 0;
                        current.copies.push((block, Copy { place: self.place(at)?, escaped }));
                        (at, seen, copies) = (self.after(at), seen + 1, copies + 1);
                    }
                }
                REVOKE => {
                    let width = if self.features & INCOMPAT_64BIT != 0 { 8 } else { 4 };
                    let end = (be32(&raw, 12) as usize).min(raw.len());
                    let list = raw.get(16..end).unwrap_or_default().chunks_exact(width);
                    copies += list.len();
                    current.revoked.extend(list.map(|number| match width {
                        8 => wide(be32(number, 0), be32(number, 4)),
                        _ => be32(number, 0).into(),
                    }));
                }
                COMMIT => {
                    found.push(std::mem::take(&mut current));
                    sequence = sequence.wrapping_add(1);
                }
                _ => break,
            }
            if copies > MAX_COPIES {
                return Err(Error::corrupt("ext4: the journal is not believable"));
            }
        }
        Ok(found)
    }

    /// The blocks of which copies follow a descriptor, with the flags of each.
    fn tags(&self, raw: &[u8]) -> Vec<(u64, u32)> {
        let wide_numbers = self.features & INCOMPAT_64BIT != 0;
        let (third, second) =
            (self.features & INCOMPAT_CSUM_3 != 0, self.features & INCOMPAT_CSUM_2 != 0);
        let size = match (third, second, wide_numbers) {
            (true, ..) => 16,
            (_, second, wide) => 8 + if second { 2 } else { 0 } + if wide { 4 } else { 0 },
        };
        // With checksums, the block ends with one.
        let end = raw.len() - if third || second { 4 } else { 0 };
        let mut found = Vec::new();
        let mut at = 12;
        while at + size <= end {
            let tag = raw.get(at..at + size).unwrap_or_default();
            let flags = if third { be32(tag, 4) } else { be16(tag, 6).into() };
            let high = if wide_numbers { be32(tag, 8) } else { 0 };
            found.push((wide(high, be32(tag, 0)), flags));
            at += size + if flags & TAG_SAME_UUID == 0 { 16 } else { 0 };
            if flags & TAG_LAST != 0 {
                break;
            }
        }
        found
    }
}
