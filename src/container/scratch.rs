//! Where the processes of a container meet: a directory that only they see anything in.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::unistd::geteuid;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use std::os::fd::AsFd;

use super::sys::{self, Attributes};
use crate::error::{Error, Result};

/// The longest path of a socket is 108 bytes; this is what stands before its name.
const LONGEST: usize = 90;

/// The directory, whose contents are this container's alone.
#[derive(Debug, Clone)]
pub(super) struct Scratch(PathBuf);

impl Scratch {
    /// Finds a directory that belongs to this user, made where it is missing. Nothing is put into
    /// it but by [`cover`](Scratch::cover).
    ///
    /// # Errors
    /// Where there is none, with what became of the last.
    pub(super) fn find(host_root: bool) -> Result<Scratch> {
        let run = host_root.then(|| PathBuf::from("/run/vdisk"));
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
        let runtime = runtime.map(|dir| PathBuf::from(dir).join("vdisk"));
        let makeshift = std::env::temp_dir().join(format!("vdisk-{}", geteuid()));
        let mut failed = None;
        for parent in [run, runtime, Some(makeshift)].into_iter().flatten() {
            let dir = parent.join("container");
            if dir.as_os_str().len() > LONGEST {
                continue;
            }
            match own(&parent).and_then(|()| own(&dir)) {
                Ok(()) => return Ok(Scratch(dir)),
                Err(e) => {
                    failed = Some(Error::io("cannot make a directory to work in", e).at_path(dir))
                }
            }
        }
        Err(failed.unwrap_or_else(|| Error::invalid("TMPDIR is too long for a socket's path")))
    }

    /// The directory that a stage was told of.
    pub(super) fn at(path: &Path) -> Scratch {
        Scratch(path.to_owned())
    }

    /// Its path.
    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Covers the directory by an empty one of this mount namespace's own, with a place for a root
    /// and this program in it.
    pub(super) fn cover(&self) -> Result<()> {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("tmpfs"), &self.0, Some("tmpfs"), flags, Some("mode=0700"))
            .map_err(|e| Error::io("cannot mount a tmpfs", e.into()).at_path(&self.0))?;
        fs::create_dir(self.root())
            .and_then(|()| self.bind_executable())
            .map_err(|e| Error::io("cannot prepare the container", e).at_path(&self.0))
    }

    /// An empty directory.
    pub(super) fn root(&self) -> PathBuf {
        self.0.join("root")
    }

    /// The socket of the host process.
    pub(super) fn control(&self) -> PathBuf {
        self.0.join("control")
    }

    /// The container's network, where something is connected to it.
    pub(super) fn network(&self) -> PathBuf {
        self.0.join("network")
    }

    /// This program.
    pub(super) fn executable(&self) -> PathBuf {
        self.0.join("vdisk")
    }

    /// Shows this binary as a file on a read-only mount. A program in the container that gets hold
    /// of /proc/PID/exe of a process on its way in cannot write through such a mount.
    fn bind_executable(&self) -> io::Result<()> {
        let at = self.executable();
        let running = fs::metadata("/proc/self/exe")?;
        let installed = fs::read_link("/proc/self/exe")?;
        let same =
            |found: fs::Metadata| (found.dev(), found.ino()) == (running.dev(), running.ino());
        let source = if fs::metadata(&installed).is_ok_and(same) {
            fs::File::create(&at)?;
            installed
        } else {
            // The binary was replaced while it runs; the stages must be of one version.
            fs::copy("/proc/self/exe", &at)?;
            at.clone()
        };
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(rustix::fs::CWD, &source, flags)?;
        let set = nix::libc::MOUNT_ATTR_RDONLY
            | nix::libc::MOUNT_ATTR_NOSUID
            | nix::libc::MOUNT_ATTR_NODEV;
        sys::set_attributes(tree.as_fd(), Attributes { set, recursive: false })?;
        move_mount(&tree, "", rustix::fs::CWD, &at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        Ok(())
    }
}

/// A directory that is this user's, and that nobody else can change.
fn own(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let meta = fs::symlink_metadata(dir)?;
    if !meta.is_dir() || meta.uid() != geteuid().as_raw() || meta.mode() & 0o022 != 0 {
        let text = "it belongs to, or is open to, somebody else";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(())
}
