//! New VHDX images, fixed and dynamic: headers, an empty log, the block table, metadata. [MS-VHDX] 2.

use std::ops::Range;

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use super::guid::Guid;
use super::header::{
    self, HEADERS, MIB, REGION_TABLE, REGION_TABLES, RawHeader, RawRegion, RawRegionTable,
};
use super::metadata::{
    DISK_ID, DISK_SIZE, FILE_PARAMETERS, LOGICAL_SECTOR, MAX_SIZE, PHYSICAL_SECTOR, REQUIRED,
    RawItem, RawParameters, RawTable, SIGNATURE, TABLE,
};
use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::storage::Storage;

/// What a sector is to the guest.
const SECTOR: Unit = Unit::from_bits(9);
/// The largest block.
const MAX_BLOCK: u64 = 256 * MIB;
/// What a program that reads text learns of who made the file.
const CREATOR: &str = "vdisk";
/// A block that has a place.
pub(super) const PRESENT: u64 = 6;
/// A block that reads as zeroes.
const ZERO: u64 = 2;
/// In an item's flags: it is of the disk rather than of the file.
const OF_DISK: u32 = 2;

/// What to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the guest's disk, whole sectors.
    pub size: u64,
    /// Every block has its place at once.
    pub fixed: bool,
    /// Bytes of a block; `None` for what suits the size.
    pub block: Option<u64>,
    /// Bytes of the log.
    pub log: u64,
    /// Blocks of a dynamic disk that nobody wrote are said to be zero, rather than absent.
    pub zero_blocks: bool,
}

/// Where the parts of the file stand, in bytes.
struct Places {
    log: Range<u64>,
    bat: Range<u64>,
    metadata: u64,
    /// The first block.
    data: u64,
}

/// What a child knows the file and its contents by.
#[derive(Clone, Copy)]
struct Ids {
    file_write: Guid,
    data_write: Guid,
}

/// Makes an image in `storage`, whatever that holds.
///
/// # Errors
/// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) where the format ends below the size;
/// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) for sizes of blocks and logs that it has not.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    if options.size > MAX_SIZE {
        return Err(Error::unsupported("Image size too large; max of 64TB"));
    }
    let block = block(options)?;
    let places = places(options, block)?;
    let blocks = block.count(options.size);
    let end = if options.fixed { places.data + blocks * block.bytes() } else { places.data };
    storage.renew(0..end)?;
    storage.write_all_at(0, &file_type())?;
    // Two headers, of which the second is in force.
    let ids = Ids { file_write: Guid::random(), data_write: Guid::random() };
    for (at, sequence) in HEADERS.into_iter().zip(1u64..) {
        storage.write_all_at(at, header(sequence, ids, &places).as_bytes())?;
    }
    let regions = regions(&places);
    for at in REGION_TABLES {
        storage.write_all_at(at, &regions)?;
    }
    metadata(storage, options, block, places.metadata)?;
    if options.fixed || options.zero_blocks {
        bat(storage, options.fixed.then_some(places.data), block, blocks, places.bat.start)?;
    }
    storage.sync()
}

/// The size of a block: larger ones for larger disks.
fn block(options: &CreateOptions) -> Result<Unit> {
    const GIB: u64 = 1 << 30;
    let bytes = match options.block {
        Some(bytes) => bytes.checked_next_multiple_of(MIB).unwrap_or(MAX_BLOCK).min(MAX_BLOCK),
        None => match options.size {
            size if size > 32 << 40 => 64 * MIB,
            size if size > 100 * GIB => 32 * MIB,
            size if size > GIB => 16 * MIB,
            _ => 8 * MIB,
        },
    };
    let block = Unit::from_bytes(bytes).filter(|block| block.bytes() >= MIB);
    block.ok_or_else(|| Error::invalid("Block size must be a power of two"))
}

fn places(options: &CreateOptions, block: Unit) -> Result<Places> {
    let log = options.log.checked_next_multiple_of(MIB).filter(|log| *log < 1 << 32);
    let log = log.ok_or_else(|| Error::invalid("Log size must be smaller than 4 GB"))?;
    if log == 0 {
        return Err(Error::invalid("Log size must be a multiple of 1 MB"));
    }
    let blocks = block.count(options.size);
    let entries = super::entries(blocks, super::ratio(SECTOR, block));
    let log = MIB..MIB + log;
    let bat = log.end..log.end + (entries * 8).next_multiple_of(MIB).max(MIB);
    let metadata = bat.end;
    Ok(Places { log, bat, metadata, data: metadata + MIB })
}

fn file_type() -> Vec<u8> {
    let creator = CREATOR.encode_utf16().flat_map(u16::to_le_bytes);
    let mut bytes: Vec<u8> = b"vhdxfile".iter().copied().chain(creator).collect();
    bytes.resize(8 + 512, 0);
    bytes
}

fn header(sequence: u64, ids: Ids, places: &Places) -> RawHeader {
    let mut raw = RawHeader {
        signature: *b"head",
        sequence_number: sequence.into(),
        file_write_guid: ids.file_write.into(),
        data_write_guid: ids.data_write.into(),
        // No entry of the log counts: its id is zero. Its version is 0, the file's 1.
        version: 1.into(),
        log_length: ((places.log.end - places.log.start) as u32).into(),
        log_offset: places.log.start.into(),
        ..RawHeader::new_zeroed()
    };
    header::seal(raw.as_mut_bytes());
    raw
}

fn regions(places: &Places) -> Vec<u8> {
    let mut bytes = vec![0; REGION_TABLE as usize];
    let metadata = places.metadata..places.metadata + MIB;
    let regions = [(header::BAT, &places.bat), (header::METADATA, &metadata)];
    let table = RawRegionTable {
        signature: *b"regi",
        entry_count: (regions.len() as u32).into(),
        ..RawRegionTable::new_zeroed()
    };
    header::put(&mut bytes, 0, &table);
    let slots = (size_of::<RawRegionTable>()..).step_by(size_of::<RawRegion>());
    for (slot, (id, place)) in slots.zip(regions) {
        let region = RawRegion {
            guid: id.into(),
            file_offset: place.start.into(),
            length: ((place.end - place.start) as u32).into(),
            required: 1.into(),
        };
        header::put(&mut bytes, slot, &region);
    }
    header::seal(&mut bytes);
    bytes
}

/// Writes the table of items, and the items behind it.
fn metadata(
    storage: &dyn Storage,
    options: &CreateOptions,
    block: Unit,
    region: u64,
) -> Result<()> {
    let parameters = RawParameters {
        block_size: (block.bytes() as u32).into(),
        // Bit 0: blocks stay where they are, all of them.
        flags: u32::from(options.fixed).into(),
    };
    let sector = U32::new(SECTOR.bytes() as u32);
    let size = U64::new(options.size);
    let disk_id = Guid::random().to_bytes();
    let items: [(Guid, u32, &[u8]); 5] = [
        (FILE_PARAMETERS, REQUIRED, parameters.as_bytes()),
        (DISK_SIZE, REQUIRED | OF_DISK, size.as_bytes()),
        (DISK_ID, REQUIRED | OF_DISK, &disk_id),
        (LOGICAL_SECTOR, REQUIRED | OF_DISK, sector.as_bytes()),
        (PHYSICAL_SECTOR, REQUIRED | OF_DISK, sector.as_bytes()),
    ];
    let mut bytes = vec![0; TABLE as usize];
    let table = RawTable {
        signature: SIGNATURE,
        entry_count: (items.len() as u16).into(),
        ..RawTable::new_zeroed()
    };
    header::put(&mut bytes, 0, &table);
    let mut data: Vec<u8> = Vec::new();
    let slots = (size_of::<RawTable>()..).step_by(size_of::<RawItem>());
    for (slot, (id, flags, value)) in slots.zip(items) {
        let item = RawItem {
            item_id: id.into(),
            offset: (TABLE as u32 + data.len() as u32).into(),
            length: (value.len() as u32).into(),
            flags: flags.into(),
            reserved: 0.into(),
        };
        header::put(&mut bytes, slot, &item);
        data.extend_from_slice(value);
    }
    storage.write_all_at(region, &bytes)?;
    storage.write_all_at(region + TABLE, &data)
}

/// Fills the block table: places from `data` on, or zeroes.
fn bat(
    storage: &dyn Storage,
    data: Option<u64>,
    block: Unit,
    blocks: u64,
    table: u64,
) -> Result<()> {
    // A piece at a time: the largest table has half a gigabyte.
    const PIECE: u64 = 1 << 16;
    let ratio = super::ratio(SECTOR, block);
    let entries = super::entries(blocks, ratio);
    let entry = |slot: u64| match (data, slot % (ratio + 1) == ratio) {
        // A bitmap, of which only differencing disks have any.
        (_, true) => 0,
        (None, false) => ZERO,
        (Some(data), false) => {
            let number = slot - slot / (ratio + 1);
            (data + number * block.bytes()) | PRESENT
        }
    };
    for first in (0..entries).step_by(PIECE as usize) {
        let slots = first..entries.min(first + PIECE);
        let bytes: Vec<u8> = slots.flat_map(|slot| entry(slot).to_le_bytes()).collect();
        storage.write_all_at(table + first * 8, &bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::addr::GuestOffset;
    use crate::formats::vhdx::Vhdx;
    use crate::image::{Image, Mapping};
    use crate::storage::MemoryStorage;

    const PLAIN: CreateOptions =
        CreateOptions { size: 20 << 20, fixed: false, block: None, log: MIB, zero_blocks: true };

    #[test]
    fn a_new_image_opens_and_is_empty_or_all_there() {
        for (fixed, zero_blocks) in [(false, true), (false, false), (true, true)] {
            let storage = Arc::new(MemoryStorage::default());
            let options = CreateOptions { fixed, zero_blocks, block: Some(MIB), ..PLAIN };
            create(&*storage, &options).unwrap();
            let image = Vhdx::open(storage).unwrap();
            let all = image.map(GuestOffset(0), 20 << 20).unwrap();
            assert_eq!((image.size(), all.len), (20 << 20, 20 << 20));
            let right = match (fixed, zero_blocks) {
                (true, _) => matches!(all.mapping, Mapping::Data { .. }),
                (false, true) => matches!(all.mapping, Mapping::Zero { .. }),
                (false, false) => all.mapping == Mapping::Unallocated,
            };
            assert!(right, "{all:?}");
        }
    }

    #[test]
    fn bitmaps_keep_their_slots_between_those_of_blocks() {
        // 4096 blocks of 1 MiB have one bitmap.
        let options = CreateOptions { size: 5 << 30, fixed: true, block: Some(MIB), ..PLAIN };
        let block = block(&options).unwrap();
        let storage = MemoryStorage::default();
        bat(&storage, Some(8 * MIB), block, 5120, 0).unwrap();
        let bytes = storage.to_vec();
        let at = |slot: usize| u64::from_le_bytes(bytes[slot * 8..][..8].try_into().unwrap());
        assert_eq!((at(0), at(4095)), ((8 * MIB) | 6, (4103 * MIB) | 6));
        assert_eq!((at(4096), at(4097), bytes.len()), (0, (4104 * MIB) | 6, 5121 * 8));
    }

    #[test]
    fn sizes_that_the_format_has_not_are_refused() {
        let storage = MemoryStorage::default();
        let bad = [
            CreateOptions { size: (64 << 40) + 512, ..PLAIN },
            CreateOptions { block: Some(3 * MIB), ..PLAIN },
            CreateOptions { log: 0, ..PLAIN },
            CreateOptions { log: 1 << 32, ..PLAIN },
        ];
        assert!(bad.iter().all(|options| create(&storage, options).is_err()));
        let large = CreateOptions { block: Some(1 << 30), ..PLAIN };
        assert_eq!(block(&large).unwrap().bytes(), MAX_BLOCK);
    }
}
