//! A new image of another program's format while it is filled: each block gets its place at the end
//! of the file when the first byte of it is written.
//!
//! Only for an image that was just made and that nobody else uses: its tables are written as blocks
//! come, in no order that a crash would leave whole.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::sync::{Arc, Mutex, MutexGuard};

use super::runs;
use crate::addr::{GuestOffset, HostOffset, Unit};
use crate::block::total;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Allocation, Extent, Image, Mapping};
use crate::storage::Storage;

/// Where a format puts its blocks, and how it writes that down.
pub trait Places: Send {
    /// Bytes of a block.
    fn block(&self) -> Unit;

    /// Gives a block a place, where the file reads as zeroes; returns its first byte's offset.
    fn place(&mut self, index: u64) -> Result<u64>;

    /// Stores a whole block compressed.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the format does not compress.
    fn place_compressed(&mut self, index: u64, bytes: &[u8]) -> Result<()> {
        let _ = (index, bytes);
        Err(Error::unsupported("this format does not compress"))
    }

    /// Writes down what counts for the image as a whole.
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

/// One new image, empty at first.
pub struct Filling {
    storage: Arc<dyn Storage>,
    size: u64,
    block: Unit,
    state: Mutex<State>,
}

struct State {
    places: Box<dyn Places>,
    /// The blocks that have a place.
    known: BTreeMap<u64, u64>,
}

impl Filling {
    /// An image of `size` bytes in `storage`, none of whose blocks has a place.
    pub fn new(storage: Arc<dyn Storage>, size: u64, places: Box<dyn Places>) -> Filling {
        let block = places.block();
        let state = Mutex::new(State { places, known: BTreeMap::new() });
        Filling { storage, size, block, state }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn end_of_block(&self, at: u64) -> u64 {
        (self.block.floor(at) + self.block.bytes()).min(self.size)
    }
}

impl Image for Filling {
    fn size(&self) -> u64 {
        self.size
    }

    fn cluster(&self) -> Unit {
        self.block
    }

    fn granularity(&self) -> Unit {
        Unit::from_bits(9)
    }

    fn read_only(&self) -> bool {
        false
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        let len = runs::clip(at, len, self.size)?;
        let (index, state) = (self.block.index(at.0), self.state());
        let (mapping, end) = match state.known.get(&index) {
            Some(host) => {
                let host = HostOffset(host + self.block.within(at.0));
                (Mapping::Data { host, exclusive: true }, self.end_of_block(at.0))
            }
            None => {
                let next =
                    state.known.range(index..).next().and_then(|(i, _)| self.block.start(*i));
                (Mapping::Unallocated, next.unwrap_or(self.size))
            }
        };
        Ok(Extent { start: at, len: len.min(end - at.0), mapping })
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        runs::read(&self.storage, extent, at, bufs)
    }

    fn overwrite(&self, extent: &Extent, at: GuestOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        let skip = runs::skip(extent, at, total(bufs))?;
        let Mapping::Data { host, .. } = extent.mapping else {
            return Err(Error::invalid("not an extent of plain data"));
        };
        self.storage.write_at(host.0 + skip, bufs)
    }

    fn prepare(&self, at: GuestOffset, len: u64) -> Result<Box<dyn Allocation + '_>> {
        let len = runs::clip(at, len, self.size)?.min(self.end_of_block(at.0) - at.0);
        let (index, mut state) = (self.block.index(at.0), self.state());
        let host = match state.known.get(&index) {
            Some(host) => *host,
            None => {
                let host = state.places.place(index)?;
                state.known.insert(index, host);
                host
            }
        };
        let host = host + self.block.within(at.0);
        Ok(Box::new(Place { storage: &*self.storage, start: at, len, host }))
    }

    fn zero(&self, at: GuestOffset, len: u64, _unmap: bool) -> Result<()> {
        let last = self.block.index(at.0.saturating_add(len.max(1)) - 1);
        let state = self.state();
        match state.known.range(self.block.index(at.0)..=last).next() {
            None => Ok(()),
            Some(_) => Err(Error::new(ErrorKind::Unsupported, "the block is there already")),
        }
    }

    fn pack(&self, _at: GuestOffset, bytes: &[u8]) -> Result<Option<Vec<u8>>> {
        // The format compresses a block where it gives it a place.
        Ok(Some(bytes.to_vec()))
    }

    fn write_packed(&self, at: GuestOffset, packed: &[u8]) -> Result<bool> {
        self.state().places.place_compressed(self.block.index(at.0), packed)?;
        Ok(true)
    }

    fn flush(&self) -> Result<()> {
        self.state().places.finish()?;
        self.storage.sync()
    }
}

/// A stretch of a block that has its place already: nothing has to be written down any more.
struct Place<'a> {
    storage: &'a dyn Storage,
    start: GuestOffset,
    len: u64,
    host: u64,
}

impl Allocation for Place<'_> {
    fn start(&self) -> GuestOffset {
        self.start
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn reads_zero(&self) -> bool {
        true
    }

    fn write(&self, skip: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        if skip.checked_add(total(bufs)).is_none_or(|end| end > self.len) {
            return Err(Error::invalid("a write past what was reserved for it"));
        }
        self.storage.write_at(self.host + skip, bufs)
    }

    fn commit(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}
