//! Giving back to the host what the file holds in free clusters.

use crate::addr::HostOffset;
use crate::error::Result;
use crate::qcow2::guard::lock;
use crate::qcow2::image::Image;

/// Clusters that are looked at under one lock: as many as keep writers waiting for a moment only.
const BATCH: u64 = 1024;

impl Image {
    /// Punches holes where clusters are free and the host stores something. While a batch is looked
    /// at, nobody can be given its clusters; whoever had them before is done with them, since only
    /// then did they become free.
    pub(in crate::qcow2) fn punch_free(&self) -> Result<()> {
        self.each_free(&mut |start, end| self.punch_if_stored(start, end))
    }

    /// Bytes that the host stores for free clusters.
    pub(in crate::qcow2) fn unused_bytes(&self) -> Result<u64> {
        let bits = self.shape.cluster.bits();
        let mut bytes = 0;
        self.each_free(&mut |start, end| {
            let (mut at, end) = (start << bits, end << bits);
            while let Some((from, to)) = self.storage.next_data(at)? {
                if from >= end || to <= at {
                    break;
                }
                bytes += to.min(end) - from;
                at = to;
            }
            Ok(())
        })?;
        Ok(bytes)
    }

    /// Calls `act` with the first and the end of each stretch of free clusters.
    fn each_free(&self, act: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<()> {
        let cluster = self.shape.cluster;
        let clusters = cluster.count(self.storage.len()?);
        for first in (0..clusters).step_by(BATCH as usize) {
            self.each_free_of(first, (first + BATCH).min(clusters), act)?;
        }
        Ok(())
    }

    fn each_free_of(
        &self,
        first: u64,
        end: u64,
        act: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let mut refcounts = lock(&self.refcounts);
        let mut at = first;
        while at < end {
            if !refcounts.has_block(at) || refcounts.get(at)? != 0 {
                at += 1;
                continue;
            }
            let start = at;
            while at < end && refcounts.has_block(at) && refcounts.get(at)? == 0 {
                at += 1;
            }
            act(start, at)?;
        }
        Ok(())
    }

    /// Punches the clusters from `start` to `end`, which are free, if anything is stored there.
    fn punch_if_stored(&self, start: u64, end: u64) -> Result<()> {
        let bits = self.shape.cluster.bits();
        let (from, len) = (start << bits, (end - start) << bits);
        // Metadata that is not counted: the refcounts are wrong, and check says so.
        if self.metadata_map.check(HostOffset(from), len).is_err() {
            return Ok(());
        }
        let stored = self.storage.next_data(from)?.is_some_and(|(data, _)| data < from + len);
        if stored { self.storage.punch_hole(from, len) } else { Ok(()) }
    }
}
