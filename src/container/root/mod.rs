//! The container's view of files: the new root, and /proc, /dev and /sys in it as the OCI runtime
//! specification ("Default Filesystems", "Default Devices") and podman's defaults have them.
//!
//! What is mounted inside is made before the old root is gone, because the kernel gives a namespace
//! a /proc only where it sees one whole, and volumes are the host's; it is put in its place after:
//! whatever links the image holds lead to the image.

mod devices;
mod mounts;
pub(super) mod names;
pub(super) mod volume;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::libc;
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, pivot_root};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::change;
use super::ids::Ids;
use super::sys::{self, Attributes};
use crate::error::{Error, Result};
use volume::Volume;

pub(super) use mounts::console;

/// What a container sees of files.
pub(super) struct View {
    /// The directory that becomes the root.
    pub(super) root: PathBuf,
    /// Refuses every change of it.
    pub(super) read_only: bool,
    pub(super) ids: Ids,
    /// Whether the network is the host's: then /sys is, too.
    pub(super) host_network: bool,
    pub(super) volumes: Vec<Volume>,
}

/// Makes the view's root the root of this process, which must be in new mount, pid, ipc and network
/// namespaces. The host's files are out of reach afterwards.
pub(super) fn enter(view: &View) -> Result<()> {
    let at_root =
        |e: io::Error| Error::io("cannot enter the root directory", e).at_path(&view.root);
    change("/", MsFlags::MS_REC | MsFlags::MS_PRIVATE).map_err(|e| at_root(e.into()))?;
    let mut mounts = mounts::make(view)?;
    let devices = devices::take(view.ids)?;
    let volumes = volume::take(&view.volumes)?;
    pivot(view).map_err(at_root)?;
    umask(Mode::empty());
    mounts.place()?;
    devices.place().map_err(|e| Error::io("cannot make the devices in /dev", e))?;
    mounts::hide()?;
    umask(Mode::from_bits_truncate(0o022));
    volume::place(volumes)
}

fn pivot(view: &View) -> io::Result<()> {
    let tree = clone(&view.root, false)?;
    // A device node in the image could be the host's disk.
    let mut set = libc::MOUNT_ATTR_NODEV;
    if view.read_only {
        set |= libc::MOUNT_ATTR_RDONLY;
    }
    sys::set_attributes(tree.as_fd(), Attributes { set, recursive: false })?;
    move_mount(&tree, "", CWD, &view.root, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    drop(tree);
    chdir(&view.root)?;
    // With both the same, the old root lands on top of the new one: no directory to make for it.
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    Ok(chdir("/")?)
}

/// What stands at a path, as a mount that stands nowhere yet.
fn clone(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(CWD, path, flags)?)
}
