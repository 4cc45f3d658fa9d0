//! Directories and files of the host in a container.
//!
//! The host's are found by the host's names, before the container's root is entered; the places
//! inside by the container's own, after. A link on either side leads to its own side.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::libc;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{MoveMountFlags, move_mount};

use super::super::sys::{self, Attributes};
use super::clone;
use crate::error::{Error, Result};

/// A directory or file of the host's and where it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// On the host.
    pub source: PathBuf,
    /// In the container, from its root on; made where it is missing.
    pub at: PathBuf,
    /// Refuses every change.
    pub read_only: bool,
}

/// A volume that stands nowhere yet.
pub(super) struct Taken<'a> {
    volume: &'a Volume,
    tree: OwnedFd,
    directory: bool,
}

/// Takes hold of the host's side.
pub(super) fn take(volumes: &[Volume]) -> Result<Vec<Taken<'_>>> {
    let one = |volume| {
        take_one(volume)
            .map_err(|e| Error::io("cannot use this as a volume", e).at_path(&volume.source))
    };
    volumes.iter().map(one).collect()
}

fn take_one(volume: &Volume) -> io::Result<Taken<'_>> {
    let tree = clone(&volume.source, true)?;
    let directory =
        rustix::fs::fstat(&tree).map(|stat| stat.st_mode & libc::S_IFMT)? == libc::S_IFDIR;
    let mut set = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    if volume.read_only {
        set |= libc::MOUNT_ATTR_RDONLY;
    }
    sys::set_attributes(tree.as_fd(), Attributes { set, recursive: true })?;
    Ok(Taken { volume, tree, directory })
}

/// Puts them in their places, in the order of their names: one may stand in another.
pub(super) fn place(mut taken: Vec<Taken<'_>>) -> Result<()> {
    taken.sort_by(|a, b| a.volume.at.cmp(&b.volume.at));
    for one in taken {
        one.place()
            .map_err(|e| Error::io("cannot show a volume there", e).at_path(&one.volume.at))?;
    }
    Ok(())
}

impl Taken<'_> {
    fn place(&self) -> io::Result<()> {
        let target = self.target()?;
        let flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        Ok(move_mount(&self.tree, "", &target, "", flags)?)
    }

    /// The place, which is of the same kind. The root of this process is the container's already.
    fn target(&self) -> io::Result<OwnedFd> {
        let at = &self.volume.at;
        let target = match look(at) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.make(at)?;
                look(at)?
            }
            found => found?,
        };
        let found = File::from(target);
        let meta = found.metadata()?;
        if meta.is_dir() != self.directory {
            let text = if self.directory {
                "the volume is a directory, and what stands there is none"
            } else {
                "the volume is a file, and a directory stands there"
            };
            return Err(io::Error::new(io::ErrorKind::NotADirectory, text));
        }
        let root = fs::metadata("/")?;
        // Over the root it would not be seen; over what the kernel shows it would uncover what is
        // hidden there.
        let kernels = ["/proc", "/sys"]
            .iter()
            .any(|kernels| fs::metadata(kernels).is_ok_and(|kernels| kernels.dev() == meta.dev()));
        if kernels || (meta.dev(), meta.ino()) == (root.dev(), root.ino()) {
            let text = "no volume can stand at /, or in /proc or /sys";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(found.into())
    }

    fn make(&self, at: &Path) -> io::Result<()> {
        let place = Path::new("/").join(at);
        if self.directory {
            return make_directories(&place);
        }
        place.parent().map_or(Ok(()), make_directories)?;
        File::create_new(&place).map(drop)
    }
}

/// As `mkdir -p`, but where a link leads nowhere, what it leads to is made: in the container, since
/// its root is this process's.
fn make_directories(path: &Path) -> io::Result<()> {
    if path.components().any(|part| matches!(part, Component::ParentDir)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a path with .. in it is not made",
        ));
    }
    make_below(path, MAX_LINKS)
}

/// As many as the kernel follows.
const MAX_LINKS: u32 = 40;

fn make_below(path: &Path, links: u32) -> io::Result<()> {
    let Some(parent) = path.parent() else { return Ok(()) };
    match fs::create_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound && links > 0 => {
            make_below(parent, links - 1)?;
            make_below(path, links - 1)
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => match fs::metadata(path) {
            Ok(_) => Ok(()),
            Err(missing) if missing.kind() == io::ErrorKind::NotFound && links > 0 => {
                make_below(&parent.join(fs::read_link(path)?), links - 1)
            }
            Err(other) => Err(other),
        },
        done => done,
    }
}

fn look(at: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    // A link in /proc to something open is no place.
    let resolve = ResolveFlags::NO_MAGICLINKS;
    let place = Path::new("/").join(at);
    Ok(openat2(CWD, &place, flags, Mode::empty(), resolve)?)
}
