//! Smaller tables and files.

use std::ops::Range;

use crate::error::Result;
use crate::qcow2::guard::lock;
use crate::qcow2::image::Image;
use crate::qcow2::step;

impl Image {
    /// Takes a range of L1 entries out of the active table, and frees what only they led to.
    pub(in crate::qcow2) fn drop_tables(&self, range: Range<usize>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.write_back_all()?;
        let header = self.header();
        let l1 = self.active_l1(&header)?;
        let gone = l1.get(range.clone()).unwrap_or_default();
        if gone.iter().all(|entry| *entry == 0) {
            return Ok(());
        }
        let less = self.references(gone)?;
        self.can_subtract(&less)?;
        let at = header.l1_offset + range.start as u64 * 8;
        self.metadata(|| {
            self.storage.about_to(step::L1_SHRINK[0]);
            self.storage.write_all_at(at, &vec![0; gone.len() * 8])?;
            self.storage.sync()
        })?;
        self.reload_tables()?;
        self.storage.about_to(step::L1_SHRINK[1]);
        let freed = self.take_references(&less)?;
        self.write_back()?;
        self.punch_freed(&freed);
        Ok(())
    }

    /// Drops refcount blocks that count nothing, and cuts the file after the last cluster in use.
    pub(in crate::qcow2) fn shorten_file(&self) -> Result<()> {
        self.write_back_all()?;
        let blocks = lock(&self.refcounts).drop_empty_blocks()?;
        self.write_back()?;
        for host in blocks {
            lock(&self.refcounts).release(host, 1)?;
        }
        self.write_back()?;
        let Some(last) = lock(&self.refcounts).last_used()? else { return Ok(()) };
        let end = (last + 1) << self.shape.cluster.bits();
        if end < self.storage.len()? {
            self.storage.set_len(end)?;
            self.data.shortened();
            self.barrier()?;
        }
        Ok(())
    }
}
