//! A file as it will be once its log is replayed: the file itself is never written.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

use crate::block;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;

/// Bytes of an update: the unit in which the log changes the file.
pub(super) const UPDATE: u64 = 4096;

/// A storage under updates that are kept in memory. It refuses every write.
pub(super) struct Overlay {
    below: Arc<dyn Storage>,
    /// The length of the file below.
    held: u64,
    len: u64,
    /// By file offset, none overlapping another.
    updates: BTreeMap<u64, Update>,
}

#[derive(Clone)]
struct Update {
    len: u64,
    /// `None` for zeroes.
    bytes: Option<Arc<[u8]>>,
}

impl Overlay {
    /// Nothing updated yet.
    pub(super) fn new(below: Arc<dyn Storage>) -> Result<Overlay> {
        let held = below.len()?;
        Ok(Overlay { below, held, len: held, updates: BTreeMap::new() })
    }

    /// The file has at least `len` bytes.
    pub(super) fn extend(&mut self, len: u64) {
        self.len = self.len.max(len);
    }

    /// Puts an update of [`UPDATE`] bytes at `at`.
    pub(super) fn put(&mut self, at: u64, bytes: Arc<[u8]>) -> Result<()> {
        let len = bytes.len() as u64;
        self.insert(at, Update { len, bytes: Some(bytes) })
    }

    /// Makes `len` bytes at `at` zeroes.
    pub(super) fn zero(&mut self, at: u64, len: u64) -> Result<()> {
        if len == 0 { Ok(()) } else { self.insert(at, Update { len, bytes: None }) }
    }

    fn insert(&mut self, at: u64, update: Update) -> Result<()> {
        let end = at.checked_add(update.len).filter(|&end| i64::try_from(end).is_ok());
        let end = end.ok_or_else(|| Error::corrupt("an update past 63 bits").at_offset(at))?;
        // Whatever it covers goes; of an update that begins before or ends after, the rest stays.
        let first = self.updates.range(..at).next_back().map_or(at, |(&start, _)| start);
        let covered: Vec<u64> = self.updates.range(first..end).map(|(&start, _)| start).collect();
        for start in covered {
            let Some(old) = self.updates.remove(&start) else { continue };
            if start < at {
                let left = old.part(0, old.len.min(at - start));
                self.updates.insert(start, left);
            }
            if start + old.len > end {
                let right = old.part(end.max(start) - start, old.len);
                self.updates.insert(end.max(start), right);
            }
        }
        self.updates.insert(at, update);
        self.extend(end);
        Ok(())
    }

    /// Fills `buf`, which lies within the length, from the file below; zeroes past its end.
    fn read_below(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let held = self.held.saturating_sub(at).min(buf.len() as u64) as usize;
        let (held, past) = buf.split_at_mut(held);
        past.fill(0);
        if held.is_empty() { Ok(()) } else { self.below.read_exact_at(at, held) }
    }

    fn read_one(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read_below(offset, buf)?;
        let end = offset + buf.len() as u64;
        let first = self.updates.range(..offset).next_back().map_or(offset, |(&start, _)| start);
        for (&start, update) in self.updates.range(first..end) {
            let (from, to) = (start.max(offset), (start + update.len).min(end));
            if from >= to {
                continue;
            }
            let Some(target) = buf.get_mut((from - offset) as usize..(to - offset) as usize) else {
                continue;
            };
            match &update.bytes {
                None => target.fill(0),
                Some(bytes) => {
                    if let Some(b) = bytes.get((from - start) as usize..(to - start) as usize) {
                        target.copy_from_slice(b);
                    }
                }
            }
        }
        Ok(())
    }

    fn touches(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len);
        end > self.held
            || self
                .updates
                .range(..end)
                .next_back()
                .is_some_and(|(&start, update)| start + update.len > offset)
    }
}

impl Update {
    /// The update's bytes `from..to`.
    fn part(&self, from: u64, to: u64) -> Update {
        let bytes = self.bytes.as_ref();
        let bytes = bytes.map(|b| b.get(from as usize..to as usize).unwrap_or_default().into());
        Update { len: to - from, bytes }
    }
}

impl Storage for Overlay {
    fn len(&self) -> Result<u64> {
        Ok(self.len)
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let len = block::total_mut(bufs);
        block::check_range(offset, len, self.len)?;
        if !self.touches(offset, len) {
            return self.below.read_at(offset, bufs);
        }
        let mut at = offset;
        for buf in bufs {
            self.read_one(at, buf)?;
            at += buf.len() as u64;
        }
        Ok(())
    }

    fn set_len(&self, _: u64) -> Result<()> {
        Err(read_only())
    }

    fn is_fixed(&self) -> bool {
        true
    }

    fn write_at(&self, _: u64, _: &[IoSlice<'_>]) -> Result<()> {
        Err(read_only())
    }

    fn punch_hole(&self, _: u64, _: u64) -> Result<()> {
        Err(read_only())
    }

    fn write_zeroes(&self, _: u64, _: u64) -> Result<()> {
        Err(read_only())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn allocated(&self) -> Result<u64> {
        self.below.allocated()
    }
}

fn read_only() -> Error {
    Error::new(ErrorKind::ReadOnly, "the image is open for reading only")
}
