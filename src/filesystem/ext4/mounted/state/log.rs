//! The journal, written (kernel: Documentation/filesystems/ext4/journal.rst).
//!
//! A commit is durable before any of its blocks goes to its place. What it holds is written there
//! only when the ring is half full or the file system comes to rest: then everything is, the ring
//! is empty, and the journal's superblock says so before the ring is written again.

use std::collections::HashMap;
use std::io::IoSlice;

use foldhash::fast::RandomState;

use crate::error::{Error, Result};
use crate::filesystem::ext4::bytes::{be32, put};
use crate::filesystem::ext4::checksum::checksum;
use crate::filesystem::ext4::mounted::part::Part;
use crate::filesystem::ext4::mounted::state::blocks::{Batch, Block};

const MAGIC: u32 = 0xc03b_3998;
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const REVOKE: u32 = 5;
const INCOMPAT_REVOKE: u32 = 0x1;
const INCOMPAT_64BIT: u32 = 0x2;
const INCOMPAT_CSUM_2: u32 = 0x8;
const INCOMPAT_CSUM_3: u32 = 0x10;
const INCOMPAT_FAST_COMMIT: u32 = 0x20;
const COMPAT_CHECKSUM: u32 = 0x1;
const KNOWN: u32 =
    INCOMPAT_REVOKE | INCOMPAT_64BIT | INCOMPAT_CSUM_2 | INCOMPAT_CSUM_3 | INCOMPAT_FAST_COMMIT;
const TAG_ESCAPED: u32 = 1;
const TAG_SAME_UUID: u32 = 2;
const TAG_LAST: u32 = 8;
/// Blocks that wait for their places at most, whatever the ring could hold.
const MOST_PENDING: usize = 4096;
/// The fewest blocks of a journal that an operation's changes surely fit into.
const FEWEST: u32 = 256;

/// The journal of a file system that is written.
pub struct Log {
    /// Where the ring's blocks stand, by their numbers in the journal.
    places: Vec<u64>,
    superblock: Vec<u8>,
    features: u32,
    seed: u32,
    first: u32,
    /// One past the ring's last block.
    end: u32,
    /// The next block to write.
    head: u32,
    /// Blocks in use.
    used: u32,
    sequence: u32,
    /// The newest committed version of blocks that are not at their places.
    pending: HashMap<u64, Block, RandomState>,
}

impl Log {
    /// The journal of which the blocks stand at `places`: one that is empty.
    ///
    /// # Errors
    /// What is no journal, or has features that cannot be written.
    pub fn open(part: &Part, places: Vec<u64>) -> Result<Log> {
        let corrupt = |what: &str| Error::corrupt(format!("ext4: the journal {what}"));
        let start = places.first().copied().ok_or_else(|| corrupt("is empty"))?;
        let mut superblock = vec![0; part.block];
        part.read(start, 0, &mut superblock)?;
        let raw = &superblock;
        if be32(raw, 0) != MAGIC || be32(raw, 4) != 4 || be32(raw, 12) as usize != part.block {
            return Err(corrupt("has no superblock of the second version"));
        }
        let features = be32(raw, 0x28);
        if features & !KNOWN != 0 || be32(raw, 0x24) & COMPAT_CHECKSUM != 0 {
            let text =
                format!("ext4: the journal has features {features:#x} and cannot be written");
            return Err(Error::unsupported(text));
        }
        let fast = match (features & INCOMPAT_FAST_COMMIT != 0, be32(raw, 0x54)) {
            (false, _) => 0,
            (true, 0) => 256,
            (true, blocks) => blocks,
        };
        let (blocks, first) = (be32(raw, 0x10), be32(raw, 0x14));
        let end = blocks.saturating_sub(fast);
        if first == 0 || blocks as usize > places.len() || end < first.saturating_add(FEWEST) {
            return Err(corrupt("is too small to be written"));
        }
        let seed = checksum(u32::MAX, raw.get(0x30..0x40).unwrap_or_default());
        let sequence = be32(raw, 0x18).max(1);
        Ok(Log {
            places,
            features,
            seed,
            first,
            end,
            head: first,
            used: 0,
            sequence,
            pending: HashMap::default(),
            superblock,
        })
    }

    /// The most blocks of one commit that surely fit when the ring is empty.
    pub fn most(&self) -> usize {
        (self.end - self.first) as usize / 2
    }

    /// Whether a commit of `blocks` blocks fits without a checkpoint.
    pub fn fits(&self, blocks: usize, gone: usize) -> bool {
        let free = (self.end - self.first - self.used) as usize;
        let need = blocks + blocks / self.tags_in_block() + gone / self.revokes_in_block() + 4;
        need < free && self.pending.len() + blocks <= MOST_PENDING.max(self.most())
            || self.used == 0
    }

    /// Whether anything waits for its place.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Commits: durable when this returns, and the data that was written before with it.
    pub fn commit(&mut self, part: &Part, batch: &Batch) -> Result<()> {
        let gone: Vec<u64> =
            batch.gone.iter().copied().filter(|block| self.pending.contains_key(block)).collect();
        if batch.blocks.is_empty() && gone.is_empty() {
            return part.flush();
        }
        let start = self.head;
        let mut out: Vec<Piece<'_>> = Vec::new();
        for chunk in batch.blocks.chunks(self.tags_in_block()) {
            out.push(Piece::Own(self.descriptor(part, chunk)));
            out.extend(chunk.iter().map(|(_, block)| Piece::of(block)));
        }
        for chunk in gone.chunks(self.revokes_in_block()) {
            out.push(Piece::Own(self.revoke(part, chunk)));
        }
        let ring = self.end - self.first;
        if out.len() + 2 > (ring - self.used) as usize {
            return Err(Error::unsupported("ext4: a change is larger than the journal"));
        }
        self.write_ring(part, &out)?;
        if self.used == 0 {
            self.write_superblock(part, start)?;
        }
        part.flush()?;
        let mut commit = self.header(part, COMMIT);
        if self.checksums() {
            let sum = checksum(self.seed, &commit);
            put(&mut commit, 0x10, &sum.to_be_bytes());
        }
        let written = out.len() as u32;
        self.write_ring(part, &[Piece::Own(commit)])?;
        part.flush()?;
        self.used += written + 1;
        self.sequence = self.sequence.wrapping_add(1).max(1);
        for block in &batch.gone {
            self.pending.remove(block);
        }
        for (number, block) in &batch.blocks {
            self.pending.insert(*number, block.clone());
        }
        Ok(())
    }

    /// Writes all that was committed to its place and empties the ring. Returns which blocks.
    pub fn checkpoint(&mut self, part: &Part) -> Result<Vec<u64>> {
        let mut all: Vec<(u64, Block)> =
            self.pending.iter().map(|(number, block)| (*number, block.clone())).collect();
        all.sort_unstable_by_key(|(number, _)| *number);
        write_in_place(part, &all)?;
        if self.used > 0 {
            part.flush()?;
            self.write_superblock(part, 0)?;
            part.flush()?;
        }
        self.pending.clear();
        self.used = 0;
        Ok(all.into_iter().map(|(number, _)| number).collect())
    }

    fn checksums(&self) -> bool {
        self.features & (INCOMPAT_CSUM_2 | INCOMPAT_CSUM_3) != 0
    }

    fn tag_size(&self) -> usize {
        let has = |feature| self.features & feature != 0;
        match (has(INCOMPAT_CSUM_3), has(INCOMPAT_CSUM_2), has(INCOMPAT_64BIT)) {
            (true, ..) => 16,
            (_, second, wide) => 8 + if second { 2 } else { 0 } + if wide { 4 } else { 0 },
        }
    }

    /// How many blocks one descriptor can name.
    fn tags_in_block(&self) -> usize {
        // A header, the first tag's id, the checksum.
        ((self.superblock.len() - 12 - 16 - 4) / self.tag_size()).max(1)
    }

    fn revokes_in_block(&self) -> usize {
        ((self.superblock.len() - 16 - 4) / 8).max(1)
    }

    fn header(&self, part: &Part, kind: u32) -> Vec<u8> {
        let mut block = vec![0; part.block];
        for (at, value) in [(0, MAGIC), (4, kind), (8, self.sequence)] {
            put(&mut block, at, &value.to_be_bytes());
        }
        block
    }

    fn seal(&self, block: &mut [u8]) {
        if self.checksums() {
            let at = block.len() - 4;
            let sum = checksum(self.seed, block);
            put(block, at, &sum.to_be_bytes());
        }
    }

    fn descriptor(&self, part: &Part, chunk: &[(u64, Block)]) -> Vec<u8> {
        let mut block = self.header(part, DESCRIPTOR);
        let (size, wide) = (self.tag_size(), self.features & INCOMPAT_64BIT != 0);
        let mut at = 12;
        for (index, (number, bytes)) in chunk.iter().enumerate() {
            let mut flags = if index > 0 { TAG_SAME_UUID } else { 0 };
            flags |= if index + 1 == chunk.len() { TAG_LAST } else { 0 };
            flags |= if is_escaped(bytes) { TAG_ESCAPED } else { 0 };
            put(&mut block, at, &(*number as u32).to_be_bytes());
            let sum = if self.checksums() { self.block_checksum(bytes) } else { 0 };
            if self.features & INCOMPAT_CSUM_3 != 0 {
                put(&mut block, at + 4, &flags.to_be_bytes());
                put(&mut block, at + 12, &sum.to_be_bytes());
            } else {
                put(&mut block, at + 4, &(sum as u16).to_be_bytes());
                put(&mut block, at + 6, &(flags as u16).to_be_bytes());
            }
            if wide {
                put(&mut block, at + 8, &((number >> 32) as u32).to_be_bytes());
            }
            at += size;
            if index == 0 {
                // Any id will do: nobody compares it.
                at += 16;
            }
        }
        self.seal(&mut block);
        block
    }

    fn block_checksum(&self, bytes: &[u8]) -> u32 {
        let seed = checksum(self.seed, &self.sequence.to_be_bytes());
        if is_escaped(bytes) {
            return checksum(checksum(seed, &[0; 4]), bytes.get(4..).unwrap_or_default());
        }
        checksum(seed, bytes)
    }

    fn revoke(&self, part: &Part, chunk: &[u64]) -> Vec<u8> {
        let mut block = self.header(part, REVOKE);
        let wide = self.features & INCOMPAT_64BIT != 0;
        let mut at = 16;
        for number in chunk {
            if wide {
                put(&mut block, at, &number.to_be_bytes());
                at += 8;
            } else {
                put(&mut block, at, &(*number as u32).to_be_bytes());
                at += 4;
            }
        }
        put(&mut block, 12, &(at as u32).to_be_bytes());
        self.seal(&mut block);
        block
    }

    /// Writes blocks from the head on, in as few pieces as their places allow.
    fn write_ring(&mut self, part: &Part, pieces: &[Piece<'_>]) -> Result<()> {
        let mut rest = pieces;
        while !rest.is_empty() {
            let place = self.place(self.head)?;
            let mut run = 1;
            while run < rest.len()
                && run < 256
                && self.head + (run as u32) < self.end
                && self.place(self.head + run as u32)? == place + run as u64
            {
                run += 1;
            }
            let bufs: Vec<IoSlice<'_>> =
                rest.iter().take(run).map(|piece| IoSlice::new(piece.bytes())).collect();
            part.write_all(place, 0, &bufs)?;
            self.head += run as u32;
            if self.head >= self.end {
                self.head = self.first;
            }
            rest = rest.get(run..).unwrap_or_default();
        }
        Ok(())
    }

    fn place(&self, number: u32) -> Result<u64> {
        let place = self.places.get(number as usize).copied();
        place.ok_or_else(|| Error::corrupt("ext4: the journal is shorter than it says"))
    }

    fn write_superblock(&mut self, part: &Part, start: u32) -> Result<()> {
        let place = self.place(0)?;
        let raw = &mut self.superblock;
        put(raw, 0x28, &(self.features | INCOMPAT_REVOKE).to_be_bytes());
        put(raw, 0x18, &self.sequence.to_be_bytes());
        put(raw, 0x1c, &start.to_be_bytes());
        if self.features & (INCOMPAT_CSUM_2 | INCOMPAT_CSUM_3) != 0 {
            put(raw, 0xfc, &[0; 4]);
            let sum = checksum(u32::MAX, raw.get(..1024).unwrap_or_default());
            put(raw, 0xfc, &sum.to_be_bytes());
        }
        part.write(place, 0, raw)
    }
}

/// Whether a block would be taken for one of the journal's own.
fn is_escaped(bytes: &[u8]) -> bool {
    be32(bytes, 0) == MAGIC
}

/// One block to write to the ring.
enum Piece<'a> {
    Own(Vec<u8>),
    Shared(&'a [u8]),
}

impl<'a> Piece<'a> {
    fn of(block: &'a Block) -> Piece<'a> {
        if !is_escaped(block) {
            return Piece::Shared(block);
        }
        let mut copy = block.to_vec();
        put(&mut copy, 0, &[0; 4]);
        Piece::Own(copy)
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Piece::Own(bytes) => bytes,
            Piece::Shared(bytes) => bytes,
        }
    }
}

/// Writes blocks, in order, to their places, neighbours together.
pub fn write_in_place(part: &Part, blocks: &[(u64, Block)]) -> Result<()> {
    let mut rest = blocks;
    while let Some((first, _)) = rest.first() {
        let next = |(at, (number, _)): (usize, &(u64, Block))| *number == first + at as u64;
        let run = rest.iter().enumerate().take(256).take_while(|pair| next(*pair)).count();
        let bufs: Vec<IoSlice<'_>> =
            rest.iter().take(run).map(|(_, block)| IoSlice::new(block)).collect();
        part.write_all(*first, 0, &bufs)?;
        rest = rest.get(run..).unwrap_or_default();
    }
    Ok(())
}
