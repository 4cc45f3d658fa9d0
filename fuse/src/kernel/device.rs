//! `/dev/fuse`: one connection to the kernel, and the numbers it gives to files that it shall
//! read and write by itself. Knows no request.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use crate::sys;

/// A connection, or one more channel of one.
#[derive(Debug)]
pub struct Device {
    file: File,
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl From<OwnedFd> for Device {
    fn from(fd: OwnedFd) -> Device {
        Device { file: fd.into() }
    }
}

impl From<Device> for OwnedFd {
    fn from(device: Device) -> OwnedFd {
        device.file.into()
    }
}

impl Device {
    /// A connection that no mount uses yet.
    pub fn open() -> io::Result<Device> {
        Ok(Device { file: File::options().read(true).write(true).open("/dev/fuse")? })
    }

    /// One more channel, whose requests another thread answers without waiting for this one's.
    pub fn channel(&self) -> io::Result<Device> {
        let other = Device::open()?;
        sys::clone_device(other.as_fd(), self.as_fd())?;
        Ok(other)
    }

    /// Gives the kernel a file to use in the place of one of ours.
    pub fn back(self: &Arc<Device>, file: BorrowedFd<'_>) -> io::Result<BackingNumber> {
        let number = sys::open_backing(self.as_fd(), file.as_raw_fd())?;
        Ok(BackingNumber { device: Arc::downgrade(self), number })
    }
}

/// The kernel's number for a file that it uses in the place of one of ours; given back on drop.
#[derive(Debug)]
pub struct BackingNumber {
    device: Weak<Device>,
    number: u32,
}

impl BackingNumber {
    /// As it stands in the reply to an opening.
    pub fn get(&self) -> u32 {
        self.number
    }
}

impl Drop for BackingNumber {
    fn drop(&mut self) {
        if let Some(device) = self.device.upgrade() {
            // A connection that has ended has given it back already.
            let _ = sys::close_backing(device.as_fd(), self.number);
        }
    }
}
