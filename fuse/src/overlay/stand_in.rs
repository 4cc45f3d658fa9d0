//! Stand-ins for lower layers. A stand-in is the kernel's own overlayfs over one layer, mounted nowhere. A
//! large file is opened there for the kernel to read by itself: what it has read it shares with everybody who
//! reads that layer, and no byte takes a way through this process. When somebody opens the file for writing,
//! that overlayfs copies it, and whoever has it open goes on in the copy, which then takes its place in our
//! upper layer. Of a lower file itself the kernel would not let go.
//!
//! Knows no node.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_fd, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

use super::{Lending, clear};
use crate::attr::Attr;
use crate::host::{HostDir, Spot};

/// What the directories are called in which they keep their copies, in the directory to work in: one for each
/// overlay that is served or was killed.
const PREFIX: &str = "#stand-ins.";
/// The most layers that have one: each costs a mount.
const MOST: usize = 32;

/// How a stand-in is entered: by no link.
const INSIDE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

/// The stand-in for one layer.
pub(super) struct StandIn {
    /// Of the mount.
    root: OwnedFd,
    /// Where its copies are.
    copies: HostDir,
    /// Whether the kernel did not take a file of it.
    refused: AtomicBool,
}

/// The stand-ins of an overlay.
pub(super) struct StandIns {
    /// The directory to work in, and its path.
    work: HostDir,
    path: PathBuf,
    /// Where they are in it.
    name: OsString,
    own: HostDir,
    /// By the number of the layer.
    layers: Vec<(usize, StandIn)>,
}

fn made(dir: &HostDir, name: &str) -> io::Result<HostDir> {
    let name = OsStr::new(name);
    dir.mkdir(name, 0o700)?;
    dir.child(name)
}

/// Removes what stand-ins of overlays that were killed have left in a directory to work in, which nobody else
/// may use.
pub(super) fn clear_others(work: &HostDir, own: Option<&StandIns>) -> io::Result<()> {
    for entry in work.names()? {
        let other = entry.name.as_encoded_bytes().starts_with(PREFIX.as_bytes());
        if other && own.is_none_or(|own| own.name != entry.name) {
            clear(&work.child(&entry.name)?, 0)?;
            work.rmdir(&entry.name)?;
        }
    }
    Ok(())
}

impl StandIns {
    /// None yet, in a directory to work in, which is open.
    pub(super) fn new(path: &Path, work: &HostDir) -> io::Result<StandIns> {
        let (work, path) = (work.child(OsStr::new("."))?, path.to_path_buf());
        let mut number = 0;
        loop {
            let name = format!("{PREFIX}{}.{number}", std::process::id());
            match made(&work, &name) {
                Ok(own) => {
                    let (name, layers) = (name.into(), Vec::new());
                    return Ok(StandIns { work, path, name, own, layers });
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(e) => return Err(e),
            }
        }
    }

    /// Mounts one for the layer at `lower`. Takes `CAP_SYS_ADMIN`, and Linux 6.13.
    pub(super) fn add(&mut self, number: usize, lower: &Path, lending: Lending) -> io::Result<()> {
        if self.layers.len() >= MOST {
            return Ok(());
        }
        let place = made(&self.own, &number.to_string())?;
        let copies = made(&place, "upper")?;
        made(&place, "work")?;
        // The kernel takes what is mounted in this process's namespace only, which a layer need not be.
        let place = self.path.join(&self.name).join(number.to_string());
        let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_fd(&fs, "lowerdir+", File::open(lower)?)?;
        fsconfig_set_fd(&fs, "upperdir", File::open(place.join("upper"))?)?;
        fsconfig_set_fd(&fs, "workdir", File::open(place.join("work"))?)?;
        for (key, value) in [
            ("redirect_dir", "nofollow"),
            ("index", "off"),
            ("metacopy", "off"),
            ("nfs_export", "off"),
            ("xino", "off"),
        ] {
            fsconfig_set_string(&fs, key, value)?;
        }
        // A volatile one heeds no O_DSYNC: whoever has a copy open writes to it through this mount.
        for (flag, set) in [("userxattr", lending.user_xattrs), ("volatile", lending.volatile)] {
            if set {
                fsconfig_set_flag(&fs, flag)?;
            }
        }
        fsconfig_create(&fs)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        let root = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        self.layers.push((number, StandIn { root, copies, refused: AtomicBool::new(false) }));
        Ok(())
    }

    /// Whether they are still there: who had the directory to work in before may have cleared them away.
    pub(super) fn stand(&self) -> io::Result<bool> {
        let (there, own) = (self.work.look(&self.name)?, self.own.this().stat()?);
        Ok(there.is_some_and(|there| there.ino == own.ino))
    }

    /// Whether there is any.
    pub(super) fn any(&self) -> bool {
        !self.layers.is_empty()
    }

    /// The one for a layer.
    pub(super) fn get(&self, layer: usize) -> Option<&StandIn> {
        self.layers.iter().find(|(number, _)| *number == layer).map(|(_, one)| one)
    }

    /// The roots of their mounts.
    pub(super) fn roots(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.layers.iter().map(|(_, one)| one.root.as_fd())
    }

    /// Removes what they have, at the end.
    pub(super) fn clear(&self) -> io::Result<()> {
        clear(&self.own, 0)?;
        self.work.rmdir(&self.name)
    }
}

impl StandIn {
    /// Whether the kernel has taken all files of it.
    pub(super) fn lends(&self) -> bool {
        !self.refused.load(Ordering::Relaxed)
    }

    /// Opens a file, which is to be the one with these attributes in the layer.
    pub(super) fn open(&self, path: &Path, like: &Attr) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let file = File::from(openat2(&self.root, path, flags, Mode::empty(), INSIDE)?);
        let attr = Spot::File(file.as_fd()).stat()?;
        let same = |attr: &Attr| (attr.mode, attr.size, attr.mtime, attr.uid, attr.gid);
        match same(&attr) == same(like) {
            true => Ok(file),
            false => Err(io::Error::from_raw_os_error(libc::ESTALE)),
        }
    }

    /// The kernel did not take a file of it: no more are opened. Those that it has go on.
    pub(super) fn refuse(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }

    /// Has a file copied that is open in it, and gives the copy a name in a directory on the upper layer's file
    /// system.
    pub(super) fn copy(
        &self,
        file: &File,
        path: &Path,
        to: &HostDir,
        name: &OsStr,
    ) -> io::Result<()> {
        drop(Spot::Open(file.as_fd()).open(OFlags::WRONLY)?);
        let above = Path::new(".").join(path.parent().unwrap_or(Path::new("")));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = openat2(&self.copies, &above, flags, Mode::empty(), INSIDE)?;
        HostDir::from(dir).rename(path.file_name().unwrap_or_default(), to, name, 0)
    }
}
