//! What an instance without a terminal prints: kept in a file of bounded size, and in the one before.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// How large the file becomes before a new one is begun, in bytes.
pub const LOG_SIZE: u64 = 10 << 20;

/// Where it is kept.
pub(super) struct Log {
    path: PathBuf,
    file: File,
    len: u64,
    size: u64,
}

impl Log {
    /// The log in the directory of an instance, of at most `size` bytes, twice.
    pub(super) fn open(dir: &Path, size: u64) -> io::Result<Log> {
        let path = dir.join("log");
        let file = File::options().append(true).create(true).open(&path)?;
        let len = file.metadata()?.len();
        Ok(Log { path, file, len, size })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.len > 0 && self.len + bytes.len() as u64 > self.size {
            fs::rename(&self.path, self.path.with_extension("1"))?;
            *self = Log::open(self.path.parent().unwrap_or(Path::new(".")), self.size)?;
        }
        self.file.write_all(bytes)?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Keeps all that comes, until there is an end of it. What cannot be kept is lost: who prints must
    /// not be held up.
    pub(super) fn fill(mut self, mut from: impl Read) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            let _ = self.write(buffer.get(..length).unwrap_or_default());
        }
    }
}

/// Reads a log while it is written.
pub struct Tail {
    path: PathBuf,
    /// The file that is being read, after the one before.
    files: Vec<File>,
}

impl Tail {
    /// The log in an instance's directory from its beginning, as far as it is kept.
    ///
    /// # Errors
    /// Where there is none.
    pub fn open(dir: &Path) -> io::Result<Tail> {
        let path = dir.join("log");
        loop {
            let before = File::open(path.with_extension("1")).ok();
            let file = File::open(&path)?;
            // Between the two a new one may have been begun.
            let again = File::open(path.with_extension("1")).ok();
            if number(before.as_ref()) == number(again.as_ref()) {
                // The last is read first.
                return Ok(Tail {
                    path,
                    files: [Some(file), before].into_iter().flatten().collect(),
                });
            }
        }
    }

    /// The same from where it ends now.
    ///
    /// # Errors
    /// As [`open`](Tail::open).
    pub fn at_end(dir: &Path) -> io::Result<Tail> {
        let path = dir.join("log");
        let mut file = File::open(&path)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Tail { path, files: vec![file] })
    }

    /// Reads on; 0 where there is nothing new.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let Some(file) = self.files.last_mut() else { return Ok(0) };
            // Looked at before it is read to its end: nothing is written to it after that.
            let newest = File::open(&self.path).ok();
            match file.read(buffer)? {
                0 if self.files.len() > 1 => drop(self.files.pop()),
                0 if newest.is_some() && number(newest.as_ref()) != number(self.files.last()) => {
                    self.files = newest.into_iter().collect();
                }
                length => return Ok(length),
            }
        }
    }
}

/// All that is in the log of an instance's directory; nothing where there is none.
pub(super) fn all(dir: &Path) -> Vec<u8> {
    let (mut text, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
    let Ok(mut tail) = Tail::open(dir) else { return text };
    while let Ok(length @ 1..) = tail.read(&mut buffer) {
        text.extend_from_slice(buffer.get(..length).unwrap_or_default());
    }
    text
}

/// How much of it is kept, in bytes.
pub(super) fn len(dir: &Path) -> usize {
    let len = |name| fs::metadata(dir.join(name)).map_or(0, |meta| meta.len());
    usize::try_from(len("log") + len("log.1")).unwrap_or(usize::MAX)
}

fn number(file: Option<&File>) -> Option<(u64, u64)> {
    file?.metadata().ok().map(|meta| (meta.dev(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_bounded_and_read_across_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::open(dir.path(), 100).unwrap();
        log.write(&[b'a'; 60]).unwrap();
        let mut tail = Tail::open(dir.path()).unwrap();
        let mut read = || {
            let (mut all, mut buffer) = (String::new(), [0; 7]);
            while let length @ 1.. = tail.read(&mut buffer).unwrap() {
                all.push_str(std::str::from_utf8(&buffer[..length]).unwrap());
            }
            all
        };
        assert_eq!(read(), "a".repeat(60));
        log.write(&[b'b'; 60]).unwrap();
        assert_eq!(read(), "b".repeat(60));
        log.write(&[b'c'; 60]).unwrap();
        assert_eq!(read(), "c".repeat(60));
        let lens = ["log", "log.1"].map(|name| fs::metadata(dir.path().join(name)).unwrap().len());
        assert_eq!(lens, [60, 60]);
        let (mut tail, mut text) = (Tail::open(dir.path()).unwrap(), Vec::new());
        let mut buffer = [0; 50];
        while let length @ 1.. = tail.read(&mut buffer).unwrap() {
            text.extend_from_slice(&buffer[..length]);
        }
        assert_eq!(text, ["b".repeat(60), "c".repeat(60)].concat().into_bytes());
    }
}
