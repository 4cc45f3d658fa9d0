//! One sparse extent of a VMDK: a header, a directory of grain tables, grains that may be
//! compressed. "Virtual Disk Format 5.0", section "Hosted Sparse Extents".

use std::io::{IoSliceMut, Read};
use std::sync::Arc;

use flate2::read::ZlibDecoder;

use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::formats::fields::{self, Fields};
use crate::formats::pages::{Cursor, Pages};
use crate::formats::runs;
use crate::image::Mapping;
use crate::storage::Storage;

pub(super) const SECTOR: Unit = Unit::from_bits(9);
const HEADER: u64 = 512;
/// The directory's place stands in a second header, before the end of the file.
const AT_END: u64 = u64::MAX;
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

/// The header of a sparse extent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    flags: u32,
    /// Bytes of the guest disk; 0 when a descriptor in the file lists other extents.
    pub(super) capacity: u64,
    pub(super) grain: Unit,
    /// Where the embedded descriptor stands and its length in bytes; 0 without one.
    pub(super) descriptor: (u64, u64),
    pub(super) entries: u32,
    pub(super) directory: u64,
    /// Bytes before the first grain.
    overhead: u64,
}

impl Header {
    /// Reads the header, or the one at the end that a stream-optimised extent means.
    pub(super) fn read(storage: &Arc<dyn Storage>) -> Result<Header> {
        let bytes = fields::read(storage, 0, HEADER, "the VMDK header")?;
        let header = Header::parse(&bytes, 0)?;
        if header.capacity == 0 || header.directory != AT_END {
            return Ok(header);
        }
        // A footer marker, the header again, an end-of-stream marker: the last three sectors.
        let end = storage.len()?;
        let at = end.checked_sub(3 * SECTOR.bytes()).unwrap_or(end);
        let tail = fields::read(storage, at, 3 * SECTOR.bytes(), "the VMDK footer")?;
        let fields = Fields::new(&tail, at);
        let marker =
            |sector: usize| Ok::<_, Error>((fields.le32(sector + 8)?, fields.le32(sector + 12)?));
        if marker(0)? != (0, 3) || marker(1024)? != (0, 0) {
            return Err(Error::corrupt(
                "the footer of a stream-optimised VMDK is missing: the file \
                                       was cut off",
            )
            .at_offset(at));
        }
        let footer = Header::parse(fields.bytes(512, 512)?, at + 512)?;
        if footer.directory == AT_END {
            return Err(Error::corrupt("the footer does not say where the grain directory is")
                .at_offset(at + 512));
        }
        Ok(Header { descriptor: header.descriptor, ..footer })
    }

    fn parse(bytes: &[u8], base: u64) -> Result<Header> {
        let fields = Fields::new(bytes, base);
        match fields.bytes(0, 4)? {
            b"KDMV" => {}
            b"COWD" => {
                return Err(Error::unsupported("COWD, the sparse extents of ESX").at_offset(base));
            }
            _ => return Err(Error::corrupt("not a sparse VMDK extent").at_offset(base)),
        }
        let version = fields.le32(4)?;
        if !(1..=3).contains(&version) {
            return Err(Error::unsupported(format!("VMDK version {version}")).at_offset(base + 4));
        }
        let sectors = |at: usize| {
            SECTOR.start(fields.le64(at)?).ok_or_else(|| {
                Error::corrupt("a number of sectors past 64 bits").at_offset(base + at as u64)
            })
        };
        let entries = fields.le32(44)?;
        let grain = Header::shape(&fields, base, entries)?;
        let capacity = sectors(12)?;
        let flags = fields.le32(8)?;
        let method = fields.le16(77)?;
        let flags = match (flags & FLAG_COMPRESSED != 0, method) {
            (_, 0) => flags & !FLAG_COMPRESSED,
            (_, 1) => flags | FLAG_COMPRESSED,
            (false, _) => flags,
            (true, _) => {
                return Err(Error::unsupported(format!("VMDK compression method {method}"))
                    .at_offset(base + 77));
            }
        };
        let directory = match fields.le64(56)? {
            AT_END => AT_END,
            _ => sectors(56)?,
        };
        let descriptor = (sectors(28)?, sectors(36)?);
        Ok(Header {
            flags,
            capacity,
            grain,
            descriptor,
            entries,
            directory,
            overhead: sectors(64)?,
        })
    }

    /// The grain, once it and the size of all tables are known to be ones that there are.
    fn shape(fields: &Fields<'_>, base: u64, entries: u32) -> Result<Unit> {
        let bad = |what: &str, at: u64| Err(Error::corrupt(what).at_offset(base + at));
        let (capacity, sectors) = (fields.le64(12)?, fields.le64(20)?);
        let grain = SECTOR
            .start(sectors)
            .and_then(Unit::from_bytes)
            .filter(|grain| (SECTOR.bytes()..=MAX_GRAIN).contains(&grain.bytes()));
        if capacity == 0 {
            return Ok(grain.unwrap_or(SECTOR));
        }
        if entries > MAX_ENTRIES {
            return bad("L2 table size too big", 44);
        }
        if entries == 0 {
            return bad("L1 entry size is invalid", 44);
        }
        let Some(grain) = grain else {
            return bad("Invalid granularity, image may be corrupt", 20);
        };
        let tables = capacity.div_ceil(SECTOR.index(grain.bytes())).div_ceil(entries.into());
        if tables > MAX_TABLES {
            return bad("L1 size too big", 12);
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
        let tables = header.grain.count(header.capacity).div_ceil(u64::from(header.entries.max(1)));
        if header.overhead > file {
            return Err(Error::corrupt(format!(
                "File truncated, expecting at least {} bytes",
                header.overhead
            ))
            .at_offset(64));
        }
        fields::within(header.directory, tables.saturating_mul(4), file, "the grain directory")?;
        if header.compressed() && header.grain.bytes() > MAX_COMPRESSED_GRAIN {
            return Err(Error::unsupported(format!(
                "compressed grains of {} bytes",
                header.grain.bytes()
            ))
            .at_offset(20));
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
        let Header { grain, entries, capacity, directory, .. } = self.header;
        let index = grain.index(at);
        let (table, slot) = (index / u64::from(entries), index % u64::from(entries));
        let rest = capacity - at;
        let entry = directory + table * 4;
        let table = u64::from(u32::from_le_bytes(tables.array(entry)?)) * SECTOR.bytes();
        let within = grain.within(at);
        if table == 0 {
            let covered = (u64::from(entries) - slot) * grain.bytes() - within;
            return Ok((Mapping::Unallocated, covered.min(rest)));
        }
        let len = (grain.bytes() - within).min(rest);
        let entry = table + slot * 4;
        let mapping = match u32::from_le_bytes(tables.array(entry)?) {
            0 => Mapping::Unallocated,
            1 if self.header.flags & FLAG_ZERO_GRAIN != 0 => Mapping::Zero { host: None },
            sector => {
                let host = u64::from(sector) * SECTOR.bytes();
                let stored = if self.header.compressed() { 0 } else { within + len };
                if host + stored.max(1) > self.pages.file_len() {
                    return Err(Error::corrupt(format!(
                        "the grain at sector {sector} reaches past the end of the file"
                    ))
                    .at_offset(entry));
                }
                match self.header.compressed() {
                    true => Mapping::Compressed { descriptor: host },
                    false => runs::data(host + within),
                }
            }
        };
        Ok((mapping, len))
    }

    /// Fills `bufs` from an unpacked grain, from `at` of the extent on; `host` is for the error.
    pub(super) fn copy(
        &self,
        grain: &[u8],
        host: u64,
        at: u64,
        bufs: &mut [IoSliceMut<'_>],
    ) -> Result<()> {
        let mut rest = grain.get(self.header.grain.within(at) as usize..).unwrap_or_default();
        for buf in bufs {
            let (now, later) = rest.split_at_checked(buf.len()).ok_or_else(|| {
                Error::corrupt(format!("a compressed grain holds only {} bytes", grain.len()))
                    .at_offset(host)
            })?;
            buf.copy_from_slice(now);
            rest = later;
        }
        Ok(())
    }

    /// Reads and unpacks the compressed grain at file offset `host`: at most a grain's bytes.
    pub(super) fn unpack(&self, host: u64) -> Result<Vec<u8>> {
        let size = self.header.grain.bytes();
        let (at, len) = if self.header.flags & FLAG_MARKERS != 0 {
            let marker = fields::read(&self.storage, host, 12, "a grain marker")?;
            (host + 12, u64::from(Fields::new(&marker, host).le32(8)?))
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
