//! Another refcount width: new blocks and a new table, built beside the old ones.
//!
//! One write of the header makes them the image's refcounts; before it, they are clusters that
//! nothing refers to. Specification: qcow2, "Host cluster management".

use std::collections::BTreeMap;

use nix::libc::{EFBIG, EINVAL};

use super::super::header::MAX_REFCOUNT_TABLE;
use super::super::image::{Image, lock};
use super::super::refcount::{Refcounts, Run};
use super::super::refcount_bits::{max_refcount, set_in};
use crate::addr::HostOffset;
use crate::error::{Error, ErrorKind, Result};

/// Clusters for the new structures, counted by the old ones.
#[derive(Default)]
struct Site {
    /// Host offsets of the clusters for blocks.
    blocks: Vec<u64>,
    table: Option<Run>,
}

impl Image {
    /// Makes all refcounts `bits` wide. Nothing else is changed in memory.
    pub(super) fn change_refcount_width(&mut self, bits: u32) -> Result<()> {
        let order = bits.trailing_zeros();
        self.settle_changes()?;
        let old = self.header();
        let mut site = Site::default();
        let (indexes, table) = match self.prepare_site(&mut site, order) {
            Ok(prepared) => prepared,
            Err(error) => {
                self.give_site_back(&site);
                return Err(error);
            }
        };
        // Making room may have added blocks of the old kind, or moved their table.
        let old_blocks = lock(&self.refcounts).blocks();
        self.metadata(|| {
            self.write_blocks(order, &site.blocks)?;
            self.write_refcount_table(&table, &indexes, &site.blocks)?;
            // The old structures stay right until the header lets go of them.
            self.write_back()?;
            self.update_header(|h| {
                h.refcount_order = order;
                h.refcount_table_offset = table.host.0;
                h.refcount_table_clusters = table.clusters as u32;
            })
        })?;
        let capacity = lock(&self.refcounts).capacity();
        let mut new = Refcounts::open(self.storage.clone(), &self.header(), capacity)?;
        new.territory = self.territory.clone();
        *lock(&self.refcounts) = new;
        for offset in old_blocks.into_values() {
            lock(&self.refcounts).release(HostOffset(offset), 1)?;
        }
        let clusters = u64::from(old.refcount_table_clusters);
        lock(&self.refcounts).release(HostOffset(old.refcount_table_offset), clusters)?;
        self.survey()?;
        self.write_back()
    }

    /// Finds room for table and blocks, which have to count themselves. Returns which blocks of the
    /// new width are needed, and the table's place.
    fn prepare_site(&self, site: &mut Site, order: u32) -> Result<(Vec<u64>, Run)> {
        let cluster = self.shape.cluster;
        loop {
            let used = self.blocks_needed(order)?;
            let entries = used.last().map_or(1, |last| last + 1);
            let clusters = cluster.count(entries * 8);
            if clusters << cluster.bits() > MAX_REFCOUNT_TABLE.max(cluster.bytes()) {
                let message = "the refcount table would be larger than the format allows";
                return Err(Error::invalid(message).with_os_error(EFBIG));
            }
            match site.table {
                Some(table) if table.clusters >= clusters => {
                    let (have, need) = (site.blocks.len(), used.len());
                    if have < need {
                        let run = lock(&self.refcounts).allocate_run((need - have) as u64)?;
                        let offsets = (0..run.clusters).map(|i| run.host.0 + (i << cluster.bits()));
                        site.blocks.extend(offsets);
                    } else if let Some(spare) = site.blocks.pop_if(|_| have > need) {
                        lock(&self.refcounts).release(HostOffset(spare), 1)?;
                    } else {
                        return Ok((used, table));
                    }
                }
                small => {
                    if let Some(table) = small {
                        site.table = None;
                        lock(&self.refcounts).release(table.host, table.clusters)?;
                    }
                    site.table = Some(lock(&self.refcounts).allocate(clusters)?);
                }
            }
        }
    }

    fn give_site_back(&self, site: &Site) {
        let mut refcounts = lock(&self.refcounts);
        // If it fails, the clusters are leaked, which check mends.
        for offset in &site.blocks {
            let _ = refcounts.release(HostOffset(*offset), 1);
        }
        if let Some(table) = site.table {
            let _ = refcounts.release(table.host, table.clusters);
        }
    }

    /// Shows every cluster in use, in order, with its refcount.
    fn each_refcount(&self, mut look: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
        let blocks = lock(&self.refcounts).blocks();
        for index in blocks.into_keys() {
            for slice in 0.. {
                let Some(found) = lock(&self.refcounts).used_in_slice(index, slice)? else { break };
                found.into_iter().try_for_each(|(cluster, count)| look(cluster, count))?;
            }
        }
        Ok(())
    }

    /// log2 of the clusters that one block counts at this width.
    fn block_bits(&self, order: u32) -> u32 {
        self.shape.cluster.bits() + 3 - order
    }

    /// The numbers of the blocks that are needed at this width, in order.
    fn blocks_needed(&self, order: u32) -> Result<Vec<u64>> {
        let max = max_refcount(order);
        let mut needed = Vec::new();
        self.each_refcount(|cluster, count| {
            if count > max {
                let offset = cluster << self.shape.cluster.bits();
                let message = format!(
                    "Cannot decrease refcount entry width to {} bits: Cluster at offset {offset:#x} \
                     has a refcount of {count}",
                    1 << order
                );
                let error = Error::new(ErrorKind::Invalid, message).at_offset(offset);
                return Err(error.with_os_error(EINVAL));
            }
            let block = cluster >> self.block_bits(order);
            if needed.last() != Some(&block) {
                needed.push(block);
            }
            Ok(())
        })?;
        Ok(needed)
    }

    /// Writes the blocks with what the refcounts are now; their clusters are taken in order.
    fn write_blocks(&self, order: u32, places: &[u64]) -> Result<()> {
        let bits = self.block_bits(order);
        let mut blank = vec![0; self.shape.cluster.bytes() as usize];
        let mut places = places.iter();
        let mut current: Option<u64> = None;
        let mut write = |bytes: &mut Vec<u8>| {
            let place =
                places.next().ok_or_else(|| Error::corrupt("refcounts changed meanwhile"))?;
            self.storage.write_all_at(*place, bytes)?;
            bytes.fill(0);
            Ok(())
        };
        self.each_refcount(|cluster, count| {
            let block = cluster >> bits;
            if current.is_some_and(|now| now != block) {
                write(&mut blank)?;
            }
            current = Some(block);
            set_in(&mut blank, order, (cluster & ((1 << bits) - 1)) as usize, count);
            Ok(())
        })?;
        if current.is_some() { write(&mut blank) } else { Ok(()) }
    }

    fn write_refcount_table(&self, table: &Run, indexes: &[u64], places: &[u64]) -> Result<()> {
        let cluster = self.shape.cluster;
        let entries: BTreeMap<u64, u64> =
            indexes.iter().copied().zip(places.iter().copied()).collect();
        let count = table.clusters << cluster.bits() >> 3;
        let bytes: Vec<u8> = (0..count)
            .flat_map(|index| entries.get(&index).copied().unwrap_or(0).to_be_bytes())
            .collect();
        self.storage.write_all_at(table.host.0, &bytes)?;
        Ok(())
    }
}
