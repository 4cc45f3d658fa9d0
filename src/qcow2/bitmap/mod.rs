//! Persistent dirty bitmaps: which parts of the disk were written since a backup.
//!
//! Bitmaps with the "auto" flag are kept right by writes. Before the first write their "in use" flag
//! is set in the file; their bits are then kept in memory and stored when the image is closed. A
//! crash leaves the flag, and everyone knows that the bits mean nothing. Directory, tables and bits
//! are written beside the old ones and switched by one header write. Specification: qcow2,
//! "Bitmaps".

pub(in crate::qcow2) mod bits;
mod carry;
mod change;
pub(in crate::qcow2) mod directory;
pub(in crate::qcow2) mod tracker;

use std::ops::Range;
use std::sync::atomic::Ordering;

use nix::libc::{EINVAL, ENOENT};

use crate::addr::{HostOffset, Unit};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::guard::lock;
use crate::qcow2::header::extension::BITMAPS;
use crate::qcow2::header::{Header, autoclear};
use crate::qcow2::image::Image;
use crate::qcow2::tables::words::{decode, encode};
use bits::{Bits, Part, table_entry};
pub use change::BitmapChanges;
use directory::{AUTO, Entry, IN_USE};
use tracker::{Bitmap, Tracker};

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
        self.bits_of(entry)?.ranges(&*self.storage)
    }

    /// Whether the image can have a bitmap of that name besides `others`.
    fn check_new_bitmap(&self, name: &str, others: usize) -> Result<()> {
        if self.shape.version < 3 {
            let message = "bitmaps need version 3: amend the image first";
            return Err(Error::unsupported(message));
        }
        if name.is_empty() || name.len() > directory::MAX_NAME {
            return Err(Error::invalid("Bitmap name is too long").with_os_error(EINVAL));
        }
        if others >= directory::MAX_BITMAPS {
            return Err(Error::invalid("Maximum number of persistent bitmaps is already reached"));
        }
        Ok(())
    }

    /// Brings everything to the file; returns all bitmaps.
    fn begin_bitmaps(&self) -> Result<Vec<Bitmap>> {
        self.check_writable()?;
        self.write_back_all()?;
        self.store_tracked()?;
        let entries = directory::read(&*self.storage, &self.header())?;
        Ok(entries.into_iter().map(|entry| Bitmap { entry, bits: None }).collect())
    }

    /// Begins to keep the "auto" bitmaps right; their bits are read when they change.
    pub(super) fn track_bitmaps(&self) -> Result<()> {
        let entries = directory::read(&*self.storage, &self.header())?;
        let tracked = entries.into_iter().filter(|e| e.is(AUTO) && !e.is(IN_USE));
        let bitmaps: Result<Vec<Bitmap>> = tracked
            .map(|entry| {
                let bits = Some(self.bits_of(&entry)?);
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
        if self.unrecorded || !self.tracking.load(Ordering::Acquire) {
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
        self.store_bitmaps(all, |_| ())
    }

    /// Whether all bitmaps can go over to a disk of `size` bytes.
    pub(super) fn check_resizable_bitmaps(&self, size: u64) -> Result<()> {
        let entries = directory::read(&*self.storage, &self.header())?;
        let tracker = lock(&self.tracker);
        for entry in &entries {
            // Those that this image keeps right are in use by itself.
            let kept = tracker.marked && tracker.bitmaps.iter().any(|b| b.entry.name == entry.name);
            let entry = if kept { entry } else { consistent(entry)? };
            Bits::new(Unit::from_bits(entry.granularity_bits.into()), self.shape.cluster, size)?;
        }
        Ok(())
    }

    /// All bitmaps over a disk of `size` bytes, to be stored with the new size; `None` without any.
    pub(super) fn resized_bitmaps(&self, size: u64) -> Result<Option<Vec<Bitmap>>> {
        if directory::place(&self.header()).is_none() {
            return Ok(None);
        }
        let mut bitmaps = self.begin_bitmaps()?;
        for Bitmap { entry, bits } in &mut bitmaps {
            let old = self.bits_of(consistent(entry)?)?;
            *bits = Some(old.resized(&*self.storage, size)?);
        }
        Ok(Some(bitmaps))
    }

    /// A bitmap's bits as the file has them: over a disk as long as the header says.
    fn bits_of(&self, entry: &Entry) -> Result<Bits> {
        Bits::read(&*self.storage, entry, self.shape.cluster, self.header().size)
    }

    /// Writes a new directory with these bitmaps, and tables for those whose bits are given; frees
    /// what the old ones held alone; goes on tracking. What `change` does to the header is published
    /// with them.
    pub(super) fn store_bitmaps(
        &self,
        mut bitmaps: Vec<Bitmap>,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let header = self.header();
        let old = directory::read(&*self.storage, &header)?;
        let mut written = Vec::new();
        let place = self.write_bitmaps(&mut bitmaps, &mut written);
        let (place, len) =
            place.and_then(|place| self.write_back().map(|()| place)).inspect_err(|_| {
                // Nothing in the file refers to any of it: on a full host others need it.
                for (offset, len) in &written {
                    let _ = self.release_bytes(offset.0, *len);
                }
            })?;
        let entries: Vec<Entry> = bitmaps.into_iter().map(|b| b.entry).collect();
        self.update_header(|h| {
            let some = !entries.is_empty();
            let data = directory::extension(entries.len(), place.0, len);
            h.set_extension(BITMAPS, some.then_some(data));
            h.autoclear =
                h.autoclear & !autoclear::BITMAPS | if some { autoclear::BITMAPS } else { 0 };
            change(h);
        })?;
        self.free_bitmaps(&header, &old, &entries)?;
        self.write_back()?;
        self.track_bitmaps()
    }

    /// Writes the bitmaps whose bits can be read beside the old ones, and a directory of all; returns
    /// where that is, and its length. Each place that is taken, with its length, goes to `written`.
    fn write_bitmaps(
        &self,
        bitmaps: &mut [Bitmap],
        written: &mut Vec<(HostOffset, u64)>,
    ) -> Result<(HostOffset, u64)> {
        for Bitmap { entry, bits } in &mut *bitmaps {
            // All of them move, as QEMU does it: what was written together stands together.
            let bits = match bits.take() {
                Some(bits) => bits,
                None if entry.is(IN_USE) => continue,
                None => match self.bits_of(entry) {
                    Ok(bits) => bits,
                    // What cannot be read stays where it is.
                    Err(_) => continue,
                },
            };
            let table = self.write_bits(&bits, written)?;
            let bytes = encode(&table);
            entry.table_offset = self.write_noted(&bytes, written)?.0;
            entry.table_size = table.len() as u32;
            entry.flags &= !IN_USE;
        }
        let bytes = directory::encode(bitmaps.iter().map(|b| &b.entry));
        Ok((self.write_noted(&bytes, written)?, bytes.len() as u64))
    }

    /// As [`write_new`](Image::write_new); the place is noted.
    fn write_noted(
        &self,
        bytes: &[u8],
        written: &mut Vec<(HostOffset, u64)>,
    ) -> Result<HostOffset> {
        let place = self.write_new(bytes)?;
        written.push((place, bytes.len() as u64));
        Ok(place)
    }

    /// Writes the bits that are in memory; returns the bitmap's table. No part stays where it was:
    /// what the old table refers to is freed with it.
    fn write_bits(&self, bits: &Bits, written: &mut Vec<(HostOffset, u64)>) -> Result<Vec<u64>> {
        let mut table = Vec::with_capacity(bits.parts.len());
        for part in &bits.parts {
            table.push(match part {
                Part::Changed(bytes) if bytes.iter().any(|b| *b != 0) => {
                    self.write_noted(bytes, written)?.0
                }
                Part::Stored(offset) => {
                    let mut bytes = vec![0; self.shape.cluster.bytes() as usize];
                    let have = self.storage.len()?.saturating_sub(*offset);
                    let have = have.min(bytes.len() as u64) as usize;
                    self.storage.read_exact_at(*offset, &mut bytes[..have])?;
                    if bytes.iter().all(|b| *b == 0) {
                        0
                    } else {
                        self.write_noted(&bytes, written)?.0
                    }
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
            for raw in decode(&table) {
                let offset = raw & crate::qcow2::tables::entry::OFFSET;
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

fn find(entries: &[Entry], name: &str) -> Result<usize> {
    entries.iter().position(|e| e.is_named(name)).ok_or_else(|| missing(name))
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
