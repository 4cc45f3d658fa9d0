//! A layer in front of another: it changes a few of that one's answers and passes the rest on.

use std::io::{IoSlice, IoSliceMut};

use super::{Allocation, Backing, Capabilities, Details, Extent, Hold, Identity, Image, read_only};
use crate::addr::{GuestOffset, Unit};
use crate::error::Result;

/// A layer in front of [`inner`](Filter::inner). A method that it does not write itself is the inner
/// layer's; each means what the method of [`Image`] of that name means. Where it is
/// [`read_only`](Filter::read_only), nothing that would change the inner layer reaches it.
pub trait Filter: Send + Sync {
    /// The layer behind it.
    fn inner(&self) -> &dyn Image;

    /// Whether changes are refused.
    fn read_only(&self) -> bool {
        self.inner().read_only()
    }

    /// What it can do besides. A filter of data leaves out what would go around it.
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities::default()
    }

    /// See [`Image::map`].
    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        self.inner().map(at, len)
    }

    /// See [`Image::narrow`].
    fn narrow(&self, extent: Extent) -> Result<Extent> {
        self.inner().narrow(extent)
    }

    /// See [`Image::read`].
    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.inner().read(extent, at, bufs)
    }

    /// See [`Image::overwrite`].
    fn overwrite(&self, extent: &Extent, at: GuestOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.inner().overwrite(extent, at, bufs)
    }

    /// See [`Image::prepare`].
    fn prepare(&self, at: GuestOffset, len: u64) -> Result<Box<dyn Allocation + '_>> {
        self.inner().prepare(at, len)
    }

    /// See [`Image::zero`].
    fn zero(&self, at: GuestOffset, len: u64, unmap: bool) -> Result<()> {
        self.inner().zero(at, len, unmap)
    }

    /// See [`Image::discard`].
    fn discard(&self, at: GuestOffset, len: u64, expose: bool) -> Result<()> {
        self.inner().discard(at, len, expose)
    }

    /// See [`Image::set_identity`].
    fn set_identity(&self, identity: &Identity) -> Result<()> {
        self.inner().set_identity(identity)
    }

    /// See [`Image::flush`].
    fn flush(&self) -> Result<()> {
        self.inner().flush()
    }
}

impl<F: Filter> Image for F {
    fn size(&self) -> u64 {
        self.inner().size()
    }

    fn cluster(&self) -> Unit {
        self.inner().cluster()
    }

    fn block_size(&self) -> Option<u64> {
        self.inner().block_size()
    }

    fn granularity(&self) -> Unit {
        self.inner().granularity()
    }

    fn backing(&self) -> Option<Backing> {
        self.inner().backing()
    }

    fn encrypted(&self) -> bool {
        self.inner().encrypted()
    }

    fn starts_zeroed(&self) -> bool {
        self.inner().starts_zeroed()
    }

    fn read_only(&self) -> bool {
        Filter::read_only(self)
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Filter::capabilities(self)
    }

    fn hold(&self) -> Hold<'_> {
        self.inner().hold()
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        Filter::map(self, at, len)
    }

    fn narrow(&self, extent: Extent) -> Result<Extent> {
        Filter::narrow(self, extent)
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        Filter::read(self, extent, at, bufs)
    }

    fn overwrite(&self, extent: &Extent, at: GuestOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        writable(self)?;
        Filter::overwrite(self, extent, at, bufs)
    }

    fn prepare(&self, at: GuestOffset, len: u64) -> Result<Box<dyn Allocation + '_>> {
        writable(self)?;
        Filter::prepare(self, at, len)
    }

    fn zero(&self, at: GuestOffset, len: u64, unmap: bool) -> Result<()> {
        writable(self)?;
        Filter::zero(self, at, len, unmap)
    }

    fn discard(&self, at: GuestOffset, len: u64, expose: bool) -> Result<()> {
        writable(self)?;
        Filter::discard(self, at, len, expose)
    }

    fn identity(&self) -> Result<Identity> {
        self.inner().identity()
    }

    fn set_identity(&self, identity: &Identity) -> Result<()> {
        writable(self)?;
        Filter::set_identity(self, identity)
    }

    fn details(&self) -> Option<Details> {
        self.inner().details()
    }

    fn flush(&self) -> Result<()> {
        if Filter::read_only(self) { Ok(()) } else { Filter::flush(self) }
    }

    fn close(&self) -> Result<()> {
        if Filter::read_only(self) {
            return Ok(());
        }
        Filter::flush(self)?;
        self.inner().close()
    }

    fn resize_over(&self, size: u64, clear: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        writable(self)?;
        self.inner().resize_over(size, clear)
    }
}

fn writable(filter: &impl Filter) -> Result<()> {
    if Filter::read_only(filter) { Err(read_only()) } else { Ok(()) }
}
