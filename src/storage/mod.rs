//! Bytes that last: one file, or something that stands in for one.
//!
//! This room knows no image format, no guest and no chain.

mod attributes;
pub mod device;
#[cfg(any(feature = "control", feature = "serve"))]
pub mod directory;
pub mod draft;
mod file;
pub mod fsfreeze;
#[cfg(feature = "virtio")]
mod guest_memory;
mod lock;
#[cfg(feature = "mount")]
pub mod loopdev;
mod maker;
mod memory;
pub mod name;
mod share;
mod step;
mod unfinished;
mod unsynced;

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;

use crate::error::{Error, Result};

pub use attributes::{other_names, refuse_fixed};
pub use draft::Draft;
pub use file::{FileOptions, FileStorage};
#[cfg(feature = "virtio")]
pub use guest_memory::{io_slices, io_slices_mut};
pub use lock::{Access, Holder, Manners, Turn, holders, note_holders, set_manners};
pub use maker::{FileMaker, Host, make_by};
pub use memory::MemoryStorage;
pub use name::follow;
pub use share::shares_space;
pub use step::Step;
pub use unfinished::Unfinished;
pub use unsynced::unsynced;

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

    /// Cuts or extends to `len` bytes; new bytes read as zeroes. One that [is
    /// fixed](Storage::is_fixed) keeps what lies behind, and fails where it is shorter.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Whether it keeps its length, and so whatever was stored there before: a block device, another
    /// program's export. Nothing there reads as zeroes only because nobody here has written it.
    fn is_fixed(&self) -> bool;

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

    /// Gives it exactly that length.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) where it is fixed and has another.
    fn resize(&self, len: u64) -> Result<()> {
        if self.is_fixed() && self.len()? != len {
            return Err(Error::unsupported("Cannot resize device files"));
        }
        self.set_len(len)
    }

    /// Makes `range` new: it is all there and reads as zeroes, whatever stood there, and nothing that
    /// lies behind it counts any more. Where that can be, the length ends with it.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`](crate::ErrorKind::NoSpace), and nothing done, where it is fixed and
    /// too short.
    fn renew(&self, range: Range<u64>) -> Result<()> {
        if self.is_fixed() {
            self.set_len(range.end)?;
            return self.write_zeroes(range.start, range.end.saturating_sub(range.start));
        }
        self.set_len(range.start)?;
        self.set_len(range.end)
    }

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

    /// Tells what its user is about to do. Nothing depends on it: a storage that fails on purpose may
    /// wait for it.
    fn about_to(&self, step: Step) {
        let _ = step;
    }

    /// The file that the bytes stand in, where it is one: the way to what only files can do, such as
    /// [sharing their space](FileStorage::share).
    fn as_file(&self) -> Option<&FileStorage> {
        None
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
