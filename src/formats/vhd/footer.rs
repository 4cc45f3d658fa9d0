//! The fixed structures of a VHD: the footer, the dynamic disk header, and the names of a parent.
//! All numbers are big-endian. "Virtual Hard Disk Image Format Specification", version 1.0.

use std::sync::Arc;

use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::formats::fields::{self, Fields};
use crate::storage::Storage;

/// Bytes of the footer, and of its copy at the beginning of a dynamic disk.
pub const FOOTER: u64 = 512;
/// Bytes of the dynamic disk header.
pub const HEADER: u64 = 1024;
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
        let fields = Fields::new(bytes, base);
        if fields.bytes(0, 8)? != b"conectix" {
            return Err(Error::corrupt("not a VHD image: there is no footer").at_offset(base));
        }
        check_sum(&fields, FOOTER as usize, 64, base)?;
        if fields.be32(12)? >> 16 != 1 {
            return Err(Error::unsupported(format!("VHD format version {:#x}", fields.be32(12)?))
                .at_offset(base + 12));
        }
        let kind = match fields.be32(60)? {
            2 => Kind::Fixed,
            3 => Kind::Dynamic,
            4 => Kind::Differencing,
            other => {
                return Err(
                    Error::unsupported(format!("VHD disk type {other}")).at_offset(base + 60)
                );
            }
        };
        let size = size(&fields, by)?;
        Ok(Footer { kind, size, header: fields.be64(16)?, id: fields.array(68)? })
    }
}

/// The guest's size in bytes. Virtual PC and older QEMU show a guest the geometry, and the size
/// they record is larger; Hyper-V and all later programs mean the size they record. The largest
/// geometry stands for any larger disk.
fn size(fields: &Fields<'_>, by: SizeBy) -> Result<u64> {
    let [_, _, heads, sectors] = fields.array(56)?;
    let geometry = u64::from(fields.be16(56)?) * u64::from(heads) * u64::from(sectors);
    let creator: [u8; 4] = fields.array(28)?;
    let recorded = match &creator {
        _ if by == SizeBy::Recorded || geometry == MAX_GEOMETRY => true,
        _ if by == SizeBy::Geometry => false,
        b"win " | b"qem2" | b"d2v " | b"tap\0" | b"CTXS" => true,
        [b'w', b'a', 0, 0] => true,
        _ => false,
    };
    let total = if recorded { SECTOR.index(fields.be64(48)?) } else { geometry };
    if total > MAX_SECTORS {
        return Err(Error::corrupt(format!(
            "a VHD disk of {total} sectors: the format ends at {MAX_SECTORS}"
        ))
        .at_offset(48));
    }
    Ok(total * SECTOR.bytes())
}

/// The checksum is the complement of the sum of all bytes but its own four.
fn check_sum(fields: &Fields<'_>, len: usize, at: usize, base: u64) -> Result<()> {
    let sum: u32 = fields.bytes(0, len)?.iter().map(|&b| u32::from(b)).sum();
    let own: u32 = fields.bytes(at, 4)?.iter().map(|&b| u32::from(b)).sum();
    if !(sum - own) == fields.be32(at)? {
        return Ok(());
    }
    Err(Error::corrupt("the VHD header's checksum is wrong").at_offset(base + at as u64))
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
        let mut bytes = fields::read(storage, base, have, "the dynamic disk header")?;
        bytes.resize(HEADER as usize, 0);
        let fields = Fields::new(&bytes, base);
        if fields.bytes(0, 8)? != b"cxsparse" {
            return Err(Error::corrupt("there is no dynamic disk header here").at_offset(base));
        }
        let bytes = fields.be32(32)?;
        let block = Unit::from_bytes(bytes.into())
            .filter(|block| block.bytes() >= SECTOR.bytes())
            .ok_or_else(|| {
                Error::corrupt(format!("Invalid block size {bytes}")).at_offset(base + 32)
            })?;
        let entries = fields.be32(28)?;
        if entries > MAX_ENTRIES {
            return Err(Error::corrupt(format!("Max Table Entries too large ({entries})"))
                .at_offset(base + 28));
        }
        if block.count(footer.size) > entries.into() {
            return Err(Error::corrupt(format!(
                "{entries} blocks of {} bytes cannot hold a disk of {} bytes",
                block.bytes(),
                footer.size
            ))
            .at_offset(base + 28));
        }
        check_sum(&fields, HEADER as usize, 36, base)?;
        let table = fields.be64(16)?;
        let needed = block.count(footer.size) * 4;
        fields::within(table, needed, storage.len()?, "the block allocation table")?;
        let parent = match footer.kind {
            Kind::Differencing => Some(parent(storage, &fields, base)?),
            _ => None,
        };
        Ok(Header {
            table,
            entries,
            block,
            bitmap: SECTOR.ceil(SECTOR.index(block.bytes()).div_ceil(8)),
            parent_id: fields.array(40)?,
            parent,
        })
    }
}

/// The best of the parent's names: relative to this file, absolute, the bare file name.
fn parent(storage: &Arc<dyn Storage>, header: &Fields<'_>, base: u64) -> Result<String> {
    let (mut relative, mut absolute, mut url) = (None, None, None);
    for locator in (576..768).step_by(24) {
        let place = match header.bytes(locator, 4)? {
            b"W2ru" => &mut relative,
            b"W2ku" => &mut absolute,
            b"MacX" => &mut url,
            _ => continue,
        };
        let len = header.be32(locator + 8)?;
        let at = header.be64(locator + 16)?;
        if len > MAX_NAME {
            return Err(Error::corrupt(format!("a parent's name of {len} bytes"))
                .at_offset(base + locator as u64));
        }
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
        fields::native_path(&fields::utf16(header.bytes(64, 512)?, u16::from_be_bytes))
    };
    if name.is_empty() {
        return Err(Error::corrupt("a differencing VHD that does not name its parent")
            .at_offset(base + 576));
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
