//! The references that an L1 table makes: to L2 tables, and through them to data.
//!
//! Everything here reads tables from the file: the caller has written back what was changed, and
//! keeps others out. However many entries point at one L2 table, it is read once.

use std::collections::BTreeMap;

use nix::libc::{EAGAIN, EFBIG, EINVAL};

use crate::addr::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image as _;
use crate::qcow2::check::counts::{Counted, Counts};
use crate::qcow2::guard::lock;
use crate::qcow2::header::{Header, MAX_L1};
use crate::qcow2::image::Image;
use crate::qcow2::tables::entry::{COPIED, OFFSET};
use crate::qcow2::tables::words::decode;

/// An L2 table as it stands in the file.
pub(in crate::qcow2) struct L2 {
    pub host: HostOffset,
    /// How many of the L1 entries point to it.
    pub times: u32,
    pub bytes: Vec<u8>,
    /// Whether `bytes` were changed and are to be written.
    pub changed: bool,
}

impl Image {
    /// Reads the L1 table of `entries` entries at `offset`, which belongs to `whose`.
    pub(in crate::qcow2) fn read_l1(
        &self,
        whose: &str,
        offset: u64,
        entries: u32,
    ) -> Result<Vec<u64>> {
        let bytes = u64::from(entries) * 8;
        if bytes > MAX_L1 {
            let message = format!("{whose} L1 table too large");
            return Err(Error::corrupt(message).at_offset(offset).with_os_error(EFBIG));
        }
        let end = offset.checked_add(bytes).filter(|end| *end <= 1 << 56);
        if !self.shape.cluster.aligned(offset) || end.is_none() {
            let message = format!("{whose} L1 table offset invalid");
            return Err(Error::corrupt(message).at_offset(offset).with_os_error(EINVAL));
        }
        if end.is_some_and(|end| end > self.storage.len().unwrap_or(0)) {
            let message = format!("{whose} L1 table reaches past the end of the file");
            return Err(Error::corrupt(message).at_offset(offset).with_os_error(EINVAL));
        }
        let mut raw = vec![0; bytes as usize];
        self.storage.read_exact_at(offset, &mut raw).map_err(|e| e.at_offset(offset))?;
        Ok(decode(&raw))
    }

    /// The active L1 table, from the file.
    pub(in crate::qcow2) fn active_l1(&self, header: &Header) -> Result<Vec<u64>> {
        self.read_l1("Active", header.l1_offset, header.l1_size)
    }

    /// Shows each L2 table that `l1` points to, and writes those back that `look` marks as changed.
    pub(in crate::qcow2) fn each_l2(
        &self,
        l1: &[u64],
        mut look: impl FnMut(&mut L2) -> Result<()>,
    ) -> Result<()> {
        let mut tables: BTreeMap<u64, u32> = BTreeMap::new();
        for host in l1.iter().map(|entry| entry & OFFSET).filter(|host| *host != 0) {
            let times = tables.entry(host).or_default();
            *times = times.saturating_add(1);
        }
        let cluster = self.shape.cluster;
        let mut bytes = vec![0; cluster.bytes() as usize];
        for (host, times) in tables {
            if !cluster.aligned(host) {
                let message = "an L1 entry points at an unaligned L2 table";
                return Err(Error::corrupt(message).at_offset(host));
            }
            self.storage.read_exact_at(host, &mut bytes).map_err(|_| {
                Error::corrupt("an L2 table lies past the end of the file").at_offset(host)
            })?;
            let mut l2 = L2 { host: HostOffset(host), times, bytes, changed: false };
            look(&mut l2)?;
            if l2.changed {
                self.metadata(|| self.storage.write_all_at(host, &l2.bytes))?;
            }
            bytes = l2.bytes;
        }
        Ok(())
    }

    /// Entries of one L2 table.
    pub(in crate::qcow2) fn l2_entries(&self) -> usize {
        (self.shape.cluster.bytes() / self.shape.entry_bytes()) as usize
    }

    /// How often `l1` refers to each host cluster, as far as clusters with a refcount go.
    pub(in crate::qcow2) fn references(&self, l1: &[u64]) -> Result<Counted> {
        let cluster = self.shape.cluster;
        let mut counts = Counts::default();
        self.each_l2(l1, |l2| {
            self.count(&mut counts, l2.host.0, 1, l2.times)?;
            if self.shape.external {
                // Clusters of a data file have no refcount.
                return Ok(());
            }
            for index in 0..self.l2_entries() {
                let entry = self.shape.get(&l2.bytes, index);
                if entry.is_compressed() {
                    let (host, len) = self.shape.compressed(entry.descriptor);
                    let first = cluster.floor(host.0);
                    let clusters = cluster.count(host.0 + len - first);
                    self.count(&mut counts, first, clusters, l2.times)?;
                } else if let Some(host) = entry.host() {
                    if !cluster.aligned(host.0) {
                        let message = "an L2 entry points at an unaligned cluster";
                        return Err(Error::corrupt(message).at_offset(host.0));
                    }
                    self.count(&mut counts, host.0, 1, l2.times)?;
                }
            }
            Ok(())
        })?;
        Ok(counts.finish())
    }

    fn count(&self, counts: &mut Counts, host: u64, clusters: u64, times: u32) -> Result<()> {
        let first = self.shape.cluster.index(host);
        let refcounts = lock(&self.refcounts);
        for cluster in first..first + clusters {
            if !refcounts.has_block(cluster) {
                // The numbers are those that QEMU gives where it would first make a block.
                let near = refcounts.within_largest_table(cluster);
                let message = "an entry points at a cluster that has no refcount: run check";
                let error = Error::corrupt(message).at_offset(host);
                return Err(error.with_os_error(if near { EAGAIN } else { EFBIG }));
            }
            counts.add(cluster, times);
        }
        Ok(())
    }

    /// Whether all references in `more` can be added to what the refcounts say now.
    pub(in crate::qcow2) fn can_add(&self, more: &Counted) -> Result<()> {
        let mut refcounts = lock(&self.refcounts);
        let max = refcounts.max();
        for (cluster, count) in more.used() {
            let sum = refcounts.get(cluster)?.checked_add(count);
            if sum.is_none_or(|sum| sum > max) {
                let message = "one more reference to a cluster does not fit into its refcount: \
                               `amend` with more refcount bits makes room";
                let offset = cluster << self.shape.cluster.bits();
                let error = Error::new(ErrorKind::Invalid, message).at_offset(offset);
                return Err(error.with_os_error(EINVAL));
            }
        }
        Ok(())
    }

    /// Whether all references in `less` are counted.
    pub(in crate::qcow2) fn can_subtract(&self, less: &Counted) -> Result<()> {
        let mut refcounts = lock(&self.refcounts);
        for (cluster, count) in less.used() {
            if refcounts.get(cluster)? < count {
                let message = "a cluster has fewer refcounts than references: run check";
                let offset = cluster << self.shape.cluster.bits();
                return Err(Error::corrupt(message).at_offset(offset).with_os_error(EINVAL));
            }
        }
        Ok(())
    }

    /// Adds references that [`can_add`](Image::can_add) found room for.
    pub(in crate::qcow2) fn add_references(&self, more: &Counted) -> Result<()> {
        for (cluster, count) in more.used() {
            lock(&self.refcounts).add(cluster, count)?;
            self.write_back_if_crowded()?;
        }
        Ok(())
    }

    /// Takes references away that nothing in the file makes any more; returns the clusters that
    /// are free now, in runs of host bytes.
    pub(in crate::qcow2) fn take_references(
        &self,
        less: &Counted,
    ) -> Result<Vec<(HostOffset, u64)>> {
        let bytes = self.cluster().bytes();
        let mut freed: Vec<(HostOffset, u64)> = Vec::new();
        for (cluster, count) in less.used() {
            let left = lock(&self.refcounts).subtract(cluster, count)?;
            self.write_back_if_crowded()?;
            if left > 0 {
                continue;
            }
            let host = cluster * bytes;
            match freed.last_mut() {
                Some((start, len)) if start.0 + *len == host => *len += bytes,
                _ => freed.push((HostOffset(host), bytes)),
            }
        }
        Ok(freed)
    }

    /// Gives the space of free clusters back to the host; that it can is not sure.
    pub(in crate::qcow2) fn punch_freed(&self, freed: &[(HostOffset, u64)]) {
        for (host, len) in freed {
            let _ = self.storage.punch_hole(host.0, *len);
        }
    }

    /// Gives the COPIED flags in `l1` and in the L2 tables below it the value that `exclusive` says
    /// of the cluster, writes the changed L2 tables, and returns whether `l1` was changed.
    pub(in crate::qcow2) fn flag_tables(
        &self,
        l1: &mut [u64],
        exclusive: impl Fn(u64) -> Result<bool>,
    ) -> Result<bool> {
        let cluster = self.shape.cluster;
        self.each_l2(l1, |l2| {
            for index in 0..if self.shape.external { 0 } else { self.l2_entries() } {
                let mut entry = self.shape.get(&l2.bytes, index);
                let Some(host) = entry.host().filter(|h| cluster.aligned(h.0)) else { continue };
                if entry.exclusive() != exclusive(cluster.index(host.0))? {
                    entry.descriptor ^= COPIED;
                    self.shape.put(&mut l2.bytes, index, entry);
                    l2.changed = true;
                }
            }
            Ok(())
        })?;
        let mut changed = false;
        for entry in l1.iter_mut().filter(|entry| **entry & OFFSET != 0) {
            let want = exclusive(cluster.index(*entry & OFFSET))?;
            if (*entry & COPIED != 0) != want {
                *entry ^= COPIED;
                changed = true;
            }
        }
        Ok(changed)
    }

    /// Whether a cluster's refcount is exactly one.
    pub(in crate::qcow2) fn is_exclusive(&self, cluster: u64) -> Result<bool> {
        Ok(lock(&self.refcounts).get(cluster)? == 1)
    }
}
