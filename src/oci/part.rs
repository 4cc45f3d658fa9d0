//! A blob on its way into the store, a part of which may have come already: an interrupted download goes on from there.
//!
//! It has a hidden name beside the blobs until all of it is there and is what its digest says.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest as _, Sha256};

use super::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::name::{remove, sync_directory};

/// How the hidden names begin.
const PREFIX: &str = ".part-";
const PIECE: usize = 256 << 10;

/// A blob of which some may be there. Nobody else writes to it meanwhile.
pub struct Part {
    file: Flock<File>,
    path: PathBuf,
    target: PathBuf,
    hash: Sha256,
    len: u64,
}

impl Part {
    /// What is there of the blob that will stand at `target`; `None` where all of it is. Waits for another who is at it.
    pub fn open(target: &Path) -> Result<Option<Part>> {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let path = target.with_file_name(format!("{PREFIX}{name}"));
        let failed = |e| Error::io("cannot be kept", e).at_path(&path);
        loop {
            if target.exists() {
                return Ok(None);
            }
            let mut options = fs::OpenOptions::new();
            let options = options.read(true).write(true).create(true).truncate(false);
            let file = options.open(&path).map_err(failed)?;
            let file =
                Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| failed(e.into()))?;
            // Whoever was at it before may have finished it, or taken it away.
            let mine = file.metadata().map_err(failed)?;
            let named = fs::metadata(&path).is_ok_and(|meta| meta.ino() == mine.ino());
            if named {
                let target = target.to_owned();
                let mut part = Part { file, path, target, hash: Sha256::new(), len: 0 };
                part.read()?;
                return Ok(Some(part));
            }
        }
    }

    fn failed(&self, e: std::io::Error) -> Error {
        Error::io("cannot be kept", e).at_path(&self.path)
    }

    fn read(&mut self) -> Result<()> {
        let mut buffer = vec![0; PIECE];
        loop {
            let read = (&*self.file).read(&mut buffer).map_err(|e| self.failed(e))?;
            if read == 0 {
                return Ok(());
            }
            self.hash.update(buffer.get(..read).unwrap_or_default());
            self.len += read as u64;
        }
    }

    /// Bytes that are there.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Puts more behind what is there.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        (&*self.file).write_all(bytes).map_err(|e| self.failed(e))?;
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Forgets what is there.
    pub fn reset(&mut self) -> Result<()> {
        use std::io::Seek;
        self.file.set_len(0).and_then(|()| (&*self.file).rewind()).map_err(|e| self.failed(e))?;
        (self.hash, self.len) = (Sha256::new(), 0);
        Ok(())
    }

    /// Gives the blob its name, durably.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where it is not what `digest` says: nothing of it is kept.
    pub fn finish(self, digest: Digest) -> Result<()> {
        let found = Digest(self.hash.clone().finalize().into());
        if found != digest {
            remove(&self.path)?;
            return Err(Error::corrupt(format!(
                "a blob holds something else than its digest says ({digest})"
            )));
        }
        self.file.sync_all().map_err(|e| self.failed(e))?;
        fs::rename(&self.path, &self.target).map_err(|e| self.failed(e))?;
        sync_directory(&self.target)
    }
}

/// Parts in `dir` that nobody is at.
pub fn left_behind(dir: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e| Error::io("cannot be listed", e).at_path(dir);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.starts_with(PREFIX) {
            continue;
        }
        let file = match File::open(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            file => file.map_err(failed)?,
        };
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(_) => found.push(path),
            Err((_, nix::Error::EWOULDBLOCK)) => {}
            Err((_, e)) => {
                return Err(Error::new(ErrorKind::Io, format!("no lock: {e}")).at_path(path));
            }
        }
    }
    found.sort();
    Ok(found)
}
