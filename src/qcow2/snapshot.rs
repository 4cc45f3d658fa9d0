//! The table of internal snapshots.
//!
//! Specification: qcow2, "Snapshots".

use byteorder::{BigEndian, ByteOrder};

use super::header::{Header, MAX_L1};
use crate::error::{Error, Result};
use crate::storage::Storage;

/// The largest snapshot table, in bytes.
const MAX_TABLE: u64 = 64 << 20;
/// Bytes of an entry before its extra data.
const FIXED: usize = 40;

/// One internal snapshot, as far as other parts of the engine care.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Snapshot {
    pub l1_offset: u64,
    pub l1_size: u32,
    pub id: String,
    pub name: String,
}

/// Reads the table; returns the snapshots and the table's length in bytes.
pub(super) fn read_table(storage: &dyn Storage, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
    let mut snapshots = Vec::new();
    let mut at = 0;
    for _ in 0..header.snapshots {
        let (snapshot, len) = read_entry(storage, header.snapshots_offset.saturating_add(at))?;
        snapshots.push(snapshot);
        at = (at + len).next_multiple_of(8);
        if at > MAX_TABLE {
            let error = Error::corrupt("Snapshot table is too big");
            return Err(error.at_offset(header.snapshots_offset));
        }
    }
    Ok((snapshots, at))
}

fn read_entry(storage: &dyn Storage, offset: u64) -> Result<(Snapshot, u64)> {
    let mut fixed = [0; FIXED];
    storage.read_exact_at(offset, &mut fixed).map_err(|e| e.at_offset(offset))?;
    let id_len = u64::from(BigEndian::read_u16(&fixed[12..]));
    let name_len = u64::from(BigEndian::read_u16(&fixed[14..]));
    let extra = u64::from(BigEndian::read_u32(&fixed[36..]));
    let mut names = vec![0; (id_len + name_len) as usize];
    let names_at = offset + FIXED as u64 + extra;
    storage.read_exact_at(names_at, &mut names).map_err(|e| e.at_offset(names_at))?;
    let (id, name) = names.split_at(id_len as usize);
    let snapshot = Snapshot {
        l1_offset: BigEndian::read_u64(&fixed),
        l1_size: BigEndian::read_u32(&fixed[8..]),
        id: String::from_utf8_lossy(id).into_owned(),
        name: String::from_utf8_lossy(name).into_owned(),
    };
    if u64::from(snapshot.l1_size) * 8 > MAX_L1 {
        return Err(Error::corrupt("Snapshot L1 table too large").at_offset(offset));
    }
    Ok((snapshot, FIXED as u64 + extra + id_len + name_len))
}
