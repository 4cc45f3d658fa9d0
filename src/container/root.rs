//! The container's view of files: the new root, and /proc, /dev and /sys in it as the OCI runtime
//! specification ("Default Filesystems", "Default Devices") and podman's defaults have them.
//!
//! All that is mounted inside is mounted after the old root is gone: whatever links the image holds
//! lead to the image.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};
use nix::unistd::{chdir, pivot_root};

use super::change;
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

/// The devices that every container has, and their minor numbers with the major number 1 or 5.
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

const NOSUID: MsFlags = MsFlags::MS_NOSUID;
const NOEXEC: MsFlags = MsFlags::MS_NOEXEC;
const NODEV: MsFlags = MsFlags::MS_NODEV;

/// A file system of the kernel's and where it belongs.
struct Mounted {
    kind: &'static str,
    at: &'static str,
    flags: MsFlags,
    options: &'static str,
}

const MOUNTED: [Mounted; 6] = [
    Mounted { kind: "proc", at: "/proc", flags: NOSUID.union(NOEXEC).union(NODEV), options: "" },
    Mounted {
        kind: "tmpfs",
        at: "/dev",
        flags: NOSUID.union(MsFlags::MS_STRICTATIME),
        options: "mode=755,size=65536k",
    },
    Mounted {
        kind: "devpts",
        at: "/dev/pts",
        flags: NOSUID.union(NOEXEC),
        options: "newinstance,ptmxmode=0666,mode=0620,gid=5",
    },
    Mounted {
        kind: "tmpfs",
        at: "/dev/shm",
        flags: NOSUID.union(NOEXEC).union(NODEV),
        options: "mode=1777,size=65536k",
    },
    Mounted {
        kind: "mqueue",
        at: "/dev/mqueue",
        flags: NOSUID.union(NOEXEC).union(NODEV),
        options: "",
    },
    Mounted {
        kind: "sysfs",
        at: "/sys",
        flags: NOSUID.union(NOEXEC).union(NODEV).union(MsFlags::MS_RDONLY),
        options: "",
    },
];

/// Makes `root` the root of this process, which must be in new mount, pid, ipc and network
/// namespaces. The host's files are out of reach afterwards.
pub(super) fn enter(root: &Path) -> Result<()> {
    pivot(root).map_err(|e| Error::io("cannot enter the root directory", e).at_path(root))?;
    umask(Mode::empty());
    for mounted in &MOUNTED {
        mount_kernels_own(mounted).map_err(|e| {
            Error::io(format!("cannot mount {}", mounted.kind), e).at_path(mounted.at)
        })?;
    }
    devices().map_err(|e| Error::io("cannot make the devices in /dev", e))?;
    for path in MASKED {
        mask(path).map_err(|e| Error::io("cannot hide a part of the kernel", e).at_path(path))?;
    }
    for path in READ_ONLY {
        protect(path).map_err(|e| Error::io("cannot protect from writing", e).at_path(path))?;
    }
    umask(Mode::from_bits_truncate(0o022));
    Ok(())
}

fn pivot(root: &Path) -> io::Result<()> {
    change("/", MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    mount(Some(root), root, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    // A device node in the image could be the host's disk.
    change(root, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | NODEV)?;
    chdir(root)?;
    // With both the same, the old root lands on top of the new one: no directory to make for it.
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    Ok(chdir("/")?)
}

fn mount_kernels_own(mounted: &Mounted) -> io::Result<()> {
    real_directory(mounted.at)?;
    let options = Some(mounted.options).filter(|options| !options.is_empty());
    Ok(mount(Some(mounted.kind), mounted.at, Some(mounted.kind), mounted.flags, options)?)
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

fn devices() -> io::Result<()> {
    let mode = Mode::from_bits_truncate(0o666);
    for (path, major, minor) in DEVICES {
        mknod(path, SFlag::S_IFCHR, mode, makedev(major, minor))?;
    }
    for (target, link) in LINKS {
        symlink(target, link)?;
    }
    Ok(())
}

/// Covers a directory by an empty one and a file by /dev/null; what this kernel lacks needs none.
fn mask(path: &str) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => {
            let flags = NOSUID | NOEXEC | NODEV | MsFlags::MS_RDONLY;
            Ok(mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some("nr_inodes=1"))?)
        }
        Ok(_) => Ok(mount(Some("/dev/null"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn protect(path: &str) -> io::Result<()> {
    if !fs::exists(path)? {
        return Ok(());
    }
    mount(Some(path), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    Ok(change(path, flags | NOSUID | NOEXEC | NODEV)?)
}

/// Gives a disk that knows no host names those of the container, or else `localhost` would be
/// unknown. A disk with names of its own keeps them.
pub(super) fn host_names(hostname: &OsStr) -> io::Result<()> {
    const HOSTS: &str = "/etc/hosts";
    const FILE: &str = "/dev/hosts";
    match fs::symlink_metadata(HOSTS) {
        Ok(found) if found.is_file() && found.len() == 0 => {}
        Ok(_) => return Ok(()),
        // Something to mount on, as podman leaves it, too.
        Err(_) if File::create_new(HOSTS).is_ok() => {}
        // There is no /etc.
        Err(_) => return Ok(()),
    }
    let hostname = hostname.to_string_lossy();
    fs::write(FILE, format!("127.0.0.1 localhost {hostname}\n::1 localhost ip6-localhost\n"))?;
    mount(Some(FILE), HOSTS, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    fs::remove_file(FILE)
}

/// Shows the container's terminal as /dev/console, as getty and systemd expect it.
pub(super) fn console(terminal: &str) -> io::Result<()> {
    File::create_new("/dev/console")?;
    Ok(mount(Some(terminal), "/dev/console", None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
}
