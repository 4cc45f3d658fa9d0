//! Host clusters that a write has reserved: filled, and then pointed to, or given back.
//!
//! It knows what was reserved, and not how it was found.

use std::io::IoSlice;

use crate::addr::{GuestOffset, HostOffset};
use crate::block::total;
use crate::error::{Error, Result};
use crate::image::Allocation;
use crate::qcow2::guard::lock;
use crate::qcow2::image::{Image, Lost};
use crate::qcow2::refcount::Run;
use crate::qcow2::tables::entry::{COPIED, Entry};
use crate::storage::Storage;

/// A guest range with host bytes that nothing refers to yet, or that its entries keep unused.
pub(in crate::qcow2) struct Reservation<'a> {
    pub image: &'a Image,
    pub start: GuestOffset,
    pub len: u64,
    /// Where the first byte of the range goes.
    pub host: HostOffset,
    /// The clusters to give back if the write does not happen; none where an entry keeps them.
    pub owned: Option<Run>,
    pub zeroed: bool,
}

impl Reservation<'_> {
    /// The host bytes that are reserved, to the end of their last cluster.
    pub(in crate::qcow2) fn place(&self) -> (HostOffset, u64) {
        (self.host, self.image.shape.cluster.ceil(self.len))
    }

    /// Whether the entries keep the clusters already.
    pub(in crate::qcow2) fn is_kept(&self) -> bool {
        self.owned.is_none()
    }

    /// Makes the entries keep the reserved clusters without reading anything from them. Entries with
    /// subclusters only.
    pub(in crate::qcow2) fn keep_unread(mut self) -> Result<()> {
        let image = self.image;
        let cluster = image.shape.cluster;
        let end = self.start.0 + self.len;
        for base in (cluster.floor(self.start.0)..end).step_by(cluster.bytes() as usize) {
            let into = base.saturating_sub(self.start.0);
            let host = cluster.floor(self.host.0 + into);
            self.owned = None;
            image.change_entry(GuestOffset(base), Lost::Data, |old| Entry {
                descriptor: host | COPIED,
                bitmap: old.bitmap,
            })?;
        }
        Ok(())
    }
}

impl Allocation for Reservation<'_> {
    fn start(&self) -> GuestOffset {
        self.start
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn reads_zero(&self) -> bool {
        self.zeroed
    }

    fn write(&self, skip: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        if skip.checked_add(total(bufs)).is_none_or(|end| end > self.len) {
            return Err(Error::invalid("a write past what was reserved for it"));
        }
        self.image.data.write(self.host + skip, self.start + skip, bufs)
    }

    fn share(&self, skip: u64, from: &dyn Storage, from_offset: u64, len: u64) -> Result<bool> {
        if skip.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Error::invalid("a write past what was reserved for it"));
        }
        self.image.data.share(self.host + skip, from, from_offset, len)
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        let (image, start, host) = (self.image, self.start.0, self.host.0);
        let (shape, cluster, size) = (image.shape, image.shape.cluster, image.size());
        let (first, end) = (cluster.floor(start), start + self.len);
        let mut clusters = 0..cluster.count(end - first);
        let done = image.change_entries(GuestOffset(first), &mut clusters, Lost::Data, |n, old| {
            let base = first + (n << cluster.bits());
            let (from, next) = (base.max(start), (base + cluster.bytes()).min(end));
            // The disk's last cluster may be cut short: the rest of it is the guest's as well.
            let to = if next == size { cluster.bytes() } else { next - base };
            let host = HostOffset(cluster.floor(host + (from - start)));
            shape.with_data(old, host, from - base, to)
        });
        if let Some(run) = &mut self.owned {
            // Entries refer to these now: a failure further on must not give them back.
            run.host = run.host + (clusters.start << cluster.bits());
            run.clusters = run.clusters.saturating_sub(clusters.start);
        }
        done?;
        self.owned = None;
        Ok(())
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if let Some(run) = self.owned.take() {
            // If it fails, the clusters are leaked, which check mends.
            let _ = lock(&self.image.refcounts).release(run.host, run.clusters);
        }
    }
}
