//! Zero clusters become what version 2 can say: nothing where no layer stands below, else data.

use super::{AmendPart, AmendProgress, Watch};
use crate::addr::HostOffset;
use crate::error::{Error, Result};
use crate::qcow2::guard::lock;
use crate::qcow2::image::Image;
use crate::qcow2::snapshot::Snapshot;
use crate::qcow2::tables::entry::{COPIED, Entry, Kind, OFFSET};

impl Image {
    /// Rewrites all zero clusters of the disk and its snapshots. No subclusters.
    pub(super) fn expand_zero_clusters(
        &self,
        snapshots: &[Snapshot],
        watch: Watch<'_>,
    ) -> Result<()> {
        let header = self.header();
        let mut l1 = self.active_l1(&header)?;
        for one in snapshots {
            l1.extend(self.read_l1("Snapshot", one.l1_offset, one.l1_size)?);
        }
        // Progress is counted in entries of these tables.
        let (mut done, total) = (0, l1.len() as u64);
        let mut visited = |entries: u64| {
            for _ in 0..entries {
                done += 1;
                watch(AmendProgress { part: AmendPart::Downgrade, done, total });
            }
        };
        visited(l1.iter().filter(|entry| **entry & OFFSET == 0).count() as u64);
        let shape = self.shape;
        // Host clusters that zero entries kept, with the number of references to give back.
        let mut kept: Vec<(HostOffset, u32)> = Vec::new();
        self.each_l2(&l1, |l2| {
            for index in 0..self.l2_entries() {
                let old = shape.get(&l2.bytes, index);
                if shape.kind(old, 0)? != Kind::Zero {
                    continue;
                }
                let new = if header.backing.is_some() {
                    let host = self.zeroed_cluster(l2.times)?;
                    let flag = if l2.times == 1 { COPIED } else { 0 };
                    Entry { descriptor: host.0 | flag, bitmap: 0 }
                } else {
                    Entry::default()
                };
                shape.put(&mut l2.bytes, index, new);
                l2.changed = true;
                kept.extend(old.host().map(|host| (host, l2.times)));
            }
            // The clusters, and that they are in use, before the table that refers to them.
            if l2.changed {
                self.write_back()?;
            }
            visited(u64::from(l2.times));
            Ok(())
        })?;
        self.barrier()?;
        self.reload_tables()?;
        for (host, times) in kept {
            lock(&self.refcounts).subtract(shape.cluster.index(host.0), u64::from(times))?;
        }
        self.write_back()
    }

    /// A new cluster of zeroes to which `times` L2 entries will refer.
    fn zeroed_cluster(&self, times: u32) -> Result<HostOffset> {
        let cluster = self.shape.cluster;
        let mut refcounts = lock(&self.refcounts);
        let times = u64::from(times);
        if times > refcounts.max() {
            return Err(Error::invalid("a table has more references than a refcount can say"));
        }
        let run = refcounts.allocate(1)?;
        refcounts.add(cluster.index(run.host.0), times - 1)?;
        drop(refcounts);
        self.storage.write_zeroes(run.host.0, cluster.bytes())?;
        self.write_back_if_crowded()?;
        Ok(run.host)
    }
}
