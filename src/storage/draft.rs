//! A file that gets its name only when it is whole.
//!
//! Until then it has no name at all, so that a process that is killed leaves nothing behind. Where
//! the file system cannot make nameless files, it has a hidden name that ends in `.draft`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::unistd::{linkat, syncfs};

use super::{Access, FileOptions, FileStorage, Storage};
use crate::error::{Error, Result};

/// A file on its way to a name.
pub struct Draft {
    storage: Arc<FileStorage>,
    target: PathBuf,
    /// The hidden name, where it has one.
    hidden: Option<PathBuf>,
}

impl Draft {
    /// Begins a file that will stand at `target`, in the same directory, empty, open and locked for
    /// writing.
    pub fn new(target: &Path) -> Result<Draft> {
        let nameless = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlag::O_TMPFILE.bits())
            .mode(0o644)
            .open(directory(target));
        let options = FileOptions { access: Some(Access::Write), write: true };
        let (storage, hidden) = match nameless {
            Ok(file) => (FileStorage::from_file(file, target, options)?, None),
            Err(e) if has_no_nameless_files(&e) => {
                let name = hidden_name(target);
                (FileStorage::create(&name)?, Some(name))
            }
            Err(e) => return Err(Error::io("could not be created", e).at_path(target)),
        };
        Ok(Draft { storage: Arc::new(storage), target: target.to_path_buf(), hidden })
    }

    /// The file's bytes. Syncing them does nothing yet: a file without a name needs no order of
    /// writes, and getting its name makes all of it durable at once.
    pub fn storage(&self) -> Arc<dyn Storage> {
        unsynced(self.storage.clone())
    }

    /// The file itself.
    pub fn file(&self) -> &Arc<FileStorage> {
        &self.storage
    }

    /// Gives the file its name, which nothing has yet, durably.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`](crate::ErrorKind::Exists) where something has the name: it stays.
    pub fn publish(self) -> Result<()> {
        self.storage.sync()?;
        let target = self.target.clone();
        self.name()?;
        sync_directory(&target)
    }

    /// Gives the file its name; what it holds is durable, the name is not yet.
    fn name(mut self) -> Result<()> {
        let target = self.target.clone();
        self.link(&target)?;
        self.hidden.take().map_or(Ok(()), |hidden| remove(&hidden))
    }

    /// Gives the file the name of one that is there, which it replaces in one step, durably.
    pub fn replace(self) -> Result<()> {
        let target = self.target.clone();
        self.take_name()?;
        sync_directory(&target)
    }

    /// Gives the durable file the name of one that is there, which it replaces in one step. The
    /// name is durable when the directory is synced. After a failure the old file has its name.
    pub fn take_name(mut self) -> Result<()> {
        self.storage.sync()?;
        if self.hidden.is_none() {
            let name = hidden_name(&self.target);
            self.link(&name)?;
            self.hidden = Some(name);
        }
        if let Some(hidden) = &self.hidden {
            rename(hidden, &self.target)?;
        }
        self.hidden = None;
        Ok(())
    }

    fn link(&self, name: &Path) -> Result<()> {
        let open = format!("/proc/self/fd/{}", self.storage.file().as_raw_fd());
        let from = self.hidden.as_deref().unwrap_or(Path::new(&open));
        linkat(AT_FDCWD, from, AT_FDCWD, name, AtFlags::AT_SYMLINK_FOLLOW)
            .map_err(|e| Error::io("could not be created", e.into()).at_path(name))
    }
}

/// Gives many files their names, which nothing has yet, durably: with one barrier for all where
/// they are many. Where one fails, those before it have their names.
pub fn publish_all(drafts: Vec<Draft>) -> Result<()> {
    let many = drafts.len() > 8;
    let mut synced: Vec<u64> = Vec::new();
    let mut directories: Vec<PathBuf> = Vec::new();
    for draft in &drafts {
        let file = draft.storage.file();
        let device = draft.storage.identity()?.0;
        if !many {
            draft.storage.sync()?;
        } else if !synced.contains(&device) {
            syncfs(file)
                .map_err(|e| Error::io("could not be synced", e.into()).at_path(&draft.target))?;
            synced.push(device);
        }
        if !directories.iter().any(|known| directory(known) == directory(&draft.target)) {
            directories.push(draft.target.clone());
        }
    }
    let named = drafts.into_iter().try_for_each(Draft::name);
    let synced = directories.iter().try_for_each(|path| sync_directory(path));
    named.and(synced)
}

/// The bytes of a file that nobody will look for after a crash: syncing them does nothing.
///
/// The order in which a program that reads the file sees the writes stays.
pub fn unsynced(file: Arc<dyn Storage>) -> Arc<dyn Storage> {
    Arc::new(Unsynced(file))
}

struct Unsynced(Arc<dyn Storage>);

impl Storage for Unsynced {
    fn len(&self) -> Result<u64> {
        self.0.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.0.set_len(len)
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.0.read_at(offset, bufs)
    }

    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.0.write_at(offset, bufs)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.0.punch_hole(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.0.write_zeroes(offset, len)
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        self.0.next_data(offset)
    }

    fn allocated(&self) -> Result<u64> {
        self.0.allocated()
    }

    fn about_to(&self, step: &'static str) {
        self.0.about_to(step);
    }

    fn as_file(&self) -> Option<&FileStorage> {
        self.0.as_file()
    }

    fn share(&self, offset: u64, from: &dyn Storage, from_offset: u64, len: u64) -> Result<bool> {
        self.0.share(offset, from, from_offset, len)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(hidden) = &self.hidden {
            // A leftover is only space, and its name says what it is.
            let _ = fs::remove_file(hidden);
        }
    }
}

fn has_no_nameless_files(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EOPNOTSUPP | Errno::EISDIR))
}

/// A name beside `target` that nobody else uses.
fn hidden_name(target: &Path) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    target.with_file_name(format!(".{name}.{}-{number}.draft", std::process::id()))
}

/// The directory that holds `path`.
pub fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Makes the names in the directory of `path` durable.
pub fn sync_directory(path: &Path) -> Result<()> {
    let dir = directory(path);
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(|e| Error::io("could not be synced", e).at_path(dir))
}

/// Renames a file over another, not yet durably.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|e| Error::io("could not be renamed", e).at_path(from))
}

/// Gives a file a second name, not yet durably.
pub fn link(from: &Path, to: &Path) -> Result<()> {
    fs::hard_link(from, to).map_err(|e| Error::io("could not be linked", e).at_path(to))
}

/// Takes a name away from a file, not yet durably.
pub fn remove(path: &Path) -> Result<()> {
    fs::remove_file(path).map_err(|e| Error::io("could not be removed", e).at_path(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_draft_leaves_nothing_until_it_is_published() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let names = || fs::read_dir(dir.path()).unwrap().count();
        drop(Draft::new(&path).unwrap());
        assert_eq!(names(), 0);
        let draft = Draft::new(&path).unwrap();
        draft.storage().write_all_at(0, b"one").unwrap();
        draft.publish().unwrap();
        assert_eq!(Draft::new(&path).unwrap().publish().unwrap_err().kind(), ErrorKind::Exists);
        let draft = Draft::new(&path).unwrap();
        draft.storage().write_all_at(0, b"two").unwrap();
        draft.replace().unwrap();
        assert_eq!((fs::read(&path).unwrap(), names()), (b"two".to_vec(), 1));
    }
}
