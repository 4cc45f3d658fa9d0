//! Allocating writes: reserve host clusters, fill them, point the guest range at them.
//!
//! Two writers of one guest cluster are kept apart by the caller (the chain's in-flight entries);
//! writers of different clusters meet here only under the locks. Specification: qcow2, "Cluster
//! mapping".

use std::io::IoSlice;

use super::entry::{COPIED, Entry, Kind};
use super::image::{Freed, Image, Lost, lock, read, write};
use super::refcount::Run;
use super::step;
use super::tables::{Place, Table};
use crate::addr::{GuestOffset, HostOffset};
use crate::block::total;
use crate::error::{Error, Result};
use crate::image::Allocation;
use crate::storage::Storage;

/// A guest range with host bytes that nothing refers to yet, or that its entries keep unused.
pub(super) struct Reservation<'a> {
    image: &'a Image,
    start: GuestOffset,
    len: u64,
    /// Where the first byte of the range goes.
    host: HostOffset,
    /// The clusters to give back if the write does not happen; none where an entry keeps them.
    owned: Option<Run>,
    zeroed: bool,
}

impl Reservation<'_> {
    /// The host bytes that are reserved, to the end of their last cluster.
    pub(super) fn place(&self) -> (HostOffset, u64) {
        (self.host, self.image.shape.cluster.ceil(self.len))
    }
}

impl Image {
    /// See [`crate::image::Image::prepare`].
    pub(super) fn reserve(&self, at: GuestOffset, len: u64) -> Result<Reservation<'_>> {
        let unit = self.shape.granularity();
        if !unit.aligned(at.0) || len == 0 {
            return Err(Error::invalid("an allocation must begin on a cluster boundary"));
        }
        self.relieve()?;
        self.ensure_table(at)?;
        let cluster = self.shape.cluster;
        let within = cluster.within(at.0);
        let first = GuestOffset(cluster.floor(at.0));
        let (_, entry) = self.entry_of(first)?;
        if let Some(host) = self.reusable(entry) {
            return self.reuse(at, len, self.home(first).unwrap_or(host));
        }
        let mut run = self.fresh_run(first, cluster.count(within + len))?;
        let mut len = len.min((run.clusters << cluster.bits()) - within);
        let (mut start, mut host) = (at, run.host + within);
        if within != 0 && (entry.is_compressed() || !self.shape.holds_no_data(entry)) {
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

    /// Allocates up to `want` clusters for the entries from `first` on that need new ones.
    fn fresh_run(&self, first: GuestOffset, want: u64) -> Result<Run> {
        let cluster = self.shape.cluster;
        let left = read(&self.tables).left_in_slice(first);
        let want = want.min(left >> cluster.bits());
        let mut need = 1;
        while need < want {
            let next = GuestOffset(first.0 + (need << cluster.bits()));
            let (_, entry) = self.entry_of(next)?;
            if self.reusable(entry).is_some() || self.is_settled(entry)? {
                break;
            }
            need += 1;
        }
        match self.home(first) {
            Some(host) => Ok(Run { host, clusters: need, zeroed: false }),
            None => lock(&self.refcounts).allocate_run(need),
        }
    }

    /// Whether the cluster is plain data that is overwritten in place, without subclusters.
    fn is_settled(&self, entry: Entry) -> Result<bool> {
        let plain = !self.shape.extended && self.shape.kind(entry, 0)? == Kind::Data;
        Ok(plain && entry.exclusive())
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

    /// Reserves what the entries from `at` on keep already, as far as it is in one piece.
    fn reuse(&self, at: GuestOffset, len: u64, host: HostOffset) -> Result<Reservation<'_>> {
        let cluster = self.shape.cluster;
        let within = cluster.within(at.0);
        let left = read(&self.tables).left_in_slice(at);
        let len = len.min(left);
        let mut have = (cluster.bytes() - within).min(len);
        while have < len {
            let (_, entry) = self.entry_of(GuestOffset(at.0 + have))?;
            let next = host + within + have;
            if self.reusable(entry) != Some(next) || self.is_settled(entry)? {
                break;
            }
            have = (have + cluster.bytes()).min(len);
        }
        let host = host + within;
        self.check_ground(host, have)?;
        Ok(Reservation { image: self, start: at, len: have, host, owned: None, zeroed: false })
    }

    /// The entry of a guest cluster whose L2 table exists.
    pub(super) fn entry_of(&self, at: GuestOffset) -> Result<(Place, Entry)> {
        let found = self.load_entry(at)?;
        found.ok_or_else(|| Error::corrupt("an L2 table went away during a write"))
    }

    /// Makes sure that the L2 table for `at` exists and may be changed.
    pub(super) fn ensure_table(&self, at: GuestOffset) -> Result<()> {
        let old = read(&self.tables).table(at)?;
        if old.is_some_and(|t| t.exclusive) {
            return Ok(());
        }
        let run = lock(&self.refcounts).allocate(1)?;
        if let Err(error) = self.fill_table(run.host, old) {
            lock(&self.refcounts).release(run.host, 1)?;
            return Err(error);
        }
        let mut tables = write(&self.tables);
        let now = tables.table(at)?;
        if now.is_some_and(|t| t.exclusive) {
            drop(tables);
            lock(&self.refcounts).release(run.host, 1)?;
            return Ok(());
        }
        let cluster = self.shape.cluster;
        write(&self.territory).add(cluster, run.host.0, cluster.bytes());
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
    pub(super) fn relieve(&self) -> Result<()> {
        let crowded = read(&self.tables).cache.crowded() || lock(&self.refcounts).crowded();
        if crowded { self.write_back() } else { Ok(()) }
    }

    /// Replaces the entry of the cluster at `at` by what `change` makes of it, and frees what only
    /// the old one referred to. The L2 table exists.
    pub(super) fn change_entry(
        &self,
        at: GuestOffset,
        what: Lost,
        change: impl Fn(Entry) -> Entry,
    ) -> Result<()> {
        loop {
            self.entry_of(at)?;
            let mut tables = write(&self.tables);
            let Some(place) = tables.place(at)? else {
                return Err(Error::corrupt("an L2 table went away during a write"));
            };
            // It may have been evicted since it was loaded.
            let Some(old) = tables.entry(place) else { continue };
            let new = change(old);
            if new != old {
                self.check_replaced(old)?;
                tables.set_entry(place, new);
                self.free_replaced(old, new, what);
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
        self.check_ground(host, len)
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

impl Reservation<'_> {
    /// Whether the entries keep the clusters already.
    pub(super) fn is_kept(&self) -> bool {
        self.owned.is_none()
    }

    /// Makes the entries keep the reserved clusters without reading anything from them. Entries with
    /// subclusters only.
    pub(super) fn keep_unread(mut self) -> Result<()> {
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
        let image = self.image;
        let (shape, cluster) = (image.shape, image.shape.cluster);
        let end = self.start.0 + self.len;
        let mut pos = self.start.0;
        while pos < end {
            let base = cluster.floor(pos);
            let next = (base + cluster.bytes()).min(end);
            // The disk's last cluster may be cut short: the rest of it is the guest's as well.
            let to = if next == image.size() { cluster.bytes() } else { next - base };
            let host = HostOffset(cluster.floor(self.host.0 + (pos - self.start.0)));
            image.change_entry(GuestOffset(base), Lost::Data, |old| {
                shape.with_data(old, host, pos - base, to)
            })?;
            if let Some(run) = &mut self.owned {
                // An entry refers to it now: a failure further on must not give it back.
                run.host = run.host + cluster.bytes();
                run.clusters = run.clusters.saturating_sub(1);
            }
            pos = next;
        }
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
