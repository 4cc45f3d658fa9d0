//! The fixed beginning of a VHDX: file type, two headers, two region tables. [MS-VHDX] 2.2.

use std::sync::Arc;

use super::guid::Guid;
use crate::error::{Error, Result};
use crate::formats::fields::{self, Fields};
use crate::formats::probe;
use crate::storage::Storage;

const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
const HEADER: u64 = 4096;
const REGION_TABLE: u64 = 64 << 10;
const MAX_REGIONS: u32 = 2047;
/// Regions, the log and all blocks are multiples of this.
pub(super) const MIB: u64 = 1 << 20;

const BAT: Guid = Guid(0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08);
const METADATA: Guid = Guid(0x8b7c_a206_4790_4b9a_b8fe_575f_050f_886e);

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
        let [first, second] = HEADERS.map(|at| Header::read_one(storage, at));
        // The one in force is written last: the other takes over before that.
        let sequence = |h: &Result<Header>| h.as_ref().map_or(0, |h| h.sequence);
        let (newest, order) = if second.is_ok() && sequence(&second) > sequence(&first) {
            (1, [0, 1])
        } else {
            (0, [1, 0])
        };
        let mut bytes = fields::read(storage, HEADERS[newest], HEADER, "a VHDX header")?;
        let mut number = sequence(&first).max(sequence(&second));
        let mut put = |at: usize, what: &[u8]| bytes[at..at + what.len()].copy_from_slice(what);
        put(16, uuid::Uuid::new_v4().as_bytes());
        put(48, &[0; 16]);
        for place in order {
            number = number.checked_add(1).ok_or_else(|| {
                Error::corrupt("the header's sequence number is at its end")
                    .at_offset(HEADERS[newest])
            })?;
            bytes[8..16].copy_from_slice(&number.to_le_bytes());
            let sum = sum(&bytes).to_le_bytes();
            bytes[4..8].copy_from_slice(&sum);
            storage.write_all_at(HEADERS[place], &bytes)?;
            storage.sync()?;
        }
        Ok(())
    }

    fn read_one(storage: &Arc<dyn Storage>, at: u64) -> Result<Header> {
        let bytes = fields::read(storage, at, HEADER, "a VHDX header")?;
        check_sum(&bytes, b"head", at)?;
        let fields = Fields::new(&bytes, at);
        let (log_version, version) = (fields.le16(64)?, fields.le16(66)?);
        if version != 1 || log_version != 0 {
            return Err(Error::unsupported(format!(
                "VHDX version {version} with a log of version {log_version}"
            ))
            .at_offset(at + 64));
        }
        Ok(Header {
            sequence: fields.le64(8)?,
            data_write: Guid::from_bytes(fields.array(32)?),
            log_id: Guid::from_bytes(fields.array(48)?),
            log: (fields.le64(72)?, fields.le32(68)?.into()),
        })
    }
}

/// Fails unless a structure begins with `signature` and its CRC-32C, four bytes on, is right.
pub(super) fn check_sum(bytes: &[u8], signature: &[u8; 4], at: u64) -> Result<()> {
    let fields = Fields::new(bytes, at);
    if fields.bytes(0, 4)? != signature {
        let name = String::from_utf8_lossy(signature);
        return Err(Error::corrupt(format!("the signature '{name}' is missing")).at_offset(at));
    }
    if sum(bytes) == fields.le32(4)? {
        return Ok(());
    }
    Err(Error::corrupt("the VHDX structure's checksum is wrong").at_offset(at + 4))
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
        let fields = Fields::new(&bytes, at);
        let count = fields.le32(8)?;
        if count > MAX_REGIONS {
            return Err(Error::corrupt(format!("{count} regions")).at_offset(at + 8));
        }
        let (mut bat, mut metadata) = (None, None);
        for entry in (0..count as usize).map(|n| 16 + 32 * n) {
            let place = entry_of(&fields, entry, storage.len()?)
                .map_err(|error| error.at_offset(at + entry as u64))?;
            let slot = match Guid::from_bytes(fields.array(entry)?) {
                BAT => &mut bat,
                METADATA => &mut metadata,
                id if fields.le32(entry + 28)? & 1 != 0 => {
                    return Err(Error::unsupported(format!("a required region {id}"))
                        .at_offset(at + entry as u64));
                }
                _ => continue,
            };
            if slot.replace(place).is_some() {
                return Err(
                    Error::corrupt("a region that is listed twice").at_offset(at + entry as u64)
                );
            }
        }
        match (bat, metadata) {
            (Some(bat), Some(metadata)) => Ok(Regions { bat, metadata }),
            _ => Err(Error::corrupt("the block table or the metadata is missing").at_offset(at)),
        }
    }
}

fn entry_of(fields: &Fields<'_>, entry: usize, file: u64) -> Result<Region> {
    let (at, len) = (fields.le64(entry + 16)?, u64::from(fields.le32(entry + 24)?));
    if at % MIB != 0 || len % MIB != 0 || at < MIB {
        return Err(Error::corrupt(format!(
            "a region ({len} bytes at {at:#x}) does not consist of whole MiB"
        )));
    }
    fields::within(at, len, file, "a VHDX region")?;
    Ok((at, len))
}
