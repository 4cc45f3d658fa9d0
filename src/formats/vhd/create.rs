//! New VHD images, as Virtual PC makes them: the guest's size is the one of a disk geometry, unless
//! the size itself is asked for.

use std::time::{SystemTime, UNIX_EPOCH};

use zerocopy::{FromZeros, IntoBytes};

use super::footer::{
    COOKIE, FOOTER, HEADER, HEADER_COOKIE, MAX_GEOMETRY, MAX_SECTORS, RawFooter, RawGeometry,
    RawHeader, SECTOR, checksum,
};
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

/// Makes an image in `storage`, whatever that holds. Its footer stands behind the disk, and where
/// the length is fixed at the very end as well: there it is looked for.
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
    let blocks = BLOCK.count(size);
    let table = SECTOR.ceil(blocks * 4);
    let end = if options.fixed { size } else { TABLE + table };
    storage.renew(0..end + FOOTER)?;
    storage.write_all_at(end, footer.as_bytes())?;
    if storage.is_fixed() {
        storage.write_all_at(storage.len()?.saturating_sub(FOOTER), footer.as_bytes())?;
    }
    if !options.fixed {
        storage.write_all_at(0, footer.as_bytes())?;
        storage.write_all_at(FOOTER, header(blocks as u32).as_bytes())?;
        storage.write_all_at(TABLE, &vec![0xff; table as usize])?;
    }
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

fn footer(options: CreateOptions, sectors: u64, geometry: Geometry) -> RawFooter {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
    let size = sectors * SECTOR.bytes();
    let mut raw = RawFooter {
        cookie: COOKIE,
        features: 2.into(),
        file_format_version: 0x0001_0000.into(),
        data_offset: if options.fixed { NONE } else { FOOTER }.into(),
        time_stamp: (now.saturating_sub(EPOCH) as u32).into(),
        // The creator's name says which size counts; see `footer::size`.
        creator_application: if options.exact { *b"qem2" } else { *b"qemu" },
        creator_version: 0x0005_0003.into(),
        creator_host_os: *b"Wi2k",
        original_size: size.into(),
        current_size: size.into(),
        disk_geometry: RawGeometry {
            cylinder: (geometry.cylinders as u16).into(),
            heads: geometry.heads as u8,
            sectors_per_track: geometry.track as u8,
        },
        disk_type: if options.fixed { FIXED } else { DYNAMIC }.into(),
        unique_id: uuid::Uuid::new_v4().into_bytes(),
        ..RawFooter::new_zeroed()
    };
    raw.checksum = checksum(raw.as_bytes(), raw.checksum).into();
    raw
}

/// The dynamic disk header for a disk of so many blocks.
fn header(blocks: u32) -> RawHeader {
    let mut raw = RawHeader {
        cookie: HEADER_COOKIE,
        data_offset: NONE.into(),
        table_offset: TABLE.into(),
        header_version: 0x0001_0000.into(),
        max_table_entries: blocks.into(),
        block_size: (BLOCK.bytes() as u32).into(),
        ..RawHeader::new_zeroed()
    };
    raw.checksum = checksum(raw.as_bytes(), raw.checksum).into();
    raw
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
