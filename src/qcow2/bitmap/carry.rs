//! Bitmaps on their way from one layer to another: what they say by now, and taking others in.
//!
//! What an inconsistent bitmap says is not known: it goes nowhere, and nothing is added to it.

use super::bits::Bits;
use super::{Bitmap, directory};
use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::image;
use crate::qcow2::guard::lock;
use crate::qcow2::image::Image;
use directory::{AUTO, Entry, IN_USE};

impl Image {
    /// See [`crate::image::Image::bitmaps`].
    pub(in crate::qcow2) fn recorded(&self) -> Result<Vec<image::Bitmap>> {
        let tracker = lock(&self.tracker);
        let mut all = Vec::new();
        for entry in directory::read(&*self.storage, &self.header())? {
            let kept = tracker.bitmaps.iter().find(|b| b.entry.name == entry.name);
            let written = match kept.and_then(|b| b.bits.as_ref()) {
                Some(bits) => bits.ranges(&*self.storage)?,
                None if entry.is(IN_USE) => continue,
                None => self.bits_of(&entry)?.ranges(&*self.storage)?,
            };
            all.push(image::Bitmap {
                name: String::from_utf8_lossy(&entry.name).into_owned(),
                granularity: 1 << entry.granularity_bits,
                records: entry.is(AUTO),
                written,
            });
        }
        Ok(all)
    }

    /// See [`crate::image::Image::add_to_bitmaps`].
    pub(in crate::qcow2) fn take_in_bitmaps(&self, more: &[image::Bitmap]) -> Result<()> {
        if more.is_empty() {
            return Ok(());
        }
        let mut bitmaps = self.begin_bitmaps()?;
        for one in more {
            match bitmaps.iter_mut().find(|b| b.entry.is_named(&one.name)) {
                Some(Bitmap { entry, .. }) if entry.is(IN_USE) => {}
                Some(Bitmap { entry, bits }) => {
                    let old = match bits.take() {
                        Some(bits) => bits,
                        None => self.bits_of(entry)?,
                    };
                    *bits = Some(self.with_ranges(old, one)?);
                }
                None => bitmaps.push(self.bitmap_of(one, bitmaps.len())?),
            }
        }
        self.store_bitmaps(bitmaps, |_| ())
    }

    /// See [`crate::image::Image::replace_bitmaps`].
    pub(in crate::qcow2) fn put_bitmaps(&self, all: &[image::Bitmap]) -> Result<()> {
        if self.begin_bitmaps()?.is_empty() && all.is_empty() {
            return Ok(());
        }
        let bitmaps: Result<Vec<Bitmap>> =
            all.iter().enumerate().map(|(number, one)| self.bitmap_of(one, number)).collect();
        self.store_bitmaps(bitmaps?, |_| ())
    }

    /// Such a bitmap of this image, which has `others` besides.
    fn bitmap_of(&self, one: &image::Bitmap, others: usize) -> Result<Bitmap> {
        self.check_new_bitmap(&one.name, others)?;
        let unit = bitmap_unit(one.granularity)?;
        let bits = Bits::new(unit, self.shape.cluster, self.header().size)?;
        let bits = Some(self.with_ranges(bits, one)?);
        Ok(Bitmap { entry: new_entry(&one.name, unit, one.records), bits })
    }

    fn with_ranges(&self, mut bits: Bits, one: &image::Bitmap) -> Result<Bits> {
        for range in &one.written {
            bits.set(&*self.storage, range.clone())?;
        }
        Ok(bits)
    }
}

/// The granularity of a bitmap, in bytes, where it can have that.
pub(super) fn bitmap_unit(bytes: u64) -> Result<Unit> {
    let unit = Unit::from_bytes(bytes).filter(|unit| (9..=31).contains(&unit.bits()));
    unit.ok_or_else(|| {
        Error::invalid("a bitmap's granularity is a power of two between 512 bytes and 2 GiB")
    })
}

/// The entry of a bitmap that stands nowhere in the file yet.
pub(super) fn new_entry(name: &str, unit: Unit, records: bool) -> Entry {
    Entry {
        table_offset: 0,
        table_size: 0,
        flags: if records { AUTO } else { 0 },
        kind: directory::DIRTY_TRACKING,
        granularity_bits: unit.bits() as u8,
        extra: Vec::new(),
        name: name.as_bytes().to_vec(),
        place: 0,
    }
}
