//! Bringing a mounted file system to rest: everything written reaches its device, and nothing more is
//! written until it is let go.

use std::fs::File;
use std::os::fd::AsRawFd;

use crate::error::{Error, Result};

mod ioctl {
    // FIFREEZE and FITHAW of linux/fs.h: `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)`.
    nix::ioctl_readwrite!(freeze, b'X', 119, i32);
    nix::ioctl_readwrite!(thaw, b'X', 120, i32);
}

/// Freezes the file system in which `directory` is; writers wait until [`thaw`]. Needs
/// `CAP_SYS_ADMIN`.
///
/// # Errors
/// EBUSY where it is frozen already; EOPNOTSUPP where it cannot be.
pub fn freeze(directory: &File) -> Result<()> {
    let mut unused = 0;
    // SAFETY: the kernel takes no notice of the number, which outlives the call.
    let done = unsafe { ioctl::freeze(directory.as_raw_fd(), &mut unused) };
    done.map(drop).map_err(|e| Error::io("the file system could not be frozen", e.into()))
}

/// Lets the file system in which `directory` is go on.
pub fn thaw(directory: &File) -> Result<()> {
    let mut unused = 0;
    // SAFETY: the kernel takes no notice of the number, which outlives the call.
    let done = unsafe { ioctl::thaw(directory.as_raw_fd(), &mut unused) };
    done.map(drop).map_err(|e| Error::io("the file system could not be thawed", e.into()))
}

/// The same, however often it was frozen, and none of it an error: for a file system that somebody may
/// have left at rest who is gone.
pub fn let_go(directory: &File) {
    while thaw(directory).is_ok() {}
}
