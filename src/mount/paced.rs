//! A disk that gives and takes a bounded number of bytes a second: for a user whose reading and
//! writing no control group counts, because a process of ours does it for him.
//!
//! Knows a [`BlockDevice`], and nothing of who uses it.

use std::io::{IoSlice, IoSliceMut};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::block::{BlockDevice, BlockExtent, total, total_mut};
use crate::error::Result;

/// How much may go at once after a pause.
const BURST: Duration = Duration::from_millis(100);

/// A disk with a bound on its bytes a second, reading and writing each.
pub struct Paced {
    disk: Arc<dyn BlockDevice>,
    reads: Pace,
    writes: Pace,
}

impl Paced {
    /// The disk with at most `rate` bytes a second, more than 0.
    pub fn new(disk: Arc<dyn BlockDevice>, rate: u64) -> Paced {
        Paced { disk, reads: Pace::new(rate), writes: Pace::new(rate) }
    }
}

/// When the next bytes may go.
struct Pace {
    rate: u64,
    next: Mutex<Instant>,
}

impl Pace {
    fn new(rate: u64) -> Pace {
        Pace { rate: rate.max(1), next: Mutex::new(Instant::now()) }
    }

    /// Waits until these bytes may go. Who asks first goes first.
    fn wait(&self, bytes: u64) {
        let takes = Duration::try_from_secs_f64(bytes as f64 / self.rate as f64);
        let takes = takes.unwrap_or(Duration::MAX);
        let begin = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let begin = now.checked_sub(BURST).map_or(*next, |early| (*next).max(early));
            *next = begin.checked_add(takes).unwrap_or(begin);
            *next
        };
        // To the end of what these bytes take: the first, too, come no faster.
        thread::sleep(begin.saturating_duration_since(Instant::now()));
    }
}

impl BlockDevice for Paced {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn block_size(&self) -> u32 {
        self.disk.block_size()
    }

    fn read_only(&self) -> bool {
        self.disk.read_only()
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.reads.wait(total_mut(bufs));
        self.disk.read_at(offset, bufs)
    }

    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.writes.wait(total(bufs));
        self.disk.write_at(offset, bufs)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        self.disk.write_zeroes(offset, len, may_unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.disk.discard(offset, len)
    }

    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }

    fn extents(&self, offset: u64, len: u64, limit: usize) -> Result<Vec<BlockExtent>> {
        self.disk.extents(offset, len, limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_their_time_and_a_pause_earns_little() {
        let pace = Pace::new(1 << 20);
        let begun = Instant::now();
        for _ in 0..4 {
            pace.wait(1 << 18);
        }
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(880), "{took:?}");
    }
}
