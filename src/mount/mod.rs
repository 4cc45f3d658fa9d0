//! The file system in a disk, mounted: the disk as a file over FUSE, a loop device on that file,
//! the kernel's file system on the loop device.
//!
//! Knows a [`BlockDevice`], no image format and no chain, and never prints.
//!
//! The FUSE mount stands in no mount namespace, and both it and the loop device live only as long
//! as the file system that is mounted on them. A process that is killed therefore leaves one
//! thing: the mount at the directory, every access to which fails with an I/O error until it is
//! unmounted like any other.

pub mod busy;
pub mod files;
pub mod layer;
pub mod paced;
pub mod table;
pub mod volume;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use vdisk_fuse::apart::{self, Apart};
use vdisk_fuse::{Caching, Options, Server, Tree};

use crate::block::BlockDevice;
use crate::error::{Error, ErrorKind, Result};
use crate::filesystem::probe::FileSystem;
use crate::filesystem::{Found, find};
use crate::storage::loopdev::{LoopDevice, LoopOptions};

use volume::{DeviceVolume, Lost};

/// The name of the one file in the inner FUSE mount.
const FILE: &str = "disk.raw";
/// What [`LoopOptions::name`] is for our loop devices.
pub const LOOP_NAME: &str = "vdisk";
/// How long the kernel may take to let go of the loop device and the file after an unmount. By
/// then everything is written: this is bookkeeping of milliseconds.
const RELEASE: Duration = Duration::from_secs(30);
/// The same, where nobody is told how it went.
const RELEASE_ON_DROP: Duration = Duration::from_secs(10);
/// How many requests the server works on at a time.
const THREADS: usize = 4;

/// What to mount, and how.
#[derive(Debug, Clone, Default)]
pub struct AttachOptions {
    /// Mounts for reading only, without replaying a journal. Implied by a read-only device.
    pub read_only: bool,
    /// The partition that holds the file system; `None` for the whole disk.
    pub partition: Option<u32>,
    /// Opens no device that a file there stands for, and gives no program there its owner's rights:
    /// whoever wrote the disk made those, and this host's users are to see the files only.
    pub inert: bool,
    /// Options for the kernel's file system driver, with commas between them.
    pub fs_options: Option<String>,
    /// How the disk is called where the system shows its FUSE mount.
    pub name: String,
    /// In which mount namespace to mount it.
    pub place: Apart,
}

/// A file system mounted by [`attach`].
///
/// [`detach`](Attached::detach) unmounts it and says whether everything became durable. Dropping
/// it unmounts lazily, as far as possible and without a word.
pub struct Attached {
    place: Apart,
    at: PathBuf,
    device: Arc<dyn BlockDevice>,
    loop_number: u32,
    read_only: bool,
    lost: Arc<Lost>,
    /// Taken when nothing is left to unmount.
    server: Option<Server>,
}

/// Mounts the file system in `device` at the directory `at`. Threads of this process serve it until it is unmounted, by
/// [`Attached::detach`] or by anybody else. Needs root: loop devices belong to nobody else.
pub fn attach(
    device: Arc<dyn BlockDevice>,
    options: &AttachOptions,
    at: &Path,
) -> Result<Attached> {
    let found = find(device.as_ref(), options.partition)?;
    let read_only = options.read_only || device.read_only() || found.fs.read_only;
    let volume = DeviceVolume::new(device.clone(), read_only);
    let lost = volume.lost();
    let tree = Arc::new(Tree::new());
    let name = if options.name.is_empty() { LOOP_NAME.into() } else { options.name.clone() };
    let serve = Options { name, caching: Caching::None, threads: THREADS };
    let (server, root) = tree
        .add(FILE, Arc::new(volume))
        .and_then(|()| Server::detached(tree, &serve))
        .map_err(|e| Error::io("cannot serve the disk over FUSE", e))?;
    let stack = Stack { found: &found, read_only, options, at };
    let mounted = options.place.run(&[root.as_fd()], || stack.mount(&root));
    drop(root);
    match mounted.map_err(|e| Error::io("cannot go where it is to be mounted", e)).flatten() {
        Ok(number) => Ok(Attached {
            place: options.place.clone(),
            at: at.to_path_buf(),
            device,
            loop_number: number,
            read_only,
            lost,
            server: Some(server),
        }),
        Err(error) => {
            // With its root closed nothing holds the FUSE mount: the server ends by itself.
            let _ = server.join_within(RELEASE_ON_DROP);
            Err(error)
        }
    }
}

/// What stands between the FUSE mount and the directory.
struct Stack<'a> {
    found: &'a Found,
    read_only: bool,
    options: &'a AttachOptions,
    at: &'a Path,
}

impl Stack<'_> {
    /// Puts a loop device on the file and mounts it; returns the loop device's number. Every
    /// step waits for our own server, so this runs [apart](Apart).
    fn mount(&self, root: &OwnedFd) -> Result<u32> {
        let access = if self.read_only { OFlag::O_RDONLY } else { OFlag::O_RDWR };
        let file = openat(root, FILE, access | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(|e| Error::io("cannot open the disk over FUSE", e.into()))?;
        let options = LoopOptions {
            offset: self.found.offset,
            len: self.found.len,
            read_only: self.read_only,
            name: LOOP_NAME.into(),
        };
        let device = LoopDevice::attach(file.as_fd(), &options)?;
        let fs = &self.found.fs;
        let mut flags = if self.read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
        if self.options.inert {
            flags |= MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
        }
        let no_replay = fs.no_replay.filter(|_| self.read_only);
        let words = [no_replay, self.options.fs_options.as_deref()];
        let data = words.into_iter().flatten().collect::<Vec<_>>().join(",");
        mount(Some(device.path()), self.at, Some(fs.driver), flags, Some(data.as_str()))
            .map_err(|errno| refused(fs, errno).at_path(self.at))?;
        Ok(device.number())
    }
}

fn refused(fs: &FileSystem, errno: Errno) -> Error {
    let name = fs.name;
    let text = match errno {
        Errno::ENODEV => format!("this kernel cannot mount {name}"),
        Errno::EPERM | Errno::EACCES | Errno::EBUSY | Errno::ENOENT | Errno::ENOTDIR => {
            format!("cannot mount the {name} file system")
        }
        _ => format!("the kernel refused the {name} file system (dmesg says why)"),
    };
    Error::io(text, errno.into())
}

impl Attached {
    /// The device number of the loop device as /proc/PID/mountinfo shows it: `7:N`.
    pub fn loop_device(&self) -> String {
        format!("7:{}", self.loop_number)
    }

    /// Waits until somebody else has unmounted the file system, and makes everything durable.
    pub fn wait(mut self) -> Result<()> {
        match self.server.take() {
            Some(server) => self.finish(server.join()),
            None => Ok(()),
        }
    }

    /// Unmounts, and returns when everything is durable and no thread serves the disk any more.
    ///
    /// Fails with [`ErrorKind::InUse`] while somebody uses the mount. After any failure it is
    /// unmounted lazily: what is still in use goes when its last user does.
    pub fn detach(mut self) -> Result<()> {
        unmount(&self.place, &self.at)?;
        let Some(server) = self.server.take() else { return Ok(()) };
        match server.join_within(RELEASE) {
            Ok(ended) => self.finish(ended),
            Err(server) => {
                // Another namespace holds a copy of the mount; it was synced, and the threads
                // serve it on.
                drop(server);
                Err(still_mounted(&self.at, &self.loop_device()))
            }
        }
    }

    fn finish(&self, ended: std::io::Result<()>) -> Result<()> {
        ended.map_err(|e| Error::io("the FUSE server failed", e))?;
        if !self.read_only {
            self.device.flush()?;
        }
        self.lost.check()
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let Some(server) = self.server.take() else { return };
        let at = &self.at;
        let _ = self.place.run(&[], || umount2(at, MntFlags::MNT_DETACH));
        if let Ok(ended) = server.join_within(RELEASE_ON_DROP) {
            let _ = self.finish(ended);
        }
    }
}

/// Writes out and unmounts the file system at `at` in this namespace, of whatever kind; returns when
/// its last change has reached the device under it, or the namespace is gone with all that stood in
/// it. Safe to call in the process that serves it.
///
/// Fails with [`ErrorKind::InUse`], naming the users that can be found, while it is in use, and
/// where not everything could be written: the file system is still mounted then.
pub fn unmount(place: &Apart, at: &Path) -> Result<()> {
    match place.run(&[], || sync_and_unmount(at)) {
        Err(e) if apart::is_gone(&e) => Ok(()),
        done => done.map_err(|e| Error::io("cannot go to what is to be unmounted", e)).flatten(),
    }
}

fn sync_and_unmount(at: &Path) -> Result<()> {
    let failed = |what: &str, e: std::io::Error| Error::io(what, e).at_path(at);
    let directory = File::open(at).map_err(|e| failed("cannot open the mounted directory", e))?;
    // An unmount reports no failed write; this does.
    nix::unistd::syncfs(&directory).map_err(|e| {
        failed("not everything could be written to the disk; it stays mounted", e.into())
    })?;
    drop(directory);
    match umount2(at, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::EBUSY) => Err(in_use(at)),
        Err(e) => Err(failed("cannot unmount", e.into())),
    }
}

fn in_use(at: &Path) -> Error {
    let text = match busy::users(at) {
        users if users.is_empty() => "still in use; everything is written".into(),
        users => format!("still in use by {}; everything is written", users.join(", ")),
    };
    Error::new(ErrorKind::InUse, text).at_path(at)
}

fn still_mounted(at: &Path, device: &str) -> Error {
    let text = match busy::namespaces(device) {
        holders if holders.is_empty() => "unmounted here, but the kernel still uses it".into(),
        holders => format!(
            "unmounted here, but still mounted in the mount namespace of {}",
            holders.join(", ")
        ),
    };
    Error::new(ErrorKind::InUse, text).at_path(at)
}
