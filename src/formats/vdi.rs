//! VDI, VirtualBox's disk image: a header, one map of 32-bit entries, blocks of data.
//!
//! Dynamic and fixed images. A differencing image names its parent by UUID alone, which only
//! VirtualBox's registry can resolve: it is refused by that UUID.

use std::io::IoSliceMut;
use std::sync::Arc;

use super::fields::{self, Fields};
use super::pages::{Cursor, Pages};
use super::{probe, runs};
use crate::addr::{GuestOffset, Unit};
use crate::error::{Error, Result};
use crate::image::{Extent, Image, Mapping};
use crate::storage::Storage;

/// Bytes of the header that hold fields.
const HEADER: u64 = 512;
const SECTOR: Unit = Unit::from_bits(9);
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
}

impl Vdi {
    /// Reads and checks the header. The map is read as it is needed.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Vdi> {
        let head = fields::read(&storage, 0, HEADER, "the VDI header")?;
        let header = Header::parse(&head, storage.len()?)?;
        let pages = Pages::new(Arc::clone(&storage), Pages::DEFAULT)?;
        Ok(Vdi { storage, pages, header })
    }

    fn piece(&self, map: &mut Cursor<'_>, at: u64) -> Result<runs::Piece> {
        let Header { size, block, map: table, data } = self.header;
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
    fn parse(head: &[u8], file: u64) -> Result<Header> {
        let fields = Fields::new(head, 0);
        if !probe::vdi(head) {
            return Err(Error::corrupt("not a VDI image: the signature is missing").at_offset(0x40));
        }
        let version = fields.le32(0x44)?;
        if version >> 16 != 1 {
            let (major, minor) = (version >> 16, version & 0xffff);
            return Err(Error::unsupported(format!("VDI version {major}.{minor}")).at_offset(0x44));
        }
        check_kind(&fields)?;
        let (map, data) = (u64::from(fields.le32(0x154)?), u64::from(fields.le32(0x158)?));
        if !SECTOR.aligned(map) || !SECTOR.aligned(data) || map < HEADER || data < HEADER {
            return Err(Error::corrupt(format!(
                "the block map at {map:#x} and the data at {data:#x} must be sectors behind the header"
            ))
            .at_offset(0x154));
        }
        let sector = fields.le32(0x168)?;
        if u64::from(sector) != SECTOR.bytes() {
            return Err(
                Error::unsupported(format!("VDI sectors of {sector} bytes")).at_offset(0x168)
            );
        }
        let block = Unit::from_bytes(fields.le32(0x178)?.into())
            .filter(|block| block.bytes() >= SECTOR.bytes())
            .ok_or_else(|| {
                Error::corrupt("the block size is not a power of two").at_offset(0x178)
            })?;
        if fields.le32(0x17c)? != 0 {
            return Err(Error::unsupported("VDI blocks with extra data").at_offset(0x17c));
        }
        // VirtualBox has made disks that end inside a sector; a guest sees whole ones.
        let size = SECTOR.ceil(fields.le64(0x170)?);
        let blocks = u64::from(fields.le32(0x180)?);
        if block.count(size) > blocks {
            return Err(Error::corrupt(format!(
                "{blocks} blocks of {} bytes cannot hold a disk of {size} bytes",
                block.bytes()
            ))
            .at_offset(0x180));
        }
        fields::within(map, blocks * 4, file, "the block map")?;
        Ok(Header { size, block, map, data })
    }
}

fn check_kind(fields: &Fields<'_>) -> Result<()> {
    let parent: [u8; 16] = fields.array(0x1b8)?;
    let link: [u8; 16] = fields.array(0x1a8)?;
    match fields.le32(0x4c)? {
        1 | 2 if parent == [0; 16] && link == [0; 16] => Ok(()),
        1 | 2 | 4 => {
            let id = if parent == [0; 16] { link } else { parent };
            Err(Error::unsupported(format!(
                "a differencing VDI image: its parent is known by UUID only ({}). Merge it with \
                 VirtualBox (clone the disk) and open the result",
                uuid(&id)
            ))
            .at_offset(0x1b8))
        }
        kind => Err(Error::unsupported(format!("VDI image type {kind}")).at_offset(0x4c)),
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

    fn read_only(&self) -> bool {
        true
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        let len = runs::clip(at, len, self.header.size)?;
        let mut map = self.pages.cursor();
        runs::longest(at, len, |pos| self.piece(&mut map, pos))
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
    fn a_header_is_checked_against_the_file() {
        let parsed = Header::parse(&head(), 4096).unwrap();
        assert_eq!(parsed.size, 3_000_320);
        assert_eq!(Header::parse(&head(), 512).unwrap_err().offset(), Some(512));
        for (at, value) in [(0x4c, 3u32), (0x178, 3), (0x180, 2), (0x154, 7), (0x44, 0x20000)] {
            let mut bad = head();
            bad[at..at + 4].copy_from_slice(&value.to_le_bytes());
            assert_eq!(Header::parse(&bad, 4096).unwrap_err().offset(), Some(at as u64));
        }
    }

    #[test]
    fn a_differencing_image_is_refused_by_its_parents_uuid() {
        let mut diff = head();
        diff[0x4c] = 4;
        diff[0x1b8..0x1c8]
            .copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
        let error = Header::parse(&diff, 4096).unwrap_err();
        assert!(error.message().contains("04030201-0605-0807-090a-0b0c0d0e0f10"), "{error}");
    }
}
