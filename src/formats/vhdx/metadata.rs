//! What a VHDX says about its disk: sizes, and where its parent is. [MS-VHDX] 2.6.

use std::sync::Arc;

use super::guid::Guid;
use super::header::{MIB, Region};
use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::formats::fields::{self, Fields};
use crate::storage::Storage;

const TABLE: u64 = 64 << 10;
const MAX_ITEMS: u16 = 2047;
const MAX_SIZE: u64 = 64 << 40;
/// A parent locator larger than this is damage: it holds a handful of paths.
const MAX_LOCATOR: u32 = 1 << 20;

const FILE_PARAMETERS: Guid = Guid(0xcaa1_6737_fa36_4d43_b3b6_33f0_aa44_e76b);
const DISK_SIZE: Guid = Guid(0x2fa5_4224_cd1b_4876_b211_5dbe_d83b_f4b8);
const DISK_ID: Guid = Guid(0xbeca_12ab_b2e6_4523_93ef_c309_e000_c746);
const LOGICAL_SECTOR: Guid = Guid(0x8141_bf1d_a96f_4709_ba47_f233_a8fa_ab5f);
const PHYSICAL_SECTOR: Guid = Guid(0xcda3_48c7_445d_4471_9cc9_e988_5251_c556);
const PARENT_LOCATOR: Guid = Guid(0xa8d3_5f2d_b30b_454d_abf7_d3d8_4834_ab0c);
/// The only kind of locator there is: names of a VHDX file.
const LOCATOR_TYPE: Guid = Guid(0xb04a_efb7_d19e_4a81_b789_25b8_e944_5913);

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
        let parameters = items.need(FILE_PARAMETERS, 8)?;
        let fields = parameters.fields();
        let block = Unit::from_bytes(fields.le32(0)?.into())
            .filter(|block| (MIB..=256 * MIB).contains(&block.bytes()))
            .ok_or_else(|| {
                Error::corrupt("the block size is not a power of two from 1 to 256 MiB")
                    .at_offset(parameters.at)
            })?;
        let logical = items.need(LOGICAL_SECTOR, 4)?;
        let sector = match logical.fields().le32(0)? {
            bytes @ (512 | 4096) => Unit::from_bytes(bytes.into()),
            _ => None,
        };
        let sector = sector.ok_or_else(|| {
            Error::corrupt("a sector is neither 512 nor 4096 bytes").at_offset(logical.at)
        })?;
        let disk = items.need(DISK_SIZE, 8)?;
        let size = disk.fields().le64(0)?;
        if size > MAX_SIZE || !sector.aligned(size) {
            return Err(Error::corrupt(format!(
                "a disk of {size} bytes: over 64 TiB, or not whole sectors"
            ))
            .at_offset(disk.at));
        }
        let has_parent = fields.le32(4)? & 2 != 0;
        let parent = match has_parent {
            true => Some(items.need(PARENT_LOCATOR, 20)?.parent()?),
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
        let table = Fields::new(&bytes, base);
        if table.bytes(0, 8)? != b"metadata" {
            return Err(Error::corrupt("there is no metadata table here").at_offset(base));
        }
        let count = table.le16(10)?;
        if count > MAX_ITEMS {
            return Err(Error::corrupt(format!("{count} metadata items")).at_offset(base + 10));
        }
        let mut items: Vec<(Guid, Item)> = Vec::new();
        for entry in (0..usize::from(count)).map(|n| 32 + 32 * n) {
            let here = base + entry as u64;
            let id = Guid::from_bytes(table.array(entry)?);
            let flags = table.le32(entry + 24)?;
            let limit = match id {
                FILE_PARAMETERS | DISK_SIZE => 8,
                LOGICAL_SECTOR => 4,
                PARENT_LOCATOR => MAX_LOCATOR,
                DISK_ID | PHYSICAL_SECTOR => continue,
                _ if flags & 4 != 0 => {
                    return Err(Error::unsupported(format!("a required metadata item {id}"))
                        .at_offset(here));
                }
                _ => continue,
            };
            if items.iter().any(|(known, _)| *known == id) {
                return Err(Error::corrupt("a metadata item that is listed twice").at_offset(here));
            }
            let (offset, size) = (table.le32(entry + 16)?, table.le32(entry + 20)?);
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

    fn need(&self, id: Guid, least: usize) -> Result<&Item> {
        let item = self.items.iter().find(|(known, _)| *known == id).map(|(_, item)| item);
        item.filter(|item| item.bytes.len() >= least).ok_or_else(|| {
            Error::corrupt(format!("the metadata item {id} is missing or too short"))
        })
    }
}

impl Item {
    fn fields(&self) -> Fields<'_> {
        Fields::new(&self.bytes, self.at)
    }

    /// Parses a parent locator, [MS-VHDX] 2.6.2.6: keys and values, UTF-16.
    fn parent(&self) -> Result<Parent> {
        let fields = self.fields();
        let kind = Guid::from_bytes(fields.array(0)?);
        if kind != LOCATOR_TYPE {
            return Err(
                Error::unsupported(format!("a parent locator of type {kind}")).at_offset(self.at)
            );
        }
        let (mut relative, mut absolute, mut volume) = (None, None, None);
        let mut linkages = Vec::new();
        for entry in (0..usize::from(fields.le16(18)?)).map(|n| 20 + 12 * n) {
            let text = |at: usize, len: usize| -> Result<String> {
                let len = usize::from(fields.le16(entry + len)?);
                let bytes = fields.bytes(fields.le32(entry + at)? as usize, len)?;
                Ok(fields::utf16(bytes, u16::from_le_bytes))
            };
            let value = text(4, 10)?;
            match text(0, 8)?.as_str() {
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
