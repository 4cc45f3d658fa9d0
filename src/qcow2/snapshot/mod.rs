//! Internal snapshots: taking, applying, deleting and renaming them.
//!
//! A snapshot is a second L1 table over the same L2 tables and data, with a reference of its own to
//! each of them. The table of snapshots, and an L1 table that is replaced, are written beside the
//! old ones; one write of the header makes the change. What comes before it only adds references,
//! what comes after it only takes them away: a crash leaves leaks at most. Where COPIED flags have
//! to follow refcounts, the dirty bit stands meanwhile (version 3), and the next opening for writing
//! mends what a crash left between them.
//!
//! All of this needs the image for itself, hence `&mut`. Specification: qcow2, "Snapshots".

pub(in crate::qcow2) mod references;

pub(super) mod table;

use std::sync::Arc;

use nix::libc::{EBUSY, EFBIG, ENOENT, ENOTSUP};

use crate::addr::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::guard::lock;
use crate::qcow2::header::{Header, MAX_SNAPSHOTS, incompatible};
use crate::qcow2::image::{Image, OpenOptions};
use crate::qcow2::tables::words;
use crate::storage::Storage;

pub use table::Snapshot;
pub(super) use table::Table;

/// Why a snapshot that is gone leaves leaks: the table that it stood in was not freed either.
pub const OLD_TABLE_LEAKED: &str = "Failed to free the old snapshot table";
/// Why a snapshot that is gone leaves leaks.
pub const SNAPSHOT_LEAKED: &str = "Failed to free the cluster and L1 table";

/// What the one who takes a snapshot says of it.
#[derive(Debug, Clone, Default)]
pub struct NewSnapshot {
    /// Its name, up to 65535 bytes; other snapshots may have the same.
    pub name: String,
    /// The time: seconds since 1970.
    pub seconds: u32,
    /// Nanoseconds of the second.
    pub nanoseconds: u32,
    /// How long the guest had been running, in nanoseconds.
    pub vm_clock: u64,
    /// Instructions that the guest had executed, where they were counted.
    pub icount: Option<u64>,
}

impl Image {
    /// The internal snapshots in the order of their table.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where the table is over a limit or cut short.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        Ok(Table::read(&*self.storage, &self.header())?.snapshots)
    }

    /// Opens the image in `storage` for reading, as it was when the snapshot with this id, or else
    /// this name, was taken, whatever `options` say about writing.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is no such snapshot.
    pub fn open_snapshot(
        storage: Arc<dyn Storage>,
        options: OpenOptions,
        which: &str,
    ) -> Result<Image> {
        let options = OpenOptions { read_only: true, repair: false, ..options };
        let mut header = Header::read(&*storage)?;
        let snapshots = Table::read(&*storage, &header)?.snapshots;
        let snapshot = &snapshots[find(&snapshots, which)?];
        {
            // The table is checked with the image's own means before its place is believed.
            let image = Image::with_header(storage.clone(), header.clone(), options.clone())?;
            image.read_l1("Snapshot", snapshot.l1_offset, snapshot.l1_size)?;
        }
        header.l1_offset = snapshot.l1_offset;
        header.l1_size = snapshot.l1_size;
        header.size = snapshot.disk_size.unwrap_or(header.size);
        let needed = header.l1_needed(header.size);
        let needed = needed.ok_or_else(|| Error::corrupt("Image is too big"))?;
        let image = Image::with_header(storage, header, options)?;
        image.tables.write().pad_l1(needed as usize);
        Ok(image)
    }

    /// Takes a snapshot of the disk as it is; returns its id.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where a refcount has no room for one more reference: nothing that is
    /// in use is changed then, and the clusters for the snapshot's L1 table are leaked.
    pub fn create_snapshot(&mut self, new: &NewSnapshot) -> Result<String> {
        // The table need not be read to know that it is full.
        if self.header().snapshots >= MAX_SNAPSHOTS {
            return Err(Error::invalid("an image has 65536 snapshots at most").with_os_error(EFBIG));
        }
        if new.name.len() > usize::from(u16::MAX) {
            return Err(Error::invalid("a snapshot's name has 65535 bytes at most"));
        }
        let (header, mut snapshots) = self.begin_snapshots()?;
        let mut l1 = self.active_l1(&header)?;
        let id = next_id(&snapshots);
        let mut snapshot = table::Snapshot {
            l1_offset: 0,
            l1_size: header.l1_size,
            id: id.clone().into_bytes(),
            name: new.name.clone().into_bytes(),
            seconds: new.seconds,
            nanoseconds: new.nanoseconds,
            vm_clock: new.vm_clock,
            vm_state_size: 0,
            disk_size: Some(header.size),
            icount: new.icount,
            extra_len: 0,
            unknown: Vec::new(),
        };
        // Before anything is written: a table that would be too large is refused.
        snapshots.push(snapshot.clone());
        Table::encode(&snapshots)?;
        snapshots.pop();
        // As QEMU does: what is reserved for a snapshot that is then refused is a leak.
        let copy: Vec<u64> =
            l1.iter().map(|entry| entry & !crate::qcow2::tables::entry::COPIED).collect();
        snapshot.l1_offset = self.write_new(&words::encode(&copy))?.0;
        let more = self.references(&l1)?;
        self.can_add(&more)?;
        snapshots.push(snapshot);
        let table = self.write_new(&Table::encode(&snapshots)?)?;
        let shares = more.end() > 0;
        if shares {
            self.set_dirty(true)?;
            self.add_references(&more)?;
            self.write_back()?;
            if self.flag_tables(&mut l1, |_| Ok(false))? {
                let bytes = words::encode(&l1);
                self.metadata(|| self.storage.write_all_at(header.l1_offset, &bytes))?;
            }
        }
        let old = self.old_table(&header)?;
        self.publish(snapshots.len(), table, old, |h| h.incompatible &= !incompatible::DIRTY)?;
        Ok(id)
    }

    /// Makes the disk what it was when the snapshot was taken, size included. What was written
    /// since and is in no snapshot is lost.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for an unknown id; [`ErrorKind::Invalid`] where a refcount has no
    /// room for one more reference: nothing is changed then.
    pub fn apply_snapshot(&mut self, id: &str) -> Result<()> {
        let (header, snapshots) = self.begin_snapshots()?;
        let snapshot = &snapshots[position(&snapshots, id)?];
        if !self.bitmaps()?.is_empty() {
            // They would not know what changed.
            return Err(Error::unsupported("Device has active dirty bitmaps").with_os_error(EBUSY));
        }
        let size = snapshot.disk_size.unwrap_or(header.size);
        let needed = header.l1_needed(size);
        let needed = needed.ok_or_else(|| Error::corrupt("Image is too big"))? as usize;
        let mut l1 = self.read_l1("Snapshot", snapshot.l1_offset, snapshot.l1_size)?;
        let more = self.references(&l1)?;
        let less = self.references(&self.active_l1(&header)?)?;
        self.can_add(&more)?;
        self.can_subtract(&less)?;
        self.begin_change()?;
        self.add_references(&more)?;
        // The snapshot goes on referring to all of it: nothing below the new table is exclusive.
        self.write_back()?;
        self.flag_tables(&mut l1, |_| Ok(false))?;
        l1.resize(l1.len().max(needed), 0);
        let place = self.write_new(&words::encode(&l1))?;
        self.write_back()?;
        self.update_header(|h| {
            h.l1_offset = place.0;
            h.l1_size = l1.len() as u32;
            h.size = size;
        })?;
        self.size.store(size, std::sync::atomic::Ordering::Release);
        self.reload_tables()?;
        let mut freed = self.take_references(&less)?;
        freed.extend(self.release_bytes(header.l1_offset, u64::from(header.l1_size) * 8)?);
        self.write_back()?;
        self.punch_freed(&freed);
        Ok(())
    }

    /// Deletes a snapshot; what only it held is free.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for an unknown id.
    pub fn delete_snapshot(&mut self, id: &str) -> Result<()> {
        let (header, mut snapshots) = self.begin_snapshots()?;
        let snapshot = snapshots.remove(position(&snapshots, id)?);
        let l1 = self.read_l1("Snapshot", snapshot.l1_offset, snapshot.l1_size)?;
        let less = self.references(&l1)?;
        self.can_subtract(&less)?;
        let table = self.write_new(&Table::encode(&snapshots)?)?;
        self.write_back()?;
        let shares = less.end() > 0;
        let old = self.old_table(&header)?;
        self.update_header(|h| {
            (h.snapshots, h.snapshots_offset) = (snapshots.len() as u32, table.0);
            if shares && h.version >= 3 {
                h.incompatible |= incompatible::DIRTY;
            }
        })?;
        // What fails from here on leaves leaks.
        let mut freed = self.release_old_table(old).map_err(|e| leaked(OLD_TABLE_LEAKED, e))?;
        let freeing = || {
            let mut freed = self.take_references(&less)?;
            freed.extend(self.release_bytes(snapshot.l1_offset, u64::from(snapshot.l1_size) * 8)?);
            self.write_back()?;
            Ok(freed)
        };
        freed.extend(freeing().map_err(|e| leaked(SNAPSHOT_LEAKED, e))?);
        if shares {
            let mut l1 = self.active_l1(&header)?;
            if self.flag_tables(&mut l1, |cluster| self.is_exclusive(cluster))? {
                let bytes = words::encode(&l1);
                self.metadata(|| self.storage.write_all_at(header.l1_offset, &bytes))?;
            }
            self.barrier()?;
            self.set_dirty(false)?;
        }
        self.punch_freed(&freed);
        self.reload_tables()
    }

    fn release_old_table(&self, old: OldTable) -> Result<Vec<(HostOffset, u64)>> {
        let freed = self.release_bytes(old.offset, old.len)?;
        self.write_back()?;
        Ok(freed)
    }

    /// Gives a snapshot another name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for an unknown id.
    pub fn rename_snapshot(&mut self, id: &str, name: &str) -> Result<()> {
        let (header, mut snapshots) = self.begin_snapshots()?;
        let at = position(&snapshots, id)?;
        if name.len() > usize::from(u16::MAX) {
            return Err(Error::invalid("a snapshot's name has 65535 bytes at most"));
        }
        snapshots[at].name = name.as_bytes().to_vec();
        let old = self.old_table(&header)?;
        self.replace_snapshots(&snapshots, old)
    }

    /// Writes the table anew, with these snapshots and all extra data, and frees the `old` one: its
    /// offset and length in bytes.
    pub(super) fn replace_snapshots(&self, list: &[Snapshot], old: OldTable) -> Result<()> {
        let table = self.write_new(&Table::encode(list)?)?;
        self.publish(list.len(), table, old, |_| ())
    }

    /// Brings everything that was changed to the file; returns header and snapshots.
    fn begin_snapshots(&self) -> Result<(Header, Vec<Snapshot>)> {
        self.check_writable()?;
        if self.data.is_external() {
            // Two states of one cluster would need two places for it.
            let message = "an image with an external data file holds no internal snapshots";
            return Err(Error::unsupported(message).with_os_error(ENOTSUP));
        }
        self.write_back_all()?;
        let header = self.header();
        let table = Table::read(&*self.storage, &header)?;
        Ok((header, table.snapshots))
    }

    /// Writes back all that was changed, and makes free what was freed: the file says all there is
    /// to know.
    pub(super) fn write_back_all(&self) -> Result<()> {
        self.write_back()?;
        self.release_freed()?;
        self.write_back()
    }

    /// Allocates room for `bytes` and writes them there. Nowhere for no bytes.
    pub(super) fn write_new(&self, bytes: &[u8]) -> Result<HostOffset> {
        if bytes.is_empty() {
            return Ok(HostOffset(0));
        }
        let cluster = self.shape.cluster;
        let run = lock(&self.refcounts).allocate(cluster.count(bytes.len() as u64))?;
        self.storage.write_all_at(run.host.0, bytes).inspect_err(|_| {
            // Nobody knows it.
            let _ = lock(&self.refcounts).release(run.host, run.clusters);
        })?;
        Ok(run.host)
    }

    /// Makes the header point to a table of `count` snapshots that was written at `table`, and frees
    /// the old one.
    fn publish(
        &self,
        count: usize,
        table: HostOffset,
        old: OldTable,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        self.write_back()?;
        self.update_header(|h| {
            (h.snapshots, h.snapshots_offset) = (count as u32, table.0);
            change(h);
        })?;
        self.reload_tables()?;
        let freed = self.release_bytes(old.offset, old.len)?;
        self.write_back()?;
        self.punch_freed(&freed);
        Ok(())
    }

    /// Where the snapshot table stands now.
    fn old_table(&self, header: &Header) -> Result<OldTable> {
        let len = Table::read(&*self.storage, header)?.len;
        Ok(OldTable { offset: header.snapshots_offset, len })
    }

    /// Releases the clusters of `len` bytes at `host`, which nothing refers to any more.
    pub(super) fn release_bytes(&self, host: u64, len: u64) -> Result<Vec<(HostOffset, u64)>> {
        if len == 0 {
            return Ok(Vec::new());
        }
        lock(&self.refcounts).release(HostOffset(host), self.shape.cluster.count(len))
    }

    /// Says in the file that flags and refcounts may disagree, or no longer do.
    pub(super) fn set_dirty(&self, dirty: bool) -> Result<()> {
        let header = self.header();
        if header.version < 3 || (header.incompatible & incompatible::DIRTY != 0) == dirty {
            return Ok(());
        }
        self.update_header(|h| h.incompatible ^= incompatible::DIRTY)
    }

    /// Forgets all mapping that is in memory: the file's was changed.
    pub(super) fn reload_tables(&self) -> Result<()> {
        lock(&self.inflated).clear();
        let header = self.header();
        self.metadata(|| self.tables.write().reload(&*self.storage, &header))?;
        self.map_metadata()
    }
}

/// The place of a snapshot table that another takes the place of, in bytes of the file.
#[derive(Clone, Copy)]
pub(super) struct OldTable {
    pub offset: u64,
    pub len: u64,
}

fn leaked(what: &str, error: Error) -> Error {
    let kind = error.kind();
    let errno = error.raw_os_error();
    let new = Error::new(kind, what);
    match errno {
        Some(errno) => new.with_os_error(errno),
        None => error,
    }
}

/// The place of the snapshot with this id.
fn position(snapshots: &[Snapshot], id: &str) -> Result<usize> {
    snapshots.iter().position(|s| s.id == id.as_bytes()).ok_or_else(|| missing(id))
}

/// The place of the snapshot with this id or, if there is none, this name.
fn find(snapshots: &[Snapshot], which: &str) -> Result<usize> {
    let named = |s: &Snapshot| s.name == which.as_bytes();
    let found = position(snapshots, which).ok().or_else(|| snapshots.iter().position(named));
    found.ok_or_else(|| missing(which))
}

fn missing(which: &str) -> Error {
    let message = format!("the image has no internal snapshot '{which}'");
    Error::new(ErrorKind::NotFound, message).with_os_error(ENOENT)
}

/// One more than the largest id that is a number.
fn next_id(snapshots: &[Snapshot]) -> String {
    let numbers = snapshots.iter().filter_map(|s| s.id().parse::<u64>().ok());
    numbers.max().unwrap_or(0).saturating_add(1).to_string()
}
