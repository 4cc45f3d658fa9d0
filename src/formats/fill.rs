//! An image of another program's format while it is written, a new one or one that is there: each
//! block gets its place at the end of the file when the first byte of it is written.
//!
//! What the image holds already is read by the format's own reader, whose tables stay as they were when
//! it was opened; what was placed since is known here. A block is entered in the image's tables once its
//! bytes are written, and a block's place is reserved before: a crash leaves a hole in the file at worst.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::sync::{Arc, Mutex, MutexGuard};

use super::runs;
use crate::addr::{GuestOffset, HostOffset, Unit};
use crate::block::total;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{
    Allocation, Backing, Capabilities, Compress, Extent, Fingerprint, Image, Mapping,
};
use crate::storage::Storage;

/// Where a format puts its blocks, and how it writes that down.
pub trait Places: Send {
    /// Bytes of a block.
    fn block(&self) -> Unit;

    /// Reserves a place for a block and makes it read as zeroes; returns its first byte's offset.
    fn place(&mut self) -> Result<u64>;

    /// Writes down that a block stands at the place that was reserved for it.
    fn enter(&mut self, index: u64, host: u64) -> Result<()>;

    /// A block that was there before is about to be overwritten.
    fn touch(&mut self, index: u64) -> Result<()> {
        let _ = index;
        Ok(())
    }

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

/// Where all blocks have a place from the beginning.
pub(super) struct Everywhere;

impl Places for Everywhere {
    fn block(&self) -> Unit {
        runs::CLUSTER
    }

    fn place(&mut self) -> Result<u64> {
        Err(Error::invalid("the disk has no more places"))
    }

    fn enter(&mut self, _: u64, _: u64) -> Result<()> {
        Err(Error::invalid("the disk has no tables"))
    }
}

/// Where new blocks may stand in `storage`: behind all that it holds. A file ends there. What is fixed
/// goes on, with bytes of others, and the tables are asked instead: `image` reads them, and nothing but
/// its blocks stands behind `front`.
pub(super) fn end(
    storage: &dyn Storage,
    image: &dyn Image,
    block: Unit,
    front: u64,
) -> Result<u64> {
    if !storage.is_fixed() {
        return storage.len();
    }
    let (mut end, mut at) = (front, 0);
    while at < image.size() {
        let Extent { len, mapping, .. } = image.map(GuestOffset(at), image.size() - at)?;
        end = end.max(match mapping {
            // The disk's last block has all of its bytes, too.
            Mapping::Data { host, .. } => host.0.saturating_add(block.ceil(len)),
            // How far it goes matters to nobody: no block is put behind a compressed one.
            Mapping::Compressed { descriptor } => descriptor.saturating_add(1),
            Mapping::Zero { .. } | Mapping::Unallocated => 0,
        });
        at += len;
    }
    Ok(end)
}

/// What the formats that QEMU does not resize say.
pub(super) fn no_resize() -> Error {
    Error::unsupported("Image format driver does not support resize")
}

/// One image that is written.
pub struct Filling {
    storage: Arc<dyn Storage>,
    size: u64,
    block: Unit,
    /// What the image held when it was opened; `None` for a new one.
    held: Option<Arc<dyn Image>>,
    state: Mutex<State>,
}

struct State {
    places: Box<dyn Places>,
    /// The blocks that got a place.
    known: BTreeMap<u64, u64>,
    /// Places that are reserved for blocks and not entered yet.
    reserved: BTreeMap<u64, Reserved>,
}

/// A place that no table names.
struct Reserved {
    host: u64,
    /// Something was written there, and never entered.
    used: bool,
}

impl Filling {
    /// An image of `size` bytes in `storage`, none of whose blocks has a place.
    pub fn new(storage: Arc<dyn Storage>, size: u64, places: Box<dyn Places>) -> Filling {
        Filling::over(storage, size, places, None)
    }

    /// An image that `held` reads, and whose plain data may be overwritten where they stand.
    pub fn of_image(
        storage: Arc<dyn Storage>,
        held: Arc<dyn Image>,
        places: Box<dyn Places>,
    ) -> Filling {
        Filling::over(storage, held.size(), places, Some(held))
    }

    fn over(
        storage: Arc<dyn Storage>,
        size: u64,
        places: Box<dyn Places>,
        held: Option<Arc<dyn Image>>,
    ) -> Filling {
        let block = places.block();
        let (known, reserved) = (BTreeMap::new(), BTreeMap::new());
        let state = Mutex::new(State { places, known, reserved });
        Filling { storage, size, block, held, state }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn end_of_block(&self, at: u64) -> u64 {
        self.block.floor(at).saturating_add(self.block.bytes()).min(self.size)
    }

    /// Where nothing is placed from `at` on: how far that goes, and what the image held there.
    fn unplaced(&self, state: &State, at: u64, len: u64) -> Result<Extent> {
        let next = state.known.range(self.block.index(at)..).next();
        let end = next.and_then(|(index, _)| self.block.start(*index)).unwrap_or(self.size);
        let (start, len) = (GuestOffset(at), len.min(end.saturating_sub(at)));
        let Some(held) = &self.held else {
            return Ok(Extent { start, len, mapping: Mapping::Unallocated });
        };
        let extent = held.map(start, len)?;
        let mapping = match extent.mapping {
            Mapping::Data { host, .. } => Mapping::Data { host, exclusive: true },
            other => other,
        };
        Ok(Extent { mapping, ..extent })
    }
}

impl Image for Filling {
    fn size(&self) -> u64 {
        self.size
    }

    fn cluster(&self) -> Unit {
        self.block
    }

    /// What a part of a block leaves out of it reads as zeroes, unless something below would show.
    fn granularity(&self) -> Unit {
        if self.backing().is_some() { self.block } else { Unit::from_bits(9) }
    }

    fn backing(&self) -> Option<Backing> {
        self.held.as_ref().and_then(|held| held.backing())
    }

    fn read_only(&self) -> bool {
        false
    }

    fn starts_zeroed(&self) -> bool {
        true
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        let len = runs::clip(at, len, self.size)?;
        let state = self.state();
        let Some(host) = state.known.get(&self.block.index(at.0)) else {
            return self.unplaced(&state, at.0, len);
        };
        let host = HostOffset(host + self.block.within(at.0));
        let len = len.min(self.end_of_block(at.0) - at.0);
        Ok(Extent { start: at, len, mapping: Mapping::Data { host, exclusive: true } })
    }

    fn narrow(&self, extent: Extent) -> Result<Extent> {
        match &self.held {
            Some(held) => held.narrow(extent),
            None => Ok(extent),
        }
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        match (&self.held, extent.mapping) {
            (Some(held), Mapping::Compressed { .. }) => held.read(extent, at, bufs),
            _ => runs::read(&self.storage, extent, at, bufs),
        }
    }

    fn overwrite(&self, extent: &Extent, at: GuestOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        let len = total(bufs);
        let skip = runs::skip(extent, at, len)?;
        let Mapping::Data { host, .. } = extent.mapping else {
            return Err(Error::invalid("not an extent of plain data"));
        };
        let mut state = self.state();
        for index in self.block.index(at.0)..=self.block.index(at.0 + len.max(1) - 1) {
            if !state.known.contains_key(&index) {
                state.places.touch(index)?;
            }
        }
        drop(state);
        self.storage.write_at(host.0 + skip, bufs)
    }

    fn prepare(&self, at: GuestOffset, len: u64) -> Result<Box<dyn Allocation + '_>> {
        let len = runs::clip(at, len, self.size)?.min(self.end_of_block(at.0) - at.0);
        let (index, mut state) = (self.block.index(at.0), self.state());
        let reserved = match (state.known.get(&index).copied(), state.reserved.remove(&index)) {
            (Some(host), _) => Reserved { host, used: false },
            (None, Some(reserved)) => reserved,
            (None, None) => Reserved { host: state.places.place()?, used: false },
        };
        if reserved.used {
            self.storage.write_zeroes(reserved.host, self.block.bytes())?;
        }
        let host = reserved.host;
        if !state.known.contains_key(&index) {
            // Until it is entered nobody may take it for zeroes.
            state.reserved.insert(index, Reserved { host, used: true });
        }
        Ok(Box::new(Place { filling: self, start: at, len, index, host }))
    }

    fn zero(&self, at: GuestOffset, len: u64, _unmap: bool) -> Result<()> {
        let end = at.0.saturating_add(len).min(self.size);
        let state = self.state();
        let mut pos = at.0;
        let there = || Error::new(ErrorKind::Unsupported, "the block is there already");
        while pos < end {
            if state.known.contains_key(&self.block.index(pos)) {
                return Err(there());
            }
            let extent = self.unplaced(&state, pos, end - pos)?;
            match extent.mapping {
                Mapping::Zero { .. } => {}
                Mapping::Unallocated if self.backing().is_none() => {}
                _ => return Err(there()),
            }
            pos += extent.len;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.state().places.finish()?;
        self.storage.sync()
    }

    fn resize_over(&self, _: u64, _: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        Err(no_resize())
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { compress: Some(self), fingerprint: Some(self), ..Capabilities::default() }
    }
}

impl Compress for Filling {
    fn pack(&self, _at: GuestOffset, bytes: &[u8]) -> Result<Option<Vec<u8>>> {
        // The format compresses a block where it gives it a place.
        Ok(Some(bytes.to_vec()))
    }

    fn write_packed(&self, at: GuestOffset, packed: &[u8]) -> Result<bool> {
        self.state().places.place_compressed(self.block.index(at.0), packed)?;
        Ok(true)
    }
}

impl Fingerprint for Filling {
    fn fingerprint(&self) -> Option<String> {
        self.held.as_ref().and_then(|held| held.fingerprint())
    }

    fn parent_fingerprints(&self) -> Vec<String> {
        self.held.as_ref().map_or_else(Vec::new, |held| held.parent_fingerprints())
    }
}

/// A stretch of a block whose place is reserved.
struct Place<'a> {
    filling: &'a Filling,
    start: GuestOffset,
    len: u64,
    index: u64,
    /// Where the block stands.
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
        let within = self.filling.block.within(self.start.0);
        self.filling.storage.write_at(self.host + within + skip, bufs)
    }

    fn commit(self: Box<Self>) -> Result<()> {
        let mut state = self.filling.state();
        if state.known.contains_key(&self.index) {
            return Ok(());
        }
        state.places.enter(self.index, self.host)?;
        state.reserved.remove(&self.index);
        state.known.insert(self.index, self.host);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    /// Number, place and bytes of each block that was entered.
    type Entered = Arc<Mutex<Vec<(u64, u64, Vec<u8>)>>>;

    /// Blocks of a KiB in the order in which they come; what was entered, and with what in the file.
    struct Log {
        storage: Arc<MemoryStorage>,
        next: u64,
        entered: Entered,
    }

    impl Places for Log {
        fn block(&self) -> Unit {
            Unit::from_bits(10)
        }

        fn place(&mut self) -> Result<u64> {
            self.next += 1024;
            self.storage.set_len(self.next)?;
            Ok(self.next - 1024)
        }

        fn enter(&mut self, index: u64, host: u64) -> Result<()> {
            let mut bytes = vec![0; 1024];
            self.storage.read_exact_at(host, &mut bytes)?;
            self.entered.lock().unwrap().push((index, host, bytes));
            Ok(())
        }
    }

    fn made() -> (Filling, Entered) {
        let storage = Arc::new(MemoryStorage::default());
        let entered = Entered::default();
        let log = Log { storage: storage.clone(), next: 0, entered: Arc::clone(&entered) };
        (Filling::new(storage, 10 << 10, Box::new(log)), entered)
    }

    #[test]
    fn a_block_is_entered_once_its_bytes_are_there() {
        let (image, entered) = made();
        let place = image.prepare(GuestOffset(3 * 1024 + 512), 512).unwrap();
        place.write(0, &[IoSlice::new(&[7; 512])]).unwrap();
        assert!(entered.lock().unwrap().is_empty());
        let found = image.map(GuestOffset(3 * 1024), 1024).unwrap();
        assert_eq!(found.mapping, Mapping::Unallocated, "it is not there before");
        place.commit().unwrap();
        let right = [[0; 512], [7; 512]].concat();
        assert_eq!(*entered.lock().unwrap(), [(3, 0, right)]);
        let found = image.map(GuestOffset(0), 10 << 10).unwrap();
        assert_eq!((found.len, found.mapping), (3072, Mapping::Unallocated));
        assert!(image.zero(GuestOffset(0), 3072, true).is_ok());
        assert!(image.zero(GuestOffset(0), 3584, true).is_err());
    }

    #[test]
    fn a_write_that_failed_leaves_nothing_of_itself() {
        let (image, entered) = made();
        let place = image.prepare(GuestOffset(0), 1024).unwrap();
        place.write(0, &[IoSlice::new(&[9; 1024])]).unwrap();
        drop(place);
        let place = image.prepare(GuestOffset(0), 512).unwrap();
        place.write(0, &[IoSlice::new(&[1; 512])]).unwrap();
        place.commit().unwrap();
        let right = [[1; 512], [0; 512]].concat();
        assert_eq!(*entered.lock().unwrap(), [(0, 0, right)], "and the place is used again");
    }
}
