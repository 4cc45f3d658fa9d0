//! A part of a file as a raw disk: from some offset on, and rounded up to whole sectors.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vdisk::Result;
use vdisk::block::{fill_zero, total_mut, window_mut};
use vdisk::storage::Storage;

/// Disks consist of whole sectors; what a file lacks of its last one reads as zeroes.
const SECTOR: u64 = 512;

/// The bytes `offset..offset + len` of a storage, which may end earlier.
pub struct Window {
    inner: Arc<dyn Storage>,
    offset: u64,
    len: AtomicU64,
    /// Data that reach the end of the file fill their last sector.
    sectors: bool,
}

impl Window {
    /// The window that begins at `offset`; to the end of `inner` where `len` is not given.
    pub fn new(inner: Arc<dyn Storage>, offset: u64, len: Option<u64>) -> Result<Window> {
        let whole = inner.len()?.saturating_sub(offset);
        let len = len.unwrap_or(whole.next_multiple_of(SECTOR));
        Ok(Window { inner, offset, len: AtomicU64::new(len), sectors: false })
    }

    /// The same, as one sees it who reads whole sectors only.
    #[must_use]
    pub fn by_sectors(self, sectors: bool) -> Window {
        Window { sectors, ..self }
    }
}

impl Storage for Window {
    fn len(&self) -> Result<u64> {
        Ok(self.len.load(Ordering::Acquire))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(self.offset + len)?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let have = self.inner.len()?.saturating_sub(self.offset + offset);
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
        self.inner.write_at(self.offset + offset, bufs)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.punch_hole(self.offset + offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.write_zeroes(self.offset + offset, len)
    }

    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }

    fn about_to(&self, step: &'static str) {
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
}
