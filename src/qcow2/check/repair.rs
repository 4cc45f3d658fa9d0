//! Comparing refcounts and COPIED flags with what was counted, and making them so.

use std::collections::HashSet;

use super::counts::Counted;
use super::{Check, Repair};
use crate::error::Result;
use crate::qcow2::guard::lock;
use crate::qcow2::image::Image;
use crate::qcow2::tables::entry::{COPIED, Entry, OFFSET};
use crate::qcow2::tables::words::words_mut;

/// Compares every refcount with the count.
pub(super) struct Compare<'a> {
    pub image: &'a Image,
    pub check: &'a mut Check,
    pub repair: Repair,
    pub counts: &'a Counted,
}

/// What a comparison found.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Found {
    pub differences: u64,
    /// A cluster in use has refcount 0.
    pub lost: bool,
    /// Behind the last cluster with a difference.
    pub end: u64,
}

/// A cluster whose refcount is not what was counted.
struct Difference {
    cluster: u64,
    stored: u64,
    count: u32,
}

/// More differences than this are not put in order.
const SORTED: usize = 1 << 18;

impl Compare<'_> {
    /// Finds all differences, and mends those that it may, in the order of the file.
    pub fn run(mut self) -> Result<Found> {
        let mut differences = Vec::new();
        let mut found = Found::default();
        let counts = self.counts;
        let mut stored = Vec::new();
        for (first, page) in counts.pages() {
            stored.resize(page.len(), 0);
            lock(&self.image.refcounts).get_all(first, &mut stored);
            if counts.agree(first, &stored) {
                continue;
            }
            for (number, (stored, count)) in stored.iter().zip(page).enumerate() {
                // What nothing refers to is found below, where its refcount stands.
                if *count > 0 && *stored != u64::from(*count) {
                    found.lost |= *stored == 0;
                    let cluster = first + number as u64;
                    differences.push(Difference { cluster, stored: *stored, count: *count });
                    if differences.len() >= SORTED {
                        self.report(&mut differences, &mut found)?;
                    }
                }
            }
        }
        self.unused(&mut differences, &mut found)?;
        self.report(&mut differences, &mut found)?;
        Ok(found)
    }

    fn report(&mut self, differences: &mut Vec<Difference>, found: &mut Found) -> Result<()> {
        differences.sort_by_key(|d| d.cluster);
        found.differences += differences.len() as u64;
        found.end = differences.last().map_or(0, |d| d.cluster.saturating_add(1)).max(found.end);
        for one in differences.drain(..) {
            self.differs(one.cluster, one.stored, u64::from(one.count))?;
        }
        Ok(())
    }

    /// Finds clusters with a refcount that nothing refers to. Past the end of the file there are
    /// none: a refcount there, which an interrupted allocation leaves, wastes no space.
    fn unused(&mut self, differences: &mut Vec<Difference>, found: &mut Found) -> Result<()> {
        let (blocks, own) = {
            let refcounts = lock(&self.image.refcounts);
            (refcounts.blocks(), refcounts.own_clusters())
        };
        let cluster = self.image.shape.cluster;
        let end = cluster.count(self.image.storage.len()?).max(self.counts.end());
        let (mut seen, mut stored) = (HashSet::new(), Vec::new());
        for (index, offset) in blocks {
            let data = self.image.storage.next_data(offset).unwrap_or(None);
            let hole =
                data.is_none_or(|(start, _)| start >= offset.saturating_add(cluster.bytes()));
            // A block that was just made for the repair is in memory only, and right.
            if hole || !cluster.aligned(offset) || !seen.insert(offset) {
                continue;
            }
            let counts = self.counts;
            for slice in 0.. {
                let first = lock(&self.image.refcounts).slice_counts(index, slice, &mut stored);
                let Ok(Some(first)) = first else { break };
                if first >= end {
                    break;
                }
                stored.truncate(usize::try_from(end - first).unwrap_or(usize::MAX));
                if counts.agree(first, &stored) {
                    continue;
                }
                let numbered = (first..).zip(stored.iter().copied());
                let used: Vec<_> = numbered.filter(|(_, count)| *count != 0).collect();
                for run in used.chunk_by(|a, b| counts.share_page(a.0, b.0)) {
                    let page = run.first().and_then(|(number, _)| counts.page(*number));
                    for (number, stored) in run {
                        // The repair itself may have made blocks, and moved the table.
                        if counts.is_unused(page, *number) && !own.contains(number) {
                            let (cluster, stored) = (*number, *stored);
                            differences.push(Difference { cluster, stored, count: 0 });
                        }
                    }
                }
                if differences.len() >= SORTED {
                    self.report(differences, found)?;
                }
            }
        }
        Ok(())
    }

    fn differs(&mut self, cluster: u64, stored: u64, count: u64) -> Result<bool> {
        let leak = stored > count;
        let mend = match self.repair {
            Repair::None => false,
            Repair::Leaks => leak,
            Repair::All => true,
        };
        let verb = if mend {
            "Repairing"
        } else if leak {
            "Leaked"
        } else {
            "ERROR"
        };
        self.check.say(format!("{verb} cluster {cluster} refcount={stored} reference={count}"));
        if mend {
            lock(&self.image.refcounts).mend(cluster, count, self.counts.end())?;
        }
        match (mend, leak) {
            (true, true) => self.check.leaks_fixed += 1,
            (true, false) => self.check.corruptions_fixed += 1,
            (false, true) => self.check.leaks += 1,
            (false, false) => self.check.corruptions += 1,
        }
        Ok(mend)
    }
}

/// Compares the COPIED flags of the active tables with the refcounts.
pub(super) struct Flags<'a> {
    pub image: &'a Image,
    pub check: &'a mut Check,
    pub repair: Repair,
    pub stored: Stored,
}

/// Refcounts that do not change meanwhile, fetched by neighbourhoods.
#[derive(Default)]
pub(super) struct Stored {
    first: u64,
    counts: Vec<u64>,
}

impl Stored {
    /// Clusters that are fetched together.
    const SPAN: u64 = 512;

    fn get(&mut self, image: &Image, cluster: u64) -> u64 {
        if self.counts.is_empty() || cluster / Self::SPAN != self.first / Self::SPAN {
            self.first = cluster / Self::SPAN * Self::SPAN;
            self.counts.resize(Self::SPAN as usize, 0);
            self.counts.fill(0);
            lock(&image.refcounts).get_all(self.first, &mut self.counts);
        }
        self.counts[(cluster - self.first) as usize]
    }

    /// Whether the refcount is 1 for all of `clusters` clusters, or else for none.
    fn all_are(&mut self, image: &Image, first: u64, clusters: u64, one: bool) -> bool {
        let (mut at, end) = (first, first.saturating_add(clusters));
        while at < end {
            self.get(image, at);
            let from = (at - self.first) as usize;
            let here = (end - at).min(Self::SPAN - from as u64);
            let counts = self.counts[from..from + here as usize].iter();
            if counts.fold(false, |wrong, count| wrong | ((*count == 1) != one)) {
                return false;
            }
            at += here;
        }
        true
    }
}

impl Flags<'_> {
    pub fn run(mut self) -> Result<()> {
        let header = self.image.header();
        let mut l1 = vec![0; header.l1_size as usize * 8];
        if self.image.storage.read_exact_at(header.l1_offset, &mut l1).is_err() {
            return Ok(());
        }
        let (mut l1_changed, mut seen) = (false, HashSet::new());
        for (index, raw) in words_mut(&mut l1).iter_mut().enumerate() {
            let entry = raw.get();
            let l2 = entry & OFFSET;
            if l2 == 0 || !header.cluster.aligned(l2) {
                continue;
            }
            let what = format!("L2 cluster: l1_index={index} l1_entry");
            if let Some(mended) = self.flag(entry, l2, &what) {
                raw.set(mended);
                l1_changed = true;
            }
            // However many entries point at it, it is read once.
            if seen.insert(l2) {
                self.l2(l2)?;
            }
        }
        if l1_changed {
            self.image.metadata(|| self.image.storage.write_all_at(header.l1_offset, &l1))?;
            self.image.barrier()?;
            self.image.tables.write().replace_l1_entries(&l1);
        }
        Ok(())
    }

    fn l2(&mut self, offset: u64) -> Result<()> {
        let shape = self.image.shape;
        if shape.external {
            // Clusters of a data file have no refcount that the flag could speak of.
            return Ok(());
        }
        let data = self.image.storage.next_data(offset)?;
        if data.is_none_or(|(start, _)| start >= offset + shape.cluster.bytes()) {
            return Ok(());
        }
        let mut table = vec![0; shape.cluster.bytes() as usize];
        if self.image.storage.read_exact_at(offset, &mut table).is_err() {
            return Ok(());
        }
        let mut changed = false;
        let (mut next, entries) = (0, table.len() / shape.entry_bytes() as usize);
        while next < entries {
            let (index, run) = (next, shape.run(&table, next));
            if run > 1 && self.right(shape.get(&table, index), run as u64) {
                next += run;
                continue;
            }
            next += 1;
            let mut entry = shape.get(&table, index);
            let Some(host) = entry.host().filter(|h| shape.cluster.aligned(h.0)) else { continue };
            if let Some(mended) = self.flag(entry.descriptor, host.0, "data cluster: l2_entry") {
                entry.descriptor = mended;
                shape.put(&mut table, index, entry);
                changed = true;
            }
        }
        if changed {
            self.image.metadata(|| self.image.storage.write_all_at(offset, &table))?;
            self.image.barrier()?;
            self.image.tables.write().forget(offset..offset + shape.cluster.bytes());
        }
        Ok(())
    }

    /// Whether the flag, which they share, is right for all entries whose clusters follow each other
    /// from that of `entry` on.
    fn right(&mut self, entry: Entry, clusters: u64) -> bool {
        let first = self.image.shape.cluster.index(entry.descriptor & OFFSET);
        self.stored.all_are(self.image, first, clusters, entry.exclusive())
    }

    /// The entry with the right flag, where it has the wrong one and may be mended.
    fn flag(&mut self, entry: u64, host: u64, what: &str) -> Option<u64> {
        let refcount = self.stored.get(self.image, self.image.shape.cluster.index(host));
        if (refcount == 1) == (entry & COPIED != 0) {
            return None;
        }
        // Refcounts that are right tell the flag without doubt.
        let is_right = self.check.corruptions == 0 && self.check.leaks == 0;
        let mend = self.repair == Repair::All
            || self.repair == Repair::Leaks && is_right && self.check.errors == 0;
        let verb = if mend { "Repairing" } else { "ERROR" };
        self.check.say(format!("{verb} OFLAG_COPIED {what}={entry:x} refcount={refcount}"));
        if mend {
            self.check.corruptions_fixed += 1;
            Some(entry ^ COPIED)
        } else {
            self.check.corruptions += 1;
            None
        }
    }
}
