//! VDI, VirtualBox's disk image: a header, one map of 32-bit entries, blocks of data.
//!
//! Dynamic and fixed images. A differencing image names its parent by UUID alone, which only
//! VirtualBox's registry can resolve: it is refused by that UUID.

use std::io::IoSliceMut;
use std::mem::offset_of;
use std::sync::Arc;

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::fields;
use super::pages::{Cursor, Pages};
use super::{probe, runs};
use crate::addr::{GuestOffset, Unit};
use crate::error::{Error, Result};
use crate::image::{Extent, Image, Mapping};
use crate::storage::Storage;

mod create;
mod fill;

pub use create::create;
pub use fill::fill;

/// The header as it stands in the file.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    text: [u8; 64],
    signature: U32,
    version: U32,
    header_size: U32,
    image_type: U32,
    image_flags: U32,
    description: [u8; 256],
    offset_bmap: U32,
    offset_data: U32,
    cylinders: U32,
    heads: U32,
    sectors: U32,
    sector_size: U32,
    unused1: U32,
    disk_size: U64,
    block_size: U32,
    block_extra: U32,
    blocks_in_image: U32,
    blocks_allocated: U32,
    uuid_image: [u8; 16],
    uuid_last_snap: [u8; 16],
    uuid_link: [u8; 16],
    uuid_parent: [u8; 16],
    unused2: [u8; 56],
}

/// Bytes of the header.
const HEADER: u64 = size_of::<RawHeader>() as u64;
const _: () = assert!(HEADER == 512);

/// The place of a header's field, for errors.
macro_rules! at {
    ($field:ident) => {
        offset_of!(RawHeader, $field) as u64
    };
}

const SECTOR: Unit = Unit::from_bits(9);
/// A dynamic image, one with a place for every block, one on a parent.
const DYNAMIC: u32 = 1;
const STATIC: u32 = 2;
const DIFFERENCING: u32 = 4;
/// The usual block, and the only one that new images have.
const BLOCK: Unit = Unit::from_bits(20);
/// How many blocks the map may name.
const MAX_BLOCKS: u32 = 0x1fff_ff80;
/// The largest disk in bytes.
const MAX_SIZE: u64 = MAX_BLOCKS as u64 * BLOCK.bytes();
/// No block of data: nothing was ever written.
const FREE: u32 = u32::MAX;
/// No block of data: the guest gave it back, it reads as zeroes.
const DISCARDED: u32 = u32::MAX - 1;

/// One VDI file, open for reading.
pub struct Vdi {
    storage: Arc<dyn Storage>,
    pages: Pages,
    header: Header,
}

#[derive(Debug, PartialEq, Eq)]
struct Header {
    size: u64,
    block: Unit,
    map: u64,
    data: u64,
    /// All blocks have a place from the beginning.
    fixed: bool,
}

impl Vdi {
    /// Reads and checks the header. The map is read as it is needed: where the file ends before it,
    /// its entries cannot be read, but all others can.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Vdi> {
        let header = Header::parse(&fields::read_structure(&*storage, 0, "the VDI header")?)?;
        let pages = Pages::new(Arc::clone(&storage), Pages::DEFAULT)?;
        Ok(Vdi { storage, pages, header })
    }

    fn piece(&self, map: &mut Cursor<'_>, at: u64) -> Result<runs::Piece> {
        let Header { size, block, map: table, data, .. } = self.header;
        let within = block.within(at);
        let len = (block.bytes() - within).min(size - at);
        let entry = table + block.index(at) * 4;
        let mapping = match u32::from_le_bytes(map.array(entry)?) {
            FREE => Mapping::Unallocated,
            DISCARDED => Mapping::Zero { host: None },
            index => {
                let host = block
                    .start(index.into())
                    .and_then(|start| data.checked_add(start)?.checked_add(within))
                    .filter(|host| {
                        host.checked_add(len).is_some_and(|end| end <= self.pages.file_len())
                    })
                    .ok_or_else(|| {
                        Error::corrupt(format!("block {index} lies past the end of the file"))
                            .at_offset(entry)
                    })?;
                runs::data(host)
            }
        };
        Ok((mapping, len))
    }
}

impl Header {
    fn parse(raw: &RawHeader) -> Result<Header> {
        let unsupported = |what: String, at: u64| {
            Err(Error::unsupported(format!("unsupported VDI image ({what})")).at_offset(at))
        };
        if !probe::vdi(raw.as_bytes()) {
            return Err(Error::corrupt(format!(
                "Image not in VDI format (bad signature {:08x})",
                raw.signature.get()
            ))
            .at_offset(at!(signature)));
        }
        let recorded = raw.disk_size.get();
        if recorded > MAX_SIZE {
            return Err(too_large(recorded).at_offset(at!(disk_size)));
        }
        let version = raw.version.get();
        if version >> 16 != 1 {
            let (major, minor) = (version >> 16, version & 0xffff);
            return unsupported(format!("version {major}.{minor}"), at!(version));
        }
        let (map, data) = (u64::from(raw.offset_bmap.get()), u64::from(raw.offset_data.get()));
        if !SECTOR.aligned(map) || map < HEADER {
            return unsupported(format!("unaligned block map offset {map:#x}"), at!(offset_bmap));
        }
        if !SECTOR.aligned(data) || data < HEADER {
            return unsupported(format!("unaligned data offset {data:#x}"), at!(offset_data));
        }
        let sector = raw.sector_size.get();
        if u64::from(sector) != SECTOR.bytes() {
            return unsupported(
                format!("sector size {sector} is not {}", SECTOR.bytes()),
                at!(sector_size),
            );
        }
        let bytes = raw.block_size.get();
        let block = Unit::from_bytes(bytes.into()).filter(|b| b.bytes() >= SECTOR.bytes());
        let Some(block) = block else {
            return unsupported(
                format!("block size {bytes} is not {}", BLOCK.bytes()),
                at!(block_size),
            );
        };
        if raw.block_extra != 0 {
            return Err(
                Error::unsupported("VDI blocks with extra data").at_offset(at!(block_extra))
            );
        }
        // VirtualBox has made disks that end inside a sector; a guest sees whole ones.
        let size = SECTOR.ceil(recorded);
        let blocks = raw.blocks_in_image.get();
        if block.count(size) > blocks.into() {
            let room = u64::from(blocks) * block.bytes();
            let what = format!("disk size {recorded}, image bitmap has room for {room}");
            return unsupported(what, at!(blocks_in_image));
        }
        check_kind(raw)?;
        if blocks > MAX_BLOCKS {
            return unsupported(
                format!("too many blocks {blocks}, max is {MAX_BLOCKS}"),
                at!(blocks_in_image),
            );
        }
        Ok(Header { size, block, map, data, fixed: raw.image_type == STATIC })
    }
}

/// A disk of more bytes than there can be blocks for.
fn too_large(size: u64) -> Error {
    Error::unsupported(format!(
        "Unsupported VDI image size (size is {size:#x}, max supported is {MAX_SIZE:#x})"
    ))
}

fn check_kind(raw: &RawHeader) -> Result<()> {
    let (parent, link) = (raw.uuid_parent, raw.uuid_link);
    match raw.image_type.get() {
        DYNAMIC | STATIC if parent == [0; 16] && link == [0; 16] => Ok(()),
        DYNAMIC | STATIC | DIFFERENCING => {
            let id = if parent == [0; 16] { link } else { parent };
            Err(Error::unsupported(format!(
                "a differencing VDI image: its parent is known by UUID only ({}). Merge it with \
                 VirtualBox (clone the disk) and open the result",
                uuid(&id)
            ))
            .at_offset(at!(uuid_parent)))
        }
        kind => {
            Err(Error::unsupported(format!("VDI image type {kind}")).at_offset(at!(image_type)))
        }
    }
}

/// A UUID as VirtualBox prints it: the first three groups are little-endian in the file.
fn uuid(b: &[u8; 16]) -> String {
    let [a0, a1, a2, a3, b0, b1, c0, c1, rest @ ..] = *b;
    let (x, y, z) = (
        u32::from_le_bytes([a0, a1, a2, a3]),
        u16::from_le_bytes([b0, b1]),
        u16::from_le_bytes([c0, c1]),
    );
    let [d0, d1, e @ ..] = rest;
    let node: String = e.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{x:08x}-{y:04x}-{z:04x}-{d0:02x}{d1:02x}-{node}")
}

impl Image for Vdi {
    fn size(&self) -> u64 {
        self.header.size
    }

    fn cluster(&self) -> Unit {
        runs::CLUSTER
    }

    fn block_size(&self) -> Option<u64> {
        Some(self.header.block.bytes())
    }

    fn read_only(&self) -> bool {
        true
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        let len = runs::clip(at, len, self.header.size)?;
        let mut map = self.pages.cursor();
        runs::longest(at, len, |pos| self.piece(&mut map, pos))
    }

    fn narrow(&self, extent: Extent) -> Result<Extent> {
        if self.header.fixed { runs::narrow(&self.storage, extent) } else { Ok(extent) }
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        runs::read(&self.storage, extent, at, bufs)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(head: &[u8]) -> Result<Header> {
        Header::parse(fields::structure(head, 0)?)
    }

    fn head() -> Vec<u8> {
        let mut head = vec![0; 512];
        let mut put = |at: usize, n: u32| head[at..at + 4].copy_from_slice(&n.to_le_bytes());
        put(0x40, 0xbeda_107f);
        put(0x44, 0x0001_0001);
        put(0x4c, 1);
        put(0x154, 512);
        put(0x158, 1024);
        put(0x168, 512);
        put(0x170, 3_000_001);
        put(0x178, 1 << 20);
        put(0x180, 3);
        head
    }

    #[test]
    fn a_header_is_checked_field_by_field() {
        let parsed = parse(&head()).unwrap();
        assert_eq!(parsed.size, 3_000_320);
        for (at, value) in [(0x4c, 3u32), (0x178, 3), (0x180, 2), (0x154, 7), (0x44, 0x20000)] {
            let mut bad = head();
            bad[at..at + 4].copy_from_slice(&value.to_le_bytes());
            assert_eq!(parse(&bad).unwrap_err().offset(), Some(at as u64));
        }
    }

    #[test]
    fn a_differencing_image_is_refused_by_its_parents_uuid() {
        let mut diff = head();
        diff[0x4c] = 4;
        diff[0x1b8..0x1c8]
            .copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
        let error = parse(&diff).unwrap_err();
        assert!(error.message().contains("04030201-0605-0807-090a-0b0c0d0e0f10"), "{error}");
    }
}
