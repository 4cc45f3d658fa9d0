//! The kernel's own file systems in a container: what is mounted, hidden and protected.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use super::super::change;
use super::super::ids::Ids;
use super::super::sys::{self, Attributes};
use super::{View, clone};
use crate::error::{Error, Result};

/// What the kernel shows of itself and a container has no business with.
const MASKED: [&str; 13] = [
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/dev/block",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/fs/selinux",
];

/// What it may read only: to write there would change the host.
const READ_ONLY: [&str; 6] =
    ["/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

const NOSUID: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID;
const NOEXEC: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOEXEC;
const NODEV: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV;
const STRICT_ATIME: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_STRICTATIME;
const RDONLY: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_RDONLY;

/// A file system of the kernel's and where it belongs.
struct Kind {
    name: &'static str,
    at: &'static str,
    attributes: MountAttrFlags,
    options: &'static [(&'static str, &'static str)],
}

const QUIET: MountAttrFlags = NOSUID.union(NOEXEC).union(NODEV);

const KINDS: [Kind; 6] = [
    Kind { name: "proc", at: "/proc", attributes: QUIET, options: &[] },
    Kind {
        name: "tmpfs",
        at: "/dev",
        attributes: NOSUID.union(STRICT_ATIME),
        options: &[("mode", "755"), ("size", "65536k")],
    },
    Kind {
        name: "devpts",
        at: "/dev/pts",
        attributes: NOSUID.union(NOEXEC),
        options: &[("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")],
    },
    Kind {
        name: "tmpfs",
        at: "/dev/shm",
        attributes: QUIET,
        options: &[("mode", "1777"), ("size", "65536k")],
    },
    Kind { name: "mqueue", at: "/dev/mqueue", attributes: QUIET, options: &[] },
    Kind { name: "sysfs", at: "/sys", attributes: QUIET.union(RDONLY), options: &[] },
];

/// Mounts that stand nowhere yet, and where they belong.
pub(super) struct Mounts(Vec<(&'static Kind, OwnedFd)>);

/// Makes them.
pub(super) fn make(view: &View) -> Result<Mounts> {
    let mut made = Vec::with_capacity(KINDS.len());
    for kind in &KINDS {
        let mount = if kind.name == "sysfs" && view.host_network && view.ids != Ids::Host {
            // The host's network is not this user's to have a /sys of: he gets to read the host's.
            clone(Path::new("/sys"), true).and_then(|tree| {
                let set = libc::MOUNT_ATTR_RDONLY
                    | libc::MOUNT_ATTR_NOSUID
                    | libc::MOUNT_ATTR_NODEV
                    | libc::MOUNT_ATTR_NOEXEC;
                sys::set_attributes(tree.as_fd(), Attributes { set, recursive: true })?;
                Ok(tree)
            })
        } else {
            kind.make(view.ids)
        };
        let mount = mount.map_err(|e| {
            let seen = if kind.name == "proc" || kind.name == "sysfs" {
                " (in a container, the kernel allows that only where the outer one hides nothing of it)"
            } else {
                ""
            };
            let nested = if e.kind() == io::ErrorKind::PermissionDenied { seen } else { "" };
            Error::io(format!("cannot mount {}{nested}", kind.name), e).at_path(kind.at)
        })?;
        made.push((kind, mount));
    }
    Ok(Mounts(made))
}

impl Kind {
    fn make(&self, ids: Ids) -> io::Result<OwnedFd> {
        let fs = fsopen(self.name, FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&fs, "source", self.name)?;
        for (key, value) in self.options {
            // Where there is one group, it is that of terminals, too.
            if *key != "gid" || ids != Ids::One {
                fsconfig_set_string(&fs, *key, *value)?;
            }
        }
        fsconfig_create(&fs)?;
        Ok(fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, self.attributes)?)
    }
}

impl Mounts {
    /// Puts them in their places.
    pub(super) fn place(&mut self) -> Result<()> {
        for (kind, mount) in self.0.drain(..) {
            real_directory(kind.at)
                .and_then(|()| {
                    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
                    Ok(move_mount(&mount, "", CWD, kind.at, flags)?)
                })
                .map_err(|e| {
                    Error::io(format!("cannot mount {}", kind.name), e).at_path(kind.at)
                })?;
        }
        Ok(())
    }
}

/// A directory in which to mount, made where it is missing. A link there is no place for /proc: the
/// paths that are hidden in it would be somewhere else.
fn real_directory(at: &str) -> io::Result<()> {
    match fs::symlink_metadata(at) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::NotADirectory,
            "the disk has something else than a directory there",
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            nix::unistd::mkdir(at, Mode::from_bits_truncate(0o755))?;
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Hides and protects.
pub(super) fn hide() -> Result<()> {
    for path in MASKED {
        mask(path).map_err(|e| Error::io("cannot hide a part of the kernel", e).at_path(path))?;
    }
    for path in READ_ONLY {
        protect(path).map_err(|e| Error::io("cannot protect from writing", e).at_path(path))?;
    }
    Ok(())
}

/// Covers a directory by an empty one and a file by /dev/null; what this kernel lacks needs none.
fn mask(path: &str) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => {
            let flags =
                MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV | MsFlags::MS_RDONLY;
            Ok(mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some("nr_inodes=1"))?)
        }
        Ok(_) => Ok(mount(Some("/dev/null"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?),
        // What this user cannot even look at needs no cover.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(error),
    }
}

fn protect(path: &str) -> io::Result<()> {
    if !fs::exists(path)? {
        return Ok(());
    }
    mount(Some(path), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    let flags = MsFlags::MS_BIND
        | MsFlags::MS_REMOUNT
        | MsFlags::MS_RDONLY
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NOEXEC
        | MsFlags::MS_NODEV;
    Ok(change(path, flags)?)
}

/// Shows the container's terminal as /dev/console, as getty and systemd expect it.
pub(in super::super) fn console(terminal: &str) -> io::Result<()> {
    File::create_new("/dev/console")?;
    Ok(mount(Some(terminal), "/dev/console", None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
}
