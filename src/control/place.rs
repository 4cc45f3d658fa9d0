//! Where control sockets are, and how they are called.

use std::fs::{self, DirBuilder};
use std::io::ErrorKind as IoErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::wire::Named;
use crate::chain;
use crate::error::{Error, ErrorKind, Result};

/// A directory of this user's that nobody else can write to; made where it is missing.
///
/// # Errors
/// [`ErrorKind::Denied`] where somebody else owns it or may write to it.
pub fn directory() -> Result<PathBuf> {
    let user = nix::unistd::geteuid();
    let dir = match std::env::var_os("XDG_RUNTIME_DIR") {
        _ if user.is_root() => PathBuf::from("/run/vdisk"),
        Some(dir) if !dir.is_empty() => PathBuf::from(dir).join("vdisk"),
        _ => std::env::temp_dir().join(format!("vdisk-{user}")),
    };
    let failed = |e| Error::io("cannot use the directory for control sockets", e).at_path(&dir);
    match DirBuilder::new().mode(0o700).create(&dir) {
        Err(e) if e.kind() != IoErrorKind::AlreadyExists => return Err(failed(e)),
        _ => {}
    }
    let meta = fs::symlink_metadata(&dir).map_err(failed)?;
    if !meta.is_dir() || meta.uid() != user.as_raw() || meta.mode() & 0o022 != 0 {
        let text = "the directory for control sockets belongs to, or is open to, somebody else";
        return Err(Error::new(ErrorKind::Denied, text).at_path(dir));
    }
    Ok(dir)
}

/// The file that the head's name means now.
///
/// # Errors
/// [`ErrorKind::NotFound`] where there is none.
pub fn named(disk: &Path) -> Result<Named> {
    let meta = fs::metadata(disk).map_err(|e| Error::io("could not be found", e).at_path(disk))?;
    Ok(Named { device: meta.dev(), inode: meta.ino() })
}

/// What the names of the sockets of a disk's holders begin with: its id, or for a file without one
/// the file's own numbers.
pub fn prefix(disk: &Path) -> Result<String> {
    // What is no image has no label either.
    let label = chain::peek(disk).ok().flatten().and_then(|p| p.identity.label);
    Ok(match label {
        Some(label) => format!("disk-{}-", label.disk.simple()),
        None => {
            let Named { device, inode } = named(disk)?;
            format!("file-{device:x}-{inode:x}-")
        }
    })
}

/// The socket of the mount on device `major:minor`, as the kernel's table of mounts shows it.
pub fn mount(device: &str) -> String {
    format!("mount-{}.sock", device.replace(':', "-"))
}
