//! Raw: the file's bytes are the guest's.
//!
//! Disks consist of whole sectors: what a file lacks of its last one reads as zeroes, and is there
//! once it is written.

use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::addr::{GuestOffset, HostOffset, Unit};
use crate::block::{fill_zero, total, total_mut, window_mut};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{self, Extent, Mapping};
use crate::storage::{Step, Storage};

/// What a disk consists of.
const SECTOR: Unit = Unit::from_bits(9);

/// A raw image.
pub struct Image {
    storage: Arc<dyn Storage>,
    size: AtomicU64,
    /// Where the file ends: at the disk's end, or inside its last sector.
    end: AtomicU64,
    read_only: bool,
    guard: Option<Guard>,
}

/// Refuses that a disk's first bytes become others.
type Judge = fn(Change<'_>) -> Result<()>;

/// What a disk begins with, and would begin with.
pub struct Change<'a> {
    /// Its first bytes now.
    pub before: &'a [u8],
    /// Its first bytes then.
    pub after: &'a [u8],
    /// Its length then, in bytes.
    pub len: u64,
}

/// What keeps the disk's first bytes from becoming what they must not be, in one write or in many.
struct Guard {
    /// How many bytes at the disk's begin it looks at.
    head: usize,
    judge: Judge,
    /// Held while the first bytes are changed: each change is judged by what is there.
    turn: Mutex<()>,
}

impl Image {
    /// Opens all of `storage` as a disk.
    pub fn open(storage: Arc<dyn Storage>, read_only: bool) -> Result<Image> {
        let end = storage.len()?;
        let size = end.checked_next_multiple_of(SECTOR.bytes()).unwrap_or(end);
        Ok(Image { storage, size: size.into(), end: end.into(), read_only, guard: None })
    }

    /// The same, making only such changes to the first `head` bytes and to the length as `judge` allows.
    pub fn guarded(self, head: usize, judge: Judge) -> Image {
        Image { guard: Some(Guard { head, judge, turn: Mutex::default() }), ..self }
    }

    /// Makes sure that the disk may have `change` done to its first bytes, which begins at `at`.
    /// The change is made while what is returned is held.
    fn judged(
        &self,
        at: u64,
        change: impl FnOnce(&mut [u8]),
    ) -> Result<Option<MutexGuard<'_, ()>>> {
        let Some(guard) = self.guard.as_ref().filter(|guard| at < guard.head as u64) else {
            return Ok(None);
        };
        let turn = guard.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // A file may be shorter than the disk in it, until that is written.
        let there = self.storage.len()?;
        let len = there.max(image::Image::size(self));
        let mut before = vec![0; len.min(guard.head as u64) as usize];
        let there = before.len().min(usize::try_from(there).unwrap_or(usize::MAX));
        self.storage.read_exact_at(0, &mut before[..there])?;
        let mut after = before.clone();
        if let Some(from) = after.get_mut(at as usize..) {
            change(from);
        }
        (guard.judge)(Change { before: &before, after: &after, len })?;
        Ok(Some(turn))
    }

    fn judge_zeroes(&self, at: u64, len: u64) -> Result<Option<MutexGuard<'_, ()>>> {
        self.judged(at, |head| {
            let end = head.len().min(usize::try_from(len).unwrap_or(usize::MAX));
            head[..end].fill(0);
        })
    }

    fn judge_size(&self, size: u64) -> Result<Option<MutexGuard<'_, ()>>> {
        let Some(guard) = &self.guard else { return Ok(None) };
        let turn = guard.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let head = guard.head as u64;
        let mut before = vec![0; self.storage.len()?.min(head) as usize];
        self.storage.read_exact_at(0, &mut before)?;
        let mut after = before.clone();
        after.resize(size.min(head) as usize, 0);
        (guard.judge)(Change { before: &before, after: &after, len: size })?;
        Ok(Some(turn))
    }

    fn check_writable(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the image is open for reading only"));
        }
        Ok(())
    }
}

impl image::Image for Image {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Raw files have no clusters; this is the unit in which others account for them.
    fn cluster(&self) -> Unit {
        Unit::from_bits(16)
    }

    fn block_size(&self) -> Option<u64> {
        None
    }

    fn granularity(&self) -> Unit {
        Unit::from_bits(0)
    }

    fn starts_zeroed(&self) -> bool {
        // A new file holds nothing; other new places go on holding what they held.
        !self.storage.is_fixed()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        let mapping = Mapping::Data { host: HostOffset(at.0), exclusive: !self.read_only };
        Ok(Extent { start: at, len: len.min(self.size().saturating_sub(at.0)), mapping })
    }

    fn narrow(&self, extent: Extent) -> Result<Extent> {
        let (start, end) = (extent.start.0, extent.start.0 + extent.len);
        let zero = |to: u64| Extent {
            start: extent.start,
            len: to.min(end) - start,
            mapping: Mapping::Zero { host: Some(HostOffset(start)) },
        };
        Ok(match self.storage.next_data(start)? {
            None => zero(end),
            Some((data, _)) if data > start => zero(data),
            // Data that reach the end of the file fill their last sector.
            Some((_, hole)) => {
                let held = hole == self.end.load(Ordering::Acquire);
                let hole = if held { SECTOR.ceil(hole) } else { hole };
                Extent { len: hole.clamp(start + 1, end) - start, ..extent }
            }
        })
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let _ = extent;
        self.storage.about_to(Step::ReadData);
        let held = self.end.load(Ordering::Acquire).saturating_sub(at.0);
        if held >= total_mut(bufs) {
            return self.storage.read_at(at.0, bufs);
        }
        fill_zero(bufs);
        if held == 0 { Ok(()) } else { self.storage.read_at(at.0, &mut window_mut(bufs, 0, held)) }
    }

    fn overwrite(&self, extent: &Extent, at: GuestOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        let _ = extent;
        self.check_writable()?;
        let _turn = self.judged(at.0, |head| put(head, bufs))?;
        self.storage.about_to(Step::WriteData);
        self.storage.write_at(at.0, bufs)?;
        self.end.fetch_max(at.0.saturating_add(total(bufs)), Ordering::AcqRel);
        Ok(())
    }

    fn zero(&self, at: GuestOffset, len: u64, unmap: bool) -> Result<()> {
        self.check_writable()?;
        let _turn = self.judge_zeroes(at.0, len)?;
        if unmap {
            self.storage.punch_hole(at.0, len)
        } else {
            self.storage.write_zeroes(at.0, len)?;
            self.end.fetch_max(at.0.saturating_add(len), Ordering::AcqRel);
            Ok(())
        }
    }

    fn discard(&self, at: GuestOffset, len: u64, _expose: bool) -> Result<()> {
        self.check_writable()?;
        let _turn = self.judge_zeroes(at.0, len)?;
        self.storage.punch_hole(at.0, len)
    }

    fn flush(&self) -> Result<()> {
        if self.read_only { Ok(()) } else { self.storage.sync() }
    }

    fn resize_over(&self, size: u64, _clear: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.check_writable()?;
        let _turn = self.judge_size(size)?;
        self.storage.resize(size)?;
        self.end.store(size, Ordering::Release);
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}

/// Copies what `bufs` hold to the front of `into`, as far as it goes.
fn put(into: &mut [u8], bufs: &[IoSlice<'_>]) {
    let mut left = into;
    for buf in bufs {
        let n = buf.len().min(left.len());
        let (front, rest) = left.split_at_mut(n);
        front.copy_from_slice(&buf[..n]);
        left = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Image as _;
    use crate::storage::MemoryStorage;

    #[test]
    fn the_last_sector_of_a_file_is_a_whole_one() {
        let storage = Arc::new(MemoryStorage::new(vec![7; 1000]));
        let image = Image::open(storage.clone(), false).unwrap();
        assert_eq!(image.size(), 1024);
        let all = image.map(GuestOffset(0), 1024).unwrap();
        assert_eq!(image.narrow(all).unwrap().len, 1024);
        let mut bytes = [1; 1024];
        image.read(&all, GuestOffset(0), &mut [IoSliceMut::new(&mut bytes)]).unwrap();
        assert!(bytes[..1000] == [7; 1000] && bytes[1000..] == [0; 24]);
        assert_eq!(storage.len().unwrap(), 1000, "nothing was written");
        image.overwrite(&all, GuestOffset(1010), &[IoSlice::new(&[9; 5])]).unwrap();
        image.read(&all, GuestOffset(0), &mut [IoSliceMut::new(&mut bytes)]).unwrap();
        assert!(bytes[1000..1010] == [0; 10] && bytes[1010..1015] == [9; 5]);
        assert!(bytes[1015..] == [0; 9]);
    }
}
