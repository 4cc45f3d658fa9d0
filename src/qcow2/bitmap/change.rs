//! Changes of an image's bitmaps: one, or several that are stored at once.

use std::ops::Range;

use super::bits::Bits;
use super::carry::{bitmap_unit, new_entry};
use super::directory::{AUTO, Entry};
use super::{Bitmap, consistent, missing};
use crate::addr::Unit;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::image::Image;

/// The bitmaps of an image while they are changed, in memory.
pub struct BitmapChanges<'a> {
    image: &'a Image,
    bitmaps: Vec<Bitmap>,
    changed: bool,
}

impl Image {
    /// Changes bitmaps. All that `change` has done is stored at once, whatever it returns: a crash, or a
    /// host without room, leaves all of the old ones or all of the new ones.
    ///
    /// # Errors
    /// Where they could not be stored.
    pub fn change_bitmaps<T>(
        &mut self,
        change: impl FnOnce(&mut BitmapChanges<'_>) -> T,
    ) -> Result<T> {
        let bitmaps = self.begin_bitmaps()?;
        let mut changes = BitmapChanges { image: self, bitmaps, changed: false };
        let done = change(&mut changes);
        let BitmapChanges { bitmaps, changed, .. } = changes;
        if changed {
            self.store_bitmaps(bitmaps, |_| ())?;
        }
        Ok(done)
    }

    /// Adds a bitmap: see [`BitmapChanges::add`].
    pub fn add_bitmap(&mut self, name: &str, granularity: Option<u64>, auto: bool) -> Result<()> {
        self.change_bitmaps(|all| all.add(name, granularity, auto))?
    }

    /// Removes a bitmap, an inconsistent one too.
    pub fn remove_bitmap(&mut self, name: &str) -> Result<()> {
        self.change_bitmaps(|all| all.remove(name))?
    }

    /// Clears all bits of a bitmap.
    pub fn clear_bitmap(&mut self, name: &str) -> Result<()> {
        self.change_bitmaps(|all| all.clear(name))?
    }

    /// Makes a bitmap record writes from now on, or stop.
    pub fn enable_bitmap(&mut self, name: &str, auto: bool) -> Result<()> {
        self.change_bitmaps(|all| all.enable(name, auto))?
    }

    /// Sets the bits of `ranges`, which another bitmap calls dirty, in this one.
    pub fn merge_bitmap(&mut self, name: &str, ranges: &[Range<u64>]) -> Result<()> {
        self.change_bitmaps(|all| all.merge(name, ranges))?
    }
}

impl BitmapChanges<'_> {
    /// Adds a bitmap with no bit set. `granularity` is in bytes; without one it is the cluster, at
    /// least 4 KiB and at most 64 KiB. Where `auto`, it records writes from now on.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`]; [`ErrorKind::Invalid`] for what is out of bounds.
    pub fn add(&mut self, name: &str, granularity: Option<u64>, auto: bool) -> Result<()> {
        if self.has(name) {
            return Err(Error::new(ErrorKind::Exists, format!("Bitmap already exists: {name}")));
        }
        self.image.check_new_bitmap(name, self.bitmaps.len())?;
        let cluster = self.image.shape.cluster;
        let unit = bitmap_unit(granularity.unwrap_or(cluster.bytes().clamp(4096, 65536)))?;
        let bits = Some(Bits::new(unit, cluster, self.image.header().size)?);
        self.bitmaps.push(Bitmap { entry: new_entry(name, unit, auto), bits });
        self.changed = true;
        Ok(())
    }

    /// Whether there is a bitmap of that name.
    pub fn has(&self, name: &str) -> bool {
        self.bitmaps.iter().any(|b| b.entry.is_named(name))
    }

    /// Removes a bitmap, an inconsistent one too.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        let at = self.bitmaps.iter().position(|b| b.entry.is_named(name));
        self.bitmaps.remove(at.ok_or_else(|| missing(name))?);
        self.changed = true;
        Ok(())
    }

    /// Clears all bits of a bitmap.
    pub fn clear(&mut self, name: &str) -> Result<()> {
        let (cluster, size) = (self.image.shape.cluster, self.image.header().size);
        self.change(name, |entry, bits| {
            let granularity = Unit::from_bits(entry.granularity_bits.into());
            *bits = Some(Bits::new(granularity, cluster, size)?);
            Ok(())
        })
    }

    /// Makes a bitmap record writes from now on, or stop.
    pub fn enable(&mut self, name: &str, auto: bool) -> Result<()> {
        self.change(name, |entry, _| {
            entry.flags = entry.flags & !AUTO | if auto { AUTO } else { 0 };
            Ok(())
        })
    }

    /// Sets the bits of `ranges`, which another bitmap calls dirty, in this one.
    pub fn merge(&mut self, name: &str, ranges: &[Range<u64>]) -> Result<()> {
        let image = self.image;
        self.change(name, |entry, bits| {
            let mut all = match bits.take() {
                Some(bits) => bits,
                None => image.bits_of(entry)?,
            };
            ranges.iter().try_for_each(|range| all.set(&*image.storage, range.clone()))?;
            *bits = Some(all);
            Ok(())
        })
    }

    /// The ranges of the disk, in bytes, that a bitmap calls dirty.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Invalid`] where the bitmap is inconsistent.
    pub fn ranges(&self, name: &str) -> Result<Vec<Range<u64>>> {
        let found = self.bitmaps.iter().find(|b| b.entry.is_named(name));
        let Bitmap { entry, bits } = found.ok_or_else(|| missing(name))?;
        match bits {
            Some(bits) => bits.ranges(&*self.image.storage),
            None => self.image.bits_of(consistent(entry)?)?.ranges(&*self.image.storage),
        }
    }

    fn change(
        &mut self,
        name: &str,
        work: impl FnOnce(&mut Entry, &mut Option<Bits>) -> Result<()>,
    ) -> Result<()> {
        let found = self.bitmaps.iter_mut().find(|b| b.entry.is_named(name));
        let Bitmap { entry, bits } = found.ok_or_else(|| missing(name))?;
        consistent(entry)?;
        work(entry, bits)?;
        self.changed = true;
        Ok(())
    }
}
