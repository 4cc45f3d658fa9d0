//! The files in a disk, read without the kernel.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::Arc;

use crate::block::BlockDevice;
use crate::error::{Error, ErrorKind, Result};
use crate::filesystem::ext4::mounted::{Attributes, Mounted};
use crate::filesystem::{self, path};

const TYPE: u16 = 0o170_000;
const DIRECTORY: u16 = 0o040_000;
const REGULAR: u16 = 0o100_000;
const LINK: u16 = 0o120_000;
/// Names that are asked for at a time.
const LISTED: usize = 512;

/// The ext2, ext3 or ext4 file system on a disk or in one of its partitions, for reading. Nothing is
/// mounted and no privilege is needed.
///
/// Links are followed within the disk: nothing leads out of it.
pub struct Files {
    mounted: Mounted,
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DirEntry {
    /// The name.
    pub name: OsString,
    /// Length in bytes.
    pub len: u64,
    /// Type and permissions, as `st_mode`.
    pub mode: u16,
}

impl DirEntry {
    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.mode & TYPE == DIRECTORY
    }

    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        self.mode & TYPE == REGULAR
    }

    /// Whether it is a symbolic link.
    pub fn is_symlink(&self) -> bool {
        self.mode & TYPE == LINK
    }
}

impl Files {
    /// Opens the file system on `disk`, or in its partition of that number.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] names what is there instead; [`ErrorKind::Invalid`] for a disk with
    /// partitions of which none was named, and lists them.
    pub fn open(disk: Arc<dyn BlockDevice>, partition: Option<u32>) -> Result<Files> {
        Ok(Files { mounted: filesystem::open(disk, partition, true)? })
    }

    /// All bytes of the file at `path`, from the root of the file system.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where nothing has that name; [`ErrorKind::NoSpace`] for a file that is
    /// larger than memory.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<Vec<u8>> {
        let path = path.as_ref();
        let file = self.find(path, REGULAR, "is no regular file in the disk")?;
        let full = || Error::new(ErrorKind::NoSpace, "no memory for so many bytes").at_path(path);
        let len = usize::try_from(file.size).map_err(|_| full())?;
        let mut bytes = Vec::new();
        // The length is the disk's word.
        bytes.try_reserve_exact(len).map_err(|_| full())?;
        bytes.resize(len, 0);
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.mounted.read(file.inode, done as u64, rest)? {
                0 => break,
                some => done += some,
            }
        }
        bytes.truncate(done);
        Ok(bytes)
    }

    /// The names in the directory at `path`, but its own and its parent's.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where nothing has that name.
    pub fn list(&self, path: impl AsRef<Path>) -> Result<Vec<DirEntry>> {
        let directory = self.find(path.as_ref(), DIRECTORY, "is no directory in the disk")?;
        let (mut after, mut all) = (0, Vec::new());
        loop {
            let some = self.mounted.list(directory.inode, after, LISTED)?;
            let Some(last) = some.last() else { return Ok(all) };
            after = last.next;
            for name in some.into_iter().filter(|n| !matches!(&n.name[..], b"." | b"..")) {
                let known = self.mounted.attributes(name.inode)?;
                let entry = OsString::from_vec(name.name);
                all.push(DirEntry { name: entry, len: known.size, mode: known.mode });
            }
        }
    }

    fn find(&self, at: &Path, kind: u16, otherwise: &str) -> Result<Attributes> {
        let name: &OsStr = at.as_ref();
        let file = path::file(&self.mounted, name.as_bytes(), true)?;
        match file.mode & TYPE == kind {
            true => Ok(file),
            false => Err(Error::invalid(otherwise).at_path(at)),
        }
    }
}

impl std::fmt::Debug for Files {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Files").finish_non_exhaustive()
    }
}
