//! Reading the bytes of mapped extents: plain ones from the file, compressed ones inflated.
//!
//! Specification: qcow2, "Compressed Clusters Descriptor".

use std::io::IoSliceMut;
use std::sync::Arc;

use crate::addr::{GuestOffset, HostOffset};
use crate::block::fill_zero;
use crate::error::{Error, Result};
use crate::image::{Extent, Mapping};
use crate::qcow2::data::inflated::decompress;
use crate::qcow2::guard::lock;
use crate::qcow2::image::Image;
use crate::qcow2::refcount::Refcounts;
use crate::qcow2::step;

impl Image {
    /// See [`crate::image::Image::narrow`]. Only where much is mapped that was never written: else
    /// to ask the host is work without use.
    pub(in crate::qcow2) fn narrow_extent(&self, extent: Extent) -> Result<Extent> {
        let Mapping::Data { host, .. } = extent.mapping else { return Ok(extent) };
        if self.data.is_encrypted() || !*self.preallocated.get_or_init(|| self.is_preallocated()) {
            return Ok(extent);
        }
        let zero = |len: u64| {
            let mapping = Mapping::Zero { host: Some(HostOffset(host.0)) };
            Extent { len: len.min(extent.len), mapping, ..extent }
        };
        Ok(match self.data.storage().next_data(host.0)? {
            None => zero(extent.len),
            Some((data, _)) if data > host.0 => zero(data - host.0),
            Some((_, hole)) => {
                let len = hole.saturating_sub(host.0).max(1).min(extent.len);
                Extent { len, ..extent }
            }
        })
    }

    /// Whether clearly more clusters are in use than the host stores anything of.
    fn is_preallocated(&self) -> bool {
        let cluster = self.shape.cluster;
        let (Ok(len), Ok(bytes)) = (self.storage.len(), self.storage.allocated()) else {
            return false;
        };
        let clearly_more = |stored: u64| (stored.saturating_mul(10) / 9).max(stored + 2);
        // What the host stores is quickly told, and mostly says enough.
        let (least, mut used, mut counts) = (clearly_more(bytes >> cluster.bits()), 0, [0; 512]);
        // An image that is only read was opened without its refcounts.
        let capacity = lock(&self.refcounts).capacity();
        let mut own = match self.read_only {
            true => Refcounts::open(self.storage.clone(), &self.header(), capacity).ok(),
            false => None,
        };
        for first in (0..cluster.count(len)).step_by(counts.len()) {
            match &mut own {
                Some(own) => own.get_all(first, &mut counts),
                None => lock(&self.refcounts).get_all(first, &mut counts),
            }
            used += counts.iter().filter(|count| **count != 0).count() as u64;
        }
        used >= least && self.stored_clusters().is_ok_and(|stored| used >= clearly_more(stored))
    }

    /// How many clusters of the file hold anything.
    fn stored_clusters(&self) -> Result<u64> {
        let cluster = self.shape.cluster;
        let (mut stored, mut counted) = (0, 0);
        while let Some((start, end)) = self.storage.next_data(counted << cluster.bits())? {
            let first = cluster.index(start).max(counted);
            counted = cluster.count(end).max(first + 1);
            stored += counted - first;
        }
        Ok(stored)
    }

    pub(in crate::qcow2) fn read_extent(
        &self,
        extent: &Extent,
        at: GuestOffset,
        bufs: &mut [IoSliceMut<'_>],
    ) -> Result<()> {
        match extent.mapping {
            Mapping::Data { host, .. } => self.data.read(host + (at - extent.start), at, bufs),
            Mapping::Zero { .. } => {
                fill_zero(bufs);
                Ok(())
            }
            Mapping::Compressed { descriptor } => {
                let cluster = self.inflate(descriptor)?;
                let mut skip = self.shape.cluster.within(at.0) as usize;
                for buf in bufs {
                    let from = cluster.get(skip..skip + buf.len());
                    let from =
                        from.ok_or_else(|| Error::invalid("a read past a compressed cluster"))?;
                    buf.copy_from_slice(from);
                    skip += buf.len();
                }
                Ok(())
            }
            Mapping::Unallocated => Err(Error::invalid("a read of what this layer does not hold")),
        }
    }

    /// The whole cluster that a compressed descriptor stands for.
    pub(in crate::qcow2) fn inflate(&self, descriptor: u64) -> Result<Arc<[u8]>> {
        let kept = lock(&self.inflated).find(descriptor);
        if let Some(cluster) = kept {
            return Ok(cluster);
        }
        let (host, len) = self.shape.compressed(descriptor);
        let have = self.storage.len()?.saturating_sub(host.0).min(len);
        let mut packed = vec![0; have as usize];
        self.storage.about_to(step::READ_COMPRESSED);
        self.storage.read_exact_at(host.0, &mut packed)?;
        let size = self.shape.cluster.bytes() as usize;
        let compression = lock(&self.inflated).compression;
        let cluster: Arc<[u8]> =
            decompress(compression, &packed, size).map_err(|e| e.at_offset(host.0))?.into();
        lock(&self.inflated).keep(descriptor, cluster.clone());
        Ok(cluster)
    }
}
