//! The bits of one bitmap, in the parts that a cluster of the file each holds.
//!
//! A part is read when it is first changed. Specification: qcow2, "Bitmap table", "Bitmap data".

use std::ops::Range;

use super::directory::{Entry, MAX_TABLES};
use crate::addr::Unit;
use crate::error::{Error, Result};
use crate::qcow2::tables::entry::OFFSET;
use crate::qcow2::tables::words::decode;
use crate::storage::Storage;

/// A table entry without a cluster: all bits of the part are set.
const ALL_ONES: u64 = 1;

/// What one entry of the bitmap's table stands for.
#[derive(Debug, Clone)]
pub(in crate::qcow2) enum Part {
    Zero,
    One,
    /// In the file, at this offset.
    Stored(u64),
    /// To be written.
    Changed(Box<[u8]>),
}

/// The bits of a bitmap over a disk of `size` bytes.
#[derive(Debug, Clone)]
pub(in crate::qcow2) struct Bits {
    pub parts: Vec<Part>,
    granularity: Unit,
    cluster: Unit,
    size: u64,
}

impl Bits {
    /// All clear.
    pub fn new(granularity: Unit, cluster: Unit, size: u64) -> Result<Bits> {
        let parts = cluster.count(granularity.count(size).div_ceil(8));
        if parts > MAX_TABLES {
            return Err(Error::invalid("the bitmap would be too large; take a larger granularity"));
        }
        Ok(Bits { parts: vec![Part::Zero; parts as usize], granularity, cluster, size })
    }

    /// As the file has them.
    pub fn read(storage: &dyn Storage, entry: &Entry, cluster: Unit, size: u64) -> Result<Bits> {
        let at = entry.table_offset;
        let len = u64::from(entry.table_size) * 8;
        let granularity = Unit::from_bits(u32::from(entry.granularity_bits));
        let needed = cluster.count(granularity.count(size).div_ceil(8));
        let inside = at.checked_add(len).is_some_and(|end| end <= storage.len().unwrap_or(0));
        if needed != u64::from(entry.table_size) || !cluster.aligned(at) || !inside {
            return Err(Error::corrupt("a bitmap's table does not fit the disk").at_offset(at));
        }
        let mut bits = Bits::new(granularity, cluster, size)?;
        let mut table = vec![0; len as usize];
        storage.read_exact_at(at, &mut table)?;
        for (part, raw) in bits.parts.iter_mut().zip(decode(&table)) {
            let offset = raw & OFFSET;
            let known = raw & !(OFFSET | ALL_ONES) == 0 && (offset == 0 || raw & ALL_ONES == 0);
            if !known || !cluster.aligned(offset) {
                return Err(Error::corrupt("a bitmap table entry is not valid").at_offset(at));
            }
            *part = match (offset, raw & ALL_ONES) {
                (0, 0) => Part::Zero,
                (0, _) => Part::One,
                _ => Part::Stored(offset),
            };
        }
        Ok(bits)
    }

    /// Bits of one part.
    fn per_part(&self) -> u64 {
        self.cluster.bytes() * 8
    }

    fn bytes(&self, storage: &dyn Storage, part: usize) -> Result<Box<[u8]>> {
        let mut bytes = vec![0; self.cluster.bytes() as usize].into_boxed_slice();
        match self.parts.get(part) {
            Some(Part::One) => bytes.fill(0xff),
            Some(Part::Changed(changed)) => bytes.copy_from_slice(changed),
            Some(Part::Stored(offset)) => {
                let have = storage.len()?.saturating_sub(*offset).min(bytes.len() as u64) as usize;
                storage.read_exact_at(*offset, &mut bytes[..have])?;
            }
            Some(Part::Zero) | None => {}
        }
        Ok(bytes)
    }

    /// Marks the bytes of `range` dirty.
    pub fn set(&mut self, storage: &dyn Storage, range: Range<u64>) -> Result<()> {
        let end = range.end.min(self.size);
        if range.start >= end {
            return Ok(());
        }
        let (first, last) = (self.granularity.index(range.start), self.granularity.index(end - 1));
        for part in first / self.per_part()..=last / self.per_part() {
            let index = part as usize;
            match self.parts.get(index) {
                None | Some(Part::One) => continue,
                Some(Part::Changed(_)) => {}
                Some(_) => self.parts[index] = Part::Changed(self.bytes(storage, index)?),
            }
            let base = part * self.per_part();
            let Some(Part::Changed(bytes)) = self.parts.get_mut(index) else { continue };
            for bit in first.max(base)..=last.min(base + bytes.len() as u64 * 8 - 1) {
                let bit = (bit - base) as usize;
                bytes[bit / 8] |= 1 << (bit % 8);
            }
        }
        Ok(())
    }

    /// The dirty ranges of the disk, in bytes, in order.
    pub fn ranges(&self, storage: &dyn Storage) -> Result<Vec<Range<u64>>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        for part in 0..self.parts.len() {
            if matches!(self.parts[part], Part::Zero) {
                continue;
            }
            let bytes = self.bytes(storage, part)?;
            let base = part as u64 * self.per_part();
            let set = (0..self.per_part()).filter(|i| bytes[(*i / 8) as usize] >> (i % 8) & 1 != 0);
            for bit in set {
                let start = self.granularity.start(base + bit).unwrap_or(u64::MAX);
                let end = start.saturating_add(self.granularity.bytes()).min(self.size);
                match found.last_mut() {
                    _ if start >= self.size => break,
                    Some(last) if last.end == start => last.end = end,
                    _ => found.push(start..end),
                }
            }
        }
        Ok(found)
    }

    /// The same bits over a disk of another size; what is new is clear.
    pub fn resized(&self, storage: &dyn Storage, size: u64) -> Result<Bits> {
        let mut bits = Bits::new(self.granularity, self.cluster, size)?;
        for range in self.ranges(storage)? {
            bits.set(storage, range)?;
        }
        Ok(bits)
    }
}

/// The table entry of a part that is in the file, or that needs no place there.
pub(super) fn table_entry(part: &Part) -> u64 {
    match part {
        Part::One => ALL_ONES,
        Part::Stored(offset) => *offset,
        Part::Zero | Part::Changed(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn bits_are_set_found_and_kept_over_a_change_of_size() {
        let storage = MemoryStorage::default();
        let (granularity, cluster) = (Unit::from_bits(9), Unit::from_bits(9));
        let size = 5 << 20;
        let mut bits = Bits::new(granularity, cluster, size).unwrap();
        assert_eq!(bits.parts.len(), 3);
        bits.set(&storage, 1000..1100).unwrap();
        bits.set(&storage, (2 << 20) - 1..(2 << 20) + 1).unwrap();
        bits.set(&storage, size - 1..size + 9999).unwrap();
        let edge = (2 << 20) - 512..(2 << 20) + 512;
        assert_eq!(bits.ranges(&storage).unwrap(), [512..1536, edge.clone(), size - 512..size]);
        let small = bits.resized(&storage, 3 << 20).unwrap();
        assert_eq!(small.ranges(&storage).unwrap(), [512..1536, edge]);
    }
}
