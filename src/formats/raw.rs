//! Raw: the file's bytes are the guest's.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::addr::{GuestOffset, HostOffset, Unit};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{self, Extent, Mapping};
use crate::storage::Storage;

/// A raw image.
pub struct Image {
    storage: Arc<dyn Storage>,
    size: AtomicU64,
    read_only: bool,
}

impl Image {
    /// Opens all of `storage` as a disk.
    pub fn open(storage: Arc<dyn Storage>, read_only: bool) -> Result<Image> {
        let size = AtomicU64::new(storage.len()?);
        Ok(Image { storage, size, read_only })
    }

    fn check_writable(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the image is open for reading only"));
        }
        Ok(())
    }
}

impl image::Image for Image {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Raw files have no clusters; this is the unit in which others account for them.
    fn cluster(&self) -> Unit {
        Unit::from_bits(16)
    }

    fn block_size(&self) -> Option<u64> {
        None
    }

    fn granularity(&self) -> Unit {
        Unit::from_bits(0)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        let mapping = Mapping::Data { host: HostOffset(at.0), exclusive: !self.read_only };
        Ok(Extent { start: at, len: len.min(self.size().saturating_sub(at.0)), mapping })
    }

    fn narrow(&self, extent: Extent) -> Result<Extent> {
        let (start, end) = (extent.start.0, extent.start.0 + extent.len);
        let zero = |to: u64| Extent {
            start: extent.start,
            len: to.min(end) - start,
            mapping: Mapping::Zero { host: Some(HostOffset(start)) },
        };
        Ok(match self.storage.next_data(start)? {
            None => zero(end),
            Some((data, _)) if data > start => zero(data),
            Some((_, hole)) => Extent { len: hole.clamp(start + 1, end) - start, ..extent },
        })
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let _ = extent;
        self.storage.about_to("read_aio");
        self.storage.read_at(at.0, bufs)
    }

    fn overwrite(&self, extent: &Extent, at: GuestOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        let _ = extent;
        self.check_writable()?;
        self.storage.about_to("write_aio");
        self.storage.write_at(at.0, bufs)
    }

    fn zero(&self, at: GuestOffset, len: u64, unmap: bool) -> Result<()> {
        self.check_writable()?;
        if unmap {
            self.storage.punch_hole(at.0, len)
        } else {
            self.storage.write_zeroes(at.0, len)
        }
    }

    fn discard(&self, at: GuestOffset, len: u64, _expose: bool) -> Result<()> {
        self.check_writable()?;
        self.storage.punch_hole(at.0, len)
    }

    fn flush(&self) -> Result<()> {
        if self.read_only { Ok(()) } else { self.storage.sync() }
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.check_writable()?;
        self.storage.set_len(size)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}
