//! The sparse extents of ESX, in which it keeps snapshots: COWD (VMFSSPARSE in a descriptor) and, since
//! 5.0, seSparse. VMware describes neither; what QEMU's `block/vmdk.c` knows of them is what there is.

use std::mem::offset_of;
use std::sync::Arc;

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::sparse::{Header, Layout, SECTOR};
use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::formats::fields;
use crate::storage::Storage;

/// Entries of a COWD table.
const COWD_ENTRIES: u32 = 4096;
/// The largest COWD extent, 2 TiB in sectors.
const MAX_COWD: u32 = u32::MAX;

/// The first number of a seSparse extent.
const SPACE_MAGIC: u64 = 0xcafe_babe;
/// The one version that there is.
const SPACE_VERSION: u64 = 0x2_0000_0001;
/// The first number of the part of a seSparse header that changes.
const VOLATILE_MAGIC: u64 = 0xcafe_cafe;
/// Sectors of a grain, and of a table of grains: the only ones.
const SPACE_GRAIN: u64 = 8;
const SPACE_TABLE: u64 = 64;
/// The largest seSparse extent, 64 TiB in sectors.
const MAX_SPACE: u64 = 64 << 31;
/// Bytes of a seSparse entry.
pub(super) const SPACE_ENTRY: u64 = 8;

/// The beginning of a COWD extent; numbers of sectors.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawCowd {
    magic: [u8; 4],
    version: U32,
    flags: U32,
    disk_sectors: U32,
    granularity: U32,
    l1dir_offset: U32,
    l1dir_size: U32,
}

/// The beginning of a seSparse extent; numbers of sectors.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSpace {
    magic: U64,
    version: U64,
    capacity: U64,
    grain_size: U64,
    grain_table_size: U64,
    flags: U64,
    reserved: [U64; 4],
    volatile_header_offset: U64,
    volatile_header_size: U64,
    journal_header_offset: U64,
    journal_header_size: U64,
    journal_offset: U64,
    journal_size: U64,
    grain_dir_offset: U64,
    grain_dir_size: U64,
    grain_tables_offset: U64,
    grain_tables_size: U64,
    free_bitmap_offset: U64,
    free_bitmap_size: U64,
    backmap_offset: U64,
    backmap_size: U64,
    grains_offset: U64,
    grains_size: U64,
    pad: [u8; 304],
    volatile: RawVolatile,
}

/// The part of a seSparse header that changes; it stands behind the other.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawVolatile {
    magic: U64,
    free_gt_number: U64,
    next_txn_seq_number: U64,
    replay_journal: U64,
    pad: [u8; 480],
}

const _: () = assert!(size_of::<RawCowd>() == 28 && size_of::<RawSpace>() == 1024);

/// The place of a field of a seSparse header, for errors.
macro_rules! at {
    ($($field:ident).+) => {
        offset_of!(RawSpace, $($field).+) as u64
    };
}

/// Whether an extent that begins with `head` is a seSparse one.
pub(super) fn is_space(head: &[u8]) -> bool {
    head.starts_with(&SPACE_MAGIC.to_le_bytes())
}

/// Parses a COWD header, which is all that its first sector holds.
pub(super) fn cowd(bytes: &[u8]) -> Result<Header> {
    let raw: &RawCowd = fields::structure(bytes, 0)?;
    let (version, capacity, grain) =
        (raw.version.get(), raw.disk_sectors.get(), raw.granularity.get());
    let at = |field: usize| field as u64;
    if version != 1 {
        return Err(Error::unsupported(format!("COWD version {version}"))
            .at_offset(at(offset_of!(RawCowd, version))));
    }
    let unit = SECTOR.start(grain.into()).and_then(Unit::from_bytes);
    let Some(grain) = unit.filter(|unit| (SECTOR.bytes()..=1 << 20).contains(&unit.bytes())) else {
        return Err(Error::corrupt(format!("grains of {grain} sectors"))
            .at_offset(at(offset_of!(RawCowd, granularity))));
    };
    if capacity == 0 || capacity == MAX_COWD {
        return Err(Error::corrupt(format!("a disk of {capacity} sectors"))
            .at_offset(at(offset_of!(RawCowd, disk_sectors))));
    }
    let capacity = u64::from(capacity) * SECTOR.bytes();
    let tables = grain.count(capacity).div_ceil(COWD_ENTRIES.into());
    let held = raw.l1dir_size.get();
    if tables > held.into() {
        let message = format!("{held} tables of grains, where the disk needs {tables}");
        return Err(Error::corrupt(message).at_offset(at(offset_of!(RawCowd, l1dir_size))));
    }
    Ok(Header {
        capacity,
        grain,
        entries: COWD_ENTRIES,
        directory: u64::from(raw.l1dir_offset.get()) * SECTOR.bytes(),
        ..Header::plain(Layout::Cowd)
    })
}

/// Reads a seSparse header.
pub(super) fn space(storage: &Arc<dyn Storage>) -> Result<Header> {
    let raw: RawSpace = fields::read_structure(&**storage, 0, "the seSparse header")?;
    let expect = |number: U64, at: u64, right: u64, what: &str| {
        if number == right {
            return Ok(());
        }
        let message = format!("a seSparse extent with {what} {:#x}", number.get());
        Err(Error::unsupported(message).at_offset(at))
    };
    expect(raw.magic, at!(magic), SPACE_MAGIC, "magic number")?;
    expect(raw.version, at!(version), SPACE_VERSION, "version")?;
    expect(raw.grain_size, at!(grain_size), SPACE_GRAIN, "a grain size of")?;
    expect(raw.grain_table_size, at!(grain_table_size), SPACE_TABLE, "a grain table size of")?;
    expect(raw.flags, at!(flags), 0, "flags")?;
    let (number, place) = (raw.volatile_header_offset, at!(volatile_header_offset));
    expect(number, place, 1, "a volatile header at sector")?;
    let (number, place) = (raw.volatile.magic, at!(volatile));
    expect(number, place, VOLATILE_MAGIC, "a volatile header that begins with")?;
    let sectors = |number: U64, at: u64| {
        SECTOR
            .start(number.get())
            .filter(|bytes| i64::try_from(*bytes).is_ok())
            .ok_or_else(|| Error::corrupt("a number of sectors past 63 bits").at_offset(at))
    };
    if raw.volatile.replay_journal != 0 {
        let message = "Image is dirty, Replaying journal not supported: let ESX open it once";
        return Err(Error::unsupported(message).at_offset(at!(volatile.replay_journal)));
    }
    if raw.capacity.get() > MAX_SPACE {
        let message = "a seSparse extent of more than 64 TiB";
        return Err(Error::corrupt(message).at_offset(at!(capacity)));
    }
    let layout = Layout::Space {
        tables: sectors(raw.grain_tables_offset, at!(grain_tables_offset))?,
        grains: sectors(raw.grains_offset, at!(grains_offset))?,
    };
    let header = Header {
        capacity: sectors(raw.capacity, at!(capacity))?,
        grain: Unit::from_bits(12),
        entries: (SPACE_TABLE * SECTOR.bytes() / SPACE_ENTRY) as u32,
        directory: sectors(raw.grain_dir_offset, at!(grain_dir_offset))?,
        ..Header::plain(layout)
    };
    let needed = header.tables() * SPACE_ENTRY;
    let held = sectors(raw.grain_dir_size, at!(grain_dir_size))?;
    if needed > held {
        let message = format!("a grain directory of {held} bytes, where the disk needs {needed}");
        return Err(Error::corrupt(message).at_offset(at!(grain_dir_size)));
    }
    Ok(header)
}

/// What an entry of a grain directory means: how far into the tables its table stands, in bytes.
/// `None` for no table.
pub(super) fn space_table(entry: u64) -> Option<Option<u64>> {
    match (entry, entry >> 32) {
        (0, _) => Some(None),
        (_, 0x1000_0000) => Some(Some((entry & 0xffff_ffff) * SPACE_TABLE * SECTOR.bytes())),
        _ => None,
    }
}

/// What an entry of a grain table means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Grain {
    /// The layer below shows.
    Absent,
    /// It reads as zeroes.
    Zero,
    /// It is the one of this number among the grains.
    At(u64),
}

/// Parses an entry of a grain table; `None` for one that there is not.
pub(super) fn space_grain(entry: u64) -> Option<Grain> {
    match entry >> 60 {
        0 if entry == 0 => Some(Grain::Absent),
        // Unmapped by the guest, or zeroed.
        1 | 2 => Some(Grain::Zero),
        // The low twelve bits of the number stand above the others.
        3 => Some(Grain::At((entry >> 48 & 0xfff) | (entry & 0xffff_ffff_ffff) << 12)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_mean_what_their_top_bits_say() {
        assert_eq!(space_table(0), Some(None));
        assert_eq!(space_table(0x1000_0000_0000_0003), Some(Some(3 * 32768)));
        assert_eq!(space_table(0x2000_0000_0000_0003), None);
        assert_eq!(space_grain(0), Some(Grain::Absent));
        assert_eq!(space_grain(5), None);
        assert_eq!(space_grain(0x1000_0000_0000_0000), Some(Grain::Zero));
        assert_eq!(space_grain(0x2000_0000_0000_0000), Some(Grain::Zero));
        assert_eq!(space_grain(0x3005_0000_0000_0002), Some(Grain::At(2 << 12 | 5)));
        assert_eq!(space_grain(u64::MAX), None);
    }
}
