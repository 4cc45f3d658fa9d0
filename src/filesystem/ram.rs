//! A disk in memory for this room's tests.

use std::io::{IoSlice, IoSliceMut};

use crate::block::{BlockDevice, BlockExtent, BlockStatus, check_range, total_mut};
use crate::error::{Error, ErrorKind, Result};

/// A read-only disk; runs of 4096 zero bytes count as nothing stored.
pub struct Ram(pub Vec<u8>);

impl BlockDevice for Ram {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn block_size(&self) -> u32 {
        512
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        check_range(offset, total_mut(bufs), self.size())?;
        let mut at = offset as usize;
        for buf in bufs {
            let end = at + buf.len();
            buf.copy_from_slice(&self.0[at..end]);
            at = end;
        }
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[IoSlice<'_>]) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "a disk for reading"))
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "a disk for reading"))
    }

    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "a disk for reading"))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, limit: usize) -> Result<Vec<BlockExtent>> {
        check_range(offset, len, self.size())?;
        let mut found = Vec::new();
        let mut at = offset;
        while at < offset + len && found.len() < limit {
            let next = ((at / 4096 + 1) * 4096).min(offset + len);
            let zero = self.0[at as usize..next as usize].iter().all(|b| *b == 0);
            let status = if zero { BlockStatus::Zero } else { BlockStatus::Data };
            found.push(BlockExtent { offset: at, len: next - at, status });
            at = next;
        }
        Ok(found)
    }
}
