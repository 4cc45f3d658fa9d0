//! Smaller images.

use std::ops::Range;
use std::sync::atomic::Ordering;

use nix::libc::ENOTSUP;

use super::image::{Image, lock};
use super::step;
use crate::addr::GuestOffset;
use crate::error::{Error, Result};

impl Image {
    /// Makes the disk `size` bytes long and gives back the clusters past that. What the last
    /// cluster holds past `size` stays: the caller has zeroed it.
    ///
    /// Nothing is done where refcounts could not be changed afterwards. Mappings go first: after a crash in between, the disk has its old size and nothing past the
    /// new one; none of what is lost comes back when it grows again.
    pub(super) fn shrink(&self, size: u64) -> Result<()> {
        self.write_back()?;
        lock(&self.refcounts).check_blocks()?;
        let header = self.header();
        let from = self.shape.cluster.ceil(size);
        if from < header.size {
            self.discard_range(GuestOffset(from), header.size - from, true)?;
        }
        let first = header.l1_needed(size).unwrap_or(0) as usize;
        self.drop_tables(first..header.l1_size as usize)?;
        self.update_header(|h| h.size = size)?;
        self.size.store(size, Ordering::Release);
        if self.data.is_external() {
            self.data.shrink(size)?;
        }
        self.shorten_file()
    }

    /// Takes a range of L1 entries out of the active table, and frees what only they led to.
    pub(super) fn drop_tables(&self, range: Range<usize>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.settle_changes()?;
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
    pub(super) fn shorten_file(&self) -> Result<()> {
        self.settle_changes()?;
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

    /// What the guest's disk may become: version 2 snapshots do not always say their disk's size.
    pub(super) fn check_resizable(&self) -> Result<()> {
        let header = self.header();
        if header.snapshots > 0 && header.version < 3 {
            let message = "Can't resize a v2 image which has snapshots";
            return Err(Error::unsupported(message).with_os_error(ENOTSUP));
        }
        Ok(())
    }
}
