//! New VHD images, as Virtual PC makes them: the guest's size is the one of a disk geometry, unless
//! the size itself is asked for.

use std::time::{SystemTime, UNIX_EPOCH};

use super::footer::{FOOTER, HEADER, MAX_GEOMETRY, MAX_SECTORS, SECTOR};
use crate::addr::Unit;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;

/// Bytes of data in a block of a dynamic disk.
const BLOCK: Unit = Unit::from_bits(21);
/// Where the table of a dynamic disk stands: behind the copy of the footer and the header.
const TABLE: u64 = FOOTER + HEADER;
/// 2000-01-01, from which the format counts seconds.
const EPOCH: u64 = 946_684_800;
const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
/// Nothing, for an offset.
const NONE: u64 = u64::MAX;

/// What to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the guest's disk, at least: rounded up to the next geometry.
    pub size: u64,
    /// The data stand in the file as they are, with nothing before them.
    pub fixed: bool,
    /// The guest's disk has exactly `size` bytes, which not every program believes.
    pub exact: bool,
}

/// Makes an image in an empty file.
///
/// # Errors
/// [`ErrorKind::Unsupported`] where the format ends below the size.
pub fn create(storage: &dyn Storage, options: CreateOptions) -> Result<()> {
    let geometry = if options.exact {
        Geometry::LARGEST
    } else {
        Geometry::holding(SECTOR.count(options.size))
    };
    let exact = geometry == Geometry::LARGEST;
    let sectors = if exact { SECTOR.count(options.size) } else { geometry.sectors() };
    if sectors > MAX_SECTORS {
        let message = "The image size is too large for file format 'vpc'";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let footer = footer(options, sectors, geometry);
    let size = sectors * SECTOR.bytes();
    if options.fixed {
        storage.set_len(size)?;
        storage.write_all_at(size, &footer)?;
        return storage.sync();
    }
    let blocks = BLOCK.count(size);
    let table = SECTOR.ceil(blocks * 4);
    storage.write_all_at(0, &footer)?;
    storage.write_all_at(TABLE + table, &footer)?;
    storage.write_all_at(FOOTER, &header(blocks as u32))?;
    storage.write_all_at(TABLE, &vec![0xff; table as usize])?;
    storage.sync()
}

/// Cylinders, heads and sectors in a track.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Geometry {
    cylinders: u64,
    heads: u64,
    track: u64,
}

impl Geometry {
    /// The largest; it says nothing about the disk's size.
    const LARGEST: Geometry = Geometry { cylinders: 65535, heads: 16, track: 255 };

    fn sectors(self) -> u64 {
        self.cylinders * self.heads * self.track
    }

    /// The smallest that the specification's way leads to and that holds as many sectors.
    fn holding(sectors: u64) -> Geometry {
        let mut more = (sectors..).map(Geometry::of);
        more.find(|g| g.sectors() >= sectors || *g == Geometry::LARGEST)
            .unwrap_or(Geometry::LARGEST)
    }

    /// "CHS Calculation" of the specification; it rounds down.
    fn of(sectors: u64) -> Geometry {
        let sectors = sectors.min(MAX_GEOMETRY);
        let (heads, track) = if sectors >= 65535 * 16 * 63 {
            (16, 255)
        } else {
            let heads = (sectors / 17).div_ceil(1024).max(4);
            if heads <= 16 && sectors / 17 < heads * 1024 {
                (heads, 17)
            } else if sectors / 31 < 16 * 1024 {
                (16, 31)
            } else {
                (16, 63)
            }
        };
        Geometry { cylinders: sectors / track / heads, heads, track }
    }
}

fn footer(options: CreateOptions, sectors: u64, geometry: Geometry) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
    let size = sectors * SECTOR.bytes();
    let mut bytes = vec![0; FOOTER as usize];
    let mut put = |at: usize, what: &[u8]| bytes[at..at + what.len()].copy_from_slice(what);
    put(0, b"conectix");
    put(8, &2u32.to_be_bytes());
    put(12, &0x0001_0000u32.to_be_bytes());
    put(16, &if options.fixed { NONE } else { FOOTER }.to_be_bytes());
    put(24, &(now.saturating_sub(EPOCH) as u32).to_be_bytes());
    // The creator's name says which size counts; see `footer::size`.
    put(28, if options.exact { b"qem2" } else { b"qemu" });
    put(32, &0x0005_0003u32.to_be_bytes());
    put(36, b"Wi2k");
    put(40, &size.to_be_bytes());
    put(48, &size.to_be_bytes());
    put(56, &(geometry.cylinders as u16).to_be_bytes());
    put(58, &[geometry.heads as u8, geometry.track as u8]);
    put(60, &if options.fixed { FIXED } else { DYNAMIC }.to_be_bytes());
    put(68, uuid::Uuid::new_v4().as_bytes());
    sealed(bytes, 64)
}

/// The dynamic disk header for a disk of so many blocks.
fn header(blocks: u32) -> Vec<u8> {
    let mut bytes = vec![0; HEADER as usize];
    let mut put = |at: usize, what: &[u8]| bytes[at..at + what.len()].copy_from_slice(what);
    put(0, b"cxsparse");
    put(8, &NONE.to_be_bytes());
    put(16, &TABLE.to_be_bytes());
    put(24, &0x0001_0000u32.to_be_bytes());
    put(28, &blocks.to_be_bytes());
    put(32, &(BLOCK.bytes() as u32).to_be_bytes());
    sealed(bytes, 36)
}

/// The structure with its checksum, which stands at `at`.
fn sealed(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
    let sum: u32 = bytes.iter().map(|&b| u32::from(b)).sum();
    bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::addr::GuestOffset;
    use crate::formats::vhd::{SizeBy, Vhd};
    use crate::image::{Image, Mapping};
    use crate::storage::MemoryStorage;

    #[test]
    fn a_new_image_opens_with_the_size_of_its_geometry_or_its_own() {
        for (fixed, exact, size) in [
            (false, false, 16_781_312),
            (true, false, 16_781_312),
            (false, true, 16 << 20),
            (true, true, 16 << 20),
        ] {
            let storage = Arc::new(MemoryStorage::default());
            create(&*storage, CreateOptions { size: 16 << 20, fixed, exact }).unwrap();
            let image = Vhd::open(storage, SizeBy::Creator).unwrap();
            assert_eq!(image.size(), size);
            let all = image.map(GuestOffset(0), size).unwrap();
            assert_eq!((all.len, matches!(all.mapping, Mapping::Data { .. })), (size, fixed));
        }
    }

    #[test]
    fn a_geometry_holds_what_it_is_asked_to_hold() {
        for sectors in [0, 1, 67, 68, 32768, 1 << 20, (65535 * 16 * 63) - 1, 65535 * 16 * 63] {
            assert!(Geometry::holding(sectors).sectors() >= sectors, "{sectors}");
        }
        assert_eq!(Geometry::holding(1 << 30), Geometry::LARGEST);
        assert_eq!(Geometry::holding(8_388_608).sectors() * 512, 4_295_467_008);
        let too_large = CreateOptions { size: 3 << 40, fixed: false, exact: false };
        assert!(create(&MemoryStorage::default(), too_large).is_err());
    }
}
