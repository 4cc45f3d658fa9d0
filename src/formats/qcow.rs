//! qcow, the first version of QEMU's copy-on-write format: one table of tables, clusters that may be
//! compressed, and perhaps a backing file. Encrypted images are refused.
//!
//! QEMU's `block/qcow.c` is the one description that there is. All numbers are big-endian.

use std::io::{IoSliceMut, Read};
use std::mem::offset_of;
use std::sync::Arc;

use flate2::read::DeflateDecoder;
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::pages::Pages;
use super::two_level::{ByteOrder, Entry, Meaning, TwoLevel};
use super::{fields, probe, runs};
use crate::addr::{GuestOffset, Unit};
use crate::block;
use crate::error::{Error, Result};
use crate::image::{Backing, Extent, Image, Mapping};
use crate::storage::Storage;

/// The header as it stands in the file.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    version: U32,
    backing_file_offset: U64,
    backing_file_size: U32,
    mtime: U32,
    size: U64,
    cluster_bits: u8,
    l2_bits: u8,
    padding: U16,
    crypt_method: U32,
    l1_table_offset: U64,
}

const _: () = assert!(size_of::<RawHeader>() == 48);

/// The place of a header's field, for errors.
macro_rules! at {
    ($field:ident) => {
        offset_of!(RawHeader, $field) as u64
    };
}

const SECTOR: Unit = Unit::from_bits(9);
/// The longest name of a backing file, in bytes.
const MAX_NAME: u32 = 1023;
/// The largest first table, in bytes: larger than any that QEMU opens.
const MAX_TABLE: u64 = 1 << 31;
/// In an entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 63;

/// One qcow file, open for reading.
pub struct Qcow {
    storage: Arc<dyn Storage>,
    pages: Pages,
    tables: TwoLevel,
    backing: Option<Backing>,
}

impl Qcow {
    /// Reads and checks the header. Tables are read as they are needed.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Qcow> {
        let raw: RawHeader = fields::read_structure(&*storage, 0, "the qcow header")?;
        let tables = raw.tables()?;
        let bytes = tables.first_bytes().filter(|bytes| *bytes <= MAX_TABLE);
        let bytes = bytes.ok_or_else(|| Error::corrupt("Image too large").at_offset(at!(size)))?;
        fields::within(tables.first, bytes, storage.len()?, "the first table")?;
        let backing = raw.backing(&storage)?;
        let pages = Pages::new(Arc::clone(&storage), Pages::DEFAULT)?;
        Ok(Qcow { storage, pages, tables, backing })
    }

    /// Reads and unpacks a compressed cluster.
    fn unpack(&self, descriptor: u64) -> Result<Vec<u8>> {
        let cluster = self.tables.cluster;
        let split = 63 - cluster.bits();
        let (at, len) =
            (descriptor & ((1 << split) - 1), descriptor >> split & (cluster.bytes() - 1));
        // The last one of a file may end before the whole sectors that it takes.
        let len = len.min(self.pages.file_len().saturating_sub(at));
        let packed = fields::read(&self.storage, at, len, "a compressed cluster")?;
        let mut bytes = Vec::with_capacity(cluster.bytes() as usize);
        let unpacked =
            DeflateDecoder::new(&packed[..]).take(cluster.bytes()).read_to_end(&mut bytes);
        match unpacked {
            Ok(n) if n as u64 == cluster.bytes() => Ok(bytes),
            Ok(n) => {
                Err(Error::corrupt(format!("a compressed cluster holds {n} bytes")).at_offset(at))
            }
            Err(e) => {
                Err(Error::corrupt(format!("a compressed cluster is damaged: {e}")).at_offset(at))
            }
        }
    }
}

impl RawHeader {
    /// The shape of the tables, once all of the header is known to be right.
    fn tables(&self) -> Result<TwoLevel> {
        if !probe::qcow(self.as_bytes()) {
            return Err(Error::corrupt("Image not in qcow format").at_offset(0));
        }
        let bad = |what: &str, at: u64| Err(Error::corrupt(what).at_offset(at));
        if self.size.get() <= 1 {
            return bad("Image size is too small (must be at least 2 bytes)", at!(size));
        }
        if !(9..=16).contains(&self.cluster_bits) {
            return bad("Cluster size must be between 512 and 64k", at!(cluster_bits));
        }
        if !(6..=13).contains(&self.l2_bits) {
            return bad("L2 table size must be between 512 and 64k", at!(l2_bits));
        }
        match self.crypt_method.get() {
            0 => {}
            1 => {
                let message = "a qcow image encrypted with AES";
                return Err(Error::unsupported(message).at_offset(at!(crypt_method)));
            }
            _ => return bad("invalid encryption method in qcow header", at!(crypt_method)),
        }
        let size = self.size.get().checked_next_multiple_of(SECTOR.bytes());
        let size = size.filter(|size| i64::try_from(*size).is_ok());
        Ok(TwoLevel {
            size: size.ok_or_else(|| Error::corrupt("Image too large").at_offset(at!(size)))?,
            cluster: Unit::from_bits(self.cluster_bits.into()),
            entries: Unit::from_bits(self.l2_bits.into()),
            first: self.l1_table_offset.get(),
            order: ByteOrder::Big,
        })
    }

    /// The backing file's name; its format is not recorded.
    fn backing(&self, storage: &Arc<dyn Storage>) -> Result<Option<Backing>> {
        let (at, len) = (self.backing_file_offset.get(), self.backing_file_size.get());
        if at == 0 || len == 0 {
            return Ok(None);
        }
        if len > MAX_NAME {
            let message = "Backing file name too long";
            return Err(Error::corrupt(message).at_offset(at!(backing_file_size)));
        }
        let name = fields::name(storage, at, len.into())?;
        Ok(Some(Backing { name, format: None }))
    }
}

impl Meaning for Qcow {
    fn check_table(&self, _: u64, _: u64) -> Result<()> {
        // Any place will do for which there are bytes.
        Ok(())
    }

    fn mapping(&self, entry: &Entry) -> Result<Mapping> {
        Ok(match entry.value {
            0 => Mapping::Unallocated,
            packed if packed & COMPRESSED != 0 => Mapping::Compressed { descriptor: packed },
            host => {
                let end = host.checked_add(entry.within + entry.len);
                end.filter(|end| *end <= self.pages.file_len()).ok_or_else(|| {
                    Error::corrupt(format!(
                        "the cluster at {host:#x} reaches past the end of the file"
                    ))
                    .at_offset(entry.place)
                })?;
                runs::data(host + entry.within)
            }
        })
    }
}

impl Image for Qcow {
    fn size(&self) -> u64 {
        self.tables.size
    }

    fn cluster(&self) -> Unit {
        runs::CLUSTER
    }

    fn block_size(&self) -> Option<u64> {
        Some(self.tables.cluster.bytes())
    }

    fn backing(&self) -> Option<Backing> {
        self.backing.clone()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        self.tables.map(&self.pages, at, len, self)
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let Mapping::Compressed { descriptor } = extent.mapping else {
            return runs::read(&self.storage, extent, at, bufs);
        };
        runs::skip(extent, at, block::total_mut(bufs))?;
        let bytes = self.unpack(descriptor)?;
        runs::copy(&bytes, self.tables.cluster.within(at.0), bufs)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}
