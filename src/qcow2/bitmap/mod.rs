//! Persistent dirty bitmaps: which parts of the disk were written since a backup.
//!
//! Bitmaps with the "auto" flag are kept right by writes. Before the first write their "in use" flag
//! is set in the file; their bits are then kept in memory and stored when the image is closed. A
//! crash leaves the flag, and everyone knows that the bits mean nothing. Directory, tables and bits
//! are written beside the old ones and switched by one header write. Specification: qcow2,
//! "Bitmaps".

pub(in crate::qcow2) mod bits;
pub(in crate::qcow2) mod directory;

use std::ops::Range;
use std::sync::atomic::Ordering;

use nix::libc::{EINVAL, ENOENT};

use super::extension::BITMAPS;
use super::header::{Header, autoclear};
use super::image::{Image, lock};
use crate::addr::{HostOffset, Unit};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image as _;
use bits::{Bits, Part, table_entry};
use directory::{AUTO, Entry, IN_USE};

/// What is known of a bitmap without its bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name, unique in the image.
    pub name: String,
    /// Bytes of the disk that one bit speaks for.
    pub granularity: u64,
    /// Whether writes are recorded.
    pub auto: bool,
    /// Whether it was not stored when its last writer stopped: it can only be removed.
    pub in_use: bool,
}

/// The bitmaps that this image keeps right while it is open.
#[derive(Default)]
pub(super) struct Tracker {
    bitmaps: Vec<Bitmap>,
    /// Whether the file says that they are in use.
    marked: bool,
}

/// A bitmap with its bits.
struct Bitmap {
    entry: Entry,
    /// `None`: as the file has them.
    bits: Option<Bits>,
}

impl Image {
    /// The bitmaps in the order of their directory.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where the directory is not valid.
    pub fn bitmaps(&self) -> Result<Vec<BitmapInfo>> {
        let info = |entry: &Entry| BitmapInfo {
            name: String::from_utf8_lossy(&entry.name).into_owned(),
            granularity: 1 << entry.granularity_bits,
            auto: entry.is(AUTO),
            in_use: entry.is(IN_USE),
        };
        Ok(directory::read(&*self.storage, &self.header())?.iter().map(info).collect())
    }

    /// The ranges of the disk, in bytes, that a bitmap in the file calls dirty.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Invalid`] where the bitmap is inconsistent.
    pub fn bitmap_ranges(&self, name: &str) -> Result<Vec<Range<u64>>> {
        let entries = directory::read(&*self.storage, &self.header())?;
        let entry = consistent(&entries[find(&entries, name)?])?;
        let bits = Bits::read(&*self.storage, entry, self.shape.cluster, self.size())?;
        bits.ranges(&*self.storage)
    }

    /// Adds a bitmap with no bit set. `granularity` is in bytes; without one it is the cluster, at
    /// least 4 KiB and at most 64 KiB. Where `auto`, it records writes from now on.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`]; [`ErrorKind::Invalid`] for what is out of bounds.
    pub fn add_bitmap(&mut self, name: &str, granularity: Option<u64>, auto: bool) -> Result<()> {
        let mut bitmaps = self.begin_bitmaps()?;
        if self.shape.version < 3 {
            let message = "bitmaps need version 3: amend the image first";
            return Err(Error::unsupported(message));
        }
        if name.is_empty() || name.len() > directory::MAX_NAME {
            return Err(Error::invalid("Bitmap name is too long").with_os_error(EINVAL));
        }
        if bitmaps.iter().any(|b| b.entry.is_named(name)) {
            return Err(Error::new(ErrorKind::Exists, format!("Bitmap already exists: {name}")));
        }
        if bitmaps.len() >= directory::MAX_BITMAPS {
            return Err(Error::invalid("Maximum number of persistent bitmaps is already reached"));
        }
        let wanted = granularity.unwrap_or(self.shape.cluster.bytes().clamp(4096, 65536));
        let unit = Unit::from_bytes(wanted).filter(|unit| (9..=31).contains(&unit.bits()));
        let unit = unit.ok_or_else(|| {
            Error::invalid("a bitmap's granularity is a power of two between 512 bytes and 2 GiB")
        })?;
        let bits = Bits::new(unit, self.shape.cluster, self.size())?;
        let entry = Entry {
            table_offset: 0,
            table_size: 0,
            flags: if auto { AUTO } else { 0 },
            kind: directory::DIRTY_TRACKING,
            granularity_bits: unit.bits() as u8,
            extra: Vec::new(),
            name: name.as_bytes().to_vec(),
            place: 0,
        };
        bitmaps.push(Bitmap { entry, bits: Some(bits) });
        self.store_bitmaps(bitmaps)
    }

    /// Removes a bitmap, an inconsistent one too.
    pub fn remove_bitmap(&mut self, name: &str) -> Result<()> {
        let mut bitmaps = self.begin_bitmaps()?;
        let at = position(&bitmaps, name)?;
        bitmaps.remove(at);
        self.store_bitmaps(bitmaps)
    }

    /// Clears all bits of a bitmap.
    pub fn clear_bitmap(&mut self, name: &str) -> Result<()> {
        let mut bitmaps = self.begin_bitmaps()?;
        let at = position(&bitmaps, name)?;
        let granularity = Unit::from_bits(consistent(&bitmaps[at].entry)?.granularity_bits.into());
        bitmaps[at].bits = Some(Bits::new(granularity, self.shape.cluster, self.size())?);
        self.store_bitmaps(bitmaps)
    }

    /// Makes a bitmap record writes from now on, or stop.
    pub fn enable_bitmap(&mut self, name: &str, auto: bool) -> Result<()> {
        let mut bitmaps = self.begin_bitmaps()?;
        let at = position(&bitmaps, name)?;
        consistent(&bitmaps[at].entry)?;
        let entry = &mut bitmaps[at].entry;
        entry.flags = entry.flags & !AUTO | if auto { AUTO } else { 0 };
        self.store_bitmaps(bitmaps)
    }

    /// Sets the bits of `ranges`, which another bitmap calls dirty, in this one.
    pub fn merge_bitmap(&mut self, name: &str, ranges: &[Range<u64>]) -> Result<()> {
        let mut bitmaps = self.begin_bitmaps()?;
        let at = position(&bitmaps, name)?;
        let entry = consistent(&bitmaps[at].entry)?;
        let mut bits = Bits::read(&*self.storage, entry, self.shape.cluster, self.size())?;
        for range in ranges {
            bits.set(&*self.storage, range.clone())?;
        }
        bitmaps[at].bits = Some(bits);
        self.store_bitmaps(bitmaps)
    }

    /// Brings everything to the file; returns all bitmaps.
    fn begin_bitmaps(&self) -> Result<Vec<Bitmap>> {
        self.check_writable()?;
        self.settle_changes()?;
        self.store_tracked()?;
        let entries = directory::read(&*self.storage, &self.header())?;
        Ok(entries.into_iter().map(|entry| Bitmap { entry, bits: None }).collect())
    }

    /// Begins to keep the "auto" bitmaps right; their bits are read when they change.
    pub(super) fn track_bitmaps(&self) -> Result<()> {
        let entries = directory::read(&*self.storage, &self.header())?;
        let (cluster, size) = (self.shape.cluster, self.size());
        let tracked = entries.into_iter().filter(|e| e.is(AUTO) && !e.is(IN_USE));
        let bitmaps: Result<Vec<Bitmap>> = tracked
            .map(|entry| {
                let bits = Some(Bits::read(&*self.storage, &entry, cluster, size)?);
                Ok(Bitmap { entry, bits })
            })
            .collect();
        let mut tracker = lock(&self.tracker);
        *tracker = Tracker { bitmaps: bitmaps?, marked: false };
        self.tracking.store(!tracker.bitmaps.is_empty(), Ordering::Release);
        Ok(())
    }

    /// To be called before the guest's bytes in a range change.
    pub(super) fn track(&self, at: u64, len: u64) -> Result<()> {
        if !self.tracking.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut tracker = lock(&self.tracker);
        if !tracker.marked {
            self.metadata(|| {
                for Bitmap { entry, .. } in &tracker.bitmaps {
                    let flags = (entry.flags | IN_USE).to_be_bytes();
                    self.storage.write_all_at(entry.flags_place(), &flags)?;
                }
                self.storage.sync()
            })?;
            tracker.marked = true;
        }
        for bits in tracker.bitmaps.iter_mut().filter_map(|b| b.bits.as_mut()) {
            bits.set(&*self.storage, at..at.saturating_add(len))?;
        }
        Ok(())
    }

    /// Stores the bitmaps that were kept in memory; they are no longer in use.
    pub(super) fn store_tracked(&self) -> Result<()> {
        let mut tracker = lock(&self.tracker);
        if !tracker.marked {
            return Ok(());
        }
        let tracked = std::mem::take(&mut *tracker).bitmaps;
        drop(tracker);
        let mut all: Vec<Bitmap> = directory::read(&*self.storage, &self.header())?
            .into_iter()
            .map(|entry| Bitmap { entry, bits: None })
            .collect();
        for known in tracked {
            if let Some(same) = all.iter_mut().find(|b| b.entry.name == known.entry.name) {
                *same = known;
            }
        }
        self.store_bitmaps(all)
    }

    /// Makes all bitmaps what they should be over a disk of `size` bytes; to be called before the
    /// size is changed. Returns what to store afterwards.
    pub(super) fn resize_bitmaps(&self, size: u64) -> Result<PendingBitmaps> {
        if directory::place(&self.header()).is_none() {
            return Ok(PendingBitmaps(None));
        }
        let mut bitmaps = self.begin_bitmaps()?;
        let cluster = self.shape.cluster;
        for Bitmap { entry, bits } in &mut bitmaps {
            let old = Bits::read(&*self.storage, consistent(entry)?, cluster, self.size())?;
            *bits = Some(old.resized(&*self.storage, size)?);
        }
        // A crash between here and the new tables leaves bitmaps that say so.
        for Bitmap { entry, .. } in &bitmaps {
            let flags = (entry.flags | IN_USE).to_be_bytes();
            self.metadata(|| self.storage.write_all_at(entry.flags_place(), &flags))?;
        }
        self.barrier()?;
        Ok(PendingBitmaps(Some(bitmaps)))
    }

    /// Stores what [`resize_bitmaps`](Image::resize_bitmaps) made.
    pub(super) fn finish_resize(&self, pending: PendingBitmaps) -> Result<()> {
        pending.0.map_or(Ok(()), |bitmaps| self.store_bitmaps(bitmaps))
    }

    /// Writes a new directory with these bitmaps, and tables for those whose bits are given; frees
    /// what the old ones held alone; goes on tracking.
    fn store_bitmaps(&self, mut bitmaps: Vec<Bitmap>) -> Result<()> {
        let header = self.header();
        let old = directory::read(&*self.storage, &header)?;
        for Bitmap { entry, bits } in &mut bitmaps {
            // All of them move, as QEMU does it: what was written together stands together.
            let bits = match bits.take() {
                Some(bits) => bits,
                None if entry.is(IN_USE) => continue,
                None => match Bits::read(&*self.storage, entry, self.shape.cluster, self.size()) {
                    Ok(bits) => bits,
                    // What cannot be read stays where it is.
                    Err(_) => continue,
                },
            };
            let table = self.write_bits(&bits)?;
            let bytes: Vec<u8> = table.iter().flat_map(|raw| raw.to_be_bytes()).collect();
            entry.table_offset = self.write_new(&bytes)?.0;
            entry.table_size = table.len() as u32;
            entry.flags &= !IN_USE;
        }
        let entries: Vec<Entry> = bitmaps.into_iter().map(|b| b.entry).collect();
        let bytes = directory::encode(&entries);
        let place = self.write_new(&bytes)?;
        self.write_back()?;
        self.update_header(|h| {
            let some = !entries.is_empty();
            let data = directory::extension(entries.len(), place.0, bytes.len() as u64);
            h.set_extension(BITMAPS, some.then_some(data));
            h.autoclear =
                h.autoclear & !autoclear::BITMAPS | if some { autoclear::BITMAPS } else { 0 };
        })?;
        self.free_bitmaps(&header, &old, &entries)?;
        self.write_back()?;
        self.track_bitmaps()
    }

    /// Writes the bits that are in memory; returns the bitmap's table. No part stays where it was:
    /// what the old table refers to is freed with it.
    fn write_bits(&self, bits: &Bits) -> Result<Vec<u64>> {
        let mut table = Vec::with_capacity(bits.parts.len());
        for part in &bits.parts {
            table.push(match part {
                Part::Changed(bytes) if bytes.iter().any(|b| *b != 0) => self.write_new(bytes)?.0,
                Part::Stored(offset) => {
                    let mut bytes = vec![0; self.shape.cluster.bytes() as usize];
                    let have = self.storage.len()?.saturating_sub(*offset);
                    let have = have.min(bytes.len() as u64) as usize;
                    self.storage.read_exact_at(*offset, &mut bytes[..have])?;
                    if bytes.iter().all(|b| *b == 0) { 0 } else { self.write_new(&bytes)?.0 }
                }
                other => table_entry(other),
            });
        }
        Ok(table)
    }

    /// Frees the old directory, and the tables and bits that no bitmap of the new one has.
    fn free_bitmaps(&self, header: &Header, old: &[Entry], new: &[Entry]) -> Result<()> {
        let cluster = self.shape.cluster;
        for entry in old.iter().filter(|o| new.iter().all(|n| n.table_offset != o.table_offset)) {
            let len = u64::from(entry.table_size) * 8;
            let end = entry.table_offset.checked_add(len);
            if end.is_none_or(|end| end > self.storage.len().unwrap_or(0)) {
                // Nothing of it is known: what it held is leaked, which check mends.
                continue;
            }
            let mut table = vec![0; len as usize];
            self.storage.read_exact_at(entry.table_offset, &mut table)?;
            for raw in table.chunks_exact(8) {
                let raw = <byteorder::BigEndian as byteorder::ByteOrder>::read_u64(raw);
                let offset = raw & super::entry::OFFSET;
                if offset != 0 && cluster.aligned(offset) {
                    lock(&self.refcounts).release(HostOffset(offset), 1)?;
                }
            }
            self.release_bytes(entry.table_offset, len)?;
        }
        if let Some((offset, len)) = directory::place(header) {
            self.release_bytes(offset, len)?;
        }
        Ok(())
    }
}

/// Bitmaps on their way to another disk size.
pub(super) struct PendingBitmaps(Option<Vec<Bitmap>>);

fn find(entries: &[Entry], name: &str) -> Result<usize> {
    entries.iter().position(|e| e.is_named(name)).ok_or_else(|| missing(name))
}

fn position(bitmaps: &[Bitmap], name: &str) -> Result<usize> {
    bitmaps.iter().position(|b| b.entry.is_named(name)).ok_or_else(|| missing(name))
}

fn missing(name: &str) -> Error {
    let message = format!("Dirty bitmap '{name}' not found");
    Error::new(ErrorKind::NotFound, message).with_os_error(ENOENT)
}

fn consistent(entry: &Entry) -> Result<&Entry> {
    if entry.is(IN_USE) {
        let name = String::from_utf8_lossy(&entry.name);
        let message = format!("Bitmap '{name}' is inconsistent and cannot be used");
        return Err(Error::invalid(message).with_os_error(EINVAL));
    }
    Ok(entry)
}
