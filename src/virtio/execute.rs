//! Carries out parsed requests on a disk (virtio 1.2, 5.2.6.2).
//!
//! It knows no descriptor and no transport. Positions and ranges come from a guest and are checked
//! against the disk here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::config::{Id, MAX_SECTORS, has};
use super::request::{Buffers, Command, Extent, Refusal, Request, SECTOR};
use crate::block::{BlockDevice, check_range};
use crate::error::{Error, ErrorKind};
use crate::storage::{io_slices, io_slices_mut};

/// Serves requests on one disk with the features that one driver accepted. Many threads may use
/// their own clone at once.
#[derive(Clone)]
pub struct Executor {
    disk: Arc<dyn BlockDevice>,
    id: Id,
    features: u64,
    writeback: Arc<AtomicBool>,
}

impl Executor {
    /// An executor for a driver that accepted `features`, and says by `writeback` whether it flushes
    /// what it writes.
    pub fn new(
        disk: Arc<dyn BlockDevice>,
        id: Id,
        features: u64,
        writeback: Arc<AtomicBool>,
    ) -> Executor {
        Executor { disk, id, features, writeback }
    }

    /// Carries a request out and writes its status byte.
    ///
    /// Returns how many bytes from the start of the request's writable part hold an answer: the
    /// length that goes into the used ring (virtio 2.7.8.2).
    pub fn answer(&self, request: Request<'_>) -> u32 {
        let Request { command, status, room } = request;
        let done = command.and_then(|command| self.execute(command));
        let byte = match done {
            Ok(_) => VIRTIO_BLK_S_OK,
            Err(Refusal::Io) => VIRTIO_BLK_S_IOERR,
            Err(Refusal::Unsupported) => VIRTIO_BLK_S_UNSUPP,
        };
        status.copy_from(&[byte as u8]);
        let filled = done.unwrap_or(0);
        // The status byte counts only when all before it has been written.
        let used = if filled == room { room + 1 } else { filled };
        u32::try_from(used).unwrap_or(u32::MAX)
    }

    /// Returns how many bytes were given to the guest.
    fn execute(&self, command: Command<'_>) -> Result<u64, Refusal> {
        match command {
            Command::Read { sector, into } => self.read(sector, &into),
            Command::Write { sector, from } => self.write(sector, &from),
            Command::Flush => self.disk.flush().map(|()| 0).map_err(refusal),
            Command::Discard(ranges) => self.discard(&ranges),
            Command::WriteZeroes(ranges) => self.write_zeroes(&ranges),
            Command::GetId(into) => Ok(into.copy_from(self.id.bytes()) as u64),
        }
    }

    fn read(&self, sector: u64, into: &Buffers<'_>) -> Result<u64, Refusal> {
        let offset = self.locate(sector, into.len())?;
        let mut bufs = io_slices_mut(into.slices()).ok_or(Refusal::Io)?;
        self.disk.read_at(offset, &mut bufs).map_err(refusal)?;
        Ok(into.len())
    }

    fn write(&self, sector: u64, from: &Buffers<'_>) -> Result<u64, Refusal> {
        self.writable()?;
        let offset = self.locate(sector, from.len())?;
        self.disk.write_at(offset, &io_slices(from.slices())).map_err(refusal)?;
        self.settle()
    }

    fn discard(&self, ranges: &[Extent]) -> Result<u64, Refusal> {
        self.offered(VIRTIO_BLK_F_DISCARD)?;
        self.writable()?;
        // `unmap` too is refused here: it belongs to write zeroes (virtio 5.2.6.2).
        for (offset, len) in self.located(ranges, 0)? {
            self.disk.discard(offset, len).map_err(refusal)?;
        }
        self.settle()
    }

    fn write_zeroes(&self, ranges: &[Extent]) -> Result<u64, Refusal> {
        self.offered(VIRTIO_BLK_F_WRITE_ZEROES)?;
        self.writable()?;
        let located = self.located(ranges, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)?;
        for (range, (offset, len)) in ranges.iter().zip(located) {
            let unmap = range.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            self.disk.write_zeroes(offset, len, unmap).map_err(refusal)?;
        }
        self.settle()
    }

    /// A driver that knows no flush, or has turned the cache to write through, expects each write to be
    /// durable when it completes (virtio 5.2.6.2).
    fn settle(&self) -> Result<u64, Refusal> {
        if !has(self.features, VIRTIO_BLK_F_FLUSH) || !self.writeback.load(Ordering::Acquire) {
            self.disk.flush().map_err(refusal)?;
        }
        Ok(0)
    }

    fn offered(&self, bit: u32) -> Result<(), Refusal> {
        if has(self.features, bit) { Ok(()) } else { Err(Refusal::Unsupported) }
    }

    fn writable(&self) -> Result<(), Refusal> {
        if self.disk.read_only() { Err(Refusal::Io) } else { Ok(()) }
    }

    /// Checks all ranges before any of them takes effect; byte offsets and lengths, empty ones
    /// included.
    fn located(&self, ranges: &[Extent], flags: u32) -> Result<Vec<(u64, u64)>, Refusal> {
        if ranges.iter().any(|range| range.flags & !flags != 0) {
            return Err(Refusal::Unsupported);
        }
        ranges
            .iter()
            .map(|range| {
                if range.sectors > MAX_SECTORS {
                    return Err(Refusal::Io);
                }
                let len = u64::from(range.sectors) * SECTOR;
                Ok((self.locate(range.sector, len)?, len))
            })
            .collect()
    }

    /// The byte offset of a sector, if the whole range lies within the disk's whole sectors.
    fn locate(&self, sector: u64, len: u64) -> Result<u64, Refusal> {
        let offset = sector.checked_mul(SECTOR).ok_or(Refusal::Io)?;
        let end = self.disk.size() / SECTOR * SECTOR;
        check_range(offset, len, end).map_err(refusal)?;
        Ok(offset)
    }
}

fn refusal(error: Error) -> Refusal {
    match error.kind() {
        ErrorKind::Unsupported => Refusal::Unsupported,
        _ => Refusal::Io,
    }
}
