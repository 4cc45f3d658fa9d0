//! Which mounts are vdisk's, told from the kernel's table of mounts.

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use vdisk_fuse::server;

use crate::mountinfo::{self, Mount};
use crate::storage::loopdev;

/// A mount of vdisk's, with the device number (`major:minor`) that tells it from all others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A disk as a file, or an overlay, on a FUSE connection.
    Raw(String),
    /// The file system in a disk, on a loop device. The file system's own number may be an
    /// anonymous one (btrfs).
    Files(String),
}

impl Kind {
    /// The device number.
    pub fn device(&self) -> &str {
        match self {
            Kind::Raw(device) | Kind::Files(device) => device,
        }
    }
}

/// What a mount is to vdisk; `None` where somebody else made it.
pub fn ours(mount: &Mount) -> Option<Kind> {
    let of_fuse = mount.kind.strip_prefix("fuse.");
    if matches!(of_fuse, Some(server::SUBTYPE | server::OVERLAY_SUBTYPE)) {
        return Some(Kind::Raw(mount.device.clone()));
    }
    let number: u32 = mount.source.to_str()?.strip_prefix("/dev/loop")?.parse().ok()?;
    let is_ours = match loopdev::name_of(Path::new(&mount.source)) {
        Ok(name) => name.is_some_and(|name| name == super::LOOP_NAME),
        // The kernel asks the file first, and nobody serves that any more.
        Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) => shows_dead_disk(number),
        Err(_) => false,
    };
    is_ours.then(|| Kind::Files(format!("7:{number}")))
}

/// Whether a loop device shows the one file of a mount that stands in no directory, as vdisk's do.
fn shows_dead_disk(number: u32) -> bool {
    let file = std::fs::read_to_string(format!("/sys/block/loop{number}/loop/backing_file"));
    file.is_ok_and(|file| file.trim_end().strip_prefix('/') == Some(super::FILE))
}

/// Lets go of the copies of vdisk's mounts that this thread's mount namespace was given when it
/// was made. Elsewhere they stay; but as long as any namespace holds a mount, its disk is not free.
///
/// To be called only in a namespace of the caller's own.
pub fn drop_copies() {
    for mount in mountinfo::here().unwrap_or_default().iter().rev() {
        if ours(mount).is_some() {
            // What cannot be let go of only makes somebody's umount wait.
            let _ = umount2(&mount.point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
    }
}

/// Those of the directories, by their full paths, in which nothing is mounted.
pub fn without_mounts(directories: &[PathBuf]) -> Vec<&Path> {
    let Ok(mounts) = mountinfo::here() else { return Vec::new() };
    let holds = |directory: &Path| {
        mounts.iter().any(|mount| mount.point != directory && mount.point.starts_with(directory))
    };
    directories.iter().map(PathBuf::as_path).filter(|directory| !holds(directory)).collect()
}

/// The topmost mount that stands exactly at `point`, in this process's namespace.
pub fn at(point: &Path) -> Option<Mount> {
    mountinfo::here().ok()?.into_iter().rfind(|mount| mount.point == point)
}
