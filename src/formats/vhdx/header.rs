//! The fixed beginning of a VHDX: file type, two headers, two region tables. [MS-VHDX] 2.2.

use std::mem::offset_of;
use std::sync::Arc;

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::guid::{Guid, RawGuid};
use crate::error::{Error, Result};
use crate::formats::fields::{self, Plain};
use crate::formats::probe;
use crate::storage::Storage;

pub(super) const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
pub(super) const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];

/// A header as it stands in the file: section 2.2.2.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub signature: [u8; 4],
    pub checksum: U32,
    pub sequence_number: U64,
    pub file_write_guid: RawGuid,
    pub data_write_guid: RawGuid,
    pub log_guid: RawGuid,
    pub log_version: U16,
    pub version: U16,
    pub log_length: U32,
    pub log_offset: U64,
    pub reserved: [u8; 4016],
}

/// What a region table begins with: section 2.2.3.1.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawRegionTable {
    pub signature: [u8; 4],
    pub checksum: U32,
    pub entry_count: U32,
    pub reserved: U32,
}

/// One region: section 2.2.3.2.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawRegion {
    pub guid: RawGuid,
    pub file_offset: U64,
    pub length: U32,
    pub required: U32,
}

/// What every structure with a checksum begins with.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Sealed {
    signature: [u8; 4],
    checksum: U32,
}

const _: () = assert!(size_of::<RawHeader>() == 4096);
const _: () = assert!(size_of::<RawRegionTable>() == 16 && size_of::<RawRegion>() == 32);
pub(super) const REGION_TABLE: u64 = 64 << 10;
const MAX_REGIONS: u32 = 2047;
/// Regions, the log and all blocks are multiples of this.
pub(super) const MIB: u64 = 1 << 20;

pub(super) const BAT: Guid = Guid(0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08);
pub(super) const METADATA: Guid = Guid(0x8b7c_a206_4790_4b9a_b8fe_575f_050f_886e);

/// The header in force: the one of the two that is whole and newer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    sequence: u64,
    /// Changes when the contents do; a child records it.
    pub(super) data_write: Guid,
    /// Entries of the log with this id are to be replayed; none where it is zero.
    pub(super) log_id: Guid,
    /// Where the log stands, and its length in bytes.
    pub(super) log: (u64, u64),
}

impl Header {
    /// Reads both headers and answers with the one in force.
    pub(super) fn read(storage: &Arc<dyn Storage>) -> Result<Header> {
        let id = fields::read(storage, 0, 8, "the VHDX file type")?;
        if !probe::vhdx(&id) {
            return Err(Error::corrupt("not a VHDX image").at_offset(0));
        }
        let [first, second] = HEADERS.map(|at| Header::read_one(storage, at));
        let header = match (first, second) {
            (Ok(a), Ok(b)) if b.sequence > a.sequence => b,
            (Ok(a), _) => a,
            (Err(_), Ok(b)) => b,
            (Err(error), Err(_)) => return Err(error),
        };
        let (at, len) = header.log;
        if header.log_id != Guid(0) {
            if at % MIB != 0 || len % MIB != 0 || at < MIB || len == 0 {
                return Err(Error::corrupt(format!(
                    "the log ({len} bytes at {at:#x}) does not consist of whole MiB"
                ))
                .at_offset(HEADERS[0]));
            }
            fields::within(at, len, storage.len()?, "the log")?;
        }
        Ok(header)
    }

    /// Takes the log out of force, in both headers, one after the other.
    pub(super) fn drop_log(storage: &Arc<dyn Storage>) -> Result<()> {
        Header::rewrite(storage, |raw| {
            raw.file_write_guid = Guid::random().into();
            raw.log_guid = Guid(0).into();
        })
    }

    /// Says that the file and its disk are about to change: both get new ids.
    pub(super) fn renew(storage: &Arc<dyn Storage>) -> Result<()> {
        let (file, data) = (Guid::random(), Guid::random());
        Header::rewrite(storage, |raw| {
            (raw.file_write_guid, raw.data_write_guid) = (file.into(), data.into());
        })
    }

    /// Changes the header in force, in both places, one after the other: at any time one is whole.
    fn rewrite(storage: &Arc<dyn Storage>, change: impl Fn(&mut RawHeader)) -> Result<()> {
        let [first, second] = HEADERS.map(|at| Header::read_one(storage, at));
        // The one in force is written last: the other takes over before that.
        let sequence = |h: &Result<Header>| h.as_ref().map_or(0, |h| h.sequence);
        let (newest, order) = if second.is_ok() && sequence(&second) > sequence(&first) {
            (1, [0, 1])
        } else {
            (0, [1, 0])
        };
        let mut raw = fields::read_structure(&**storage, HEADERS[newest], "a VHDX header")?;
        let mut number = sequence(&first).max(sequence(&second));
        change(&mut raw);
        for place in order {
            number = number.checked_add(1).ok_or_else(|| {
                Error::corrupt("the header's sequence number is at its end")
                    .at_offset(HEADERS[newest])
            })?;
            raw.sequence_number = number.into();
            seal(raw.as_mut_bytes());
            storage.write_all_at(HEADERS[place], raw.as_bytes())?;
            storage.sync()?;
        }
        Ok(())
    }

    fn read_one(storage: &Arc<dyn Storage>, at: u64) -> Result<Header> {
        let raw: RawHeader = fields::read_structure(&**storage, at, "a VHDX header")?;
        check_sum(raw.as_bytes(), b"head", at)?;
        if raw.version != 1 || raw.log_version != 0 {
            return Err(Error::unsupported(format!(
                "VHDX version {} with a log of version {}",
                raw.version, raw.log_version
            ))
            .at_offset(at + offset_of!(RawHeader, log_version) as u64));
        }
        Ok(Header {
            sequence: raw.sequence_number.get(),
            data_write: raw.data_write_guid.into(),
            log_id: raw.log_guid.into(),
            log: (raw.log_offset.get(), raw.log_length.get().into()),
        })
    }
}

/// Fails unless a structure begins with `signature` and its CRC-32C, four bytes on, is right.
pub(super) fn check_sum(bytes: &[u8], signature: &[u8; 4], at: u64) -> Result<()> {
    let head: &Sealed = fields::structure(bytes, at)?;
    if head.signature != *signature {
        let name = String::from_utf8_lossy(signature);
        return Err(Error::corrupt(format!("the signature '{name}' is missing")).at_offset(at));
    }
    if head.checksum == sum(bytes) {
        return Ok(());
    }
    Err(Error::corrupt("the VHDX structure's checksum is wrong")
        .at_offset(at + offset_of!(Sealed, checksum) as u64))
}

/// Writes down a structure's CRC-32C.
pub(super) fn seal(bytes: &mut [u8]) {
    let sum = sum(bytes);
    if let Ok((head, _)) = Sealed::mut_from_prefix(bytes) {
        head.checksum = sum.into();
    }
}

/// Puts `structure` at a place of a larger one that has room for it.
pub(super) fn put<T: Plain>(into: &mut [u8], at: usize, structure: &T) {
    if let Some(place) = into.get_mut(at..at + size_of::<T>()) {
        place.copy_from_slice(structure.as_bytes());
    }
}

/// The CRC-32C of a structure, whose own four bytes count as zeroes.
fn sum(bytes: &[u8]) -> u32 {
    let crc = crc32c::crc32c(bytes.get(..4).unwrap_or_default());
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, bytes.get(8..).unwrap_or_default())
}

/// A stretch of the file: offset and length in bytes.
pub(super) type Region = (u64, u64);

/// Where the two regions that every file has stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Regions {
    /// The block allocation table.
    pub(super) bat: Region,
    /// The metadata table and its items.
    pub(super) metadata: Region,
    /// Where the last of all regions ends, those included that nobody here knows.
    pub(super) end: u64,
}

impl Regions {
    /// Reads the first region table that is whole.
    pub(super) fn read(storage: &Arc<dyn Storage>) -> Result<Regions> {
        let [first, second] = REGION_TABLES.map(|at| Regions::read_one(storage, at));
        first.or_else(|error| second.map_err(|_| error))
    }

    fn read_one(storage: &Arc<dyn Storage>, at: u64) -> Result<Regions> {
        let bytes = fields::read(storage, at, REGION_TABLE, "a region table")?;
        check_sum(&bytes, b"regi", at)?;
        let table: &RawRegionTable = fields::structure(&bytes, at)?;
        let count = table.entry_count.get();
        if count > MAX_REGIONS {
            return Err(Error::corrupt(format!("{count} regions"))
                .at_offset(at + offset_of!(RawRegionTable, entry_count) as u64));
        }
        let behind = bytes.get(size_of::<RawRegionTable>()..).unwrap_or_default();
        let entries: &[RawRegion] = fields::structures(behind, count as usize, at)?;
        let places = (at + size_of::<RawRegionTable>() as u64..).step_by(size_of::<RawRegion>());
        let (mut bat, mut metadata, mut end) = (None, None, MIB);
        for (entry, here) in entries.iter().zip(places) {
            let place = entry.place(storage.len()?).map_err(|error| error.at_offset(here))?;
            end = end.max(place.0 + place.1);
            let slot = match Guid::from(entry.guid) {
                BAT => &mut bat,
                METADATA => &mut metadata,
                id if entry.required.get() & 1 != 0 => {
                    return Err(
                        Error::unsupported(format!("a required region {id}")).at_offset(here)
                    );
                }
                _ => continue,
            };
            if slot.replace(place).is_some() {
                return Err(Error::corrupt("a region that is listed twice").at_offset(here));
            }
        }
        match (bat, metadata) {
            (Some(bat), Some(metadata)) => Ok(Regions { bat, metadata, end }),
            _ => Err(Error::corrupt("the block table or the metadata is missing").at_offset(at)),
        }
    }
}

impl RawRegion {
    /// Where the region stands in a file of `file` bytes.
    fn place(&self, file: u64) -> Result<Region> {
        let (at, len) = (self.file_offset.get(), u64::from(self.length.get()));
        if at % MIB != 0 || len % MIB != 0 || at < MIB {
            return Err(Error::corrupt(format!(
                "a region ({len} bytes at {at:#x}) does not consist of whole MiB"
            )));
        }
        fields::within(at, len, file, "a VHDX region")?;
        Ok((at, len))
    }
}
