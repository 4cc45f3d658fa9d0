//! Another refcount width: new blocks and a new table, built beside the old ones.
//!
//! One write of the header makes them the image's refcounts; before it, they are clusters that
//! nothing refers to. Specification: qcow2, "Host cluster management".

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use nix::libc::{EFBIG, EINVAL};

use super::{AmendPart, AmendProgress, Watch};
use crate::addr::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::guard::lock;
use crate::qcow2::header::MAX_REFCOUNT_TABLE;
use crate::qcow2::image::Image;
use crate::qcow2::refcount::bits::{max_refcount, set_in};
use crate::qcow2::refcount::{Refcounts, Run};

/// Clusters for the new structures, counted by the old ones.
#[derive(Default)]
struct Site {
    /// Host offsets of the clusters for blocks, by the blocks' numbers.
    blocks: BTreeMap<u64, u64>,
    table: Option<Run>,
}

/// One walk over the old refcounts, of as many as are known to be needed.
#[derive(Clone, Copy)]
struct WalkNumber {
    number: u64,
    of: u64,
}

impl Image {
    /// Makes all refcounts `bits` wide. Nothing else is changed in memory.
    pub(super) fn change_refcount_width(&mut self, bits: u32, watch: Watch<'_>) -> Result<()> {
        let order = bits.trailing_zeros();
        self.write_back_all()?;
        let mut site = Site::default();
        let (table, walks) = match self.prepare_site(&mut site, order, watch) {
            Ok(prepared) => prepared,
            Err(error) => {
                self.give_site_back(&site);
                return Err(error);
            }
        };
        // Making room may have added blocks of the old kind, or moved their table.
        let old = self.header();
        let old_blocks = lock(&self.refcounts).blocks();
        self.metadata(|| {
            self.write_blocks(order, &site, WalkNumber { number: walks, of: walks + 1 }, watch)?;
            self.write_refcount_table(&table, &site)?;
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
        new.metadata_map = self.metadata_map.clone();
        *lock(&self.refcounts) = new;
        for offset in old_blocks.into_values() {
            lock(&self.refcounts).release(HostOffset(offset), 1)?;
        }
        let clusters = u64::from(old.refcount_table_clusters);
        lock(&self.refcounts).release(HostOffset(old.refcount_table_offset), clusters)?;
        self.map_metadata()?;
        self.write_back()
    }

    /// Finds room for blocks and table, which have to count themselves: it walks until a walk finds
    /// nothing missing. Returns the table's place and the number of walks.
    fn prepare_site(&self, site: &mut Site, order: u32, watch: Watch<'_>) -> Result<(Run, u64)> {
        let cluster = self.shape.cluster;
        let max = max_refcount(order);
        for walk in 0.. {
            let mut found_all = true;
            // One walk finds room, one that all have it, one writes.
            let number = WalkNumber { number: walk, of: (walk + 2).max(3) };
            self.each_refcount(number, watch, |number, count| {
                if count > max {
                    return Err(self.too_wide(number, count, order));
                }
                let block = number >> self.block_bits(order);
                if let Entry::Vacant(place) = site.blocks.entry(block) {
                    place.insert(lock(&self.refcounts).allocate(1)?.host.0);
                    found_all = false;
                }
                Ok(())
            })?;
            if let Some(table) = site.table.filter(|_| found_all) {
                return Ok((table, walk + 1));
            }
            if let Some(small) = site.table.take() {
                lock(&self.refcounts).release(small.host, small.clusters)?;
            }
            let entries = site.blocks.last_key_value().map_or(1, |(last, _)| last + 1);
            let clusters = cluster.count(entries.saturating_mul(8));
            if clusters << cluster.bits() > MAX_REFCOUNT_TABLE.max(cluster.bytes()) {
                let message = "the refcount table would be larger than the format allows";
                return Err(Error::invalid(message).with_os_error(EFBIG));
            }
            site.table = Some(lock(&self.refcounts).allocate(clusters)?);
        }
        Err(Error::invalid("the refcounts never settle"))
    }

    fn too_wide(&self, cluster: u64, count: u64, order: u32) -> Error {
        let offset = cluster << self.shape.cluster.bits();
        let message = format!(
            "Cannot decrease refcount entry width to {} bits: Cluster at offset {offset:#x} has a \
             refcount of {count}",
            1 << order
        );
        let error = Error::new(ErrorKind::Invalid, message).at_offset(offset);
        error.with_os_error(EINVAL)
    }

    fn give_site_back(&self, site: &Site) {
        let mut refcounts = lock(&self.refcounts);
        // If it fails, the clusters are leaked, which check mends.
        for offset in site.blocks.values() {
            let _ = refcounts.release(HostOffset(*offset), 1);
        }
        if let Some(table) = site.table {
            let _ = refcounts.release(table.host, table.clusters);
        }
    }

    /// Shows every cluster in use, in order, with its refcount.
    fn each_refcount(
        &self,
        walk: WalkNumber,
        watch: Watch<'_>,
        mut look: impl FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let mut tell = |entries: u64, table: u64| {
            let part = AmendPart::RefcountWidth;
            let done = walk.number * table + entries;
            watch(AmendProgress { part, done, total: walk.of * table });
        };
        let mut entry = 0;
        loop {
            let table = lock(&self.refcounts).table_entries();
            tell(entry, table);
            if entry >= table {
                return Ok(());
            }
            for slice in 0.. {
                let found = lock(&self.refcounts).used_in_slice(entry as usize, slice)?;
                let Some(found) = found else { break };
                found.into_iter().try_for_each(|(cluster, count)| look(cluster, count))?;
            }
            entry += 1;
        }
    }

    /// log2 of the clusters that one block counts at this width.
    fn block_bits(&self, order: u32) -> u32 {
        self.shape.cluster.bits() + 3 - order
    }

    /// Writes the blocks with what the refcounts are now.
    fn write_blocks(
        &self,
        order: u32,
        site: &Site,
        walk: WalkNumber,
        watch: Watch<'_>,
    ) -> Result<()> {
        let bits = self.block_bits(order);
        let mut blank = vec![0; self.shape.cluster.bytes() as usize];
        let mut current: Option<u64> = None;
        // A block that was needed for what was given back is empty.
        let mut places = site.blocks.clone();
        let mut write = |block: u64, bytes: &mut Vec<u8>| -> Result<()> {
            let place = places.remove(&block);
            let place = place.ok_or_else(|| Error::corrupt("refcounts changed meanwhile"))?;
            self.storage.write_all_at(place, bytes)?;
            bytes.fill(0);
            Ok(())
        };
        self.each_refcount(walk, watch, |cluster, count| {
            let block = cluster >> bits;
            if let Some(now) = current.filter(|now| *now != block) {
                write(now, &mut blank)?;
            }
            current = Some(block);
            set_in(&mut blank, order, (cluster & ((1 << bits) - 1)) as usize, count);
            Ok(())
        })?;
        if let Some(last) = current {
            write(last, &mut blank)?;
        }
        places.into_values().try_for_each(|place| self.storage.write_all_at(place, &blank))
    }

    fn write_refcount_table(&self, table: &Run, site: &Site) -> Result<()> {
        let count = table.clusters << self.shape.cluster.bits() >> 3;
        let bytes: Vec<u8> = (0..count)
            .flat_map(|index| site.blocks.get(&index).copied().unwrap_or(0).to_be_bytes())
            .collect();
        self.storage.write_all_at(table.host.0, &bytes)?;
        Ok(())
    }
}
