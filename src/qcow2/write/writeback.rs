//! The order in which changed metadata reaches the file.
//!
//! After a crash at any point there are leaks at most, and everything that was flushed is there:
//!
//! 1. refcount blocks, and L2 tables that nothing points to yet (the data is written already);
//!    then refcount table entries, or a table that moved and the header that points to it;
//! 2. a barrier;
//! 3. L2 tables in use, and L1 entries;
//! 4. a barrier;
//! 5. only now do the clusters that lost their last reference become free.

use std::io::IoSlice;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use crate::addr::HostOffset;
use crate::error::Result;
use crate::qcow2::guard::lock;
use crate::qcow2::image::{Freed, Image, Lost};
use crate::qcow2::refcount::{DirtyRefcounts, MovedTable, TablePlace};
use crate::qcow2::step;
use crate::qcow2::tables::DirtyTables;
use crate::qcow2::tables::cache::Dirty;
use crate::storage::Step;

impl Image {
    /// Makes everything durable that was changed before the call.
    pub(in crate::qcow2) fn write_back(&self) -> Result<()> {
        self.write_back_under(&lock(&self.writeback))
    }

    /// Like [`write_back`](Image::write_back), for a caller that keeps others out.
    pub(in crate::qcow2) fn write_back_under(&self, _only: &MutexGuard<'_, ()>) -> Result<()> {
        // Whoever had the lock before may have failed, with changes of this caller's in its hands.
        self.check_writable()?;
        // The tables have let go of these by now, and what the tables refer to is counted by now.
        let freed = std::mem::take(&mut lock(&self.freed).waiting);
        self.freed_bytes.store(0, Ordering::Relaxed);
        let tables = self.tables.write().take_dirty();
        let refcounts = lock(&self.refcounts).take_dirty();
        // A failed sync poisons, too: the host may have dropped what it could not write, and the
        // next sync would succeed without it.
        self.metadata(|| self.write_in_order(&tables, &refcounts))?;
        self.tables.write().written(&tables);
        lock(&self.freed).ready.extend(freed);
        let outgrown = lock(&self.refcounts).written(&refcounts);
        for TablePlace { offset, clusters } in outgrown {
            lock(&self.refcounts).release(HostOffset(offset), u64::from(clusters))?;
        }
        Ok(())
    }

    fn write_in_order(&self, tables: &DirtyTables, refcounts: &DirtyRefcounts) -> Result<()> {
        self.write_slices(&[step::REFBLOCK_UPDATE], &refcounts.blocks)?;
        self.write_slices(&[step::L2_ALLOC[1], step::L2_UPDATE], &tables.unpublished)?;
        if let Some(moved) = &refcounts.moved {
            self.move_refcount_table(moved)?;
        } else if !refcounts.entries.is_empty() {
            self.storage.sync()?;
            self.write_entries(step::REFBLOCK_HOOKUP, &refcounts.entries)?;
        }
        self.data.sync_external()?;
        self.storage.sync()?;
        if tables.published.is_empty() && tables.l1.is_empty() {
            return Ok(());
        }
        self.write_slices(&[step::L2_UPDATE], &tables.published)?;
        self.write_entries(step::L1_UPDATE, &tables.l1)?;
        self.storage.sync()
    }

    fn move_refcount_table(&self, moved: &MovedTable) -> Result<()> {
        self.storage.about_to(step::REFBLOCK_TABLE[0]);
        self.storage.write_all_at(moved.place.offset, &moved.bytes)?;
        self.storage.sync()?;
        self.storage.about_to(step::REFBLOCK_TABLE[1]);
        self.update_header(|header| {
            header.refcount_table_offset = moved.place.offset;
            header.refcount_table_clusters = moved.place.clusters;
        })
    }

    /// Writes slices in as few calls as their neighbourhood allows.
    fn write_slices(&self, steps: &[Step], slices: &[Dirty]) -> Result<()> {
        let adjoins = |a: &Dirty, b: &Dirty| a.offset + a.bytes.len() as u64 == b.offset;
        for run in slices.chunk_by(adjoins) {
            let bufs: Vec<_> = run.iter().map(|d| IoSlice::new(&d.bytes)).collect();
            if let Some(first) = run.first() {
                steps.iter().for_each(|step| self.storage.about_to(*step));
                self.storage.write_at(first.offset, &bufs)?;
            }
        }
        Ok(())
    }

    fn write_entries(&self, step: Step, entries: &[(u64, u64)]) -> Result<()> {
        for run in entries.chunk_by(|a, b| a.0 + 8 == b.0) {
            let bytes: Vec<u8> = run.iter().flat_map(|(_, value)| value.to_be_bytes()).collect();
            if let Some((offset, _)) = run.first() {
                self.storage.about_to(step);
                self.storage.write_all_at(*offset, &bytes)?;
            }
        }
        Ok(())
    }

    /// Gives clusters to the allocator that nothing in the file refers to any more.
    pub(in crate::qcow2) fn release_freed(&self) -> Result<()> {
        let ready = std::mem::take(&mut lock(&self.freed).ready);
        if ready.is_empty() {
            return Ok(());
        }
        // Whoever mapped these clusters before they were let go is done when this is granted, and
        // nobody can map them now.
        drop(self.grace.write());
        lock(&self.inflated).clear();
        for Freed { host, clusters, what } in ready {
            let range = host.0..host.0 + (clusters << self.shape.cluster.bits());
            if what == Lost::Table {
                self.tables.write().forget(range.clone());
            }
            if what == Lost::Discarded && self.unshared(host, clusters)? {
                // Space that cannot be given back is only space.
                let _ = self.storage.punch_hole(range.start, range.end - range.start);
            }
            lock(&self.refcounts).release(host, clusters)?;
        }
        Ok(())
    }

    /// Whether each of the clusters has its last reference.
    fn unshared(&self, host: HostOffset, clusters: u64) -> Result<bool> {
        let mut refcounts = lock(&self.refcounts);
        let first = self.shape.cluster.index(host.0);
        for cluster in first..first + clusters {
            if refcounts.get(cluster)? != 1 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
