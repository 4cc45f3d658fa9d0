//! A lower layer of an overlay: a tree of files that nobody changes while it is used. A directory
//! of the host is one ([`crate::host`]), and the files in a disk are to be another. Knows no overlay.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use crate::attr::{Attr, DirEntry, StatFs};

/// A tree of files for reading, for many threads at once.
///
/// Nothing in it is ever followed: a symbolic link is a file like others, `..` is refused, and no
/// path leads out of the tree.
pub trait Layer: Send + Sync {
    /// The root directory.
    fn root(&self) -> io::Result<Arc<dyn LayerDir>>;

    /// The directory at a path from the root (names with `/` between them, none of them `.` or
    /// `..`); `ENOTDIR` or `ENOENT` where there is none.
    fn dir(&self, path: &Path) -> io::Result<Arc<dyn LayerDir>> {
        let mut at = self.root()?;
        for part in path.components() {
            let std::path::Component::Normal(name) = part else {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            };
            at = at.dir(name)?;
        }
        Ok(at)
    }

    /// Tells the file systems apart that layers stand on: layers with the same number share
    /// inode numbers. On the host, the device number.
    fn device(&self) -> u64;

    /// Tells this file system from all others, in handles that are kept ([`FileHandle`]).
    fn uuid(&self) -> [u8; 16];

    /// The file system's attributes.
    fn statfs(&self) -> io::Result<StatFs>;
}

/// What finds a file again in its file system whatever its name: struct file_handle of
/// name_to_handle_at(2).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FileHandle {
    /// `handle_type`; below 256.
    pub kind: u8,
    /// `f_handle`; at most 128 bytes.
    pub bytes: Vec<u8>,
}

/// A directory in a layer. `name` is always one component; `None` means the directory itself.
pub trait LayerDir: Send + Sync {
    /// The attributes, `None` where there is no such name. A symbolic link's are its own.
    fn attr(&self, name: Option<&OsStr>) -> io::Result<Option<Attr>>;

    /// A directory in it.
    fn dir(&self, name: &OsStr) -> io::Result<Arc<dyn LayerDir>>;

    /// Every name in it but `.` and `..`, in no order.
    fn entries(&self) -> io::Result<Vec<DirEntry>>;

    /// Opens a regular file for reading.
    fn open(&self, name: &OsStr) -> io::Result<Arc<dyn LayerFile>>;

    /// The target of a symbolic link.
    fn readlink(&self, name: &OsStr) -> io::Result<OsString>;

    /// An extended attribute; `None` where there is none, `EOPNOTSUPP` where there can be none.
    fn xattr(&self, name: Option<&OsStr>, key: &OsStr) -> io::Result<Option<Vec<u8>>>;

    /// As [`xattr`](LayerDir::xattr), but `None` also where there can be none or none is shown.
    fn mark(&self, name: Option<&OsStr>, key: &OsStr) -> io::Result<Option<Vec<u8>>> {
        match self.xattr(name, key) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EPERM)) => Ok(None),
            found => found,
        }
    }

    /// The names of the extended attributes.
    fn xattrs(&self, name: Option<&OsStr>) -> io::Result<Vec<OsString>>;

    /// A handle of the file; `None` where the file system has none.
    fn handle(&self, name: Option<&OsStr>) -> io::Result<Option<FileHandle>>;
}

/// A regular file in a layer, open for reading.
pub trait LayerFile: Send + Sync {
    /// The attributes.
    fn attr(&self) -> io::Result<Attr>;

    /// Fills `buf` as far as the file reaches.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize>;

    /// `SEEK_DATA` (`libc::SEEK_DATA`) and `SEEK_HOLE`; `ENXIO` past the end.
    fn seek(&self, offset: u64, whence: i32) -> io::Result<u64>;

    /// The file of the host, where it is one: for copies and reads that the kernel does alone.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
