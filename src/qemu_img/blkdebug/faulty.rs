//! Images and storages that fail as the rules of `blkdebug` say.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

use vdisk::Result;
use vdisk::addr::GuestOffset;
use vdisk::block::{total, total_mut};
use vdisk::image::{Allocation, Capabilities, Compress, Extent, Filter, Image};
use vdisk::storage::{Step, Storage};

use crate::qemu_img::blkdebug::events;
use crate::qemu_img::blkdebug::faults::{Doing, Faults};

/// An image with faults.
pub struct Faulty {
    inner: Arc<dyn Image>,
    faults: Faults,
}

impl Faulty {
    /// `inner`, failing as `faults` say.
    pub fn new(inner: Arc<dyn Image>, faults: Faults) -> Faulty {
        Faulty { inner, faults }
    }
}

impl Filter for Faulty {
    fn inner(&self) -> &dyn Image {
        &*self.inner
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities {
            compress: self.inner.capabilities().compress.map(|_| self as &dyn Compress),
            ..Capabilities::default()
        }
    }

    fn narrow(&self, extent: Extent) -> Result<Extent> {
        self.faults.strike(Doing::Map, extent.start.0, extent.len)?;
        self.inner.narrow(extent)
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.faults.happens("read_aio");
        self.faults.strike(Doing::Read, at.0, total_mut(bufs))?;
        self.inner.read(extent, at, bufs)
    }

    fn overwrite(&self, extent: &Extent, at: GuestOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.faults.happens("write_aio");
        self.faults.strike(Doing::Write, at.0, total(bufs))?;
        self.inner.overwrite(extent, at, bufs)
    }

    fn prepare(&self, at: GuestOffset, len: u64) -> Result<Box<dyn Allocation + '_>> {
        self.faults.happens("write_aio");
        self.faults.strike(Doing::Write, at.0, len)?;
        self.inner.prepare(at, len)
    }

    fn zero(&self, at: GuestOffset, len: u64, unmap: bool) -> Result<()> {
        self.faults.strike(Doing::WriteZeroes, at.0, len)?;
        self.inner.zero(at, len, unmap)
    }

    fn discard(&self, at: GuestOffset, len: u64, expose: bool) -> Result<()> {
        self.faults.strike(Doing::Discard, at.0, len)?;
        self.inner.discard(at, len, expose)
    }

    fn flush(&self) -> Result<()> {
        self.faults.happens("flush_to_os");
        self.faults.happens("flush_to_disk");
        self.faults.strike(Doing::Flush, 0, 0)?;
        self.inner.flush()
    }
}

impl Compress for Faulty {
    fn pack(&self, at: GuestOffset, bytes: &[u8]) -> Result<Option<Vec<u8>>> {
        self.inner.pack(at, bytes)
    }

    fn write_packed(&self, at: GuestOffset, packed: &[u8]) -> Result<bool> {
        self.faults.happens("write_aio");
        let whole = self.inner.cluster().bytes().min(self.inner.size().saturating_sub(at.0));
        self.faults.strike(Doing::Write, at.0, whole)?;
        self.inner.write_packed(at, packed)
    }
}

/// A storage with faults: what stands below a format.
pub struct FaultyStorage {
    inner: Arc<dyn Storage>,
    faults: Faults,
}

impl FaultyStorage {
    /// `inner`, failing as `faults` say.
    pub fn new(inner: Arc<dyn Storage>, faults: Faults) -> FaultyStorage {
        FaultyStorage { inner, faults }
    }
}

impl Storage for FaultyStorage {
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len)
    }

    fn is_fixed(&self) -> bool {
        self.inner.is_fixed()
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.faults.strike(Doing::Read, offset, total_mut(bufs))?;
        self.inner.read_at(offset, bufs)
    }

    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.faults.happens("pwritev");
        self.faults.strike(Doing::Write, offset, total(bufs))?;
        self.inner.write_at(offset, bufs)?;
        self.faults.happens("pwritev_done");
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.faults.strike(Doing::Discard, offset, len)?;
        self.inner.punch_hole(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.faults.happens("pwritev_zero");
        self.faults.strike(Doing::WriteZeroes, offset, len)?;
        self.inner.write_zeroes(offset, len)?;
        self.faults.happens("pwritev_done");
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.faults.strike(Doing::Flush, 0, 0)?;
        self.inner.sync()
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        let len = self.inner.len()?.saturating_sub(offset);
        self.faults.strike(Doing::Map, offset, len)?;
        self.inner.next_data(offset)
    }

    fn allocated(&self) -> Result<u64> {
        self.inner.allocated()
    }

    fn about_to(&self, step: Step) {
        events::of(step).iter().for_each(|event| self.faults.happens(event));
        self.inner.about_to(step);
    }
}
