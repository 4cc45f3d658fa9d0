//! What a VHDX says about its disk: sizes, and where its parent is. [MS-VHDX] 2.6.

use std::mem::offset_of;
use std::sync::Arc;

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::guid::{Guid, RawGuid};
use super::header::{MIB, Region};
use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::formats::fields::{self, Plain};
use crate::storage::Storage;

pub(super) const TABLE: u64 = 64 << 10;
const MAX_ITEMS: u16 = 2047;
pub(super) const MAX_SIZE: u64 = 64 << 40;
/// A parent locator larger than this is damage: it holds a handful of paths.
const MAX_LOCATOR: u32 = 1 << 20;

pub(super) const FILE_PARAMETERS: Guid = Guid(0xcaa1_6737_fa36_4d43_b3b6_33f0_aa44_e76b);
pub(super) const DISK_SIZE: Guid = Guid(0x2fa5_4224_cd1b_4876_b211_5dbe_d83b_f4b8);
pub(super) const DISK_ID: Guid = Guid(0xbeca_12ab_b2e6_4523_93ef_c309_e000_c746);
pub(super) const LOGICAL_SECTOR: Guid = Guid(0x8141_bf1d_a96f_4709_ba47_f233_a8fa_ab5f);
pub(super) const PHYSICAL_SECTOR: Guid = Guid(0xcda3_48c7_445d_4471_9cc9_e988_5251_c556);
const PARENT_LOCATOR: Guid = Guid(0xa8d3_5f2d_b30b_454d_abf7_d3d8_4834_ab0c);
/// The only kind of locator there is: names of a VHDX file.
const LOCATOR_TYPE: Guid = Guid(0xb04a_efb7_d19e_4a81_b789_25b8_e944_5913);

/// What the table begins with: section 2.6.1.1.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawTable {
    pub signature: [u8; 8],
    pub reserved: U16,
    pub entry_count: U16,
    pub reserved2: [u8; 20],
}

/// One item: section 2.6.1.2.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawItem {
    pub item_id: RawGuid,
    pub offset: U32,
    pub length: U32,
    pub flags: U32,
    pub reserved: U32,
}

/// The item of file parameters: section 2.6.2.1.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawParameters {
    pub block_size: U32,
    pub flags: U32,
}

/// What a parent locator begins with: section 2.6.2.6.1.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawLocator {
    locator_type: RawGuid,
    reserved: U16,
    key_value_count: U16,
}

/// A key and a value of a parent locator: section 2.6.2.6.2.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawKeyValue {
    key_offset: U32,
    value_offset: U32,
    key_length: U16,
    value_length: U16,
}

const _: () = assert!(size_of::<RawTable>() == 32 && size_of::<RawItem>() == 32);
const _: () = assert!(size_of::<RawParameters>() == 8);
const _: () = assert!(size_of::<RawLocator>() == 20 && size_of::<RawKeyValue>() == 12);
pub(super) const SIGNATURE: [u8; 8] = *b"metadata";
/// In a file's parameters: it stands on a parent.
const HAS_PARENT: u32 = 2;
/// In an item's flags: a program that does not know it cannot read the disk.
pub(super) const REQUIRED: u32 = 4;

/// The metadata items that a reader needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Metadata {
    /// Bytes of the guest disk.
    pub(super) size: u64,
    /// Bytes of a payload block.
    pub(super) block: Unit,
    /// Bytes of a sector as the guest sees it: what a bit of a sector bitmap stands for.
    pub(super) sector: Unit,
    /// The layer below, of a differencing disk.
    pub(super) parent: Option<Parent>,
}

/// What a differencing disk records about its parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Parent {
    /// Its path, relative to this file where the image says so.
    pub(super) name: String,
    /// The data write GUIDs that it may have: two while the parent is being changed on purpose.
    pub(super) linkages: Vec<String>,
}

impl Metadata {
    /// Reads the table and the items it points to.
    pub(super) fn read(storage: &Arc<dyn Storage>, region: Region) -> Result<Metadata> {
        let items = Items::read(storage, region)?;
        let (parameters, at) = items.need::<RawParameters>(FILE_PARAMETERS)?;
        let block = Unit::from_bytes(parameters.block_size.get().into())
            .filter(|block| (MIB..=256 * MIB).contains(&block.bytes()))
            .ok_or_else(|| {
                Error::corrupt("the block size is not a power of two from 1 to 256 MiB")
                    .at_offset(at)
            })?;
        let (logical, at) = items.need::<U32>(LOGICAL_SECTOR)?;
        let sector = match logical.get() {
            bytes @ (512 | 4096) => Unit::from_bytes(bytes.into()),
            _ => None,
        };
        let sector = sector.ok_or_else(|| {
            Error::corrupt("a sector is neither 512 nor 4096 bytes").at_offset(at)
        })?;
        let (disk, at) = items.need::<U64>(DISK_SIZE)?;
        let size = disk.get();
        if size > MAX_SIZE || !sector.aligned(size) {
            return Err(Error::corrupt(format!(
                "a disk of {size} bytes: over 64 TiB, or not whole sectors"
            ))
            .at_offset(at));
        }
        let parent = match parameters.flags.get() & HAS_PARENT != 0 {
            true => Some(items.find::<RawLocator>(PARENT_LOCATOR)?.parent()?),
            false => None,
        };
        Ok(Metadata { size, block, sector, parent })
    }
}

struct Items {
    items: Vec<(Guid, Item)>,
}

struct Item {
    at: u64,
    bytes: Vec<u8>,
}

impl Items {
    fn read(storage: &Arc<dyn Storage>, (base, len): Region) -> Result<Items> {
        let bytes = fields::read(storage, base, TABLE, "the metadata table")?;
        let table: &RawTable = fields::structure(&bytes, base)?;
        if table.signature != SIGNATURE {
            return Err(Error::corrupt("there is no metadata table here").at_offset(base));
        }
        let count = table.entry_count.get();
        if count > MAX_ITEMS {
            return Err(Error::corrupt(format!("{count} metadata items"))
                .at_offset(base + offset_of!(RawTable, entry_count) as u64));
        }
        let behind = bytes.get(size_of::<RawTable>()..).unwrap_or_default();
        let entries: &[RawItem] = fields::structures(behind, count.into(), base)?;
        let places = (base + size_of::<RawTable>() as u64..).step_by(size_of::<RawItem>());
        let mut items: Vec<(Guid, Item)> = Vec::new();
        for (entry, here) in entries.iter().zip(places) {
            let id = Guid::from(entry.item_id);
            let limit = match id {
                FILE_PARAMETERS | DISK_SIZE => 8,
                LOGICAL_SECTOR => 4,
                PARENT_LOCATOR => MAX_LOCATOR,
                DISK_ID | PHYSICAL_SECTOR => continue,
                _ if entry.flags.get() & REQUIRED != 0 => {
                    return Err(Error::unsupported(format!("a required metadata item {id}"))
                        .at_offset(here));
                }
                _ => continue,
            };
            if items.iter().any(|(known, _)| *known == id) {
                return Err(Error::corrupt("a metadata item that is listed twice").at_offset(here));
            }
            let (offset, size) = (entry.offset.get(), entry.length.get());
            fields::within(offset.into(), size.into(), len, "a metadata item").map_err(|_| {
                Error::corrupt("a metadata item outside its region").at_offset(here)
            })?;
            if size > limit {
                return Err(
                    Error::corrupt(format!("a metadata item of {size} bytes")).at_offset(here)
                );
            }
            let at = base + u64::from(offset);
            let bytes = fields::read(storage, at, size.into(), "a metadata item")?;
            items.push((id, Item { at, bytes }));
        }
        Ok(Items { items })
    }

    /// The item that begins with a `T`.
    fn find<T: Plain>(&self, id: Guid) -> Result<&Item> {
        let item = self.items.iter().find(|(known, _)| *known == id).map(|(_, item)| item);
        item.filter(|item| item.bytes.len() >= size_of::<T>()).ok_or_else(|| {
            Error::corrupt(format!("the metadata item {id} is missing or too short"))
        })
    }

    /// The `T` that an item begins with, and where it stands in the file.
    fn need<T: Plain>(&self, id: Guid) -> Result<(&T, u64)> {
        let item = self.find::<T>(id)?;
        Ok((fields::structure(&item.bytes, item.at)?, item.at))
    }
}

impl Item {
    /// Parses a parent locator, [MS-VHDX] 2.6.2.6: keys and values, UTF-16.
    fn parent(&self) -> Result<Parent> {
        let locator: &RawLocator = fields::structure(&self.bytes, self.at)?;
        let kind = Guid::from(locator.locator_type);
        if kind != LOCATOR_TYPE {
            return Err(
                Error::unsupported(format!("a parent locator of type {kind}")).at_offset(self.at)
            );
        }
        let (mut relative, mut absolute, mut volume) = (None, None, None);
        let mut linkages = Vec::new();
        let text = |at: U32, len: U16| -> Result<String> {
            let len = usize::from(len.get());
            let bytes = fields::bytes_at(&self.bytes, at.get() as usize, len, self.at)?;
            Ok(fields::utf16(bytes, u16::from_le_bytes))
        };
        let behind = self.bytes.get(size_of::<RawLocator>()..).unwrap_or_default();
        let count = locator.key_value_count.get().into();
        for entry in fields::structures::<RawKeyValue>(behind, count, self.at)? {
            let value = text(entry.value_offset, entry.value_length)?;
            match text(entry.key_offset, entry.key_length)?.as_str() {
                "relative_path" => relative = Some(value),
                "absolute_win32_path" => absolute = Some(value),
                "volume_path" => volume = Some(value),
                "parent_linkage" | "parent_linkage2" => {
                    linkages.push(value.trim_matches(['{', '}']).to_ascii_lowercase());
                }
                _ => {}
            }
        }
        let name = relative.or(absolute).or(volume).filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| {
            Error::corrupt("a differencing VHDX that does not name its parent").at_offset(self.at)
        })?;
        Ok(Parent { name: fields::native_path(&name), linkages })
    }
}
