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
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use vdisk_fuse::apart::{self, Apart};
use vdisk_fuse::kernel::Device;
use vdisk_fuse::mount::MountOptions;
use vdisk_fuse::{Caching, Options, Server, Tree};

use crate::block::BlockDevice;
use crate::error::{Error, ErrorKind, Result};
use crate::filesystem::Found;
use crate::filesystem::probe::FileSystem;
use crate::storage::loopdev::{LoopDevice, LoopOptions};

use volume::{DeviceVolume, Lost};

/// The name of the one file in the inner FUSE mount.
const FILE: &str = "disk.raw";
/// What [`LoopOptions::name`] is for our loop devices.
pub const LOOP_NAME: &str = "vdisk";
/// How long the kernel may take to let go of the loop device and the file where nothing was mounted.
const RELEASE: Duration = Duration::from_secs(10);
/// How many requests the server works on at a time.
const THREADS: usize = 4;

/// How the kernel's file system is mounted.
#[derive(Debug, Clone, Default)]
pub struct AttachOptions {
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

/// Mounts a connection where it stands nowhere, for a disk of this name: the root of that mount. A
/// [`Shown`] is to serve it, and until then who looks at what this process has open waits.
///
/// # Errors
/// Where it cannot be mounted.
pub fn connect(connection: &Device, name: &str) -> Result<OwnedFd> {
    let source = if name.is_empty() { LOOP_NAME } else { name }.to_owned();
    let options = MountOptions { source, ..MountOptions::default() };
    vdisk_fuse::mount::detached_on(connection, &options)
        .map_err(|e| Error::io("cannot serve the disk over FUSE", e))
}

/// A disk as the one file in a mount that stands nowhere, served by threads of this process until nobody
/// has the file or the root open.
pub struct Shown {
    device: Arc<dyn BlockDevice>,
    read_only: bool,
    lost: Arc<Lost>,
    server: Server,
}

impl Shown {
    /// Serves it on a connection that [`connect`] has mounted.
    ///
    /// # Errors
    /// Where no threads can be had.
    pub fn on(connection: Device, device: Arc<dyn BlockDevice>, read_only: bool) -> Result<Shown> {
        let volume = DeviceVolume::new(device.clone(), read_only);
        let lost = volume.lost();
        let tree = Arc::new(Tree::new());
        let name = LOOP_NAME.to_owned();
        let options = Options { name, caching: Caching::None, threads: THREADS };
        let server = tree
            .add(FILE, Arc::new(volume))
            .and_then(|()| Server::on(connection, tree, &options))
            .map_err(|e| Error::io("cannot serve the disk over FUSE", e))?;
        Ok(Shown { device, read_only, lost, server })
    }

    /// Waits until nobody has it open, and makes everything durable.
    ///
    /// # Errors
    /// Where something was lost.
    pub fn wait(self) -> Result<()> {
        let Shown { device, read_only, lost, server } = self;
        server.join().map_err(|e| Error::io("the FUSE server failed", e))?;
        if !read_only {
            device.flush()?;
        }
        lost.check()
    }

    /// The same where it came to nothing, for a bounded time: nobody is told how it went.
    pub fn abandon(self) {
        if let Ok(Ok(())) = self.server.join_within(RELEASE)
            && !self.read_only
        {
            let _ = self.device.flush();
        }
    }
}

/// What stands between the FUSE mount and the directory.
pub struct Stack<'a> {
    /// Where in the disk.
    pub found: &'a Found,
    /// Refuses every change.
    pub read_only: bool,
    /// How it is mounted.
    pub options: &'a AttachOptions,
    /// The directory.
    pub at: &'a Path,
}

/// Mounts what is shown below the root of a mount that stands nowhere, by a loop device, whose number this
/// is.
///
/// # Errors
/// Where the kernel refuses: then nothing of it is left, once it is served no longer.
pub fn stand(root: OwnedFd, stack: Stack<'_>) -> Result<u32> {
    let mounted = stack.options.place.run(&[root.as_fd()], || stack.mount(&root));
    mounted.map_err(|e| Error::io("cannot go where it is to be mounted", e)).flatten()
}

impl Stack<'_> {
    /// Puts a loop device on the file and mounts it; returns the loop device's number. Every
    /// step waits for the disk's server, so this runs [apart](Apart).
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

/// Takes away what is mounted at a directory there, as soon as nobody uses it.
pub fn detach(place: &Apart, at: &Path) {
    let _ = place.run(&[], || umount2(at, MntFlags::MNT_DETACH));
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

/// Why a mount on a device is not let go of by those who serve it, though it is unmounted at a directory.
pub fn still_mounted(at: &Path, device: &str) -> Error {
    let text = match busy::namespaces(device) {
        holders if holders.is_empty() => "unmounted here, but the kernel still uses it".into(),
        holders => format!(
            "unmounted here, but still mounted in the mount namespace of {}",
            holders.join(", ")
        ),
    };
    Error::new(ErrorKind::InUse, text).at_path(at)
}
