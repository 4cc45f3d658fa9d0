//! New refcounts from what was counted, where the old ones cannot be trusted.
//!
//! A cluster in use whose refcount is 0 could be given out at any moment, and room for mending would
//! be looked for with the same refcounts. So new blocks and a new table are built of the counts, in
//! clusters that nothing refers to; one write of the header makes them the image's. Until then the
//! old ones stay as they are; afterwards nothing refers to them.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;

use nix::libc::EFBIG;

use super::counts::Counted;
use crate::error::{Error, Result};
use crate::qcow2::guard::lock;
use crate::qcow2::header::{Header, MAX_REFCOUNT_TABLE};
use crate::qcow2::image::Image;
use crate::qcow2::refcount::Refcounts;
use crate::qcow2::refcount::bits::{max_refcount, set_in};
use crate::qcow2::tables::words::words_mut;

/// Clusters for the new structures.
struct Site<'a> {
    counts: &'a Counted,
    /// log2 of the clusters that one block counts.
    block_bits: u32,
    /// Cluster numbers of the new blocks by their index.
    blocks: BTreeMap<u64, u64>,
    /// The same clusters.
    taken: HashSet<u64>,
    /// The clusters of the new table.
    table: Range<u64>,
    /// No cluster below this one is used.
    floor: u64,
    /// No block is put below this one.
    next: u64,
}

impl<'a> Site<'a> {
    fn new(counts: &'a Counted, block_bits: u32, floor: u64) -> Site<'a> {
        let (blocks, taken) = (BTreeMap::new(), HashSet::new());
        Site { counts, block_bits, blocks, taken, table: 0..0, floor, next: floor }
    }

    fn is_free(&self, cluster: u64) -> bool {
        self.counts.is_unused(self.counts.page(cluster), cluster)
            && !self.table.contains(&cluster)
            && !self.taken.contains(&cluster)
    }

    /// Takes the first free cluster for a block, of those that it counts itself or that stand behind
    /// them: a block before them could be in the way of the table.
    fn take(&mut self, index: u64) -> u64 {
        self.next = self.next.max(index << self.block_bits);
        while !self.is_free(self.next) {
            self.next += 1;
        }
        self.next += 1;
        self.next - 1
    }

    /// Takes the first free run of clusters.
    fn take_run(&self, clusters: u64) -> u64 {
        let mut start = self.floor;
        while let Some(used) = (start..start + clusters).rev().find(|c| !self.is_free(*c)) {
            start = used + 1;
        }
        start
    }

    /// The indexes of all blocks that are needed, those for the new structures themselves included.
    fn needed(&self) -> BTreeSet<u64> {
        let counted = self.counts.used().map(|(cluster, _)| cluster);
        let own = self.blocks.values().copied();
        counted
            .chain(own)
            .chain(self.table.clone())
            .map(|cluster| cluster >> self.block_bits)
            .collect()
    }
}

impl Image {
    /// Replaces all refcounts by what was counted, in clusters from number `floor` on; what else is
    /// to `change` in the header becomes the image's at the same time.
    pub(super) fn rebuild_refcounts(
        &self,
        counts: &Counted,
        floor: u64,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let (header, cluster) = (self.header(), self.shape.cluster);
        let order = header.refcount_order;
        let block_bits = cluster.bits() + 3 - order;
        let mut site = Site::new(counts, block_bits, floor);
        loop {
            let needed = site.needed();
            let missing = needed.iter().find(|i| !site.blocks.contains_key(*i)).copied();
            if let Some(index) = missing {
                let place = site.take(index);
                site.taken.insert(place);
                site.blocks.insert(index, place);
                continue;
            }
            let entries = needed.last().map_or(1, |last| last + 1);
            let clusters = cluster.count(entries.saturating_mul(8));
            if clusters << cluster.bits() > MAX_REFCOUNT_TABLE.max(cluster.bytes()) {
                let message = "the refcount table would be larger than the format allows";
                return Err(Error::invalid(message).with_os_error(EFBIG));
            }
            if site.table.end - site.table.start >= clusters {
                break;
            }
            site.table = 0..0;
            let first = site.take_run(clusters);
            site.table = first..first + clusters;
        }
        self.metadata(|| {
            self.write_new_refcounts(&site, order)?;
            self.update_header(|h| {
                change(h);
                h.refcount_table_offset = site.table.start << cluster.bits();
                h.refcount_table_clusters = (site.table.end - site.table.start) as u32;
            })
        })?;
        let capacity = lock(&self.refcounts).capacity();
        let mut new = Refcounts::open(self.storage.clone(), &self.header(), capacity)?;
        new.metadata_map = self.metadata_map.clone();
        *lock(&self.refcounts) = new;
        Ok(())
    }

    fn write_new_refcounts(&self, site: &Site<'_>, order: u32) -> Result<()> {
        let cluster = self.shape.cluster;
        let max = max_refcount(order);
        let own: BTreeSet<u64> = site.blocks.values().copied().chain(site.table.clone()).collect();
        let per_block = 1u64 << site.block_bits;
        let mut used = site.counts.used().peekable();
        let mut table = vec![0; ((site.table.end - site.table.start) << cluster.bits()) as usize];
        for (index, place) in &site.blocks {
            let first = index << site.block_bits;
            let mut bytes = vec![0; cluster.bytes() as usize];
            while let Some((number, count)) = used.next_if(|(n, _)| *n < first + per_block) {
                if count > max {
                    let message = "a cluster is referred to more often than its refcount can say";
                    return Err(Error::corrupt(message).at_offset(number << cluster.bits()));
                }
                set_in(&mut bytes, order, (number - first) as usize, count);
            }
            for number in own.range(first..first + per_block) {
                set_in(&mut bytes, order, (number - first) as usize, 1);
            }
            let offset = place << cluster.bits();
            self.storage.write_all_at(offset, &bytes)?;
            if let Some(entry) = words_mut(&mut table).get_mut(*index as usize) {
                entry.set(offset);
            }
        }
        let offset = site.table.start << cluster.bits();
        self.storage.write_all_at(offset, &table)?;
        self.storage.sync()
    }
}
