//! A [`BlockDevice`] as a [`Volume`] of the FUSE crate: vectors to slices, kinds to errnos.

use std::io::{self, IoSlice, IoSliceMut};
use std::sync::{Arc, Mutex, PoisonError};

use vdisk_fuse::Volume;

use crate::block::{BlockDevice, BlockStatus};
use crate::error::{Error, ErrorKind, Result};

/// How many extents are asked for at a time.
const EXTENTS: usize = 256;

/// A flat disk that the FUSE crate can show as a file.
pub struct DeviceVolume {
    device: Arc<dyn BlockDevice>,
    read_only: bool,
    lost: Arc<Lost>,
}

/// The first write that failed: the kernel may have told nobody about it.
#[derive(Debug, Default)]
pub struct Lost(Mutex<Option<String>>);

impl Lost {
    fn note(&self, error: &Error) {
        let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| error.to_string());
    }

    /// Fails where a write has failed since the volume was made.
    pub fn check(&self) -> Result<()> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            None => Ok(()),
            Some(text) => Err(Error::new(
                ErrorKind::Io,
                format!("not everything could be written to the disk: {text}"),
            )),
        }
    }
}

impl DeviceVolume {
    /// Shows `device`, for reading only where `read_only` or the device says so.
    pub fn new(device: Arc<dyn BlockDevice>, read_only: bool) -> DeviceVolume {
        let read_only = read_only || device.read_only();
        DeviceVolume { device, read_only, lost: Arc::default() }
    }

    /// Where failed writes are noted.
    pub fn lost(&self) -> Arc<Lost> {
        self.lost.clone()
    }

    fn written(&self, result: Result<()>) -> io::Result<()> {
        result.map_err(|error| {
            self.lost.note(&error);
            to_io(&error)
        })
    }
}

/// What the program that made the system call is told.
pub fn to_io(error: &Error) -> io::Error {
    let number = match error.kind() {
        ErrorKind::NoSpace => libc::ENOSPC,
        ErrorKind::ReadOnly | ErrorKind::Sealed => libc::EROFS,
        ErrorKind::Invalid => libc::EINVAL,
        ErrorKind::InUse | ErrorKind::Busy => libc::EBUSY,
        _ => libc::EIO,
    };
    io::Error::from_raw_os_error(number)
}

impl Volume for DeviceVolume {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn block_size(&self) -> u32 {
        self.device.block_size()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.device.read_at(offset, &mut [IoSliceMut::new(buf)]).map_err(|e| to_io(&e))
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.written(self.device.write_at(offset, &[IoSlice::new(buf)]))
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.written(self.device.write_zeroes(offset, len, may_unmap))
    }

    fn flush(&self) -> io::Result<()> {
        self.written(self.device.flush())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let size = self.device.size();
        let (mut at, mut start) = (offset, None);
        while at < size {
            let extents =
                self.device.extents(at, size - at, EXTENTS).map_err(|error| to_io(&error))?;
            let before = at;
            for extent in extents {
                match (extent.status, start) {
                    (BlockStatus::Data, None) => start = Some(extent.offset.max(offset)),
                    (BlockStatus::Zero, Some(start)) => return Ok(Some((start, extent.offset))),
                    _ => {}
                }
                at = extent.offset.saturating_add(extent.len);
            }
            if let Some(start) = start {
                return Ok(Some((start, at)));
            }
            if at <= before {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filesystem::ram::Ram;

    #[test]
    fn stored_data_is_found_across_extents_and_batches_of_them() {
        let mut bytes = vec![0; 4096 * 1000];
        bytes[4096 * 700 + 100] = 1;
        bytes[4096 * 701] = 1;
        let volume = DeviceVolume::new(Arc::new(Ram(bytes)), false);
        let (start, end) = (4096 * 700, 4096 * 702);
        assert_eq!(volume.next_data(0).unwrap(), Some((start, end)));
        assert_eq!(volume.next_data(start + 9).unwrap(), Some((start + 9, end)));
        assert_eq!(volume.next_data(end).unwrap(), None);
    }

    #[test]
    fn a_write_that_failed_is_remembered() {
        let volume = DeviceVolume::new(Arc::new(Ram(vec![0; 512])), false);
        let lost = volume.lost();
        lost.check().unwrap();
        let error = volume.write_at(0, &[1]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        assert!(lost.check().unwrap_err().to_string().contains("a disk for reading"));
    }
}
