//! Refcounts: who uses which host cluster, and which are free.
//!
//! Everything here changes memory only. [`Refcounts::take_dirty`] hands out what has to reach the
//! file, and the write-back puts it there in order. Specification: qcow2, "Host cluster management".

mod allocate;
pub(in crate::qcow2) mod bits;
pub(in crate::qcow2) mod metadata_map;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use crate::addr::{HostOffset, Unit};
use crate::error::{Error, Result};
use crate::qcow2::header::{Header, MAX_REFCOUNT_TABLE};
use crate::qcow2::refcount::bits::{get_in, get_run, max_refcount, set_in};
use crate::qcow2::refcount::metadata_map::MetadataMap;
use crate::qcow2::step;
use crate::qcow2::tables::cache::{Cache, Dirty, SLICE};
use crate::qcow2::tables::words::{encode, words};
use crate::storage::Storage;

pub(super) use allocate::Run;

/// The bits of a refcount table entry that hold the block's offset.
const BLOCK_OFFSET: u64 = !0x1ff;

/// The refcount table, the cached parts of its blocks, and the allocator over both.
pub(super) struct Refcounts {
    storage: Arc<dyn Storage>,
    cluster: Unit,
    order: u32,
    /// Host offsets of the refcount blocks; 0 where there is none.
    table: Vec<u64>,
    place: TablePlace,
    dirty_table: BTreeSet<usize>,
    /// Where the table stood before it had to move; the file's header says the first of them.
    outgrown: Vec<TablePlace>,
    cache: Cache,
    /// The table has grown in memory, and no place was found for it.
    unplaced: bool,
    /// Where metadata stands: never given out, whatever its refcount says.
    pub metadata_map: Arc<MetadataMap>,
    /// No cluster below this one is free.
    next_free: u64,
    /// No cluster from this one on was ever written: they read as zeroes.
    untouched: u64,
    /// Where the next compressed bytes go: inside a cluster that others stand in already.
    packed: Option<u64>,
}

/// Where a refcount table stands in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TablePlace {
    pub offset: u64,
    pub clusters: u32,
}

/// What has to reach the file before anything may refer to the clusters it counts.
pub(super) struct DirtyRefcounts {
    pub blocks: Vec<Dirty>,
    /// Host offset and value of changed table entries.
    pub entries: Vec<(u64, u64)>,
    /// A table that moved.
    pub moved: Option<MovedTable>,
}

/// A refcount table that has to be written as a whole before the header may point to it.
pub(super) struct MovedTable {
    pub place: TablePlace,
    pub bytes: Vec<u8>,
    /// How many earlier places it replaces.
    outgrown: usize,
}

impl Refcounts {
    /// Reads the refcount table. `capacity` is the number of cached slices of blocks.
    pub fn open(storage: Arc<dyn Storage>, header: &Header, capacity: usize) -> Result<Refcounts> {
        let mut refcounts = Refcounts::unread(storage, header, capacity);
        let (storage, place) = (&refcounts.storage, refcounts.place);
        let len = storage.len()?;
        let bytes = (u64::from(place.clusters) * header.cluster.bytes())
            .min(len.saturating_sub(place.offset));
        let mut raw = vec![0; bytes as usize / 8 * 8];
        storage.about_to(step::REFTABLE_LOAD);
        storage.read_exact_at(place.offset, &mut raw).map_err(|e| e.at_offset(place.offset))?;
        refcounts.table = words(&raw).iter().map(|entry| entry.get() & BLOCK_OFFSET).collect();
        refcounts.untouched = header.cluster.count(len);
        Ok(refcounts)
    }

    /// As if no cluster were in use: for an image that is only read, of which nobody asks that. A
    /// chain of hundreds of layers opens faster without hundreds of tables.
    pub fn unread(storage: Arc<dyn Storage>, header: &Header, capacity: usize) -> Refcounts {
        Refcounts {
            cluster: header.cluster,
            order: header.refcount_order,
            table: Vec::new(),
            place: TablePlace {
                offset: header.refcount_table_offset,
                clusters: header.refcount_table_clusters,
            },
            dirty_table: BTreeSet::new(),
            outgrown: Vec::new(),
            cache: Cache::new(capacity),
            unplaced: false,
            metadata_map: Arc::new(MetadataMap::new(header.cluster)),
            next_free: 0,
            untouched: 0,
            packed: None,
            storage,
        }
    }

    /// The largest refcount that fits.
    pub fn max(&self) -> u64 {
        max_refcount(self.order)
    }

    /// log2 of the clusters that one block counts.
    fn block_bits(&self) -> u32 {
        self.cluster.bits() + 3 - self.order
    }

    fn slice_bytes(&self) -> u64 {
        self.cluster.bytes().min(SLICE)
    }

    fn block_of(&self, cluster: u64) -> Option<u64> {
        let entry = *self.table.get(usize::try_from(cluster >> self.block_bits()).ok()?)?;
        (entry != 0).then_some(entry)
    }

    /// The slice that counts `cluster`, its first cluster, and loads it. `None` without a block.
    fn slice_of(&mut self, cluster: u64) -> Result<Option<(u64, u64)>> {
        let Some(block) = self.block_of(cluster) else { return Ok(None) };
        if !self.cluster.aligned(block) {
            return Err(
                Error::corrupt("a refcount block is not on a cluster boundary").at_offset(block)
            );
        }
        let per_slice = Unit::from_bits(self.slice_bytes().trailing_zeros() + 3 - self.order);
        let in_block = cluster & ((1 << self.block_bits()) - 1);
        let offset = block + per_slice.index(in_block) * self.slice_bytes();
        if self.cache.get(offset).is_none() {
            let mut bytes = vec![0; self.slice_bytes() as usize].into_boxed_slice();
            self.storage.about_to(step::REFBLOCK_LOAD);
            self.storage.read_exact_at(offset, &mut bytes).map_err(|e| e.at_offset(offset))?;
            self.cache.insert(offset, bytes);
        }
        Ok(Some((offset, per_slice.floor(cluster))))
    }

    /// The refcount of cluster number `cluster`.
    pub fn get(&mut self, cluster: u64) -> Result<u64> {
        let Some((slice, first)) = self.slice_of(cluster)? else { return Ok(0) };
        let bytes = self.cache.get(slice).unwrap_or_default();
        Ok(get_in(bytes, self.order, (cluster - first) as usize))
    }

    /// The refcounts of the clusters from `first` on; 0 where one cannot be told.
    pub fn get_all(&mut self, first: u64, counts: &mut [u64]) {
        let mut done = 0;
        while done < counts.len() {
            let cluster = first + done as u64;
            let Ok(Some((slice, start))) = self.slice_of(cluster) else {
                // Without a block for this one, there may be one for the next.
                (counts[done], done) = (0, done + 1);
                continue;
            };
            let bytes = self.cache.get(slice).unwrap_or_default();
            let (from, total) = ((cluster - start) as usize, (bytes.len() * 8) >> self.order);
            let rest = &mut counts[done..];
            let here = rest.len().min(total - from);
            get_run(bytes, self.order, from, &mut rest[..here]);
            done += here;
        }
    }

    /// Sets the refcount of a cluster whose block exists.
    fn set(&mut self, cluster: u64, value: u64) -> Result<()> {
        let order = self.order;
        let slice = self.slice_of(cluster)?;
        let found = slice.and_then(|(at, first)| Some((self.cache.get_mut(at)?, first)));
        let (bytes, first) = found.ok_or_else(|| {
            Error::corrupt(format!("cluster {cluster} is used but has no refcount block"))
        })?;
        set_in(bytes, order, (cluster - first) as usize, value);
        if value == 0 {
            self.next_free = self.next_free.min(cluster);
            // What is free is nobody's place, for metadata neither. It seldom was: most of what becomes
            // free held data, and to look is cheaper than to keep all others out.
            let offset = cluster << self.cluster.bits();
            if self.metadata_map.holds(offset, 1) {
                self.metadata_map.remove(offset, 1);
            }
            // What is free is no place to go on packing.
            self.packed = self.packed.filter(|at| self.cluster.index(*at) != cluster);
        }
        Ok(())
    }

    /// Takes one reference away from each of `clusters` clusters. Returns those that are free now,
    /// as runs of host bytes.
    pub fn release(&mut self, host: HostOffset, clusters: u64) -> Result<Vec<(HostOffset, u64)>> {
        let first = self.cluster.index(host.0);
        self.storage.about_to(step::CLUSTER_FREE);
        let mut freed: Vec<(HostOffset, u64)> = Vec::new();
        for cluster in first..first + clusters {
            let count = self.get(cluster)?;
            let offset = cluster << self.cluster.bits();
            let left = count.checked_sub(1).ok_or_else(|| {
                Error::corrupt("a cluster that is in use has refcount 0: run check")
                    .at_offset(offset)
            })?;
            self.set(cluster, left)?;
            if left > 0 {
                continue;
            }
            match freed.last_mut() {
                Some((start, len)) if start.0 + *len == offset => *len += self.cluster.bytes(),
                _ => freed.push((HostOffset(offset), self.cluster.bytes())),
            }
        }
        Ok(freed)
    }

    /// Whether so much is dirty that it should be written.
    pub fn crowded(&self) -> bool {
        self.cache.crowded()
    }

    /// Hands out what has to be written. The caller writes blocks, a barrier, then the table.
    pub fn take_dirty(&mut self) -> DirtyRefcounts {
        let blocks = self.cache.take_dirty();
        let indices = std::mem::take(&mut self.dirty_table);
        if self.outgrown.is_empty() {
            let entry = |i: usize| (self.place.offset + i as u64 * 8, self.table[i]);
            let room = (u64::from(self.place.clusters) * self.cluster.bytes() / 8) as usize;
            let entries = indices.into_iter().filter(|i| *i < room).map(entry).collect();
            return DirtyRefcounts { blocks, entries, moved: None };
        }
        let bytes = encode(&self.table);
        let moved = MovedTable { place: self.place, bytes, outgrown: self.outgrown.len() };
        DirtyRefcounts { blocks, entries: Vec::new(), moved: Some(moved) }
    }

    /// What [`take_dirty`](Refcounts::take_dirty) gave out is in the file, the header included.
    /// Returns the outgrown tables, whose clusters may be released.
    pub fn written(&mut self, dirty: &DirtyRefcounts) -> Vec<TablePlace> {
        self.cache.written(&dirty.blocks);
        let outgrown = dirty.moved.as_ref().map_or(0, |m| m.outgrown);
        self.outgrown.drain(..outgrown).collect()
    }

    /// The clusters with a refcount in slice number `slice` of block number `block`, and their
    /// refcounts; `None` past the block's end.
    pub fn used_in_slice(&mut self, block: usize, slice: u64) -> Result<Option<Vec<(u64, u64)>>> {
        let mut counts = Vec::new();
        let Some(first) = self.slice_counts(block, slice, &mut counts)? else { return Ok(None) };
        Ok(Some((first..).zip(counts).filter(|(_, count)| *count != 0).collect()))
    }

    /// Makes `counts` the refcounts in slice number `slice` of block number `block`, and returns the
    /// cluster that the first of them counts; `None` past the block's end.
    pub fn slice_counts(
        &mut self,
        block: usize,
        slice: u64,
        counts: &mut Vec<u64>,
    ) -> Result<Option<u64>> {
        let per_slice = (self.slice_bytes() * 8) >> self.order;
        let first = slice * per_slice;
        if first >> self.block_bits() != 0 {
            return Ok(None);
        }
        let first = ((block as u64) << self.block_bits()) + first;
        let Some((offset, _)) = self.slice_of(first)? else { return Ok(None) };
        let bytes = self.cache.get(offset).unwrap_or_default();
        counts.resize(per_slice as usize, 0);
        get_run(bytes, self.order, 0, counts);
        Ok(Some(first))
    }

    /// The numbers of the clusters in which the refcounts themselves stand.
    pub fn own_clusters(&self) -> HashSet<u64> {
        let first = self.cluster.index(self.place.offset);
        let table = first..first.saturating_add(u64::from(self.place.clusters));
        let blocks = self.table.iter().filter(|o| **o != 0).map(|o| self.cluster.index(*o));
        table.chain(blocks).collect()
    }

    /// How many slices of blocks are kept in memory.
    pub fn capacity(&self) -> usize {
        self.cache.capacity()
    }

    /// Takes the blocks out of the table that count nothing but themselves. They are returned, and
    /// are to be released, where they are not their own, once the table is written without them.
    pub fn drop_empty_blocks(&mut self) -> Result<Vec<HostOffset>> {
        let mut elsewhere = Vec::new();
        for (index, offset) in self.blocks() {
            let own = self.cluster.index(offset);
            let (mut empty, mut within, mut slice) = (true, false, 0);
            while let Some(used) = self.used_in_slice(index, slice)? {
                empty &= used.iter().all(|(cluster, _)| *cluster == own);
                within |= used.iter().any(|(cluster, _)| *cluster == own);
                slice += 1;
            }
            if !empty {
                continue;
            }
            self.table[index] = 0;
            self.dirty_table.insert(index);
            self.cache.forget(offset..offset + self.cluster.bytes());
            self.metadata_map.remove(offset, self.cluster.bytes());
            if !within {
                elsewhere.push(HostOffset(offset));
            }
        }
        Ok(elsewhere)
    }

    /// The last cluster in use.
    pub fn last_used(&mut self) -> Result<Option<u64>> {
        for index in self.blocks().into_keys().rev() {
            let (mut last, mut slice) = (None, 0);
            while let Some(used) = self.used_in_slice(index, slice)? {
                last = used.last().map(|(cluster, _)| *cluster).or(last);
                slice += 1;
            }
            if last.is_some() {
                return Ok(last);
            }
        }
        Ok(None)
    }

    /// Whether a cluster has a refcount block, so that references to it can be counted.
    pub fn has_block(&self, cluster: u64) -> bool {
        self.block_of(cluster).is_some()
    }

    /// Whether the largest table that the format allows has an entry for a cluster.
    pub fn within_largest_table(&self, cluster: u64) -> bool {
        cluster >> self.block_bits() < MAX_REFCOUNT_TABLE / 8
    }

    /// Adds `more` references to a cluster that has a refcount block.
    pub fn add(&mut self, cluster: u64, more: u64) -> Result<()> {
        let sum = self.get(cluster)?.checked_add(more).filter(|sum| *sum <= self.max());
        let sum = sum.ok_or_else(|| {
            Error::corrupt("a refcount overflows").at_offset(cluster << self.cluster.bits())
        })?;
        self.set(cluster, sum)
    }

    /// Takes `less` references away; returns how many are left.
    pub fn subtract(&mut self, cluster: u64, less: u64) -> Result<u64> {
        let left = self.get(cluster)?.checked_sub(less).ok_or_else(|| {
            Error::corrupt("a cluster has fewer refcounts than references: run check")
                .at_offset(cluster << self.cluster.bits())
        })?;
        self.set(cluster, left)?;
        Ok(left)
    }

    /// How many blocks the table has room for.
    pub fn table_entries(&self) -> u64 {
        self.table.len() as u64
    }

    /// Whether all blocks, which are written, can stand where the table says.
    pub fn check_blocks(&self) -> Result<()> {
        let len = self.cluster.ceil(self.storage.len()?);
        let outside = |offset: u64| {
            !self.cluster.aligned(offset)
                || offset.checked_add(self.cluster.bytes()).is_none_or(|end| end > len)
        };
        match self.blocks().into_values().find(|offset| outside(*offset)) {
            None => Ok(()),
            Some(offset) => {
                let message = "a refcount block cannot stand where the refcount table says";
                Err(Error::corrupt(message).at_offset(offset))
            }
        }
    }

    /// Host offsets of the refcount blocks by index.
    pub fn blocks(&self) -> BTreeMap<usize, u64> {
        self.table.iter().copied().enumerate().filter(|(_, o)| *o != 0).collect()
    }
}
