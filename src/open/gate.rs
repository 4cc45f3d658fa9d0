//! The gate: every file that is named inside an image passes here before it is opened.
//!
//! An image comes from anywhere and may be hostile: a guest that was given a raw disk writes whatever
//! header it likes there. The gate refuses names that are not plain paths, formats that are not
//! declared, chains without end and chains too long; and it lets an image that the user did not
//! vouch for reach only files that stand by it (see [`stands_by`]), or that its label proves to be
//! those on which this program put it (see [`crate::open::parent::vouches`]).

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, ErrorKind, Result};
pub use crate::formats::Format;
use crate::image::Backing;
use crate::qcow2;
use crate::storage::name::directory;

/// The most layers of one chain.
pub const MAX_DEPTH: usize = 4096;

/// Whether the user vouches for all that the images name which this process opens.
static FOLLOWED: AtomicBool = AtomicBool::new(false);

/// Notes that the user vouches for what the images of this process name, wherever that stands: the
/// default of [`OpenOptions::follow`](crate::open::OpenOptions::follow) from now on. For a program
/// that works for one user on the disks that he names.
pub fn follow_links() {
    FOLLOWED.store(true, Ordering::Relaxed);
}

pub(crate) fn follows_links() -> bool {
    FOLLOWED.load(Ordering::Relaxed)
}

/// Whether the file at `target`, which the image at `image` names, stands in the image's directory
/// or below it, all symbolic links followed. Both are regular files: where an image is a device, what
/// stands beside it are the host's other devices.
pub(crate) fn stands_by(image: &Path, target: &Path) -> bool {
    let is_file = |path: &Path| path.symlink_metadata().is_ok_and(|meta| meta.is_file());
    if image.parent() == target.parent() && is_file(image) && is_file(target) {
        // The layers of one disk, often hundreds: there is no link to follow.
        return true;
    }
    let (Ok(image_file), Ok(target)) = (fs::canonicalize(image), fs::canonicalize(target)) else {
        return false;
    };
    if !image_file.is_file() || !target.is_file() {
        return false;
    }
    let named_in = fs::canonicalize(directory(image)).ok();
    let roots = [named_in.as_deref(), image_file.parent()];
    roots.into_iter().flatten().any(|root| match root.parent() {
        Some(_) => target.starts_with(root),
        // All the host's files are below this one.
        None => target.parent() == Some(root),
    })
}

/// Whether `name` in the image at `image`, which means the file at `target`, leads beside it or below
/// it, and says so itself: an absolute name or one with `..` is a place of the host's.
pub(crate) fn reaches(image: &Path, name: &str, target: &Path) -> bool {
    let name = name.strip_prefix("file:").unwrap_or(name);
    let inside = |part| matches!(part, Component::Normal(_) | Component::CurDir);
    Path::new(name).components().all(inside) && stands_by(image, target)
}

/// The error for a file that the image at `image` names as its `what`, and that it may not reach.
pub(crate) fn refused(image: &Path, target: &Path, what: Named) -> Error {
    let mut message = format!(
        "names '{}' as its {what}, a place of the host's or outside its directory, and nothing shows that the \
         image was put on it here: a guest may have written that name. If you know the image, say \
         --follow, or its format (`--format qcow2`)",
        target.display()
    );
    if what == Named::Base {
        message += "; `vdisk rebase DISK --accept-base --follow` says it once and for all";
    }
    Error::new(ErrorKind::Denied, message).at_path(image)
}

/// Whether two names mean one file.
pub(crate) fn same_file(a: &Path, b: &Path) -> bool {
    matches!((file_key(a), file_key(b)), (Some(a), Some(b)) if a == b)
}

/// Device and inode number of the file that a name means, which all its names share.
pub(crate) fn file_key(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// What an image names a file as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Named {
    /// What it stands on.
    Base,
    /// Where its data are, all of them.
    Data,
    /// Where part of it is.
    Part,
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Named::Base => "backing file",
            Named::Data => "external data file",
            Named::Part => "further file",
        })
    }
}

/// Refuses `target`, which the image at `image` names so as its `what`, unless that [reaches] it. A
/// file that is not there is let through: who opens it says so.
///
/// [reaches]: reaches
pub(crate) fn admit_beside(image: &Path, name: &str, target: &Path, what: Named) -> Result<()> {
    if reaches(image, name, target) || fs::metadata(target).is_err() {
        return Ok(());
    }
    Err(refused(image, target, what))
}

/// What the gate has let through on the way down one chain.
pub(crate) struct Gate {
    /// Device and inode number of each layer's file.
    passed: Vec<(u64, u64)>,
}

impl Gate {
    pub fn new() -> Gate {
        Gate { passed: Vec::new() }
    }

    /// Notes the layer at `path`, before it is opened.
    pub fn pass(&mut self, path: &Path) -> Result<()> {
        let meta =
            fs::metadata(path).map_err(|e| Error::io("could not be found", e).at_path(path))?;
        let identity = (meta.dev(), meta.ino());
        if self.passed.contains(&identity) {
            let message = "stands below itself: its backing files form a loop";
            return Err(Error::corrupt(message).at_path(path));
        }
        if self.passed.len() >= MAX_DEPTH {
            let message = format!("the chain has more than {MAX_DEPTH} layers");
            return Err(Error::new(ErrorKind::Denied, message).at_path(path));
        }
        self.passed.push(identity);
        Ok(())
    }

    /// Forgets the layer that passed last: another is opened in its place.
    pub fn turn_back(&mut self) {
        self.passed.pop();
    }
}

/// The path and format of the layer that `child` names as its backing file; no format where the
/// child does not say it and it may be guessed.
pub(crate) fn admit(
    child: &Path,
    backing: &Backing,
    may_guess: bool,
) -> Result<(PathBuf, Option<Format>)> {
    let path = resolve(child, &backing.name)?;
    let Some(format) = &backing.format else {
        if may_guess {
            return Ok((path, None));
        }
        let message = format!(
            "names '{}' as its backing file without saying its format, and guessing from contents \
             that a guest may have written is not safe: record the format with `vdisk rebase \
             --unsafe --backing` or `qemu-img rebase -u -b '{}' -F FORMAT`",
            backing.name, backing.name
        );
        return Err(Error::new(ErrorKind::Denied, message).at_path(child));
    };
    let format = Format::from_name(format).map_err(|e| {
        let message = format!("declares its backing file's format: {}", e.message());
        Error::unsupported(message).at_path(child)
    })?;
    Ok((path, Some(format)))
}

/// How an image names the file at `path`, which is absolute or relative to the image's directory, so
/// that here and in QEMU it means that file: what stands before a colon is no protocol.
///
/// # Errors
/// [`ErrorKind::Unsupported`] where no image can name it.
pub(crate) fn record(path: &Path) -> Result<String> {
    let name = path.to_str().ok_or_else(|| {
        let message = "has a name that is not UTF-8, and no image can name it as what it stands on";
        Error::unsupported(message)
    })?;
    let name = if has_protocol(name) { format!("./{name}") } else { name.to_owned() };
    if name.len() > qcow2::MAX_BACKING_NAME {
        let message = format!(
            "has a path of {} bytes, and an image can name none of more than {}",
            name.len(),
            qcow2::MAX_BACKING_NAME
        );
        return Err(Error::unsupported(message));
    }
    Ok(name)
}

/// Whether a colon stands before the first slash: such a name is not taken for a path.
fn has_protocol(name: &str) -> bool {
    name.split('/').next().is_some_and(|first| first.contains(':'))
}

/// The path that a backing file's name means: relative to the directory of the image that names it.
pub fn resolve(child: &Path, name: &str) -> Result<PathBuf> {
    resolve_as(child, name, "backing file")
}

/// The path of the file that `child` names as its `what`.
pub(crate) fn resolve_as(child: &Path, name: &str, what: &str) -> Result<PathBuf> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    if has_protocol(name) {
        let message = format!(
            "names '{name}' as its {what}: only paths of files are opened for an image \
             (write './{name}' if it is one)"
        );
        return Err(Error::new(ErrorKind::Denied, message).at_path(child));
    }
    Ok(child.parent().unwrap_or(Path::new("")).join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_means_the_file_it_was_recorded_for() {
        let child = Path::new("/disks/web.qcow2");
        for name in
            ["b", "b:1", "file:x", "json:{}", "nbd://h/x", "../a:b/c", "-x", "a\n\"'\\,@% é"]
        {
            let recorded = record(Path::new(name)).unwrap();
            let meant = resolve(child, &recorded).unwrap();
            let same = meant.components().eq(Path::new("/disks").join(name).components());
            assert!(same, "{name:?} is recorded as {recorded:?}");
        }
        assert_eq!(record(Path::new("/a:b/c")).unwrap(), "/a:b/c");
        assert_eq!(record(Path::new("a/b:c")).unwrap(), "a/b:c");
        assert!(record(Path::new(&"x/".repeat(600))).is_err());
    }

    #[test]
    fn names_are_relative_to_the_image_and_protocols_are_refused() {
        let child = Path::new("/disks/web.qcow2");
        assert_eq!(resolve(child, "base.qcow2").unwrap(), Path::new("/disks/base.qcow2"));
        assert_eq!(resolve(child, "file:/b").unwrap(), Path::new("/b"));
        assert_eq!(resolve(child, "./a:b").unwrap(), Path::new("/disks/./a:b"));
        for name in ["json:{}", "nbd://host/x", "ssh:/x", "a:b"] {
            assert_eq!(resolve(child, name).unwrap_err().kind(), ErrorKind::Denied, "{name}");
        }
    }
}
