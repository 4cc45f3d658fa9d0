//! A file that gets its name only when it is whole.
//!
//! Until then it has no name at all, so that a process that is killed leaves nothing behind. Where
//! the file system cannot make nameless files, it has a hidden name that ends in `.draft`.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::syncfs;

use super::file::NEW;
use super::maker::maker;
use super::name::{
    Differs, Form, directory, fitting, refuse_device, remove, rename, sync_directory,
};
use super::{Access, FileOptions, FileStorage, Storage, attributes, unsynced};
use crate::error::{Error, Result};

/// A file on its way to a name.
pub struct Draft {
    storage: Arc<FileStorage>,
    target: PathBuf,
    /// The hidden name, where it has one.
    hidden: Option<PathBuf>,
    /// Whether it is to take the place of the file that has its name.
    replaces: bool,
}

/// A file that is to be as accessible as another is nobody else's until it is.
const PRIVATE: u32 = 0o600;

impl Draft {
    /// Begins a new file that will stand at `target`, in the same directory, empty, open and locked
    /// for writing.
    pub fn new(target: &Path) -> Result<Draft> {
        Draft::begin(target, NEW)
    }

    /// As [`new`](Draft::new), for a file that will take the place of the one at `target`, with its
    /// mode, owner, group, access list and labels.
    ///
    /// # Errors
    /// Where this user cannot make such a file.
    pub fn replacing(target: &Path) -> Result<Draft> {
        let mut draft = Draft::begin(target, PRIVATE)?;
        draft.replaces = true;
        attributes::copy(target, draft.storage.file())?;
        Ok(draft)
    }

    fn begin(target: &Path, mode: u32) -> Result<Draft> {
        let nameless = maker().nameless(directory(target), mode);
        let options = FileOptions { access: Some(Access::Write), write: true };
        let (storage, hidden) = match nameless {
            Ok(file) => (FileStorage::from_file(file, target, options)?, None),
            Err(e) if has_no_nameless_files(&e) => {
                let name = hidden_name(target);
                (FileStorage::create_as(&name, mode)?, Some(name))
            }
            Err(e) => return Err(Error::io("could not be created", e).at_path(target)),
        };
        let target = target.to_path_buf();
        Ok(Draft { storage: Arc::new(storage), target, hidden, replaces: false })
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
        refuse_device(&self.target)?;
        if self.replaces {
            // Somebody may have changed who may use it since the draft was begun.
            let file = self.storage.file();
            attributes::copy(&self.target, file)?;
            file.sync_all()
                .map_err(|e| Error::io("could not be synced", e).at_path(&self.target))?;
        } else {
            self.storage.sync()?;
        }
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
        let named = match &self.hidden {
            Some(hidden) => maker().link(hidden, name),
            None => maker().name(self.storage.file(), name),
        };
        named.map_err(|e| Error::io("could not be created", e).at_path(name))
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

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(hidden) = &self.hidden {
            // A leftover is only space, and its name says what it is.
            let _ = remove(hidden);
        }
    }
}

fn has_no_nameless_files(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EOPNOTSUPP | Errno::EISDIR))
}

/// What the number of a process, that of a draft and the rest of a draft's name take at most.
const DRAFT: usize = 32;

/// A name beside `target` that no process has, and that is put away where its process is gone.
pub(crate) fn hidden_name(target: &Path) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let middle = format!("{}-{number}", std::process::id());
    target.with_file_name(draft_form(target).name(&middle))
}

/// How the drafts of a file are called: by the process that makes them, and a number.
pub fn draft_form(target: &Path) -> Form {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let before = format!(".{}.", fitting(&name, DRAFT));
    Form { before, differs: Differs::Numbers, behind: ".draft".to_owned() }
}

/// Renames a file over another, whose place it takes with its mode, owner, group, access list and
/// labels; not yet durably.
pub fn rename_over(from: &Path, to: &Path) -> Result<()> {
    if to.symlink_metadata().is_ok() {
        make_like(from, to)?;
    }
    rename(from, to)
}

/// Makes the file at `path` as accessible as the one at `like`, durably.
pub fn make_like(path: &Path, like: &Path) -> Result<()> {
    // A link in its place could lead to any file.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(path)
        .map_err(|e| Error::io("could not be opened", e).at_path(path))?;
    if attributes::copy(like, &file)? {
        file.sync_all().map_err(|e| Error::io("could not be synced", e).at_path(path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

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
