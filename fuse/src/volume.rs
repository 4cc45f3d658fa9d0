//! A flat disk as the file system sees it. Knows neither FUSE nor what stands behind the bytes.

use std::io;

/// A flat disk of [`size`](Volume::size) bytes, for many threads at once.
///
/// Offsets and lengths are in bytes and need no alignment; the file system never passes a range
/// that reaches past the size it was told. An error's [`raw_os_error`](io::Error::raw_os_error)
/// reaches the program that made the system call; an error without one is `EIO`.
pub trait Volume: Send + Sync {
    /// The size in bytes. It may grow, never shrink.
    fn size(&self) -> u64;

    /// The preferred unit of a write in bytes: a power of two of at least 512.
    fn block_size(&self) -> u32;

    /// Whether every write fails.
    fn read_only(&self) -> bool;

    /// Fills `buf` with the bytes from `offset`.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes all of `buf` at `offset`. Durable after [`flush`](Volume::flush).
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()>;

    /// Makes the range read as zeroes; gives its space back when `may_unmap` and it can.
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;

    /// Returns when every write that completed before the call is durable.
    fn flush(&self) -> io::Result<()>;

    /// A file on the volume was opened; reads and writes come between this and the matching
    /// [`closed`](Volume::closed). After an error there is no such file.
    fn opened(&self) -> io::Result<()> {
        Ok(())
    }

    /// A file on the volume was closed for good.
    fn closed(&self) {}

    /// The start and end of the first stretch of stored data that ends after `offset`, its start
    /// not before `offset`; `None` when only zeroes follow. May be cautious and call zeroes data.
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let size = self.size();
        Ok((offset < size).then_some((offset, size)))
    }
}
