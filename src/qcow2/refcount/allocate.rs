//! Giving out host clusters: which are free, where runs of them go, and where the blocks and the
//! table that count them find room.
//!
//! Like all refcounts this changes memory only, but for new blocks, whose room on the host is taken
//! at once.

use super::{Refcounts, TablePlace};
use crate::addr::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::header::MAX_REFCOUNT_TABLE;
use crate::qcow2::refcount::bits::get_in;
use crate::qcow2::step;

/// A run of clusters that the allocator gave out, each with refcount 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::qcow2) struct Run {
    pub host: HostOffset,
    pub clusters: u64,
    /// Whether the clusters read as zeroes in the file.
    pub zeroed: bool,
}

impl Refcounts {
    fn check_placed(&self) -> Result<()> {
        if self.unplaced {
            let message = "the refcount table could not be moved; reopen the disk";
            return Err(Error::new(ErrorKind::Poisoned, message));
        }
        Ok(())
    }

    /// Allocates 1 to `want` clusters in one run, from the first free one on.
    pub fn allocate_run(&mut self, want: u64) -> Result<Run> {
        self.check_placed()?;
        let start = self.first_free(self.next_free)?;
        self.next_free = start;
        if self.block_of(start).is_none() {
            return self.allocate(want.min(1 << (self.block_bits() - 1)));
        }
        let mut end = start + 1;
        while end - start < want && self.block_of(end).is_some() && self.get(end)? == 0 {
            end += 1;
        }
        self.check_free(start, end - start)?;
        self.take(start, end - start)
    }

    /// Allocates exactly `clusters` clusters in one run.
    pub fn allocate(&mut self, clusters: u64) -> Result<Run> {
        self.check_placed()?;
        self.storage.about_to(step::CLUSTER_ALLOC);
        let mut start = self.first_free(self.next_free)?;
        self.next_free = start;
        loop {
            let blocks = self.blocks_missing(start, clusters);
            match self.first_used(start, blocks + clusters)? {
                Some(used) => start = self.first_free(used + 1)?,
                None => return self.allocate_at(start, blocks, clusters),
            }
        }
    }

    /// Makes room for `len` compressed bytes, not 0 and at most a cluster: behind those before them,
    /// where there is room, else in a new cluster. Every cluster that they touch gets a reference.
    /// Returns their place, and the new cluster where there is one.
    pub fn pack(&mut self, len: u64) -> Result<(HostOffset, Option<Run>)> {
        self.storage.about_to(step::CLUSTER_ALLOC_BYTES);
        let (cluster, max) = (self.cluster, self.max());
        let mut open = None;
        if let Some(at) = self.packed {
            let count = self.get(cluster.index(at))?;
            open = (count < max).then_some((at, count));
        }
        let (place, new) = match open {
            Some((at, count)) if len <= cluster.bytes() - cluster.within(at) => {
                self.set(cluster.index(at), count + 1)?;
                (at, None)
            }
            _ => {
                let run = self.allocate(1)?;
                // Allocating does not count references to the open cluster: its count still holds.
                match open {
                    Some((at, count)) if cluster.ceil(at) == run.host.0 => {
                        self.set(cluster.index(at), count + 1)?;
                        (at, Some(run))
                    }
                    _ => (run.host.0, Some(run)),
                }
            }
        };
        self.packed = Some(place + len).filter(|end| !cluster.aligned(*end));
        Ok((HostOffset(place), new))
    }

    /// How many new refcount blocks a run of `clusters` at `start` needs, if they stand before it.
    fn blocks_missing(&self, start: u64, clusters: u64) -> u64 {
        let mut blocks = 0;
        loop {
            let first = start >> self.block_bits();
            let last = (start + blocks + clusters - 1) >> self.block_bits();
            let missing = (first..=last)
                .filter(|b| self.block_of(b << self.block_bits()).is_none())
                .count() as u64;
            if missing == blocks {
                return blocks;
            }
            blocks = missing;
        }
    }

    /// Clusters of refcount 0 that hold metadata are not free: the refcounts are wrong.
    fn check_free(&self, start: u64, clusters: u64) -> Result<()> {
        let bits = self.cluster.bits();
        self.metadata_map.check(HostOffset(start << bits), clusters << bits)
    }

    /// Puts `blocks` new refcount blocks at cluster `start`, and the run behind them.
    fn allocate_at(&mut self, start: u64, blocks: u64, clusters: u64) -> Result<Run> {
        let last = (start + blocks + clusters - 1) >> self.block_bits();
        if last >= self.table.len() as u64 {
            self.grow_table(last + 1)?;
            return self.allocate(clusters);
        }
        self.check_free(start, blocks + clusters)?;
        let missing: Vec<u64> = (start >> self.block_bits()..=last)
            .filter(|b| self.block_of(b << self.block_bits()).is_none())
            .collect();
        self.zero_blocks(start, blocks)?;
        for (cluster, index) in (start..).zip(&missing) {
            self.install_block(cluster, *index);
        }
        let taken = self.take(start, blocks + clusters).inspect_err(|_| {
            // A block that is not counted must not come to be in use.
            missing.iter().for_each(|index| self.table[*index as usize] = 0);
        });
        let run = taken?;
        Ok(Run { host: run.host + (blocks << self.cluster.bits()), clusters, ..run })
    }

    /// Makes new refcount blocks zero. Their room on the host is taken now, so that a full host is
    /// noticed while nothing refers to them.
    fn zero_blocks(&self, start: u64, blocks: u64) -> Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        self.storage.about_to(step::REFBLOCK_ALLOC);
        self.storage.write_zeroes(start << self.cluster.bits(), blocks << self.cluster.bits())
    }

    /// Makes cluster number `cluster`, which is zero, the refcount block number `index`.
    fn install_block(&mut self, cluster: u64, index: u64) {
        let offset = cluster << self.cluster.bits();
        self.table[index as usize] = offset;
        self.metadata_map.add(offset, self.cluster.bytes());
        self.dirty_table.insert(index as usize);
    }

    /// Makes room in the table for at least `entries` blocks by moving it.
    fn grow_table(&mut self, entries: u64) -> Result<()> {
        self.storage.about_to(step::REFTABLE_GROW);
        let per_cluster = self.cluster.bytes() / 8;
        // Half as much again, so that a growing file moves its table a few times only.
        let entries = (entries + entries / 2 + 1).next_multiple_of(per_cluster);
        let limit = MAX_REFCOUNT_TABLE / 8;
        if self.table.len() as u64 >= limit {
            return Err(Error::new(ErrorKind::Invalid, "the file has outgrown its refcount table"));
        }
        let entries = entries.min(limit).max(self.table.len() as u64);
        self.table.resize(entries as usize, 0);
        let clusters = entries / per_cluster;
        // Without a place, what stands in its new part has nowhere to be written.
        let run = self.allocate(clusters);
        self.unplaced = run.is_err();
        let run = run?;
        self.metadata_map.add(run.host.0, clusters << self.cluster.bits());
        self.outgrown.push(self.place);
        self.place = TablePlace { offset: run.host.0, clusters: clusters as u32 };
        Ok(())
    }

    /// Sets the refcounts of free clusters to 1.
    fn take(&mut self, start: u64, clusters: u64) -> Result<Run> {
        for cluster in start..start + clusters {
            self.set(cluster, 1)?;
        }
        if self.next_free == start {
            self.next_free = start + clusters;
        }
        let zeroed = start >= self.untouched;
        self.untouched = self.untouched.max(start + clusters);
        Ok(Run { host: HostOffset(start << self.cluster.bits()), clusters, zeroed })
    }

    /// The first free cluster at or after `from`.
    fn first_free(&mut self, mut from: u64) -> Result<u64> {
        while let Some((slice, first)) = self.slice_of(from)? {
            let bytes = self.cache.get(slice).unwrap_or_default();
            let count = (bytes.len() as u64 * 8) >> self.order;
            let order = self.order;
            let free = (from - first..count).find(|i| get_in(bytes, order, *i as usize) == 0);
            match free {
                Some(i) => return Ok(first + i),
                None => from = first + count,
            }
        }
        if from >= 1 << (56 - self.cluster.bits()) {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "the file has no free cluster below 2^56 bytes",
            ));
        }
        Ok(from)
    }

    /// The last used cluster of a range, if any is used.
    fn first_used(&mut self, start: u64, clusters: u64) -> Result<Option<u64>> {
        for cluster in (start..start + clusters).rev() {
            if self.get(cluster)? != 0 {
                return Ok(Some(cluster));
            }
        }
        Ok(None)
    }

    /// Makes a refcount what it should be. A block that is missing for it is put at or after
    /// cluster `end`, past everything in use.
    pub fn mend(&mut self, cluster: u64, count: u64, end: u64) -> Result<()> {
        if count > self.max() {
            let offset = cluster << self.cluster.bits();
            let message = "a cluster is referred to more often than its refcount can say";
            return Err(Error::corrupt(message).at_offset(offset));
        }
        if self.block_of(cluster).is_none() {
            let index = cluster >> self.block_bits();
            if index >= self.table.len() as u64 {
                self.next_free = self.next_free.max(end);
                self.grow_table(index + 1)?;
            }
            let block = self.first_free(self.next_free.max(end))?;
            self.zero_blocks(block, 1)?;
            self.install_block(block, index);
            self.next_free = block + 1;
            self.mend(block, 1, block + 1)?;
        }
        self.set(cluster, count)
    }
}
