//! A flat guest disk: what a transport, a mount or a command reads and writes.
//!
//! Nothing here knows a file, a layer or an image format.

use std::io::{IoSlice, IoSliceMut};

use crate::error::{Error, Result};

/// What stands at a stretch of a flat disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockStatus {
    /// Bytes are stored somewhere in the chain.
    Data,
    /// Reads as zeroes, nothing is stored.
    Zero,
}

/// A stretch of a flat disk with one status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockExtent {
    /// First byte.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// What stands there.
    pub status: BlockStatus,
}

/// Whether all bytes are 0.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Wide steps without an early end vectorise; blocks bound what is looked at in vain, and most
    // data shows itself in its first bytes.
    let any = |bytes: &[u8]| bytes.iter().fold(0, |all, byte| all | byte) != 0;
    !any(&bytes[..bytes.len().min(64)]) && !bytes.chunks(4096).any(any)
}

/// A flat disk of [`size`](BlockDevice::size) bytes, for many threads at once.
///
/// Offsets and lengths are in bytes and need no alignment. Every call that reaches past the end
/// of the disk fails with [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) and does nothing.
/// Two calls that overlap in time and in range may take effect in either order; a byte that
/// neither of them writes keeps its value.
pub trait BlockDevice: Send + Sync {
    /// The size in bytes. It can grow while the device is open.
    fn size(&self) -> u64;

    /// The size in bytes that transports should announce as the optimal unit of a write: a power of
    /// two of at least 512.
    fn block_size(&self) -> u32;

    /// Whether every write fails.
    fn read_only(&self) -> bool;

    /// Fills `bufs` with the bytes from `offset`.
    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()>;

    /// Writes all of `bufs` at `offset`. Durable after [`flush`](BlockDevice::flush).
    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()>;

    /// Makes the range read as zeroes; gives the space back when `may_unmap` and it can.
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()>;

    /// Says that the range's contents no longer matter. Afterwards it reads as what it held or as
    /// zeroes, never as what a lower layer or another part of the disk holds.
    fn discard(&self, offset: u64, len: u64) -> Result<()>;

    /// Returns when every write that completed before the call is durable.
    fn flush(&self) -> Result<()>;

    /// The extents of a range in order, without gaps. At most `limit` of them: a caller goes on
    /// after the last one's end.
    fn extents(&self, offset: u64, len: u64, limit: usize) -> Result<Vec<BlockExtent>>;
}

/// Fails unless `offset..offset + len` lies within `size` bytes.
#[inline]
pub fn check_range(offset: u64, len: u64, size: u64) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(past_the_end(offset, len, size)),
    }
}

#[cold]
fn past_the_end(offset: u64, len: u64, size: u64) -> Error {
    Error::invalid(format!(
        "{len} bytes at offset {offset} reach past the end of the disk ({size} bytes)"
    ))
}

/// The total length in bytes of a vector to be written.
#[inline]
pub fn total(bufs: &[IoSlice<'_>]) -> u64 {
    // Asked several times for each request, most of which have one.
    if let [only] = bufs {
        return only.len() as u64;
    }
    bufs.iter().map(|b| b.len() as u64).sum()
}

/// The total length in bytes of a vector to be filled.
#[inline]
pub fn total_mut(bufs: &[IoSliceMut<'_>]) -> u64 {
    if let [only] = bufs {
        return only.len() as u64;
    }
    bufs.iter().map(|b| b.len() as u64).sum()
}

/// The `len` bytes of `bufs` that follow the first `skip`; shorter where `bufs` end.
pub fn window<'a>(bufs: &'a [IoSlice<'_>], skip: u64, len: u64) -> Vec<IoSlice<'a>> {
    let mut cut = Cut { skip, len };
    bufs.iter().filter_map(|b| Some(IoSlice::new(&b[cut.next(b.len())?]))).collect()
}

/// The `len` bytes of `bufs` that follow the first `skip`; shorter where `bufs` end.
pub fn window_mut<'a>(bufs: &'a mut [IoSliceMut<'_>], skip: u64, len: u64) -> Vec<IoSliceMut<'a>> {
    let mut cut = Cut { skip, len };
    bufs.iter_mut().filter_map(|b| cut.next(b.len()).map(|r| IoSliceMut::new(&mut b[r]))).collect()
}

/// Calls `fill` with the `len` bytes of `bufs` that follow the first `skip`.
pub fn with_window<T>(
    bufs: &mut [IoSliceMut<'_>],
    skip: u64,
    len: u64,
    fill: impl FnOnce(&mut [IoSliceMut<'_>]) -> T,
) -> T {
    if skip == 0 && total_mut(bufs) == len {
        return fill(bufs);
    }
    fill(&mut window_mut(bufs, skip, len))
}

/// Fills all of `bufs` with zeroes.
pub fn fill_zero(bufs: &mut [IoSliceMut<'_>]) {
    for buf in bufs {
        buf.fill(0);
    }
}

/// Walks over a vector's buffers and yields the part of each that lies in a window.
struct Cut {
    skip: u64,
    len: u64,
}

impl Cut {
    fn next(&mut self, buf: usize) -> Option<std::ops::Range<usize>> {
        let start = self.skip.min(buf as u64);
        self.skip -= start;
        let take = (buf as u64 - start).min(self.len);
        self.len -= take;
        (take > 0).then(|| start as usize..(start + take) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_cuts_across_buffers() {
        let (a, b, c) = ([1u8, 2, 3], [4u8], [5u8, 6]);
        let bufs = [IoSlice::new(&a), IoSlice::new(&b), IoSlice::new(&c)];
        let got: Vec<u8> = window(&bufs, 2, 3).iter().flat_map(|s| s.to_vec()).collect();
        assert_eq!(got, [3, 4, 5]);
        assert!(window(&bufs, 6, 3).is_empty());
    }

    #[test]
    fn a_range_past_the_end_is_refused() {
        assert!(check_range(10, 0, 10).is_ok());
        assert!(check_range(10, 1, 10).is_err());
        assert!(check_range(u64::MAX, 2, 10).is_err());
    }
}
