//! Bytes that last: one file, or something that stands in for one.
//!
//! This room knows no image format, no guest and no chain.

pub mod draft;
mod file;
pub mod freeze;
mod lend;
mod lock;
pub mod loopdev;
mod memory;
mod share;

use std::io::{IoSlice, IoSliceMut};

use crate::error::Result;

pub use draft::Draft;
pub use file::{FileOptions, FileStorage};
pub use lend::{lend, lend_mut};
pub use lock::{Access, Holder, holders};
pub use memory::MemoryStorage;
pub use share::shares_space;

/// A growable array of bytes, for many threads at once.
///
/// Offsets and lengths are in bytes. Nothing is durable until [`sync`](Storage::sync) returns,
/// and until then writes may reach the medium in any order.
pub trait Storage: Send + Sync {
    /// The length in bytes.
    fn len(&self) -> Result<u64>;

    /// Whether the length is 0.
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Cuts or extends to `len` bytes; new bytes read as zeroes.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Fills all of `bufs`, or fails. A range that ends past [`len`](Storage::len) is an error.
    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()>;

    /// Writes all of `bufs`, or fails; extends the length where the range ends past it.
    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()>;

    /// Makes the range read as zeroes and gives its space back where the host can.
    /// The length does not change.
    fn punch_hole(&self, offset: u64, len: u64) -> Result<()>;

    /// Makes the range read as zeroes, keeping or reserving its space where the host can.
    /// Extends the length where the range ends past it.
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()>;

    /// Returns when every write, length change and hole that completed before is durable.
    /// It is the one barrier.
    fn sync(&self) -> Result<()>;

    /// Where the stretch of stored data at or after `offset` begins and ends; `None` when only
    /// holes follow. A storage that cannot tell holes answers with everything up to its length.
    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        let len = self.len()?;
        Ok((offset < len).then_some((offset, len)))
    }

    /// How many bytes of the host it takes, holes left out.
    fn allocated(&self) -> Result<u64> {
        self.len()
    }

    /// Tells what its user is about to do, in the user's own words. Nothing depends on it: a storage
    /// that fails on purpose may wait for it.
    fn about_to(&self, step: &'static str) {
        let _ = step;
    }

    /// The file that the bytes stand in, where it is one.
    fn as_file(&self) -> Option<&FileStorage> {
        None
    }

    /// Makes `len` bytes at `offset` refer to the same space of the host as those at `from_offset`
    /// of `from`: what is written to one later is not seen in the other. Extends the length as
    /// [`write_at`](Storage::write_at). `false`, and nothing done, where the host cannot.
    fn share(&self, offset: u64, from: &dyn Storage, from_offset: u64, len: u64) -> Result<bool> {
        let _ = (offset, from, from_offset, len);
        Ok(false)
    }

    /// Fills one buffer; see [`Storage::read_at`].
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read_at(offset, &mut [IoSliceMut::new(buf)])
    }

    /// Writes one buffer; see [`Storage::write_at`].
    fn write_all_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.write_at(offset, &[IoSlice::new(buf)])
    }
}
