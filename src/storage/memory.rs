//! Bytes in memory: for tests, and for throw-away disks.

use std::io::{IoSlice, IoSliceMut};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::Storage;
use crate::error::{Error, Result};

/// A storage that forgets everything when it is dropped.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    bytes: RwLock<Vec<u8>>,
}

impl MemoryStorage {
    /// A storage that holds `bytes`.
    pub fn new(bytes: Vec<u8>) -> MemoryStorage {
        MemoryStorage { bytes: RwLock::new(bytes) }
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        self.read().clone()
    }

    // A writer that panicked left whole bytes behind, so a poisoned lock still guards valid data.
    fn read(&self) -> RwLockReadGuard<'_, Vec<u8>> {
        self.bytes.read().unwrap_or_else(|e| e.into_inner())
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<u8>> {
        self.bytes.write().unwrap_or_else(|e| e.into_inner())
    }
}

fn index(offset: u64) -> Result<usize> {
    usize::try_from(offset).map_err(|_| Error::invalid("past the address space").at_offset(offset))
}

impl Storage for MemoryStorage {
    fn len(&self) -> Result<u64> {
        Ok(self.read().len() as u64)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.write().resize(index(len)?, 0);
        Ok(())
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let bytes = self.read();
        let mut at = index(offset)?;
        for buf in bufs {
            let from = bytes.get(at..at.saturating_add(buf.len()));
            let from =
                from.ok_or_else(|| Error::corrupt("a read past the end").at_offset(at as u64))?;
            buf.copy_from_slice(from);
            at += buf.len();
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        let mut bytes = self.write();
        let mut at = index(offset)?;
        for buf in bufs {
            let end = index(at as u64 + buf.len() as u64)?;
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[at..end].copy_from_slice(buf);
            at = end;
        }
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        let mut bytes = self.write();
        let end = index(offset.saturating_add(len))?.min(bytes.len());
        if let Some(range) = bytes.get_mut(index(offset)?..end) {
            range.fill(0);
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let end = index(offset.saturating_add(len))?;
        let mut bytes = self.write();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[index(offset)?..end].fill(0);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}
