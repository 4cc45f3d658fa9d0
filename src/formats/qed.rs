//! QED, a format that QEMU made for a while between qcow2's versions: two levels of tables, clusters,
//! and perhaps a backing file. "QED Image File Format", `docs/interop/qed_spec.rst` of QEMU.
//!
//! All numbers are little-endian.

use std::io::IoSliceMut;
use std::mem::offset_of;
use std::sync::Arc;

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::pages::Pages;
use super::two_level::{ByteOrder, Entry, Meaning, TwoLevel};
use super::{fields, probe, runs};
use crate::addr::{GuestOffset, Unit};
use crate::error::{Error, Result};
use crate::image::{Backing, Extent, Image, Mapping};
use crate::storage::Storage;

/// The header as it stands in the file.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    cluster_size: U32,
    table_size: U32,
    header_size: U32,
    features: U64,
    compat_features: U64,
    autoclear_features: U64,
    l1_table_offset: U64,
    image_size: U64,
    backing_filename_offset: U32,
    backing_filename_size: U32,
}

const _: () = assert!(size_of::<RawHeader>() == 64);

/// The place of a header's field, for errors.
macro_rules! at {
    ($field:ident) => {
        offset_of!(RawHeader, $field) as u64
    };
}

const SECTOR: Unit = Unit::from_bits(9);
const ENTRY: u64 = 8;
/// A cluster that reads as zeroes, whatever is below.
const ZERO: u64 = 1;
/// The longest name of a backing file, in bytes.
const MAX_NAME: u32 = 1023;

/// Feature bits.
mod feature {
    /// There is a backing file.
    pub const BACKING: u64 = 1;
    /// Tables may be out of step with the file's length: nothing that a reader sees.
    pub const NEED_CHECK: u64 = 1 << 1;
    /// The backing file is raw.
    pub const RAW_BACKING: u64 = 1 << 2;
    pub const KNOWN: u64 = BACKING | NEED_CHECK | RAW_BACKING;
}

/// One QED file, open for reading.
pub struct Qed {
    storage: Arc<dyn Storage>,
    pages: Pages,
    tables: TwoLevel,
    backing: Option<Backing>,
}

impl Qed {
    /// Reads and checks the header. Tables are read as they are needed.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Qed> {
        let raw: RawHeader = fields::read_structure(&*storage, 0, "the QED header")?;
        let tables = raw.tables()?;
        // Tables of both levels have the same size.
        fields::within(tables.first, tables.table_bytes(), storage.len()?, "the L1 table")?;
        let backing = raw.backing(&storage)?;
        let pages = Pages::new(Arc::clone(&storage), Pages::DEFAULT)?;
        Ok(Qed { storage, pages, tables, backing })
    }

    /// Fails unless `len` bytes at `host`, as the entry at `place` says, can be clusters.
    fn check(&self, host: u64, len: u64, place: u64) -> Result<()> {
        let inside = host.checked_add(len).is_some_and(|end| end <= self.pages.file_len());
        if inside && self.tables.cluster.aligned(host) {
            return Ok(());
        }
        let what = format!("{host:#x} is no place of a cluster in this file");
        Err(Error::corrupt(what).at_offset(place))
    }
}

impl Meaning for Qed {
    fn check_table(&self, table: u64, place: u64) -> Result<()> {
        self.check(table, self.tables.table_bytes(), place)
    }

    fn mapping(&self, entry: &Entry) -> Result<Mapping> {
        Ok(match entry.value {
            0 => Mapping::Unallocated,
            ZERO => Mapping::Zero { host: None },
            host => {
                self.check(host, entry.within + entry.len, entry.place)?;
                runs::data(host + entry.within)
            }
        })
    }
}

impl RawHeader {
    /// The shape of the tables, once all of the header is known to be right.
    fn tables(&self) -> Result<TwoLevel> {
        if !probe::qed(self.as_bytes()) {
            return Err(Error::corrupt("Image not in QED format").at_offset(0));
        }
        let unit = |number: u32, at: u64, least: u32, most: u32| {
            let unit = Unit::from_bytes(number.into()).filter(|_| (least..=most).contains(&number));
            unit.ok_or_else(|| {
                Error::corrupt(format!("{number} is not a power of two from {least} to {most}"))
                    .at_offset(at)
            })
        };
        let cluster = unit(self.cluster_size.get(), at!(cluster_size), 4 << 10, 64 << 20)?;
        let clusters = unit(self.table_size.get(), at!(table_size), 1, 16)?;
        let unknown = self.features.get() & !feature::KNOWN;
        if unknown != 0 {
            let what = format!("Unsupported QED features: {unknown:x}");
            return Err(Error::unsupported(what).at_offset(at!(features)));
        }
        let (first, size) = (self.l1_table_offset.get(), self.image_size.get());
        let entries = Unit::from_bits(cluster.bits() + clusters.bits() - ENTRY.ilog2());
        let largest = u128::from(entries.bytes()) * u128::from(entries.bytes());
        let largest = largest * u128::from(cluster.bytes());
        if !SECTOR.aligned(size) || u128::from(size) > largest || i64::try_from(size).is_err() {
            let what = format!("a QED disk of {size} bytes");
            return Err(Error::corrupt(what).at_offset(at!(image_size)));
        }
        if !cluster.aligned(first) || first == 0 {
            let message = "the L1 table is no cluster";
            return Err(Error::corrupt(message).at_offset(at!(l1_table_offset)));
        }
        Ok(TwoLevel { size, cluster, entries, first, order: ByteOrder::Little })
    }

    fn backing(&self, storage: &Arc<dyn Storage>) -> Result<Option<Backing>> {
        let features = self.features.get();
        if features & feature::BACKING == 0 {
            return Ok(None);
        }
        let (at, len) = (self.backing_filename_offset.get(), self.backing_filename_size.get());
        if len > MAX_NAME || len == 0 {
            let what = format!("a backing file's name of {len} bytes");
            return Err(Error::corrupt(what).at_offset(at!(backing_filename_size)));
        }
        let name = fields::name(storage, at.into(), len.into())?;
        let raw = features & feature::RAW_BACKING != 0;
        Ok(Some(Backing { name, format: raw.then(|| "raw".to_owned()) }))
    }
}

impl Image for Qed {
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
        runs::read(&self.storage, extent, at, bufs)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}
