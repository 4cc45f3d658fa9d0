//! A part of a file as a raw disk: from some offset on, and rounded up to whole sectors.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vdisk::block::{fill_zero, total, total_mut, window_mut};
use vdisk::storage::{Step, Storage};
use vdisk::{Error, Result};

use crate::qemu_img::fail::{Fail, Outcome, reason};

/// Disks consist of whole sectors; what a file lacks of its last one reads as zeroes.
const SECTOR: u64 = 512;

/// The bytes `offset..offset + len` of a storage, which may end earlier.
pub struct Window {
    inner: Arc<dyn Storage>,
    offset: u64,
    len: AtomicU64,
    /// What stands behind it is another's.
    fixed: bool,
    /// Data that reach the end of the file fill their last sector.
    sectors: bool,
}

impl Window {
    /// The window that begins at `offset`; to the end of `inner` where `len` is not given.
    ///
    /// # Errors
    /// In QEMU's words for a window that is not within `inner`, or not of whole sectors.
    pub fn new(inner: Arc<dyn Storage>, offset: u64, len: Option<u64>) -> Outcome<Window> {
        let all = inner.len().map_err(|e| Fail::new(reason(&e)))?;
        let all = all.checked_next_multiple_of(SECTOR).unwrap_or(all);
        if offset > all {
            return Err(Fail::new(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({all})"
            )));
        }
        let rest = all - offset;
        if let Some(len) = len.filter(|len| *len > rest) {
            return Err(Fail::new(format!(
                "The sum of offset ({offset}) and size ({len}) has to be smaller or equal to the  \
                 actual size of the containing file ({all})"
            )));
        }
        if len.is_some_and(|len| !len.is_multiple_of(SECTOR)) {
            return Err(Fail::new(format!("Specified size is not multiple of {SECTOR}")));
        }
        let end = AtomicU64::new(len.unwrap_or(rest.next_multiple_of(SECTOR)));
        Ok(Window { inner, offset, len: end, fixed: len.is_some(), sectors: false })
    }

    /// The same, as one sees it who reads whole sectors only.
    #[must_use]
    pub fn by_sectors(self, sectors: bool) -> Window {
        Window { sectors, ..self }
    }

    /// Fails where `len` bytes at `offset` would reach what is another's.
    fn check(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset.checked_add(len).ok_or_else(|| Error::invalid("past 64 bits"))?;
        if self.fixed && end > self.len.load(Ordering::Acquire) {
            let full = std::io::Error::from_raw_os_error(nix::libc::ENOSPC);
            return Err(Error::io("the part of the file that was given is full", full));
        }
        Ok(())
    }
}

fn cannot_resize() -> Error {
    Error::unsupported("Cannot resize fixed-size raw disks")
}

impl Storage for Window {
    fn len(&self) -> Result<u64> {
        Ok(self.len.load(Ordering::Acquire))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        if self.fixed {
            return if len > self.len()? { Err(cannot_resize()) } else { Ok(()) };
        }
        self.inner.set_len(self.offset + len)?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        self.fixed || self.inner.is_fixed()
    }

    fn resize(&self, len: u64) -> Result<()> {
        match self.fixed && len != self.len()? {
            true => Err(cannot_resize()),
            false if self.inner.is_fixed() => self.inner.resize(self.offset + len),
            false => self.set_len(len),
        }
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let inner = self.inner.len()?.saturating_sub(self.offset);
        let have = inner.min(self.len()?).saturating_sub(offset);
        if have >= total_mut(bufs) {
            return self.inner.read_at(self.offset + offset, bufs);
        }
        fill_zero(bufs);
        if have == 0 {
            return Ok(());
        }
        self.inner.read_at(self.offset + offset, &mut window_mut(bufs, 0, have))
    }

    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        let len = total(bufs);
        self.check(offset, len)?;
        self.inner.write_at(self.offset + offset, bufs)?;
        self.len.fetch_max(offset + len, Ordering::AcqRel);
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.check(offset, len)?;
        self.inner.punch_hole(self.offset + offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.check(offset, len)?;
        self.inner.write_zeroes(self.offset + offset, len)?;
        self.len.fetch_max(offset + len, Ordering::AcqRel);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }

    fn about_to(&self, step: Step) {
        self.inner.about_to(step);
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        let found = self.inner.next_data(self.offset + offset)?;
        let (len, whole) = (self.len()?, self.inner.len()?);
        let inside = |at: u64| at.saturating_sub(self.offset).min(len);
        let end = |at: u64| {
            let fills = self.sectors && at == whole;
            inside(if fills { at.next_multiple_of(SECTOR) } else { at })
        };
        Ok(found.map(|(a, b)| (inside(a), end(b))).filter(|(a, _)| *a < len))
    }

    fn allocated(&self) -> Result<u64> {
        self.inner.allocated()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vdisk::storage::MemoryStorage;

    #[test]
    fn the_last_sector_is_filled_up_with_zeroes() {
        let inner = Arc::new(MemoryStorage::default());
        inner.write_all_at(0, &[7; 700]).unwrap();
        let window = Window::new(inner.clone(), 100, None).unwrap();
        assert_eq!(window.len().unwrap(), 1024);
        let mut bytes = [1; 1024];
        window.read_exact_at(0, &mut bytes).unwrap();
        assert!(bytes[..600].iter().all(|b| *b == 7) && bytes[600..].iter().all(|b| *b == 0));
    }

    #[test]
    fn what_stands_behind_a_window_of_a_given_size_is_not_touched() {
        let inner = Arc::new(MemoryStorage::default());
        inner.write_all_at(0, &[7; 2048]).unwrap();
        let window = Window::new(inner.clone(), 512, Some(1024)).unwrap();
        assert!(window.write_all_at(1020, &[1; 5]).is_err() && window.set_len(2000).is_err());
        assert!(window.write_zeroes(0, 1025).is_err() && window.punch_hole(1024, 1).is_err());
        assert!(window.is_fixed() && window.renew(1000..1025).is_err());
        assert!(window.resize(512).is_err() && window.resize(1024).is_ok());
        window.set_len(512).unwrap();
        assert_eq!(window.len().unwrap(), 1024);
        window.write_all_at(1020, &[1; 4]).unwrap();
        assert!(inner.to_vec()[1536..].iter().all(|b| *b == 7));
        for (offset, len) in [(2049, None), (0, Some(2049)), (1025, Some(1024)), (0, Some(513))] {
            assert!(Window::new(inner.clone(), offset, len).is_err(), "{offset} {len:?}");
        }
    }
}
