//! How far a guest's command is, and how it has ended: the guest writes it to a small disk of this
//! program's, as every kernel that reaches its root can.

use std::io::{IoSlice, IoSliceMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vdisk::block::{BlockDevice, BlockExtent};
use vdisk::vm::Disk;
use vdisk::{Error, Result};

use crate::cli::measure::marks::{ENDED, Marks, STARTED};

/// The disk's serial number, by which the guest finds it.
const ID: &str = "vdisk-status";
const SIZE: usize = 4096;
/// What says that the command is about to start.
const BEGUN: &str = "begun";
/// What stands before the status, in digits.
const BEFORE: &str = "ended ";

/// A disk in memory.
pub struct Status {
    bytes: Mutex<[u8; SIZE]>,
    marks: Marks,
}

impl Status {
    /// A disk that says nothing yet; what the guest says is told.
    pub fn told(marks: Marks) -> Status {
        Status { bytes: Mutex::new([0; SIZE]), marks }
    }

    /// The same as a guest's disk.
    pub fn disk(self: &Arc<Status>) -> Disk {
        Disk { device: self.clone(), id: ID.to_owned() }
    }

    /// What the guest has said.
    pub fn read(&self) -> Option<u8> {
        self.line()?.strip_prefix(BEFORE)?.parse().ok()
    }

    fn line(&self) -> Option<String> {
        let bytes = self.bytes();
        let line = bytes.split(|byte| *byte == b'\n').next()?;
        String::from_utf8(line.to_vec()).ok()
    }

    fn tell(&self) {
        match self.line() {
            Some(line) if line == BEGUN => self.marks.say(STARTED),
            _ if self.read().is_some() => self.marks.say(ENDED),
            _ => {}
        }
    }

    fn bytes(&self) -> MutexGuard<'_, [u8; SIZE]> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with(&self, offset: u64, work: impl FnOnce(&mut [u8])) -> Result<()> {
        let offset = usize::try_from(offset).unwrap_or(SIZE);
        let mut bytes = self.bytes();
        let part = bytes.get_mut(offset..);
        part.map(work).ok_or_else(|| Error::invalid("past the end of the disk"))
    }
}

impl BlockDevice for Status {
    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn block_size(&self) -> u32 {
        512
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.with(offset, |from| {
            let to = bufs.iter_mut().flat_map(|buf| buf.iter_mut());
            to.zip(from).for_each(|(to, from)| *to = *from);
        })
    }

    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.with(offset, |to| {
            let from = bufs.iter().flat_map(|buf| buf.iter());
            to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        })?;
        self.tell();
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> Result<()> {
        let len = usize::try_from(len).unwrap_or(SIZE);
        self.with(offset, |to| to.iter_mut().take(len).for_each(|byte| *byte = 0))
    }

    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, _: usize) -> Result<Vec<BlockExtent>> {
        let status = vdisk::BlockStatus::Data;
        Ok(vec![BlockExtent { offset, len, status }])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_writes_is_its_status() {
        let status = Status::told(Marks::default());
        assert_eq!(status.read(), None);
        status.write_at(0, &[IoSlice::new(b"begun\n\0\0")]).unwrap();
        assert_eq!((status.read(), status.line().as_deref()), (None, Some(BEGUN)));
        status.write_at(0, &[IoSlice::new(b"ended 42\n\0")]).unwrap();
        assert_eq!(status.read(), Some(42));
        status.write_at(0, &[IoSlice::new(b"ended 4200\n")]).unwrap();
        assert_eq!(status.read(), None);
        assert!(status.write_at(1 << 20, &[IoSlice::new(b"x")]).is_err());
    }
}
