//! The bytes of a file that nobody will look for after a crash.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

use super::{FileStorage, Step, Storage};
use crate::error::Result;

/// The bytes of a file that nobody will look for after a crash: syncing them does nothing.
///
/// The order in which a program that reads the file sees the writes stays.
pub fn unsynced(file: Arc<dyn Storage>) -> Arc<dyn Storage> {
    Arc::new(Unsynced(file))
}

struct Unsynced(Arc<dyn Storage>);

impl Storage for Unsynced {
    fn len(&self) -> Result<u64> {
        self.0.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.0.set_len(len)
    }

    fn is_fixed(&self) -> bool {
        self.0.is_fixed()
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.0.read_at(offset, bufs)
    }

    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.0.write_at(offset, bufs)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.0.punch_hole(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.0.write_zeroes(offset, len)
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        self.0.next_data(offset)
    }

    fn allocated(&self) -> Result<u64> {
        self.0.allocated()
    }

    fn about_to(&self, step: Step) {
        self.0.about_to(step);
    }

    fn as_file(&self) -> Option<&FileStorage> {
        self.0.as_file()
    }
}
