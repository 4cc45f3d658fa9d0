//! An export as a raw disk.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

use super::client::Client;
use crate::addr::{GuestOffset, HostOffset, Unit};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Capabilities, Extent, Image, Mapping, Placed};
use crate::storage::Storage as _;

/// An export, every byte of which is the guest's.
pub struct Disk {
    client: Arc<Client>,
    read_only: bool,
}

impl Disk {
    /// All of the export.
    pub fn new(client: Arc<Client>, read_only: bool) -> Disk {
        Disk { client, read_only }
    }

    fn check_writable(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the image is open for reading only"));
        }
        Ok(())
    }
}

impl Image for Disk {
    fn size(&self) -> u64 {
        self.client.size()
    }

    /// There are no clusters; this is the unit in which others account for them.
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
        let start = extent.start;
        let stretch = self.client.stretch(start.0, extent.len)?;
        let mapping = match stretch.zero {
            true => Mapping::Zero { host: Some(HostOffset(start.0)) },
            false => extent.mapping,
        };
        Ok(Extent { start, len: stretch.len, mapping })
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let _ = extent;
        self.client.read_at(at.0, bufs)
    }

    fn overwrite(&self, extent: &Extent, at: GuestOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        let _ = extent;
        self.check_writable()?;
        self.client.write_at(at.0, bufs)
    }

    fn zero(&self, at: GuestOffset, len: u64, unmap: bool) -> Result<()> {
        self.check_writable()?;
        match unmap {
            true => self.client.punch_hole(at.0, len),
            false => self.client.write_zeroes(at.0, len),
        }
    }

    fn discard(&self, at: GuestOffset, len: u64, expose: bool) -> Result<()> {
        self.check_writable()?;
        if expose {
            return Err(Error::unsupported("an export has nothing that could show through"));
        }
        // A server may show anything for what it was given back; zeroes are what it must show for
        // this.
        self.client.punch_hole(at.0, len)
    }

    fn flush(&self) -> Result<()> {
        if self.read_only { Ok(()) } else { self.client.sync() }
    }

    fn resize_over(&self, size: u64, _clear: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        if size == self.size() {
            return Ok(());
        }
        Err(Error::unsupported("Cannot resize NBD nodes"))
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { placed: Some(self), ..Capabilities::default() }
    }
}

impl Placed for Disk {
    fn is_stored(&self, extent: &Extent) -> Result<Option<bool>> {
        Ok(Some(self.client.stretch(extent.start.0, extent.len)?.stored))
    }
}
