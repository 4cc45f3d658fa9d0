//! The active L1 table and the cached slices of L2 tables.
//!
//! Changes stay in memory; [`Tables::take_dirty`] hands out what has to reach the file. This file
//! knows no refcount. Specification: qcow2, "Cluster mapping".

pub(in crate::qcow2) mod cache;
pub(in crate::qcow2) mod entry;
pub(in crate::qcow2) mod slice;
pub(in crate::qcow2) mod words;

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;

use crate::addr::{GuestOffset, HostOffset, Unit};
use crate::error::{Error, Result};
use crate::image::Mapping;
use crate::qcow2::header::Header;
use crate::qcow2::tables::cache::{Cache, Dirty, SLICE};
use crate::qcow2::tables::entry::{COPIED, Entry, OFFSET, Shape};
use crate::qcow2::tables::words::{decode, encode};
use crate::storage::Storage;

/// L1 and what is cached of L2.
pub(in crate::qcow2) struct Tables {
    shape: Shape,
    /// Guest bytes that one L2 table maps.
    coverage: Unit,
    /// Guest bytes that one slice maps.
    slice_coverage: Unit,
    /// Bytes of a slice.
    slice: Unit,
    /// Bytes of an entry.
    entry: Unit,
    l1: Vec<u64>,
    l1_offset: u64,
    dirty_l1: BTreeSet<usize>,
    /// L2 tables that no L1 entry in the file points to yet.
    unpublished: HashSet<u64>,
    pub cache: Cache,
}

/// Where one guest cluster's L2 entry stands.
#[derive(Debug, Clone, Copy)]
pub(in crate::qcow2) struct Place {
    /// Host offset of the slice that holds it.
    pub slice: u64,
    /// Its number in the slice.
    pub index: usize,
}

/// An L2 table as an L1 entry names it.
#[derive(Debug, Clone, Copy)]
pub(in crate::qcow2) struct Table {
    pub host: HostOffset,
    /// Whether nothing else refers to it, so that it may be changed in place.
    pub exclusive: bool,
}

/// What has to be written, in this order, with barriers between the parts.
pub(in crate::qcow2) struct DirtyTables {
    /// Slices of tables that nothing points to yet.
    pub unpublished: Vec<Dirty>,
    /// Slices of tables that are in use.
    pub published: Vec<Dirty>,
    /// Host offset and value of changed L1 entries.
    pub l1: Vec<(u64, u64)>,
}

impl Tables {
    /// Reads the active L1 table. `capacity` is the number of cached L2 slices.
    pub fn open(storage: &dyn Storage, header: &Header, capacity: usize) -> Result<Tables> {
        let shape = Shape::of(header);
        let slice = Unit::from_bits(shape.cluster.bits().min(SLICE.ilog2()));
        let entry = Unit::from_bits(shape.entry_bytes().ilog2());
        let entries = slice.bits() - entry.bits();
        Ok(Tables {
            shape,
            coverage: header.l2_coverage(),
            slice_coverage: Unit::from_bits(shape.cluster.bits() + entries),
            slice,
            entry,
            l1: read_l1(storage, header)?,
            l1_offset: header.l1_offset,
            dirty_l1: BTreeSet::new(),
            unpublished: HashSet::new(),
            cache: Cache::new(capacity),
        })
    }

    /// The bytes of a slice.
    pub fn slice_bytes(&self) -> u64 {
        self.slice.bytes()
    }

    /// The L2 table that maps `at`; `None` where none is allocated.
    #[inline]
    pub fn table(&self, at: GuestOffset) -> Result<Option<Table>> {
        let index = self.coverage.index(at.0) as usize;
        let Some(entry) = self.l1.get(index) else { return Err(self.l1_too_small()) };
        let host = entry & OFFSET;
        if !self.shape.cluster.aligned(host) {
            return Err(unaligned_table(index, host));
        }
        let table = Table { host: HostOffset(host), exclusive: entry & COPIED != 0 };
        Ok((host != 0).then_some(table))
    }

    #[cold]
    fn l1_too_small(&self) -> Error {
        Error::corrupt("the L1 table is too small for the disk").at_offset(self.l1_offset)
    }

    /// Where the L2 entry of `at` stands; `None` without an L2 table.
    #[inline]
    pub fn place(&self, at: GuestOffset) -> Result<Option<Place>> {
        Ok(self.table(at)?.map(|table| self.place_in(table, at)))
    }

    /// Where the L2 entry of `at` stands in its table.
    #[inline]
    pub fn place_in(&self, table: Table, at: GuestOffset) -> Place {
        // Looked up for every request: shifts and masks, no division.
        let entry = self.shape.cluster.index(self.coverage.within(at.0)) << self.entry.bits();
        let index = self.entry.index(self.slice.within(entry)) as usize;
        Place { slice: table.host.0 + self.slice.floor(entry), index }
    }

    /// Refuses L1 entries that name the same few L2 tables over and over: a file of a megabyte could
    /// make a disk whose extents nobody lives to walk. No program makes such an image.
    pub fn refuse_repeated(&self) -> Result<()> {
        /// Mapped clusters that may be mapped by a table that has its turn already.
        const MOST: u64 = 1 << 24;
        let per_table = self.coverage.bytes() >> self.shape.cluster.bits();
        let used = self.l1.iter().filter(|entry| *entry & OFFSET != 0).count() as u64;
        if used.saturating_mul(per_table) <= MOST {
            return Ok(());
        }
        let mut tables: Vec<u64> = self.l1.iter().map(|entry| entry & OFFSET).collect();
        tables.sort_unstable();
        tables.dedup();
        let different = tables.iter().filter(|offset| **offset != 0).count() as u64;
        if (used - different).saturating_mul(per_table) <= MOST {
            return Ok(());
        }
        let message = format!(
            "{used} L1 entries share {different} L2 tables: the disk maps more than any file holds"
        );
        Err(Error::corrupt(message).at_offset(self.l1_offset))
    }

    /// The host offsets of all L2 tables, in order; more than once where one of several entries
    /// claims the table for itself.
    pub fn offsets(&self) -> impl Iterator<Item = u64> {
        let mut found: Vec<u64> = self.l1.iter().map(|entry| entry & (OFFSET | COPIED)).collect();
        found.sort_unstable_by_key(|entry| entry.rotate_left(1));
        // A table that is copied before it changes may have several entries.
        found.dedup_by(|a, b| a == b && *a & COPIED == 0);
        found.into_iter().map(|entry| entry & OFFSET).filter(|offset| *offset != 0)
    }

    /// How far the part of the disk goes that has no L2 table, from `at` on; at most `len` bytes.
    pub fn unmapped(&self, at: GuestOffset, len: u64) -> u64 {
        let index = self.coverage.index(at.0) as usize;
        let most = self.coverage.count(self.coverage.within(at.0).saturating_add(len)) as usize;
        let entries = self.l1.iter().skip(index).take(most);
        let empty = entries.take_while(|e| **e & OFFSET == 0).count() as u64;
        let end = (index as u64 + empty).saturating_mul(self.coverage.bytes());
        (end - at.0).min(len)
    }

    /// Bytes of the disk from `at` to the end of what its slice maps.
    pub fn left_in_slice(&self, at: GuestOffset) -> u64 {
        self.slice_coverage.bytes() - self.slice_coverage.within(at.0)
    }

    /// The entry of `at`, in a slice that is in the cache at `place`, and how far from there, at most `len`
    /// bytes and within the slice, the disk is mapped in one way.
    #[inline]
    pub fn scan(
        &self,
        slice: &[u8],
        place: Place,
        at: GuestOffset,
        len: u64,
    ) -> Result<(u64, Entry)> {
        let first = self.shape.get(slice, place.index);
        let unit = self.shape.granularity();
        let mut done = unit.bytes() - unit.within(at.0);
        // Most requests are small and end here.
        if len <= done {
            return Ok((len, first));
        }
        let len = len.min(self.left_in_slice(at));
        let mapped = self.shape.mapping(first, at.0)?;
        let goes_on = |done: u64| {
            let pos = at.0 + done;
            let clusters = self.shape.cluster.index(pos) - self.shape.cluster.index(at.0);
            let entry = self.shape.get(slice, place.index + clusters as usize);
            Ok::<bool, Error>(continues(mapped, done, self.shape.mapping(entry, pos)?))
        };
        while done < len && goes_on(done)? {
            done = (done + unit.bytes()).min(len);
        }
        Ok((done, first))
    }

    /// Points the L1 entry for `at` to a new L2 table that is not in use yet.
    pub fn install(&mut self, at: GuestOffset, host: HostOffset) {
        let index = self.coverage.index(at.0) as usize;
        self.l1[index] = host.0 | COPIED;
        self.dirty_l1.insert(index);
        self.unpublished.insert(host.0);
    }

    /// The bytes of an L1 table with room for `entries`, this one's in front.
    pub fn grown_l1(&self, entries: usize) -> Vec<u8> {
        let mut l1 = self.l1.clone();
        l1.resize(entries, 0);
        encode(&l1)
    }

    /// The L1 table stands at `host` now, all of it written.
    pub fn replace_l1(&mut self, host: HostOffset, entries: usize) {
        self.l1.resize(entries, 0);
        self.l1_offset = host.0;
    }

    /// The L1 table's bytes in the file were changed.
    pub fn replace_l1_entries(&mut self, bytes: &[u8]) {
        self.l1 = decode(bytes);
    }

    /// Takes the L1 table that `header` names, and forgets all L2 tables: the file holds all there
    /// is to know.
    pub fn reload(&mut self, storage: &dyn Storage, header: &Header) -> Result<()> {
        self.l1 = read_l1(storage, header)?;
        self.l1_offset = header.l1_offset;
        self.shape = Shape::of(header);
        self.dirty_l1.clear();
        self.unpublished.clear();
        self.cache.forget(0..u64::MAX);
        Ok(())
    }

    /// Makes the L1 table in memory reach to `entries`, with nothing mapped: a snapshot's table may
    /// be shorter than its disk.
    pub fn pad_l1(&mut self, entries: usize) {
        self.l1.resize(self.l1.len().max(entries), 0);
    }

    /// Whether the file's L1 table is this one.
    pub fn l1_is_written(&self) -> bool {
        self.dirty_l1.is_empty()
    }

    /// The entry at `place`, whose slice is `slice`.
    pub fn entry_in(&self, slice: &[u8], place: Place) -> Entry {
        self.shape.get(slice, place.index)
    }

    /// Hands out what has to be written; nothing is dirty afterwards.
    pub fn take_dirty(&mut self) -> DirtyTables {
        let cluster = self.shape.cluster;
        let unpublished = std::mem::take(&mut self.unpublished);
        let (new, old) = self
            .cache
            .take_dirty()
            .into_iter()
            .partition(|d| unpublished.contains(&cluster.floor(d.offset)));
        let l1 = std::mem::take(&mut self.dirty_l1);
        let l1 = l1.into_iter().map(|i| (self.l1_offset + i as u64 * 8, self.l1[i])).collect();
        DirtyTables { unpublished: new, published: old, l1 }
    }

    /// What was handed out is in the file.
    pub fn written(&mut self, dirty: &DirtyTables) {
        self.cache.written(&dirty.unpublished);
        self.cache.written(&dirty.published);
    }

    /// Forgets a table whose clusters are given another use.
    pub fn forget(&mut self, range: Range<u64>) {
        self.cache.forget(range);
    }
}

fn read_l1(storage: &dyn Storage, header: &Header) -> Result<Vec<u64>> {
    let mut raw = vec![0; header.l1_size as usize * 8];
    let offset = header.l1_offset;
    storage.read_exact_at(offset, &mut raw).map_err(|e| e.at_offset(offset))?;
    Ok(decode(&raw))
}

#[cold]
fn unaligned_table(index: usize, host: u64) -> Error {
    let message = format!("L1 entry {index} points at an unaligned L2 table");
    Error::corrupt(message).at_offset(host)
}

/// Whether the mapping `next`, `done` bytes after `first`, carries it on.
fn continues(first: Mapping, done: u64, next: Mapping) -> bool {
    match (first, next) {
        (Mapping::Data { host: a, exclusive: x }, Mapping::Data { host: b, exclusive: y }) => {
            x == y && a.checked_add(done) == Some(b)
        }
        (Mapping::Zero { host: Some(a) }, Mapping::Zero { host: Some(b) }) => {
            a.checked_add(done) == Some(b)
        }
        (Mapping::Compressed { .. }, Mapping::Compressed { .. }) => false,
        (a, b) => a == b,
    }
}
