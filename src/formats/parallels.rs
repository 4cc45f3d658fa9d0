//! Parallels' expandable disk: a header, one table of blocks of any number of sectors. The flat file of
//! a disk alone, without the XML beside it. "Parallels Expandable Image File Format",
//! `docs/interop/parallels.rst` of QEMU.
//!
//! All numbers are little-endian.

use std::io::IoSliceMut;
use std::mem::offset_of;
use std::sync::Arc;

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::pages::{Cursor, Pages};
use super::{fields, probe, runs};
use crate::addr::{GuestOffset, Unit};
use crate::error::{Error, Result};
use crate::image::{Extent, Image, Mapping};
use crate::storage::Storage;

/// The header as it stands in the file.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 16],
    version: U32,
    heads: U32,
    cylinders: U32,
    tracks: U32,
    bat_entries: U32,
    nb_sectors: U64,
    inuse: U32,
    data_off: U32,
    flags: U32,
    ext_off: U64,
}

/// Bytes of the header, behind which the table stands.
const HEADER: u64 = size_of::<RawHeader>() as u64;
const _: () = assert!(HEADER == 64);

/// The place of a header's field, for errors.
macro_rules! at {
    ($field:ident) => {
        offset_of!(RawHeader, $field) as u64
    };
}

const SECTOR: Unit = Unit::from_bits(9);
const ENTRY: u64 = 4;
const VERSION: u32 = 2;
/// The largest block, in sectors: more than QEMU opens.
const MAX_BLOCK: u32 = 1 << 22;

/// One Parallels file, open for reading.
pub struct Parallels {
    storage: Arc<dyn Storage>,
    pages: Pages,
    header: Header,
}

#[derive(Debug, PartialEq, Eq)]
struct Header {
    size: u64,
    /// Bytes of a block: not always a power of two.
    block: u64,
    entries: u64,
    /// Bytes that a table entry counts in: sectors, or whole blocks.
    unit: u64,
}

impl Parallels {
    /// Reads and checks the header. The table is read as it is needed.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Parallels> {
        let raw = fields::read_structure(&*storage, 0, "the Parallels header")?;
        let header = Header::parse(&raw)?;
        fields::within(HEADER, header.entries * ENTRY, storage.len()?, "the table of blocks")?;
        let pages = Pages::new(Arc::clone(&storage), Pages::DEFAULT)?;
        Ok(Parallels { storage, pages, header })
    }

    fn piece(&self, table: &mut Cursor<'_>, at: u64) -> Result<runs::Piece> {
        let Header { size, block, entries, unit } = self.header;
        let (index, within) = (at / block, at % block);
        if index >= entries {
            return Ok((Mapping::Unallocated, size - at));
        }
        let len = (block - within).min(size - at);
        let place = HEADER + index * ENTRY;
        let entry = u32::from_le_bytes(table.array(place)?);
        if entry == 0 {
            return Ok((Mapping::Unallocated, len));
        }
        // 32 bits of blocks below 2 GiB: no sum here leaves 64 bits.
        let host = u64::from(entry) * unit + within;
        if host + len > self.pages.file_len() {
            let what = format!("block {index} reaches past the end of the file");
            return Err(Error::corrupt(what).at_offset(place));
        }
        Ok((runs::data(host), len))
    }
}

impl Header {
    fn parse(raw: &RawHeader) -> Result<Header> {
        if !probe::parallels(raw.as_bytes()) {
            return Err(Error::corrupt("Image not in Parallels format").at_offset(0));
        }
        let extended = raw.magic == *probe::PARALLELS_EXTENDED;
        let version = raw.version.get();
        if version != VERSION {
            let what = format!("a Parallels image of version {version}");
            return Err(Error::unsupported(what).at_offset(at!(version)));
        }
        let (sectors, entries) = (raw.tracks.get(), raw.bat_entries.get());
        if sectors == 0 || sectors > MAX_BLOCK {
            let what = format!("Invalid image: {sectors} sectors in a block");
            return Err(Error::corrupt(what).at_offset(at!(tracks)));
        }
        let block = u64::from(sectors) * SECTOR.bytes();
        // The older kind has 32 bits for the disk's sectors, and anything behind them.
        let count = raw.nb_sectors.get();
        let count = if extended { count } else { count & u64::from(u32::MAX) };
        let size = SECTOR.start(count).filter(|size| i64::try_from(*size).is_ok());
        Ok(Header {
            size: size
                .ok_or_else(|| Error::corrupt("a disk past 63 bits").at_offset(at!(nb_sectors)))?,
            block,
            entries: entries.into(),
            unit: if extended { block } else { SECTOR.bytes() },
        })
    }
}

impl Image for Parallels {
    fn size(&self) -> u64 {
        self.header.size
    }

    fn cluster(&self) -> Unit {
        runs::CLUSTER
    }

    fn block_size(&self) -> Option<u64> {
        Some(self.header.block)
    }

    fn read_only(&self) -> bool {
        true
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        let len = runs::clip(at, len, self.header.size)?;
        let mut table = self.pages.cursor();
        runs::longest(at, len, |pos| self.piece(&mut table, pos))
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        runs::read(&self.storage, extent, at, bufs)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}
