//! How much room a disk's contents take at least in a new qcow2 image: for places that do not grow.

use std::collections::BTreeSet;
use std::io::IoSliceMut;

use crate::block::{BlockDevice, BlockStatus};
use crate::error::{Error, Result};
use crate::qcow2::CreateOptions;

/// Bytes that are read at a time.
const PIECE: u64 = 1 << 20;

/// Bytes that an image with `options` has at least when it holds what `source` shows. `exact` reads
/// the source and counts nothing that is zero; else all that is stored counts.
pub fn needed(source: &dyn BlockDevice, options: &CreateOptions, exact: bool) -> Result<u64> {
    let cluster = options.cluster;
    let (mut count, mut tables) = (0u64, BTreeSet::new());
    let entry = if options.extended_l2 { 16 } else { 8 };
    let per_table = cluster.bytes() / entry;
    let mut buf = Vec::new();
    // The first cluster that was not counted yet.
    let (mut at, mut next) = (0, 0);
    while at < source.size() {
        let found = source.extents(at, source.size() - at, 1024)?;
        let Some(last) = found.last() else {
            return Err(Error::invalid("the source of a copy does not say what it holds"));
        };
        at = last.offset + last.len;
        for data in found.iter().filter(|e| e.status == BlockStatus::Data) {
            let first = cluster.index(data.offset).max(next);
            let end = cluster.count(data.offset + data.len);
            next = end.max(next);
            for index in first..end {
                if !exact || holds_data(source, index << cluster.bits(), cluster.bytes(), &mut buf)?
                {
                    count += 1;
                    tables.insert(index / per_table);
                }
            }
        }
    }
    let l1 = cluster.count(source.size().div_ceil(per_table << cluster.bits()) * 8);
    // The header, the refcount table and the tables of the disk, and what counts all of them.
    let all = 2 + l1 + tables.len() as u64 + count;
    let per_block = (cluster.bytes() * 8) / u64::from(options.refcount_bits.max(1));
    Ok((all + all.div_ceil(per_block)) << cluster.bits())
}

fn holds_data(source: &dyn BlockDevice, at: u64, len: u64, buf: &mut Vec<u8>) -> Result<bool> {
    let end = (at + len).min(source.size());
    for from in (at..end).step_by(PIECE as usize) {
        buf.resize((end - from).min(PIECE) as usize, 0);
        source.read_at(from, &mut [IoSliceMut::new(buf)])?;
        if !crate::block::is_zero(buf) {
            return Ok(true);
        }
    }
    Ok(false)
}
