//! One sparse extent of a VMDK: a header, a directory of grain tables, grains that may be
//! compressed. "Virtual Disk Format 5.0", section "Hosted Sparse Extents"; those of ESX are
//! [`esx`](super::esx)'s.

use std::io::{IoSliceMut, Read};
use std::mem::offset_of;
use std::sync::Arc;

use flate2::read::ZlibDecoder;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::esx::{self, Grain};
use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::formats::fields;
use crate::formats::pages::{Cursor, Pages};
use crate::formats::runs;
use crate::image::Mapping;
use crate::storage::Storage;

pub(super) const SECTOR: Unit = Unit::from_bits(9);

/// The header of a hosted sparse extent as it stands in the file; numbers of sectors but for the last.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub magic: [u8; 4],
    pub version: U32,
    pub flags: U32,
    pub capacity: U64,
    pub grain_size: U64,
    pub descriptor_offset: U64,
    pub descriptor_size: U64,
    pub num_gtes_per_gt: U32,
    pub rgd_offset: U64,
    pub gd_offset: U64,
    pub overhead: U64,
    pub unclean_shutdown: u8,
    /// Changed by programs that take the file for text.
    pub line_ends: [u8; 4],
    pub compress_algorithm: U16,
    pub pad: [u8; 433],
}

/// A sector between the parts of a stream-optimised extent.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Marker {
    value: U64,
    size: U32,
    kind: U32,
    pad: [u8; 496],
}

/// What such an extent ends with.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Footer {
    marker: Marker,
    header: RawHeader,
    end: Marker,
}

/// What stands before a compressed grain.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct GrainMarker {
    lba: U64,
    size: U32,
}

pub(super) const MAGIC: [u8; 4] = *b"KDMV";
const HEADER: u64 = size_of::<RawHeader>() as u64;
const _: () = assert!(HEADER == 512 && size_of::<Footer>() == 3 * 512);
const _: () = assert!(size_of::<GrainMarker>() == 12);
/// A marker's kind, before the footer.
const FOOTER_MARKER: u32 = 3;

/// The directory's place stands in a second header, before the end of the file.
const AT_END: u64 = u64::MAX;
/// There is a second directory, with tables of its own.
const FLAG_REDUNDANT: u32 = 1 << 1;
/// A grain table entry of 1 means zeroes.
pub(super) const FLAG_ZERO_GRAIN: u32 = 1 << 2;
const FLAG_COMPRESSED: u32 = 1 << 16;
/// A marker with the length stands before each compressed grain.
const FLAG_MARKERS: u32 = 1 << 17;
/// The most entries a grain table has.
const MAX_ENTRIES: u32 = 512;
/// The most grain tables: more than any program makes.
const MAX_TABLES: u64 = 32 << 20;
/// Larger grains are damage: 1 GiB.
const MAX_GRAIN: u64 = 1 << 30;
/// A compressed grain is unpacked in memory; every program makes them of 64 KiB.
const MAX_COMPRESSED_GRAIN: u64 = 8 << 20;

/// What kinds of tables there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// Those of programs that run on a host: 32-bit sectors.
    Hosted,
    /// The older ones of ESX: also 32-bit sectors.
    Cowd,
    /// Those of seSparse extents, 64 bits each: where tables and grains begin, in bytes.
    Space { tables: u64, grains: u64 },
}

/// The header of a sparse extent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) flags: u32,
    /// Bytes of the guest disk; 0 when a descriptor in the file lists other extents.
    pub(super) capacity: u64,
    pub(super) grain: Unit,
    /// Where the embedded descriptor stands and its length in bytes; 0 without one.
    pub(super) descriptor: (u64, u64),
    pub(super) entries: u32,
    pub(super) directory: u64,
    /// The second directory, which says the same.
    pub(super) redundant: Option<u64>,
    /// Bytes before the first grain.
    pub(super) overhead: u64,
    pub(super) layout: Layout,
}

impl Header {
    /// A header of a disk without bytes.
    pub(super) fn plain(layout: Layout) -> Header {
        Header {
            flags: 0,
            capacity: 0,
            grain: SECTOR,
            descriptor: (0, 0),
            entries: 1,
            directory: 0,
            redundant: None,
            overhead: 0,
            layout,
        }
    }

    /// Tables that the directory names.
    pub(super) fn tables(&self) -> u64 {
        self.grain.count(self.capacity).div_ceil(self.entries.max(1).into())
    }

    /// Reads the header, or the one at the end that a stream-optimised extent means.
    pub(super) fn read(storage: &Arc<dyn Storage>) -> Result<Header> {
        let bytes = fields::read(storage, 0, HEADER, "the VMDK header")?;
        if bytes.starts_with(b"COWD") {
            return esx::cowd(&bytes);
        }
        if esx::is_space(&bytes) {
            return esx::space(storage);
        }
        let header = Header::parse(fields::structure(&bytes, 0)?, 0)?;
        if header.capacity == 0 || header.directory != AT_END {
            return Ok(header);
        }
        // A footer marker, the header again, an end-of-stream marker: the last three sectors.
        let end = storage.len()?;
        let at = end.checked_sub(size_of::<Footer>() as u64).unwrap_or(end);
        let tail: Footer = fields::read_structure(&**storage, at, "the VMDK footer")?;
        let is = |marker: &Marker, kind: u32| marker.size == 0 && marker.kind == kind;
        if !is(&tail.marker, FOOTER_MARKER) || !is(&tail.end, 0) {
            return Err(Error::corrupt(
                "the footer of a stream-optimised VMDK is missing: the file \
                                       was cut off",
            )
            .at_offset(at));
        }
        let at = at + offset_of!(Footer, header) as u64;
        let footer = Header::parse(&tail.header, at)?;
        if footer.directory == AT_END {
            return Err(Error::corrupt("the footer does not say where the grain directory is")
                .at_offset(at));
        }
        Ok(Header { descriptor: header.descriptor, ..footer })
    }

    fn parse(raw: &RawHeader, base: u64) -> Result<Header> {
        let at = |field: usize| base + field as u64;
        if raw.magic != MAGIC {
            return Err(Error::corrupt("not a sparse VMDK extent").at_offset(base));
        }
        let version = raw.version.get();
        if !(1..=3).contains(&version) {
            return Err(Error::unsupported(format!("VMDK version {version}"))
                .at_offset(at(offset_of!(RawHeader, version))));
        }
        let sectors = |number: U64, field: usize| {
            SECTOR.start(number.get()).ok_or_else(|| {
                Error::corrupt("a number of sectors past 64 bits").at_offset(at(field))
            })
        };
        let grain = Header::shape(raw, base)?;
        let capacity = sectors(raw.capacity, offset_of!(RawHeader, capacity))?;
        let flags = raw.flags.get();
        let flags = match (flags & FLAG_COMPRESSED != 0, raw.compress_algorithm.get()) {
            (_, 0) => flags & !FLAG_COMPRESSED,
            (_, 1) => flags | FLAG_COMPRESSED,
            (false, _) => flags,
            (true, method) => {
                return Err(Error::unsupported(format!("VMDK compression method {method}"))
                    .at_offset(at(offset_of!(RawHeader, compress_algorithm))));
            }
        };
        let directory = match raw.gd_offset.get() {
            AT_END => AT_END,
            _ => sectors(raw.gd_offset, offset_of!(RawHeader, gd_offset))?,
        };
        let descriptor = (
            sectors(raw.descriptor_offset, offset_of!(RawHeader, descriptor_offset))?,
            sectors(raw.descriptor_size, offset_of!(RawHeader, descriptor_size))?,
        );
        let redundant = match flags & FLAG_REDUNDANT {
            0 => None,
            _ => SECTOR.start(raw.rgd_offset.get()).filter(|at| *at != 0),
        };
        Ok(Header {
            flags,
            capacity,
            grain,
            descriptor,
            entries: raw.num_gtes_per_gt.get(),
            directory,
            redundant,
            overhead: sectors(raw.overhead, offset_of!(RawHeader, overhead))?,
            layout: Layout::Hosted,
        })
    }

    /// The grain, once it and the size of all tables are known to be ones that there are.
    fn shape(raw: &RawHeader, base: u64) -> Result<Unit> {
        let bad =
            |what: &str, field: usize| Err(Error::corrupt(what).at_offset(base + field as u64));
        let (capacity, entries) = (raw.capacity.get(), raw.num_gtes_per_gt.get());
        let grain = SECTOR
            .start(raw.grain_size.get())
            .and_then(Unit::from_bytes)
            .filter(|grain| (SECTOR.bytes()..=MAX_GRAIN).contains(&grain.bytes()));
        if capacity == 0 {
            return Ok(grain.unwrap_or(SECTOR));
        }
        if entries > MAX_ENTRIES {
            return bad("L2 table size too big", offset_of!(RawHeader, num_gtes_per_gt));
        }
        if entries == 0 {
            return bad("L1 entry size is invalid", offset_of!(RawHeader, num_gtes_per_gt));
        }
        let Some(grain) = grain else {
            let message = "Invalid granularity, image may be corrupt";
            return bad(message, offset_of!(RawHeader, grain_size));
        };
        let tables = capacity.div_ceil(SECTOR.index(grain.bytes())).div_ceil(entries.into());
        if tables > MAX_TABLES {
            return bad("L1 size too big", offset_of!(RawHeader, capacity));
        }
        Ok(grain)
    }

    pub(super) fn compressed(&self) -> bool {
        self.flags & FLAG_COMPRESSED != 0
    }
}

/// A sparse extent, open for reading. Offsets here count from the extent's own first byte.
pub(super) struct Sparse {
    storage: Arc<dyn Storage>,
    pages: Pages,
    pub(super) header: Header,
}

impl Sparse {
    /// Checks `header` against the file; tables are read as they are needed, and up to `pages`
    /// pages of them kept.
    pub(super) fn open(storage: Arc<dyn Storage>, header: Header, pages: usize) -> Result<Sparse> {
        let file = storage.len()?;
        let entry =
            if matches!(header.layout, Layout::Space { .. }) { esx::SPACE_ENTRY } else { 4 };
        let directory = header.tables().saturating_mul(entry);
        if header.overhead > file {
            return Err(Error::corrupt(format!(
                "File truncated, expecting at least {} bytes",
                header.overhead
            ))
            .at_offset(offset_of!(RawHeader, overhead) as u64));
        }
        fields::within(header.directory, directory, file, "the grain directory")?;
        if header.compressed() && header.grain.bytes() > MAX_COMPRESSED_GRAIN {
            return Err(Error::unsupported(format!(
                "compressed grains of {} bytes",
                header.grain.bytes()
            ))
            .at_offset(offset_of!(RawHeader, grain_size) as u64));
        }
        let pages = Pages::new(Arc::clone(&storage), pages)?;
        Ok(Sparse { storage, pages, header })
    }

    /// The file.
    pub(super) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// A reader of the tables.
    pub(super) fn tables(&self) -> Cursor<'_> {
        self.pages.cursor()
    }

    /// How the bytes from `at` are mapped, up to the end of a grain or of a table.
    pub(super) fn piece(&self, tables: &mut Cursor<'_>, at: u64) -> Result<runs::Piece> {
        let Header { grain, entries, capacity, directory, layout, .. } = self.header;
        let index = grain.index(at);
        let (table, slot) = (index / u64::from(entries), index % u64::from(entries));
        let (within, rest) = (grain.within(at), capacity - at);
        let found = match layout {
            Layout::Hosted | Layout::Cowd => {
                let entry = directory + table * 4;
                let sector = u32::from_le_bytes(tables.array(entry)?);
                Some(u64::from(sector) * SECTOR.bytes()).filter(|at| *at != 0)
            }
            Layout::Space { tables: base, .. } => {
                let entry = directory + table * esx::SPACE_ENTRY;
                let number = u64::from_le_bytes(tables.array(entry)?);
                let table = esx::space_table(number).ok_or_else(|| {
                    Error::corrupt(format!("{number:#x} names no grain table")).at_offset(entry)
                })?;
                table.map(|table| base + table)
            }
        };
        let Some(table) = found else {
            let covered = (u64::from(entries) - slot) * grain.bytes() - within;
            return Ok((Mapping::Unallocated, covered.min(rest)));
        };
        let len = (grain.bytes() - within).min(rest);
        let mapping = match layout {
            Layout::Space { grains, .. } => {
                self.space_grain(tables, table + slot * esx::SPACE_ENTRY, grains, within, len)?
            }
            _ => self.grain(tables, table + slot * 4, within, len)?,
        };
        Ok((mapping, len))
    }

    /// How `len` bytes are mapped, `within` bytes into the grain of the table entry at `entry`.
    fn grain(&self, tables: &mut Cursor<'_>, entry: u64, within: u64, len: u64) -> Result<Mapping> {
        let sector = match u32::from_le_bytes(tables.array(entry)?) {
            0 => return Ok(Mapping::Unallocated),
            1 if self.header.flags & FLAG_ZERO_GRAIN != 0 => {
                return Ok(Mapping::Zero { host: None });
            }
            sector => sector,
        };
        let host = u64::from(sector) * SECTOR.bytes();
        let stored = if self.header.compressed() { 0 } else { within + len };
        self.check_grain(host, stored.max(1), entry)?;
        Ok(match self.header.compressed() {
            true => Mapping::Compressed { descriptor: host },
            false => runs::data(host + within),
        })
    }

    /// The same for an entry of a seSparse extent, whose grains begin at `grains`.
    fn space_grain(
        &self,
        tables: &mut Cursor<'_>,
        entry: u64,
        grains: u64,
        within: u64,
        len: u64,
    ) -> Result<Mapping> {
        let number = u64::from_le_bytes(tables.array(entry)?);
        let bad = || Error::corrupt(format!("{number:#x} names no grain")).at_offset(entry);
        match esx::space_grain(number).ok_or_else(bad)? {
            Grain::Absent => Ok(Mapping::Unallocated),
            Grain::Zero => Ok(Mapping::Zero { host: None }),
            Grain::At(index) => {
                let start = self.header.grain.start(index).and_then(|at| grains.checked_add(at));
                let host = start.ok_or_else(bad)?;
                self.check_grain(host, within + len, entry)?;
                Ok(runs::data(host + within))
            }
        }
    }

    /// Fails unless `len` bytes of the grain at `host`, as the entry at `entry` says, are in the file.
    fn check_grain(&self, host: u64, len: u64, entry: u64) -> Result<()> {
        if host.checked_add(len).is_some_and(|end| end <= self.pages.file_len()) {
            return Ok(());
        }
        let sector = SECTOR.index(host);
        let message = format!("the grain at sector {sector} reaches past the end of the file");
        Err(Error::corrupt(message).at_offset(entry))
    }

    /// Fills `bufs` from an unpacked grain, from `at` of the extent on; `host` is for the error.
    pub(super) fn copy(
        &self,
        grain: &[u8],
        host: u64,
        at: u64,
        bufs: &mut [IoSliceMut<'_>],
    ) -> Result<()> {
        let from = self.header.grain.within(at);
        runs::copy(grain, from, bufs).map_err(|e| e.at_offset(host))
    }

    /// Reads and unpacks the compressed grain at file offset `host`: at most a grain's bytes.
    pub(super) fn unpack(&self, host: u64) -> Result<Vec<u8>> {
        let size = self.header.grain.bytes();
        let (at, len) = if self.header.flags & FLAG_MARKERS != 0 {
            let marker: GrainMarker =
                fields::read_structure(&*self.storage, host, "a grain marker")?;
            (host + size_of::<GrainMarker>() as u64, u64::from(marker.size.get()))
        } else {
            // Nothing says how long it is: the stream itself knows where it ends.
            (host, (2 * size).min(self.pages.file_len().saturating_sub(host)))
        };
        if len > 2 * size + SECTOR.bytes() {
            return Err(
                Error::corrupt(format!("a compressed grain of {len} bytes")).at_offset(host)
            );
        }
        let packed = fields::read(&self.storage, at, len, "a compressed grain")?;
        let mut grain = Vec::with_capacity(size as usize + 1);
        // One byte more than a grain has is enough to see that the stream is too long.
        match ZlibDecoder::new(&packed[..]).take(size + 1).read_to_end(&mut grain) {
            Ok(n) if n as u64 <= size => Ok(grain),
            Ok(_) => {
                Err(Error::corrupt("a compressed grain is larger than the grain size")
                    .at_offset(host))
            }
            Err(error) => {
                Err(Error::corrupt(format!("a compressed grain is damaged: {error}"))
                    .at_offset(host))
            }
        }
    }
}
