//! The stretch of a disk that a file system stands in, in its blocks.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

use super::super::journal::{ESCAPED, Journal};
use crate::block::BlockDevice;
use crate::error::{Error, Result};

/// A stretch of a disk.
pub struct Part {
    device: Arc<dyn BlockDevice>,
    offset: u64,
    len: u64,
    /// Bytes of a block.
    pub block: usize,
    /// What a file system that is only read has not at its place.
    journal: Journal,
}

impl Part {
    /// The `len` bytes of `device` from `offset` on, in blocks of `block` bytes.
    pub fn new(device: Arc<dyn BlockDevice>, offset: u64, len: u64, block: usize) -> Part {
        let len = device.size().saturating_sub(offset).min(len);
        Part { device, offset, len, block, journal: Journal::default() }
    }

    /// The same, where blocks that are in the journal are read from there.
    pub fn with_journal(self, journal: Journal) -> Part {
        Part { journal, ..self }
    }

    /// Bytes of it.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Where on the disk `bytes` bytes from byte `skip` of block `number` on stand.
    fn place(&self, number: u64, skip: u64, bytes: u64) -> Result<u64> {
        let outside = || Error::corrupt(format!("ext4: block {number} is not in the file system"));
        let start = number.checked_mul(self.block as u64).and_then(|at| at.checked_add(skip));
        let start = start.ok_or_else(outside)?;
        let end = start.checked_add(bytes).ok_or_else(outside)?;
        if end > self.len { Err(outside()) } else { Ok(self.offset + start) }
    }

    /// Fills `buf` from byte `skip` of block `number` on.
    pub fn read(&self, number: u64, skip: u64, buf: &mut [u8]) -> Result<()> {
        if !self.journal.is_empty() {
            return self.read_through(number, skip, buf);
        }
        let at = self.place(number, skip, buf.len() as u64)?;
        self.device.read_at(at, &mut [IoSliceMut::new(buf)])
    }

    /// As [`read`](Part::read), block by block, each from where its newest bytes are.
    fn read_through(&self, number: u64, skip: u64, buf: &mut [u8]) -> Result<()> {
        let size = self.block as u64;
        let (mut number, mut skip) = (number + skip / size, skip % size);
        let mut rest = buf;
        while !rest.is_empty() {
            let len = rest.len().min((size - skip) as usize);
            let (now, later) = rest.split_at_mut(len);
            let copy = self.journal.copy(number);
            let at = self.place(copy.map_or(number, |copy| copy.place), skip, len as u64)?;
            self.device.read_at(at, &mut [IoSliceMut::new(now)])?;
            if copy.is_some_and(|copy| copy.escaped) {
                let mark = ESCAPED.iter().skip(skip as usize);
                now.iter_mut().zip(mark).for_each(|(byte, mark)| *byte = *mark);
            }
            (number, skip, rest) = (number + 1, 0, later);
        }
        Ok(())
    }

    /// Writes `buf` from byte `skip` of block `number` on.
    pub fn write(&self, number: u64, skip: u64, buf: &[u8]) -> Result<()> {
        self.write_all(number, skip, &[IoSlice::new(buf)])
    }

    /// Writes all of `bufs` from byte `skip` of block `number` on.
    pub fn write_all(&self, number: u64, skip: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        let at = self.place(number, skip, crate::block::total(bufs))?;
        self.device.write_at(at, bufs)
    }

    /// Returns when everything written is durable.
    pub fn flush(&self) -> Result<()> {
        self.device.flush()
    }
}
