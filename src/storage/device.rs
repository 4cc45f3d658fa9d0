//! Block devices that are taken as a whole, and who has one already.
//!
//! The host gives a device that is mounted, swapped on, or a part of another device to nobody else
//! who asks for it alone; whoever only opens it is not kept from writing over a mounted file system.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{major, minor};

use super::{Access, FileOptions, FileStorage};
use crate::error::{Error, ErrorKind, Result};
use crate::mountinfo;

/// Whether `path` leads to a block device.
pub fn is_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

impl FileStorage {
    /// Opens a block device for writing, and keeps all others from it that ask the host.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] says what it is used for, where it is.
    pub fn open_device(path: &Path) -> Result<FileStorage> {
        let flags = OFlag::O_EXCL | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let opened =
            OpenOptions::new().read(true).write(true).custom_flags(flags.bits()).open(path);
        let file: File = opened.map_err(|e| match e.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EBUSY) => in_use(path),
            _ => Error::io("could not be opened", e).at_path(path),
        })?;
        let options = FileOptions { access: Some(Access::Write), write: true };
        FileStorage::from_file(file, path, options)
    }
}

fn in_use(path: &Path) -> Error {
    let users = users(path);
    let users = if users.is_empty() { "somebody else".to_owned() } else { users.join(", ") };
    Error::new(ErrorKind::InUse, format!("is in use by {users}: nothing was written")).at_path(path)
}

/// Mounts, swaps and devices that use the device at `path` or one of its partitions.
fn users(path: &Path) -> Vec<String> {
    let Ok(meta) = fs::metadata(path) else { return Vec::new() };
    let number = |rdev: u64| format!("{}:{}", major(rdev), minor(rdev));
    let sys = PathBuf::from("/sys/dev/block").join(number(meta.rdev()));
    let below = entries(&sys).into_iter().filter(|entry| entry.join("partition").exists());
    let parts: Vec<PathBuf> = below.chain([sys.clone()]).collect();
    let numbers: Vec<String> = parts
        .iter()
        .filter_map(|part| fs::read_to_string(part.join("dev")).ok())
        .map(|text| text.trim().to_owned())
        .collect();
    let mut found: Vec<String> = mountinfo::here()
        .unwrap_or_default()
        .into_iter()
        .filter(|mount| numbers.contains(&mount.device))
        .map(|mount| format!("the mount at {}", mount.point.display()))
        .collect();
    for part in &parts {
        let holders = entries(&part.join("holders"));
        found.extend(holders.iter().filter_map(|h| h.file_name()).map(|n| n.display().to_string()));
    }
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let swaps = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    let swapped = |name: &&str| {
        fs::metadata(name)
            .is_ok_and(|m| m.file_type().is_block_device() && numbers.contains(&number(m.rdev())))
    };
    found.extend(swaps.filter(swapped).map(|name| format!("swap on {name}")));
    found
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let found = fs::read_dir(dir).into_iter().flatten().flatten();
    found.map(|entry| entry.path()).collect()
}
