//! The devices that every container has.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, move_mount};

use super::super::ids::Ids;
use super::clone;
use crate::error::{Error, Result};

/// The devices and their numbers.
const DEVICES: [(&str, u64, u64); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: [(&str, &str); 6] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("/proc/kcore", "/dev/core"),
    ("pts/ptmx", "/dev/ptmx"),
];

/// The host's devices, where a container's own cannot be made.
pub(super) struct Devices(Option<Vec<OwnedFd>>);

/// Takes hold of the host's devices, if they are needed.
pub(super) fn take(ids: Ids) -> Result<Devices> {
    if ids == Ids::Host {
        return Ok(Devices(None));
    }
    let taken = DEVICES.iter().map(|(path, ..)| {
        clone(Path::new(path), false)
            .map_err(|e| Error::io("cannot use this device of the host", e).at_path(path))
    });
    Ok(Devices(Some(taken.collect::<Result<_>>()?)))
}

impl Devices {
    /// Puts them in their places, in the container's /dev.
    pub(super) fn place(self) -> io::Result<()> {
        let mode = Mode::from_bits_truncate(0o666);
        let mut taken = self.0.map(Vec::into_iter);
        for (path, major, minor) in DEVICES {
            match taken.as_mut().and_then(Iterator::next) {
                None => mknod(path, SFlag::S_IFCHR, mode, makedev(major, minor))?,
                Some(device) => {
                    File::create_new(path)?;
                    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
                    move_mount(&device, "", CWD, path, flags)?;
                }
            }
        }
        for (target, link) in LINKS {
            symlink(target, link)?;
        }
        Ok(())
    }
}
