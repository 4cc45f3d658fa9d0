//! Two levels of tables that map a disk's clusters, as qcow and QED have them.
//!
//! The first level names tables, each of which maps a run of clusters, by 64-bit entries. What an entry
//! of the second level means is the format's to say.

use super::pages::{Cursor, Pages};
use super::runs;
use crate::addr::{GuestOffset, Unit};
use crate::error::{Error, Result};
use crate::image::{Extent, Mapping};

const ENTRY: u64 = size_of::<u64>() as u64;

/// The shape of an image's tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TwoLevel {
    /// Bytes of the disk.
    pub size: u64,
    pub cluster: Unit,
    /// Entries of a table of the second level.
    pub entries: Unit,
    /// Where the table of the first level stands.
    pub first: u64,
    pub order: ByteOrder,
}

/// How numbers stand in the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ByteOrder {
    Big,
    Little,
}

/// An entry of the second level that maps bytes of the disk.
pub(super) struct Entry {
    pub value: u64,
    /// Where it stands in the file.
    pub place: u64,
    /// How far in the cluster the bytes begin, and how many there are to its end.
    pub within: u64,
    pub len: u64,
}

/// What the entries of one format mean.
pub(super) trait Meaning {
    /// Fails where no table of the second level can stand at `table`, as the entry at `place` says.
    fn check_table(&self, table: u64, place: u64) -> Result<()>;

    /// How the bytes are mapped of which `entry` speaks.
    fn mapping(&self, entry: &Entry) -> Result<Mapping>;
}

impl TwoLevel {
    /// Bytes of a table of the second level.
    pub fn table_bytes(&self) -> u64 {
        self.entries.bytes() * ENTRY
    }

    /// Bytes of the first table that the disk's size needs; `None` past 64 bits.
    pub fn first_bytes(&self) -> Option<u64> {
        self.entries.count(self.cluster.count(self.size)).checked_mul(ENTRY)
    }

    /// See [`crate::image::Image::map`].
    pub fn map(
        &self,
        pages: &Pages,
        at: GuestOffset,
        len: u64,
        meaning: &impl Meaning,
    ) -> Result<Extent> {
        let len = runs::clip(at, len, self.size)?;
        let mut tables = pages.cursor();
        runs::longest(at, len, |pos| self.piece(&mut tables, pos, meaning))
    }

    fn piece(
        &self,
        tables: &mut Cursor<'_>,
        at: u64,
        meaning: &impl Meaning,
    ) -> Result<runs::Piece> {
        let TwoLevel { size, cluster, entries, first, order } = *self;
        let (index, within) = (cluster.index(at), cluster.within(at));
        let slot = entries.within(index);
        let place = first + entries.index(index) * ENTRY;
        let table = order.number(tables.array(place)?);
        if table == 0 {
            let covered = (entries.bytes() - slot) * cluster.bytes() - within;
            return Ok((Mapping::Unallocated, covered.min(size - at)));
        }
        meaning.check_table(table, place)?;
        let place = table
            .checked_add(slot * ENTRY)
            .ok_or_else(|| Error::corrupt("a table past 64 bits").at_offset(place))?;
        let value = order.number(tables.array(place)?);
        let len = (cluster.bytes() - within).min(size - at);
        Ok((meaning.mapping(&Entry { value, place, within, len })?, len))
    }
}

impl ByteOrder {
    fn number(self, bytes: [u8; 8]) -> u64 {
        match self {
            ByteOrder::Big => u64::from_be_bytes(bytes),
            ByteOrder::Little => u64::from_le_bytes(bytes),
        }
    }
}
