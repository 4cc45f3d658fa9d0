//! VHDX, Hyper-V's disk image: fixed, dynamic and differencing. [MS-VHDX].
//!
//! A log that was in use when its writer died is replayed in memory at open; the file is not
//! written, so an image on a read-only medium opens too.

use std::io::IoSliceMut;
use std::sync::Arc;

use self::guid::Guid;
use self::header::{Header, MIB, Regions};
use self::metadata::Metadata;
use super::pages::{BitOrder, Cursor, Pages};
use super::{fields, runs};
use crate::addr::{GuestOffset, Unit};
use crate::error::{Error, Result};
use crate::image::{Backing, Capabilities, Extent, Fingerprint, Image, Mapping};
use crate::storage::Storage;

mod create;
mod fill;
mod guid;
mod header;
mod log;
mod metadata;
mod overlay;

pub use create::{CreateOptions, create};
pub use fill::fill;

/// Bits, and so sectors, of one sector bitmap block.
const CHUNK_SECTORS: u64 = 1 << 23;

/// Payload blocks for each sector bitmap block.
fn ratio(sector: Unit, block: Unit) -> u64 {
    CHUNK_SECTORS * sector.bytes() / block.bytes()
}

/// Entries of the table of a disk of so many blocks that is not differencing.
fn entries(blocks: u64, ratio: u64) -> u64 {
    blocks + blocks.saturating_sub(1) / ratio
}

/// Where the entry of a block stands in the table.
fn slot(block: u64, ratio: u64) -> u64 {
    block + block / ratio
}

/// One VHDX file, open for reading.
pub struct Vhdx {
    storage: Arc<dyn Storage>,
    pages: Pages,
    metadata: Metadata,
    id: Guid,
    bat: u64,
    /// Payload blocks for each sector bitmap block; their entries alternate in the table.
    ratio: u64,
}

impl Vhdx {
    /// Reads and checks headers and metadata, and replays the log in memory. The block table is
    /// read as it is needed.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Vhdx> {
        let header = Header::read(&storage)?;
        let storage = log::replay(storage, &header)?;
        let regions = Regions::read(&storage)?;
        let metadata = Metadata::read(&storage, regions.metadata)?;
        let ratio = ratio(metadata.sector, metadata.block);
        let blocks = metadata.block.count(metadata.size);
        let entries = match &metadata.parent {
            Some(_) => blocks.div_ceil(ratio) * (ratio + 1),
            None => entries(blocks, ratio),
        };
        let (bat, len) = regions.bat;
        fields::within(0, entries * 8, len, "the table of all blocks")
            .map_err(|error| Error::corrupt(error.message()).at_offset(bat))?;
        let pages = Pages::new(Arc::clone(&storage), Pages::DEFAULT)?;
        Ok(Vhdx { storage, pages, metadata, id: header.data_write, bat, ratio })
    }

    fn piece(&self, bat: &mut Cursor<'_>, at: u64) -> Result<runs::Piece> {
        let Metadata { size, block, .. } = self.metadata;
        let (index, within) = (block.index(at), block.within(at));
        let len = (block.bytes() - within).min(size - at);
        let place = self.bat + slot(index, self.ratio) * 8;
        let entry = u64::from_le_bytes(bat.array(place)?);
        match (entry & 7, &self.metadata.parent) {
            (0, _) => Ok((Mapping::Unallocated, len)),
            // Undefined, zero and unmapped, also as version 0.95 numbered it: zeroes are what
            // all of them allow.
            (1 | 2 | 3 | 5, _) => Ok((Mapping::Zero { host: None }, len)),
            (6, _) => Ok((runs::data(self.host(entry, place, within, len)?), len)),
            (7, Some(_)) => self.partial(bat, at, place, entry),
            (state, _) => Err(Error::corrupt(format!(
                "a block in state {state}, which this disk cannot have"
            ))
            .at_offset(place)),
        }
    }

    /// A block of which this file holds some sectors and the parent the others; `entry` stands at
    /// `place`.
    fn partial(
        &self,
        bat: &mut Cursor<'_>,
        at: u64,
        place: u64,
        entry: u64,
    ) -> Result<runs::Piece> {
        let Metadata { size, block, sector, .. } = self.metadata;
        let within = block.within(at);
        let len = (block.bytes() - within).min(size - at);
        let chunk = block.index(at) / self.ratio;
        let map_place = self.bat + (chunk * (self.ratio + 1) + self.ratio) * 8;
        let map_entry = u64::from_le_bytes(bat.array(map_place)?);
        if map_entry & 7 != 6 {
            return Err(Error::corrupt("a block lacks its sector bitmap").at_offset(map_place));
        }
        let bitmap = self.host(map_entry, map_place, 0, MIB)?;
        let first = sector.index(at) % CHUNK_SECTORS;
        let (here, run) = bat.bits(bitmap, first, sector.count(len), BitOrder::Low)?;
        let len = len.min(run * sector.bytes() - sector.within(at));
        match here {
            true => Ok((runs::data(self.host(entry, place, within, len)?), len)),
            false => Ok((Mapping::Unallocated, len)),
        }
    }

    /// The file offset `within` bytes into the block of `entry`, which stands at `place`.
    fn host(&self, entry: u64, place: u64, within: u64, len: u64) -> Result<u64> {
        let start = entry & !(MIB - 1);
        let end = start.checked_add(within).and_then(|host| host.checked_add(len));
        match end {
            Some(end) if start >= MIB && end <= self.pages.file_len() => Ok(start + within),
            _ => Err(Error::corrupt(format!(
                "a block at {start:#x} lies in the header or past the end of the file"
            ))
            .at_offset(place)),
        }
    }
}

/// Gives the log of the image in `storage` effect for good; `false` where there is nothing to do.
/// A crash leaves the log in force or its work done.
pub fn replay_log(storage: Arc<dyn Storage>) -> Result<bool> {
    let header = Header::read(&storage)?;
    if header.log_id == Guid(0) {
        return Ok(false);
    }
    log::write(&storage, &header)?;
    Header::drop_log(&storage)?;
    Ok(true)
}

impl Image for Vhdx {
    fn size(&self) -> u64 {
        self.metadata.size
    }

    fn cluster(&self) -> Unit {
        runs::CLUSTER
    }

    fn block_size(&self) -> Option<u64> {
        Some(self.metadata.block.bytes())
    }

    fn backing(&self) -> Option<Backing> {
        let name = self.metadata.parent.as_ref()?.name.clone();
        Some(Backing { name, format: Some("vhdx".to_owned()) })
    }

    fn read_only(&self) -> bool {
        true
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        let len = runs::clip(at, len, self.metadata.size)?;
        let mut bat = self.pages.cursor();
        runs::longest(at, len, |pos| self.piece(&mut bat, pos))
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        runs::read(&self.storage, extent, at, bufs)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { fingerprint: Some(self), ..Capabilities::default() }
    }
}

impl Fingerprint for Vhdx {
    /// The data write GUID, which every writer changes.
    fn fingerprint(&self) -> Option<String> {
        Some(self.id.to_string())
    }

    fn parent_fingerprints(&self) -> Vec<String> {
        self.metadata.parent.as_ref().map_or_else(Vec::new, |parent| parent.linkages.clone())
    }
}
