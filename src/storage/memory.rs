//! Bytes in memory: for tests, and for throw-away disks.

use std::io::{IoSlice, IoSliceMut};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::Storage;
use crate::error::{Error, ErrorKind, Result};

/// A storage that forgets everything when it is dropped.
#[derive(Debug)]
pub struct MemoryStorage {
    bytes: RwLock<Vec<u8>>,
    /// How many there may be.
    most: usize,
}

impl Default for MemoryStorage {
    fn default() -> MemoryStorage {
        MemoryStorage::new(Vec::new())
    }
}

impl MemoryStorage {
    /// A storage that holds `bytes`.
    pub fn new(bytes: Vec<u8>) -> MemoryStorage {
        MemoryStorage::with_room(bytes, usize::MAX)
    }

    /// The same; it is full when it holds `most`.
    pub fn with_room(bytes: Vec<u8>, most: usize) -> MemoryStorage {
        MemoryStorage { bytes: RwLock::new(bytes), most }
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

/// Makes `bytes`, of which there may be `most`, reach to `end`: an error where there is no memory for them, as a full
/// disk gives one. What a damaged image asks to be written may lie anywhere.
fn reach(bytes: &mut Vec<u8>, end: usize, most: usize) -> Result<()> {
    if let Some(more) = end.checked_sub(bytes.len()) {
        let full = || Error::new(ErrorKind::NoSpace, "no memory for so many bytes");
        if end > most {
            return Err(full());
        }
        bytes.try_reserve(more).map_err(|_| full())?;
        bytes.resize(end, 0);
    }
    Ok(())
}

fn index(offset: u64) -> Result<usize> {
    usize::try_from(offset).map_err(|_| Error::invalid("past the address space").at_offset(offset))
}

impl Storage for MemoryStorage {
    fn len(&self) -> Result<u64> {
        Ok(self.read().len() as u64)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let len = index(len)?;
        let mut bytes = self.write();
        bytes.truncate(len);
        reach(&mut bytes, len, self.most)
    }

    fn is_fixed(&self) -> bool {
        false
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
            let end = index((at as u64).saturating_add(buf.len() as u64))?;
            reach(&mut bytes, end, self.most)?;
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
        reach(&mut bytes, end, self.most)?;
        bytes[index(offset)?..end].fill(0);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_memory_could_hold_is_an_error_and_changes_nothing() {
        let memory = MemoryStorage::new(vec![7; 3]);
        for far in [1 << 62, u64::MAX - 8] {
            for result in [
                memory.write_at(far, &[IoSlice::new(&[1; 4])]),
                memory.write_zeroes(far, 4),
                memory.set_len(far),
            ] {
                assert_eq!(result.unwrap_err().kind(), ErrorKind::NoSpace, "at {far}");
            }
        }
        assert_eq!(memory.to_vec(), [7; 3]);
        let small = MemoryStorage::with_room(vec![7; 3], 4);
        assert!(small.write_at(3, &[IoSlice::new(&[8])]).is_ok());
        assert_eq!(small.set_len(5).unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!(small.to_vec(), [7, 7, 7, 8]);
    }
}
