//! An open image as one layer of a disk: what the rest of the house asks of it.

use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::Ordering;

use crate::addr::{GuestOffset, Unit};
use crate::block::total;
use crate::error::{Error, Result};
use crate::image::{
    self, Allocation, Backing, Begun, Check, Details, Extent, Hold, Identity, Label, Mapping,
    Repair,
};
use crate::qcow2::guard::lock;
use crate::qcow2::header::autoclear;
use crate::qcow2::image::Image;
use crate::qcow2::step;
use crate::qcow2::tables::entry::Entry;
use crate::storage::Storage;

/// Freed bytes that wait for a flush, at most: a guest that never flushes gets them back, too.
const MAX_FREED: u64 = 64 << 20;

impl image::Image for Image {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn cluster(&self) -> Unit {
        self.shape.cluster
    }

    fn granularity(&self) -> Unit {
        self.shape.granularity()
    }

    fn backing(&self) -> Option<Backing> {
        lock(&self.header).backing.clone()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn encrypted(&self) -> bool {
        self.data.is_encrypted()
    }

    fn starts_zeroed(&self) -> bool {
        // A data file that is read without the tables shows what it held before.
        !self.data.is_raw() || !self.data.storage().is_fixed()
    }

    fn hold(&self) -> Hold<'_> {
        if self.read_only {
            return Hold::free();
        }
        // This is where nothing of the caller's is mapped yet, so that clusters may change hands. What
        // fails here poisons the image, and is told by the next write or flush.
        let waiting = self.freed_bytes.load(Ordering::Relaxed);
        if waiting >= MAX_FREED {
            let _ = image::Image::flush(self);
        }
        Hold::shared(self.grace.read())
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        let len = len.min(self.size().saturating_sub(at.0));
        if len == 0 {
            return Err(Error::invalid("a mapping past the end of the disk was asked for"));
        }
        let (len, entry) = self.with_slice(at, |tables, found| match found {
            Some((place, slice)) => tables.scan(slice, place, at, len),
            None => Ok((tables.unmapped(at, len), Entry::default())),
        })?;
        if let Some(cluster) = self.shape.plain(entry) {
            let host = cluster + self.shape.cluster.within(at.0);
            let mapping = Mapping::Data { host, exclusive: entry.exclusive() };
            return Ok(Extent { start: at, len, mapping });
        }
        let mapping = self.shape.mapping(entry, at.0).map_err(|e| self.note_corruption(e))?;
        Ok(Extent { start: at, len, mapping })
    }

    fn narrow(&self, extent: Extent) -> Result<Extent> {
        self.narrow_extent(extent)
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.read_extent(extent, at, bufs)
    }

    fn overwrite(&self, extent: &Extent, at: GuestOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        let Mapping::Data { host, exclusive: true } = extent.mapping else {
            return Err(Error::invalid("only exclusive data is overwritten in place"));
        };
        self.begin_change()?;
        self.track(at.0, total(bufs))?;
        let host = host + (at - extent.start);
        self.check_overlap(host, total(bufs))?;
        self.data.write(host, at, bufs)
    }

    fn prepare(&self, at: GuestOffset, len: u64) -> Result<Box<dyn Allocation + '_>> {
        self.begin_change()?;
        self.track(at.0, len)?;
        Ok(Box::new(self.reserve(at, len)?))
    }

    fn begin_write(&self, at: GuestOffset, len: u64) -> Result<Begun<'_>> {
        self.begin_change()?;
        let (start, end) = image::whole(self.shape.granularity(), at, len, self.size());
        self.track(start.0, end - start)?;
        self.begin(start, end - start)
    }

    fn zero(&self, at: GuestOffset, len: u64, unmap: bool) -> Result<()> {
        self.begin_change()?;
        self.track(at.0, len)?;
        self.zero_range(at, len, unmap)
    }

    fn discard(&self, at: GuestOffset, len: u64, expose: bool) -> Result<()> {
        self.begin_change()?;
        self.track(at.0, len)?;
        self.discard_range(at, len, expose)
    }

    fn identity(&self) -> Result<Identity> {
        self.header().identity()
    }

    fn set_identity(&self, identity: &Identity) -> Result<()> {
        let label = identity.label.as_ref().map(Label::encode).transpose()?;
        self.update_header(|header| {
            header.set_extension(Label::REST_MAGIC, None);
            header.set_extension(Label::MAGIC, label);
            header.backing = identity.backing.clone();
            header.autoclear &= !autoclear::CONTENT_ID;
            if identity.vouched && header.version >= 3 {
                header.autoclear |= autoclear::CONTENT_ID;
            }
        })
    }

    fn details(&self) -> Option<Details> {
        Some(self.header().details())
    }

    fn flush(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.check_writable()?;
        self.storage.about_to(step::FLUSH);
        self.write_back()?;
        self.release_freed()
    }

    fn close(&self) -> Result<()> {
        image::Image::flush(self)?;
        self.store_tracked()?;
        // Writes down which clusters the first one made free: without it they would be leaks.
        image::Image::flush(self)
    }

    fn resize_over(&self, size: u64, clear: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.change_size(size, clear)
    }

    fn capabilities(&self) -> image::Capabilities<'_> {
        image::Capabilities {
            bitmaps: Some(self),
            check: Some(self),
            compress: Some(self),
            placed: Some(self),
            space: Some(self),
            ..image::Capabilities::default()
        }
    }
}

impl image::Bitmaps for Image {
    fn bitmaps(&self) -> Result<Vec<image::Bitmap>> {
        self.recorded()
    }

    fn add_to_bitmaps(&self, more: &[image::Bitmap]) -> Result<()> {
        self.take_in_bitmaps(more)
    }

    fn replace_bitmaps(&self, all: &[image::Bitmap]) -> Result<()> {
        self.put_bitmaps(all)
    }
}

impl image::Checked for Image {
    fn check(&self, repair: Repair) -> Result<Check> {
        self.check_and_mend(repair)
    }
}

impl image::Compress for Image {
    fn pack(&self, at: GuestOffset, bytes: &[u8]) -> Result<Option<Vec<u8>>> {
        self.pack_cluster(at, bytes)
    }

    fn write_packed(&self, at: GuestOffset, packed: &[u8]) -> Result<bool> {
        self.begin_change()?;
        self.track(
            at.0,
            self.shape.cluster.bytes().min(image::Image::size(self).saturating_sub(at.0)),
        )?;
        self.store_packed(at, packed)
    }
}

impl image::Placed for Image {
    fn stored(&self, extent: &Extent, at: GuestOffset) -> Option<(&dyn Storage, u64)> {
        let Mapping::Data { host, .. } = extent.mapping else { return None };
        (!self.data.is_encrypted()).then(|| (self.data.storage(), (host + (at - extent.start)).0))
    }
}

impl image::Space for Image {
    fn give_back(&self) -> Result<()> {
        self.check_writable()?;
        self.punch_free()
    }

    fn unused(&self) -> Result<u64> {
        self.unused_bytes()
    }

    fn shorten(&self) -> Result<()> {
        self.check_writable()?;
        self.shorten_file()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // Who needs to know whether this worked calls close.
        let _ = image::Image::close(self);
    }
}
