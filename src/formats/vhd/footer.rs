//! The fixed structures of a VHD: the footer, the dynamic disk header, and the names of a parent.
//! All numbers are big-endian. "Virtual Hard Disk Image Format Specification", version 1.0.

use std::mem::offset_of;
use std::sync::Arc;

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::formats::fields;
use crate::storage::Storage;

/// The footer as it stands in the file: "Hard Disk Footer Format".
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawFooter {
    pub cookie: [u8; 8],
    pub features: U32,
    pub file_format_version: U32,
    pub data_offset: U64,
    pub time_stamp: U32,
    pub creator_application: [u8; 4],
    pub creator_version: U32,
    pub creator_host_os: [u8; 4],
    pub original_size: U64,
    pub current_size: U64,
    pub disk_geometry: RawGeometry,
    pub disk_type: U32,
    pub checksum: U32,
    pub unique_id: [u8; 16],
    pub saved_state: u8,
    pub reserved: [u8; 427],
}

/// "Disk Geometry".
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawGeometry {
    pub cylinder: U16,
    pub heads: u8,
    pub sectors_per_track: u8,
}

/// The header of a dynamic disk as it stands in the file: "Dynamic Disk Header Format".
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub cookie: [u8; 8],
    pub data_offset: U64,
    pub table_offset: U64,
    pub header_version: U32,
    pub max_table_entries: U32,
    pub block_size: U32,
    pub checksum: U32,
    pub parent_unique_id: [u8; 16],
    pub parent_time_stamp: U32,
    pub reserved: U32,
    pub parent_unicode_name: [u8; 512],
    pub parent_locators: [ParentLocator; 8],
    pub reserved2: [u8; 256],
}

/// "Parent Locator Entry".
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct ParentLocator {
    platform_code: [u8; 4],
    platform_data_space: U32,
    platform_data_length: U32,
    reserved: U32,
    platform_data_offset: U64,
}

pub(super) const COOKIE: [u8; 8] = *b"conectix";
pub(super) const HEADER_COOKIE: [u8; 8] = *b"cxsparse";
/// Bytes of the footer, and of its copy at the beginning of a dynamic disk.
pub const FOOTER: u64 = size_of::<RawFooter>() as u64;
/// Bytes of the dynamic disk header.
pub const HEADER: u64 = size_of::<RawHeader>() as u64;
const _: () = assert!(FOOTER == 512 && HEADER == 1024);

/// The unit of the block allocation table and of the bitmaps.
pub const SECTOR: Unit = Unit::from_bits(9);
/// 2040 GiB in sectors: the largest disk that the format's users make.
pub const MAX_SECTORS: u64 = 0xff00_0000;
/// The largest geometry. It says nothing about the size of the disk.
pub const MAX_GEOMETRY: u64 = 65535 * 16 * 255;
/// More entries than a table's 32 bits of bytes have room for.
const MAX_ENTRIES: u32 = i32::MAX as u32 / 4;
/// A longer parent name is damage, not a path.
const MAX_NAME: u32 = 64 * 1024;

/// How the data of a disk are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The data stand as they are, from offset 0.
    Fixed,
    /// Blocks where they were written.
    Dynamic,
    /// Blocks and, per sector, whether this file or its parent holds it.
    Differencing,
}

/// Which of the sizes in a footer the guest's disk has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SizeBy {
    /// The one that the program counts which made the image.
    #[default]
    Creator,
    /// That of the geometry.
    Geometry,
    /// The recorded one.
    Recorded,
}

/// The hard disk footer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footer {
    /// How the data are kept.
    pub kind: Kind,
    /// The guest disk's size in bytes.
    pub size: u64,
    /// Where the dynamic disk header stands.
    pub header: u64,
    /// The disk's UUID; a child records it.
    pub id: [u8; 16],
}

impl Footer {
    /// Parses the footer that stood at file offset `base`.
    pub fn parse(bytes: &[u8], base: u64, by: SizeBy) -> Result<Footer> {
        let raw: &RawFooter = fields::structure(bytes, base)?;
        let at = |field: usize| base + field as u64;
        if raw.cookie != COOKIE {
            return Err(Error::corrupt("not a VHD image: there is no footer").at_offset(base));
        }
        if raw.checksum != checksum(raw.as_bytes(), raw.checksum) {
            let offset = at(offset_of!(RawFooter, checksum));
            return Err(Error::corrupt("Incorrect header checksum").at_offset(offset));
        }
        let version = raw.file_format_version.get();
        if version >> 16 != 1 {
            return Err(Error::unsupported(format!("VHD format version {version:#x}"))
                .at_offset(at(offset_of!(RawFooter, file_format_version))));
        }
        let kind = match raw.disk_type.get() {
            2 => Kind::Fixed,
            3 => Kind::Dynamic,
            4 => Kind::Differencing,
            other => {
                return Err(Error::unsupported(format!("VHD disk type {other}"))
                    .at_offset(at(offset_of!(RawFooter, disk_type))));
            }
        };
        let size = size(raw, by)?;
        Ok(Footer { kind, size, header: raw.data_offset.get(), id: raw.unique_id })
    }
}

/// The guest's size in bytes. Virtual PC and older QEMU show a guest the geometry, and the size
/// they record is larger; all others, also those that nobody has heard of, mean the size that they
/// record. The largest geometry stands for any larger disk.
fn size(raw: &RawFooter, by: SizeBy) -> Result<u64> {
    let RawGeometry { cylinder, heads, sectors_per_track } = raw.disk_geometry;
    let geometry = u64::from(cylinder.get()) * u64::from(heads) * u64::from(sectors_per_track);
    let by_geometry = match by {
        _ if geometry == MAX_GEOMETRY => false,
        SizeBy::Creator => matches!(&raw.creator_application, b"vpc " | b"qemu"),
        SizeBy::Geometry => true,
        SizeBy::Recorded => false,
    };
    let total = if by_geometry { geometry } else { SECTOR.index(raw.current_size.get()) };
    if total > MAX_SECTORS {
        return Err(Error::corrupt(format!(
            "a VHD disk of {total} sectors: the format ends at {MAX_SECTORS}"
        ))
        .at_offset(offset_of!(RawFooter, current_size) as u64));
    }
    Ok(total * SECTOR.bytes())
}

/// The checksum of a structure that holds `own` for one: the complement of the sum of all its bytes
/// but those four.
pub(super) fn checksum(bytes: &[u8], own: U32) -> u32 {
    let sum = |bytes: &[u8]| bytes.iter().map(|&b| u32::from(b)).sum::<u32>();
    !(sum(bytes) - sum(own.as_bytes()))
}

/// The dynamic disk header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Where the block allocation table stands.
    pub table: u64,
    /// Its 32-bit entries.
    pub entries: u32,
    /// Bytes of data in a block.
    pub block: Unit,
    /// Bytes of the bitmap before each block's data.
    pub bitmap: u64,
    /// The parent's UUID.
    pub parent_id: [u8; 16],
    /// The parent's name, a path relative to this file where the image says so.
    pub parent: Option<String>,
}

impl Header {
    /// Reads the header that `footer` points to, and what it says about a parent.
    pub fn read(storage: &Arc<dyn Storage>, footer: &Footer) -> Result<Header> {
        let base = footer.header;
        // A file may end within it, as long as what is left out is zero.
        let have = storage.len()?.saturating_sub(base).min(HEADER);
        let mut raw = RawHeader::new_zeroed();
        let front = fields::read(storage, base, have, "the dynamic disk header")?;
        raw.as_mut_bytes()[..front.len()].copy_from_slice(&front);
        let at = |field: usize| base + field as u64;
        if raw.cookie != HEADER_COOKIE {
            return Err(Error::corrupt("there is no dynamic disk header here").at_offset(base));
        }
        let bytes = raw.block_size.get();
        let block = Unit::from_bytes(bytes.into())
            .filter(|block| block.bytes() >= SECTOR.bytes())
            .ok_or_else(|| {
                Error::corrupt(format!("Invalid block size {bytes}"))
                    .at_offset(at(offset_of!(RawHeader, block_size)))
            })?;
        let entries = raw.max_table_entries.get();
        let at_entries = at(offset_of!(RawHeader, max_table_entries));
        if entries > MAX_ENTRIES {
            return Err(Error::corrupt(format!("Max Table Entries too large ({entries})"))
                .at_offset(at_entries));
        }
        if block.count(footer.size) > entries.into() {
            return Err(Error::corrupt(format!(
                "{entries} blocks of {} bytes cannot hold a disk of {} bytes",
                block.bytes(),
                footer.size
            ))
            .at_offset(at_entries));
        }
        if raw.checksum != checksum(raw.as_bytes(), raw.checksum) {
            let message = "the checksum of the dynamic disk header is wrong";
            return Err(Error::corrupt(message).at_offset(at(offset_of!(RawHeader, checksum))));
        }
        let table = raw.table_offset.get();
        let needed = block.count(footer.size) * 4;
        fields::within(table, needed, storage.len()?, "the block allocation table")?;
        let parent = match footer.kind {
            Kind::Differencing => Some(parent(storage, &raw, base)?),
            _ => None,
        };
        Ok(Header {
            table,
            entries,
            block,
            bitmap: SECTOR.ceil(SECTOR.index(block.bytes()).div_ceil(8)),
            parent_id: raw.parent_unique_id,
            parent,
        })
    }
}

/// The best of the parent's names: relative to this file, absolute, the bare file name.
fn parent(storage: &Arc<dyn Storage>, header: &RawHeader, base: u64) -> Result<String> {
    let locators = base + offset_of!(RawHeader, parent_locators) as u64;
    let (mut relative, mut absolute, mut url) = (None, None, None);
    for (number, locator) in (0u64..).zip(&header.parent_locators) {
        let place = match &locator.platform_code {
            b"W2ru" => &mut relative,
            b"W2ku" => &mut absolute,
            b"MacX" => &mut url,
            _ => continue,
        };
        let len = locator.platform_data_length.get();
        if len > MAX_NAME {
            return Err(Error::corrupt(format!("a parent's name of {len} bytes"))
                .at_offset(locators + number * size_of::<ParentLocator>() as u64));
        }
        let at = locator.platform_data_offset.get();
        *place = Some(fields::read(storage, at, len.into(), "the parent's name")?);
    }
    let wide = |name: Vec<u8>| fields::native_path(&fields::utf16(&name, u16::from_le_bytes));
    let name = if let Some(name) = relative.or(absolute) {
        wide(name)
    } else if let Some(name) = url {
        let text = String::from_utf8_lossy(&name);
        let text = text.trim_end_matches('\0');
        text.strip_prefix("file://localhost").unwrap_or(text).to_owned()
    } else {
        fields::native_path(&fields::utf16(&header.parent_unicode_name, u16::from_be_bytes))
    };
    if name.is_empty() {
        return Err(
            Error::corrupt("a differencing VHD that does not name its parent").at_offset(locators)
        );
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footer(creator: &[u8; 4], chs: [u8; 4], recorded: u64) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        bytes[..8].copy_from_slice(b"conectix");
        bytes[12..16].copy_from_slice(&0x0001_0000u32.to_be_bytes());
        bytes[28..32].copy_from_slice(creator);
        bytes[48..56].copy_from_slice(&recorded.to_be_bytes());
        bytes[56..60].copy_from_slice(&chs);
        bytes[63] = 2;
        let sum: u32 = bytes.iter().map(|&b| u32::from(b)).sum();
        bytes[64..68].copy_from_slice(&(!sum).to_be_bytes());
        bytes
    }

    #[test]
    fn the_creator_decides_which_size_counts() {
        let size = |creator, chs, recorded| {
            Footer::parse(&footer(creator, chs, recorded), 0, SizeBy::Creator).map(|f| f.size / 512)
        };
        assert_eq!(size(b"vpc ", [0, 10, 4, 17], 1 << 20).unwrap(), 680);
        assert_eq!(size(b"qemu", [0, 10, 4, 17], 1 << 20).unwrap(), 680);
        assert_eq!(size(b"qem2", [0, 10, 4, 17], 1 << 20).unwrap(), 2048);
        assert_eq!(size(b"win ", [0, 10, 4, 17], 1 << 20).unwrap(), 2048);
        assert_eq!(size(b"wa\0\0", [0, 10, 4, 17], 1 << 20).unwrap(), 2048);
        assert_eq!(size(b"vpc ", [255, 255, 16, 255], 1 << 40).unwrap(), 1 << 31);
        for other in [b"vbox", b"vs  ", b"rufs", b"mkos", b"tap\0", b"\0\0\0\0", b"wa  "] {
            assert_eq!(size(other, [0, 10, 4, 17], 1 << 20).unwrap(), 2048, "{other:?}");
        }
        assert!(size(b"win ", [0; 4], 1 << 50).is_err());
        let forced = |creator, by| {
            Footer::parse(&footer(creator, [0, 10, 4, 17], 1 << 20), 0, by).map(|f| f.size / 512)
        };
        assert_eq!(forced(b"vpc ", SizeBy::Recorded).unwrap(), 2048);
        assert_eq!(forced(b"win ", SizeBy::Geometry).unwrap(), 680);
    }

    #[test]
    fn a_changed_footer_is_noticed() {
        let mut bytes = footer(b"win ", [0; 4], 512);
        bytes[100] ^= 1;
        assert_eq!(
            Footer::parse(&bytes, 512, SizeBy::Creator).unwrap_err().offset(),
            Some(512 + 64)
        );
        assert!(Footer::parse(&bytes[..100], 0, SizeBy::Creator).is_err());
    }
}
