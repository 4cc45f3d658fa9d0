//! Where control sockets are, and how they are called.

use std::fs::{self, DirBuilder};
use std::io::ErrorKind as IoErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::unistd::Uid;

use super::wire::Named;
use crate::error::{Error, ErrorKind, Result};
use crate::open;

/// Where control sockets are: in a directory of this user's that nobody else can write to, which is made
/// where it is missing.
///
/// # Errors
/// [`ErrorKind::Denied`] where somebody else owns it or may write to it.
pub fn directory() -> Result<PathBuf> {
    match usual().map(own) {
        // Without a /run, or where it cannot be written to.
        Some(Err(e)) if e.kind() != ErrorKind::Denied => own(makeshift()),
        Some(done) => done,
        None => own(makeshift()),
    }
}

/// Whose process this is, as those count users among whom its user namespace was made: the superuser
/// of a namespace is somebody there.
pub fn user() -> Uid {
    static USER: OnceLock<Uid> = OnceLock::new();
    *USER.get_or_init(|| {
        let user = nix::unistd::geteuid();
        let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        outside(&map, user.as_raw()).map_or(user, Uid::from_raw)
    })
}

/// uid_map(5): a line is the first number inside, the first outside, and how many.
fn outside(map: &str, user: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split_ascii_whitespace().map(|word| word.parse::<u32>().ok());
        let (inside, outside, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let at = user.checked_sub(inside).filter(|at| *at < count)?;
        outside.checked_add(at)
    })
}

/// Remembers whose process this is. To be called before it goes into a user namespace, in which its
/// user has another number: others look for its socket where it would be without.
pub fn settle() {
    user();
}

/// Where others look for them.
fn usual() -> Option<PathBuf> {
    if user().is_root() {
        return Some(PathBuf::from(RUN));
    }
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    runtime.map(|dir| PathBuf::from(dir).join("vdisk"))
}

/// Root's directory.
const RUN: &str = "/run/vdisk";

/// The directory of those who have no better one. Who has another `TMPDIR` does not find it.
fn makeshift() -> PathBuf {
    std::env::temp_dir().join(format!("vdisk-{}", user()))
}

/// Where control sockets are, if that is not where others would look for them.
pub fn elsewhere() -> Option<PathBuf> {
    let usual = usual()?;
    directory().ok().filter(|dir| *dir != usual)
}

fn own(dir: PathBuf) -> Result<PathBuf> {
    let user = nix::unistd::geteuid();
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
    let label = open::peek(disk).ok().flatten().and_then(|p| p.identity.label);
    Ok(match label {
        Some(label) => format!("disk-{}-", label.disk.simple()),
        None => {
            let Named { device, inode } = named(disk)?;
            format!("file-{device:x}-{inode:x}-")
        }
    })
}

/// The socket of a mount whose device is not known yet.
pub fn mounting() -> String {
    format!("mounting-{}-0.sock", std::process::id())
}

/// The socket of the mount on device `major:minor`, as the kernel's table of mounts shows it.
pub fn mount(device: &str) -> String {
    format!("mount-{}.sock", device.replace(':', "-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_of_a_namespace_is_found_outside() {
        assert_eq!(outside("         0          0 4294967295\n", 0), Some(0));
        let map = "0 1000 1\n1 100000 65536\n";
        assert_eq!([0, 1, 33].map(|user| outside(map, user)), [1000, 100_000, 100_032].map(Some));
        assert_eq!(outside(map, 70_000), None);
        assert_eq!(outside("x 1 2\n", 0), None);
    }
}
