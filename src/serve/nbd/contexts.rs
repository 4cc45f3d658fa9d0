//! What is told of a disk beside its bytes: metadata contexts, the protocol's own `base:allocation` and
//! two of QEMU's (docs/interop/nbd.rst), which backup programs read.
//!
//! It knows ranges and numbers, no socket.

use std::ops::Range;
use std::sync::Arc;

use crate::block::{BlockDevice, BlockStatus};
use crate::error::Result;
use crate::nbd::wire;

const ALLOCATION: &str = "base:allocation";
const DEPTH: &str = "qemu:allocation-depth";
const BITMAP: &str = "qemu:dirty-bitmap:";

/// Numbers of the contexts here; bitmaps follow one another.
const ALLOCATION_ID: u32 = 1;
const DEPTH_ID: u32 = 2;
const FIRST_BITMAP_ID: u32 = 3;
/// The most bitmaps of one export: a chosen context is a bit of a number.
pub const MAX_BITMAPS: usize = 60;
/// A stretch that was written since the bitmap was begun.
const DIRTY: u32 = 1;

/// Tells of the first stretch of a range how long it is, and how far below the top of the chain the
/// layer is that has it, from 1; 0 where none has.
pub type Depth = Arc<dyn Fn(u64, u64) -> Result<(u64, u32)> + Send + Sync>;

/// A bitmap that does not change any more.
#[derive(Debug, Clone)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// What it calls written, in order.
    pub written: Vec<Range<u64>>,
}

/// QEMU's contexts of an export.
#[derive(Clone, Default)]
pub struct Contexts {
    /// `qemu:allocation-depth`, where it is offered.
    pub depth: Option<Depth>,
    /// `qemu:dirty-bitmap:NAME`, at most [`MAX_BITMAPS`].
    pub bitmaps: Vec<Bitmap>,
}

/// Contexts that a client has chosen, by their numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Chosen(u64);

impl Chosen {
    /// One more.
    pub fn add(&mut self, id: u32) {
        self.0 |= 1 << id;
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Their numbers.
    pub fn ids(self) -> impl Iterator<Item = u32> {
        (0..u64::BITS).filter(move |id| self.0 >> id & 1 == 1)
    }
}

impl Contexts {
    /// All contexts of an export: their numbers and names.
    pub fn all(&self) -> Vec<(u32, String)> {
        let mut all = vec![(ALLOCATION_ID, ALLOCATION.to_owned())];
        all.extend(self.depth.iter().map(|_| (DEPTH_ID, DEPTH.to_owned())));
        let bitmaps = self.bitmaps.iter().take(MAX_BITMAPS).map(|b| format!("{BITMAP}{}", b.name));
        all.extend((FIRST_BITMAP_ID..).zip(bitmaps));
        all
    }

    /// At most `limit` stretches of a range in one context: their lengths and flags.
    pub fn stretches(
        &self,
        id: u32,
        device: &dyn BlockDevice,
        range: Range<u64>,
        limit: usize,
    ) -> Result<Vec<(u32, u32)>> {
        match (id, &self.depth) {
            (DEPTH_ID, Some(depth)) => depths(depth, range, limit),
            (ALLOCATION_ID | DEPTH_ID, _) => allocation(device, range, limit),
            _ => {
                let bitmap = self.bitmaps.get((id - FIRST_BITMAP_ID) as usize);
                let written = bitmap.map_or(&[][..], |bitmap| &bitmap.written);
                Ok(dirty(written, range, limit))
            }
        }
    }
}

/// Whether a client's query means a context of that name: what ends with a colon is all in it.
pub fn means(query: &[u8], name: &str, listing: bool) -> bool {
    let all = listing && query.ends_with(b":") && name.as_bytes().starts_with(query);
    all || query == name.as_bytes()
}

fn allocation(
    device: &dyn BlockDevice,
    range: Range<u64>,
    limit: usize,
) -> Result<Vec<(u32, u32)>> {
    let found = device.extents(range.start, range.end - range.start, limit)?;
    let flags = |status| match status {
        BlockStatus::Data => 0,
        BlockStatus::Zero => wire::STATE_HOLE | wire::STATE_ZERO,
    };
    // They lie in the range that was asked for, which has less than 4 GiB.
    Ok(found.iter().map(|extent| (extent.len as u32, flags(extent.status))).collect())
}

fn depths(depth: &Depth, range: Range<u64>, limit: usize) -> Result<Vec<(u32, u32)>> {
    let mut found: Vec<(u32, u32)> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let (len, value) = depth(at, range.end - at)?;
        let len = len.clamp(1, range.end - at);
        let full = found.len() == limit;
        match found.last_mut() {
            Some((before, same)) if *same == value => *before += len as u32,
            _ if full => break,
            _ => found.push((len as u32, value)),
        }
        at += len;
    }
    Ok(found)
}

fn dirty(written: &[Range<u64>], range: Range<u64>, limit: usize) -> Vec<(u32, u32)> {
    let mut found = Vec::new();
    let mut at = range.start;
    let first = written.partition_point(|part| part.end <= at);
    let mut parts = written.get(first..).unwrap_or_default().iter();
    while at < range.end && found.len() < limit {
        let part = parts.next().map_or(range.end..range.end, Clone::clone);
        let (start, end) = (part.start.clamp(at, range.end), part.end.min(range.end));
        if start > at {
            found.push(((start - at) as u32, 0));
        }
        if end > start && found.len() < limit {
            found.push(((end - start) as u32, DIRTY));
        }
        at = end.max(start);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_is_stretches_in_turn() {
        let written = [10..20, 30..40, 40..50, 90..200];
        let told = |range, limit| dirty(&written, range, limit);
        assert_eq!(
            told(0..100, 99),
            [(10, 0), (10, 1), (10, 0), (10, 1), (10, 1), (40, 0), (10, 1)]
        );
        assert_eq!(told(15..16, 99), [(1, 1)]);
        assert_eq!(told(20..30, 99), [(10, 0)]);
        assert_eq!(told(0..100, 2), [(10, 0), (10, 1)]);
        assert_eq!(told(0..100, 1), [(10, 0)]);
        assert_eq!(told(300..400, 99), [(100, 0)]);
    }

    #[test]
    fn layers_of_one_depth_are_one_stretch() {
        let depth: Depth = Arc::new(|at, len| Ok((len.min(10 - at % 10), (at / 20) as u32)));
        assert_eq!(depths(&depth, 5..60, 9).unwrap(), [(15, 0), (20, 1), (20, 2)]);
        assert_eq!(depths(&depth, 5..60, 1).unwrap(), [(15, 0)]);
    }
}
