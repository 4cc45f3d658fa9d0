//! Allocating writes: reserve host clusters, fill them, point the guest range at them.
//!
//! Two writers of one guest cluster are kept apart by the caller (the chain's in-flight entries);
//! writers of different clusters meet here only under the locks. Specification: qcow2, "Cluster
//! mapping".

mod compress;
mod reservation;
mod writeback;
mod zero;

use std::ops::Range;

use crate::addr::{GuestOffset, HostOffset};
use crate::error::{Error, Result};
use crate::image::{Begun, Extent, Mapping};
use crate::qcow2::guard::lock;
use crate::qcow2::image::{Freed, Image, Lost};
use crate::qcow2::refcount::Run;
use crate::qcow2::step;
use crate::qcow2::tables::entry::{Entry, Kind};
use crate::qcow2::tables::slice::Missing;
use crate::qcow2::tables::{Place, Table, Tables};
use reservation::Reservation;

/// What one look at the tables says of a write: its range is in one slice, and while the caller has
/// the in-flight entry of its clusters, nobody else changes what was found.
struct Site {
    /// What the range shows now.
    extent: Extent,
    /// The entry of the first cluster.
    entry: Entry,
    /// Clusters from the first on, at least one, that get their place in the same way.
    clusters: u64,
    /// Whether too much changed metadata waits in memory.
    crowded: bool,
}

/// What a look at the tables for a write came upon.
enum Look {
    Site(Site),
    /// The L2 table, where there is one, is not this image's own yet.
    Shared(Option<Table>),
    /// A slice has to be loaded first.
    Missing(Missing),
}

impl Image {
    /// See [`crate::image::Image::prepare`].
    pub(in crate::qcow2) fn reserve(&self, at: GuestOffset, len: u64) -> Result<Reservation<'_>> {
        let site = self.site(at, len)?;
        self.reserve_at(at, len, &site)
    }

    /// See [`crate::image::Image::begin_write`].
    pub(in crate::qcow2) fn begin(&self, at: GuestOffset, len: u64) -> Result<Begun<'_>> {
        let site = self.site(at, len)?;
        if let Mapping::Data { exclusive: true, .. } = site.extent.mapping {
            return Ok(Begun::InPlace(site.extent));
        }
        let token = self.reserve_at(at, site.extent.len, &site)?;
        Ok(Begun::Reserved { token: Box::new(token), over: site.extent })
    }

    /// Looks the range up: its L2 table exists afterwards, and may be changed, unless what was found is
    /// overwritten where it stands.
    fn site(&self, at: GuestOffset, len: u64) -> Result<Site> {
        if !self.shape.granularity().aligned(at.0) || len == 0 {
            return Err(Error::invalid("an allocation must begin on a cluster boundary"));
        }
        loop {
            let look = self.look(&self.tables.read(), at, len);
            match look.map_err(|e| self.note_corruption(e))? {
                Look::Site(site) => {
                    // No entry changes by this, and none of this range by others.
                    if site.crowded {
                        self.write_back()?;
                    }
                    return Ok(site);
                }
                Look::Shared(old) => self.own_table(at, old)?,
                Look::Missing(slice) => self.load_slice(slice)?,
            }
        }
    }

    fn look(&self, tables: &Tables, at: GuestOffset, len: u64) -> Result<Look> {
        let Some(table) = tables.table(at)? else { return Ok(Look::Shared(None)) };
        let place = tables.place_in(table, at);
        let Some(slice) = tables.cache.get(place.slice) else {
            return Ok(Look::Missing(Missing::new(tables, place)));
        };
        let (mapped, entry) = tables.scan(slice, place, at, len)?;
        let mapping = self.shape.mapping(entry, at.0)?;
        let extent = Extent { start: at, len: mapped, mapping };
        let in_place = matches!(mapping, Mapping::Data { exclusive: true, .. });
        if !in_place && !table.exclusive {
            return Ok(Look::Shared(Some(table)));
        }
        let cluster = self.shape.cluster;
        let want = cluster.count(cluster.within(at.0) + len);
        let clusters = self.alike(slice, place.index, want);
        let crowded = tables.cache.crowded();
        Ok(Look::Site(Site { extent, entry, clusters, crowded }))
    }

    /// How many clusters of a slice, from entry `index` on and up to `want`, keep clusters of the host
    /// in one piece that are to be filled, or all need new ones, as the first does.
    fn alike(&self, slice: &[u8], index: usize, want: u64) -> u64 {
        let (shape, cluster) = (self.shape, self.shape.cluster);
        let kept = self.reusable(shape.get(slice, index));
        let entries = slice.len() / shape.entry_bytes() as usize;
        let follows = |n: &u64| {
            let entry = shape.get(slice, index + *n as usize);
            let next = kept.map(|host| host + (n << cluster.bits()));
            self.reusable(entry) == next && !self.is_in_place(entry)
        };
        1 + (1..want.min((entries - index) as u64)).take_while(follows).count() as u64
    }

    fn reserve_at(&self, at: GuestOffset, len: u64, site: &Site) -> Result<Reservation<'_>> {
        let cluster = self.shape.cluster;
        let within = cluster.within(at.0);
        let first = GuestOffset(cluster.floor(at.0));
        let len = len.min((site.clusters << cluster.bits()) - within);
        if let Some(host) = self.reusable(site.entry) {
            let host = self.home(first).unwrap_or(host) + within;
            self.check_overlap(host, len)?;
            return Ok(Reservation {
                image: self,
                start: at,
                len,
                host,
                owned: None,
                zeroed: false,
            });
        }
        let mut run = self.fresh_run(first, cluster.count(within + len))?;
        let mut len = len.min((run.clusters << cluster.bits()) - within);
        let (mut start, mut host) = (at, run.host + within);
        if within != 0 && (site.entry.is_compressed() || !self.shape.holds_no_data(site.entry)) {
            // Parts of the cluster stand in a place that this write leaves: they move along.
            (start, host) = (first, run.host);
            self.give_back_after(&mut run, 1)?;
            len = cluster.bytes().min(self.size() - first.0);
        } else if self.shape.extended {
            (start, len, host) = self.whole_where_needed(start, len, host, &mut run)?;
        }
        // What reads as zeroes in the file does not once it is decrypted.
        let zeroed = run.zeroed && !self.data.is_encrypted();
        let owned = (!self.shape.external).then_some(run);
        Ok(Reservation { image: self, start, len, host, owned, zeroed })
    }

    fn size(&self) -> u64 {
        crate::image::Image::size(self)
    }

    /// With subclusters, a cluster that leaves its place must be covered whole. Cuts the range so
    /// that it ends before such a cluster, or covers it.
    fn whole_where_needed(
        &self,
        start: GuestOffset,
        len: u64,
        host: HostOffset,
        run: &mut Run,
    ) -> Result<(GuestOffset, u64, HostOffset)> {
        let cluster = self.shape.cluster;
        let end = start.0 + len;
        let last = cluster.floor(end - 1);
        let disk_end = self.size();
        if end == disk_end || cluster.aligned(end) {
            return Ok((start, len, host));
        }
        let (_, entry) = self.entry_of(GuestOffset(last))?;
        if !entry.is_compressed() && self.shape.holds_no_data(entry) {
            return Ok((start, len, host));
        }
        if last <= start.0 {
            let whole = cluster.bytes().min(disk_end - last);
            return Ok((GuestOffset(last), whole, run.host));
        }
        self.give_back_after(run, cluster.index(last) - cluster.index(start.0))?;
        Ok((start, last - start.0, host))
    }

    /// Allocates up to `want` clusters for the entries from `first` on.
    fn fresh_run(&self, first: GuestOffset, want: u64) -> Result<Run> {
        if let Some(host) = self.home(first) {
            return Ok(Run { host, clusters: want, zeroed: false });
        }
        let mut refcounts = lock(&self.refcounts);
        if refcounts.crowded() {
            drop(refcounts);
            self.write_back()?;
            refcounts = lock(&self.refcounts);
        }
        refcounts.allocate_run(want)
    }

    /// Whether the cluster is plain data that is overwritten in place, without subclusters.
    fn is_in_place(&self, entry: Entry) -> bool {
        let plain = || matches!(self.shape.kind(entry, 0), Ok(Kind::Data));
        !self.shape.extended && entry.exclusive() && plain()
    }

    fn give_back_after(&self, run: &mut Run, keep: u64) -> Result<()> {
        if keep < run.clusters {
            let rest = run.host + (keep << self.shape.cluster.bits());
            if !self.shape.external {
                lock(&self.refcounts).release(rest, run.clusters - keep)?;
            }
            run.clusters = keep;
        }
        Ok(())
    }

    /// Where the guest cluster at `first` stands in an external data file: nowhere else.
    fn home(&self, first: GuestOffset) -> Option<HostOffset> {
        self.shape.external.then_some(HostOffset(first.0))
    }

    /// The host cluster that `entry` keeps for itself without (all of) it being data.
    fn reusable(&self, entry: Entry) -> Option<HostOffset> {
        let host = self.shape.host(entry);
        host.filter(|h| entry.exclusive() && self.shape.cluster.aligned(h.0))
    }

    /// The entry of a guest cluster whose L2 table exists.
    pub(in crate::qcow2) fn entry_of(&self, at: GuestOffset) -> Result<(Place, Entry)> {
        let found = self.load_entry(at)?;
        found.ok_or_else(|| Error::corrupt("an L2 table went away during a write"))
    }

    /// Makes sure that the L2 table for `at` exists and may be changed.
    pub(in crate::qcow2) fn ensure_table(&self, at: GuestOffset) -> Result<()> {
        let old = self.tables.read().table(at)?;
        if old.is_some_and(|t| t.exclusive) { Ok(()) } else { self.own_table(at, old) }
    }

    /// Puts a new L2 table for `at` in the place of `old`, or where there was none.
    fn own_table(&self, at: GuestOffset, old: Option<Table>) -> Result<()> {
        let run = lock(&self.refcounts).allocate(1)?;
        if let Err(error) = self.fill_table(run.host, old) {
            lock(&self.refcounts).release(run.host, 1)?;
            return Err(error);
        }
        let mut tables = self.tables.write();
        let now = tables.table(at)?;
        if now.is_some_and(|t| t.exclusive) {
            drop(tables);
            lock(&self.refcounts).release(run.host, 1)?;
            return Ok(());
        }
        let cluster = self.shape.cluster;
        self.metadata_map.add(run.host.0, cluster.bytes());
        tables.install(at, run.host);
        drop(tables);
        if let Some(Table { host, .. }) = old {
            self.free_later(Freed { host, clusters: 1, what: Lost::Table });
        }
        Ok(())
    }

    /// Writes a new L2 table, which nothing refers to yet: a copy of `old`, or empty. A host without
    /// room for it is noticed here, where nothing is lost by it.
    fn fill_table(&self, host: HostOffset, old: Option<Table>) -> Result<()> {
        let len = self.shape.cluster.bytes();
        match old {
            None => self.storage.write_zeroes(host.0, len)?,
            Some(old) => {
                let mut bytes = vec![0; len as usize];
                self.storage.about_to(step::L2_ALLOC[0]);
                let read = self.storage.read_exact_at(old.host.0, &mut bytes);
                read.map_err(|e| e.at_offset(old.host.0))?;
                self.storage.about_to(step::L2_ALLOC[1]);
                self.storage.write_all_at(host.0, &bytes)?;
            }
        }
        Ok(())
    }

    /// Writes metadata back where too much of it waits in memory.
    pub(in crate::qcow2) fn write_back_if_crowded(&self) -> Result<()> {
        let crowded = self.tables.read().cache.crowded() || lock(&self.refcounts).crowded();
        if crowded { self.write_back() } else { Ok(()) }
    }

    /// Replaces the entry of the cluster at `at` by what `change` makes of it, and frees what only
    /// the old one referred to. The L2 table exists.
    pub(in crate::qcow2) fn change_entry(
        &self,
        at: GuestOffset,
        what: Lost,
        change: impl Fn(Entry) -> Entry,
    ) -> Result<()> {
        self.change_entries(at, &mut (0..1), what, |_, old| change(old))
    }

    /// Replaces the entries of the `clusters` from the one at `first` on, which one slice maps, by what
    /// `change` makes of each, and frees what only the old ones referred to. The L2 table exists. After
    /// a failure `clusters` are those that were not changed.
    fn change_entries(
        &self,
        first: GuestOffset,
        clusters: &mut Range<u64>,
        what: Lost,
        change: impl Fn(u64, Entry) -> Entry,
    ) -> Result<()> {
        loop {
            let mut tables = self.tables.write();
            let Some(place) = tables.place(first)? else {
                return Err(Error::corrupt("an L2 table went away during a write"));
            };
            let Some(slot) = tables.cache.slot(place.slice) else {
                drop(tables);
                // It was evicted since it was looked at.
                self.entry_of(first)?;
                continue;
            };
            while let Some(number) = clusters.clone().next() {
                let index = place.index + number as usize;
                let old = self.shape.get(tables.cache.bytes(slot), index);
                let new = change(number, old);
                if new != old {
                    self.check_replaced(old)?;
                    self.shape.put(tables.cache.bytes_mut(slot), index, new);
                    self.free_replaced(old, new, what);
                }
                clusters.start += 1;
            }
            return Ok(());
        }
    }

    /// What an entry refers to is let go, or written: it had better not be metadata.
    fn check_replaced(&self, old: Entry) -> Result<()> {
        let cluster = self.shape.cluster;
        let (host, len) = match old.host() {
            Some(host) => (host, cluster.bytes()),
            None if old.is_compressed() => self.shape.compressed(old.descriptor),
            None => return Ok(()),
        };
        self.check_overlap(host, len)
    }

    fn free_replaced(&self, old: Entry, new: Entry, what: Lost) {
        let cluster = self.shape.cluster;
        if old.is_compressed() {
            let (host, len) = self.shape.compressed(old.descriptor);
            let first = cluster.floor(host.0);
            let clusters = cluster.count(host.0 + len - first);
            self.free_later(Freed { host: HostOffset(first), clusters, what: Lost::Data });
        } else if let Some(host) = old.host().filter(|h| new.host() != Some(*h)) {
            if self.shape.external {
                return;
            }
            self.free_later(Freed { host, clusters: 1, what });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::sync::Arc;

    use super::*;
    use crate::addr::Unit;
    use crate::image::Image as _;
    use crate::qcow2::{CreateOptions, Repair, create};
    use crate::storage::MemoryStorage;

    const CLUSTER: u64 = 4096;

    fn image(extended: bool) -> Image {
        let cluster = Unit::from_bits(if extended { 14 } else { 12 });
        let options =
            CreateOptions { cluster, extended_l2: extended, ..CreateOptions::new(4 << 20) };
        create(Arc::new(MemoryStorage::default()), &options).unwrap()
    }

    fn write(image: &Image, at: u64, len: u64) {
        let Begun::Reserved { token, over } = image.begin_write(GuestOffset(at), len).unwrap()
        else {
            panic!("nothing was written at {at} before");
        };
        assert_eq!(over.mapping, Mapping::Unallocated);
        let bytes = vec![7; token.len() as usize];
        token.write(0, &[IoSlice::new(&bytes)]).unwrap();
        token.commit().unwrap();
    }

    #[test]
    fn a_write_reserves_up_to_what_has_its_place_already() {
        let image = image(false);
        write(&image, 5 * CLUSTER, CLUSTER);
        // Unaligned: the clusters that the bytes touch, as far as they are alike.
        let begun = image.begin_write(GuestOffset(2 * CLUSTER + 100), 5 * CLUSTER).unwrap();
        let Begun::Reserved { token, over } = begun else { panic!("these are new") };
        assert_eq!((token.start().0, token.len()), (2 * CLUSTER, 3 * CLUSTER));
        assert_eq!((over.start.0, over.len), (2 * CLUSTER, 3 * CLUSTER));
        drop(token);
        let begun = image.begin_write(GuestOffset(5 * CLUSTER + 100), 5 * CLUSTER).unwrap();
        let Begun::InPlace(extent) = begun else { panic!("it was written") };
        assert_eq!((extent.start.0, extent.len), (5 * CLUSTER, CLUSTER));
        // What was not committed is given back.
        image.flush().unwrap();
        assert!(image.check(Repair::None).unwrap().is_clean());
    }

    #[test]
    fn a_write_goes_no_further_than_one_slice_of_the_tables() {
        let image = image(false);
        let slice = 512 * CLUSTER;
        write(&image, slice - CLUSTER, 4 * CLUSTER);
        let extent = image.map(GuestOffset(slice - CLUSTER), 4 * CLUSTER).unwrap();
        assert!(matches!(extent.mapping, Mapping::Data { .. }) && extent.len == CLUSTER);
    }

    #[test]
    fn subclusters_of_one_cluster_share_its_place() {
        let image = image(true);
        write(&image, 512, 512);
        write(&image, 4096, 512);
        let place = |at: u64| match image.map(GuestOffset(at), 512).unwrap().mapping {
            Mapping::Data { host, exclusive: true } => host.0 - at,
            other => panic!("{other:?}"),
        };
        assert_eq!(place(512), place(4096));
        let between = image.map(GuestOffset(1024), 512).unwrap();
        assert_eq!(between.mapping, Mapping::Unallocated);
        image.flush().unwrap();
        assert!(image.check(Repair::None).unwrap().is_clean());
    }
}
