//! A file or block device on the host.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use nix::sys::stat::{major, minor};
use nix::sys::uio::{preadv, pwritev};
use nix::unistd::{Whence, lseek};

use super::Storage;
use super::lock::{self, Access};
use super::maker::maker;
use super::share;
use crate::error::{Error, ErrorKind, Result};

/// The most buffers of one system call (`IOV_MAX`).
const MAX_BUFS: usize = 1024;
/// What devices zero is a multiple of this many bytes, whatever their sectors are.
const BLOCK: u64 = 4096;

/// What everybody may do with a new file, less the umask.
pub(super) const NEW: u32 = 0o644;

/// An open file, locked as QEMU's file driver locks it.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    path: PathBuf,
    /// A device, which keeps its length.
    device: bool,
    /// The lock that is held on it.
    access: Mutex<Option<Access>>,
    /// The stretch of data that was found last: to find its end, the host may have to walk all of
    /// it. What became a hole since is at worst taken for data.
    stretch: Mutex<Range<u64>>,
}

/// How to open a file.
#[derive(Debug, Clone, Copy)]
pub struct FileOptions {
    /// What the opener does, and suffers others to do, while it is open; `None` takes no lock.
    pub access: Option<Access>,
    /// Whether writes are allowed.
    pub write: bool,
}

impl FileStorage {
    /// Opens a regular file, a block device, or one of the host's devices that hold nothing.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] names the process that holds a conflicting lock;
    /// [`ErrorKind::Unsupported`] for anything that is neither file nor block device.
    pub fn open(path: &Path, options: FileOptions) -> Result<FileStorage> {
        FileStorage::open_within(path, options, lock::manners().wait)
    }

    /// As [`open`](FileStorage::open), waiting no longer than `wait` for commands that hold the file.
    ///
    /// # Errors
    /// As [`open`](FileStorage::open).
    pub fn open_within(path: &Path, options: FileOptions, wait: Duration) -> Result<FileStorage> {
        loop {
            let file = FileStorage::open_unlocked(path, options)?;
            let Some(access) = options.access else { return Ok(file) };
            lock::acquire(&file.file, access, wait).map_err(|e| e.at_path(path))?;
            // Whoever had it before may have given its name to another file.
            let named = std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
            if named.is_ok_and(|named| file.identity().is_ok_and(|own| own == named)) {
                *file.access.lock().unwrap_or_else(|e| e.into_inner()) = options.access;
                return Ok(file);
            }
        }
    }

    /// Whether another opener of the file at `path` writes to it.
    pub fn is_written(path: &Path) -> Result<bool> {
        let file = FileStorage::open_unlocked(path, FileOptions { access: None, write: false })?;
        lock::is_written(&file.file)
    }

    fn open_unlocked(path: &Path, options: FileOptions) -> Result<FileStorage> {
        // Nonblocking: opening a FIFO that an image names must not hang.
        let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let read = || OpenOptions::new().read(true).custom_flags(flags.bits()).open(path);
        let file = if options.write { maker().open(path) } else { read() };
        let file = file.map_err(|e| Error::io("could not be opened", e).at_path(path))?;
        FileStorage::from_file(file, path, FileOptions { access: None, ..options })
    }

    /// Makes a new empty file, which everybody may read and its owner write, less the umask.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] where something has that name already.
    pub fn create(path: &Path) -> Result<FileStorage> {
        FileStorage::create_as(path, NEW)
    }

    /// The same with another mode, less the umask.
    pub(super) fn create_as(path: &Path, mode: u32) -> Result<FileStorage> {
        let file = maker()
            .create(path, mode)
            .map_err(|e| Error::io("could not be created", e).at_path(path))?;
        FileStorage::from_file(file, path, FileOptions { access: Some(Access::Write), write: true })
    }

    pub(super) fn from_file(file: File, path: &Path, options: FileOptions) -> Result<FileStorage> {
        let meta =
            file.metadata().map_err(|e| Error::io("could not be examined", e).at_path(path))?;
        let device = meta.file_type().is_block_device() || is_empty_device(&meta);
        if !device && !meta.is_file() {
            let message = "is neither a regular file nor a block device";
            return Err(Error::unsupported(message).at_path(path));
        }
        if let Some(access) = options.access {
            lock::acquire(&file, access, Duration::ZERO).map_err(|e| e.at_path(path))?;
        }
        let access = Mutex::new(options.access);
        Ok(FileStorage {
            file,
            path: path.to_path_buf(),
            device,
            access,
            stretch: Mutex::default(),
        })
    }

    /// Makes a file without a name in `dir`; it is gone when it is closed.
    pub fn temporary(dir: &Path) -> Result<FileStorage> {
        let file = maker()
            .nameless(dir, 0o600)
            .map_err(|e| Error::io("a temporary file could not be made here", e).at_path(dir))?;
        FileStorage::from_file(file, dir, FileOptions { access: None, write: true })
    }

    /// Changes the lock that is held on the file, without a moment in which somebody could come
    /// between. After a failure it is what it was.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] names the process that holds a conflicting lock.
    pub fn relock(&self, access: Access) -> Result<()> {
        let mut held = self.access.lock().unwrap_or_else(|e| e.into_inner());
        let done = match *held {
            Some(now) => lock::change(&self.file, now, access),
            None => lock::acquire(&self.file, access, lock::manners().wait),
        };
        done.map_err(|e| e.at_path(&self.path))?;
        *held = Some(access);
        Ok(())
    }

    /// Waits until nobody else changes what the file says of itself while others read it, and keeps
    /// them out until it is closed. The file must be open for writing.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] names who does not come to an end.
    pub fn take_turn(&self) -> Result<()> {
        lock::take_turn(&self.file).map_err(|e| e.at_path(&self.path))
    }

    /// Says that clones are being made of what the file holds, until it is closed.
    pub fn begin_clones(&self) -> Result<()> {
        lock::begin_clones(&self.file).map_err(|e| e.at_path(&self.path))
    }

    /// Whether nobody makes clones of the file now; a command waits for those who do.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where somebody does.
    pub fn await_clones(&self) -> Result<()> {
        lock::await_clones(&self.file, lock::manners().wait.max(lock::PATIENCE))
            .map_err(|e| e.at_path(&self.path))
    }

    /// As [`await_clones`](FileStorage::await_clones), at once: who makes clones may need what the caller
    /// has.
    pub fn refuse_cloning(&self) -> Result<()> {
        lock::await_clones(&self.file, Duration::ZERO).map_err(|e| e.at_path(&self.path))
    }

    /// The name it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode number: the same file under any name.
    pub fn identity(&self) -> Result<(u64, u64)> {
        let meta = self.file.metadata().map_err(|e| self.error("examined", e))?;
        Ok((meta.dev(), meta.ino()))
    }

    /// The open file, for calls that need the descriptor.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn error(&self, doing: &str, source: io::Error) -> Error {
        Error::io(format!("could not be {doing}"), source).at_path(&self.path)
    }

    /// Calls fallocate; `false` where the host does not support that mode here.
    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> Result<bool> {
        *self.stretch() = 0..0;
        let (offset, len) = (signed(offset)?, signed(len)?);
        loop {
            match fallocate(self.file.as_fd(), flags, offset, len) {
                Ok(()) => return Ok(true),
                Err(Errno::EINTR) => {}
                // Somebody else has it for himself: writing is not forbidden by that.
                Err(Errno::EBUSY) if self.device => return Ok(false),
                Err(Errno::EOPNOTSUPP | Errno::ENODEV | Errno::EINVAL | Errno::ENOSYS) => {
                    return Ok(false);
                }
                Err(errno) => {
                    return Err(self.error("changed", errno.into()).at_offset(offset as u64));
                }
            }
        }
    }

    /// Makes a range that is there zero in one of the `ways`, the first that the host has, as far as
    /// whole blocks go; the rest is written.
    fn zero(&self, ways: &[FallocateFlags], offset: u64, len: u64) -> Result<()> {
        let end = offset.saturating_add(len);
        // A device takes whole blocks only; a file takes any range.
        let block = if self.device { BLOCK } else { 1 };
        let from = offset.checked_next_multiple_of(block).unwrap_or(end).min(end);
        let to = end / block * block;
        if from < to {
            for flags in ways {
                if self.fallocate(*flags, from, to - from)? {
                    self.write_zero_bytes(offset, from - offset)?;
                    return self.write_zero_bytes(to, end - to);
                }
            }
        }
        self.write_zero_bytes(offset, len)
    }

    /// Writes zeroes as data.
    pub fn write_zero_bytes(&self, mut offset: u64, mut len: u64) -> Result<()> {
        let zeroes = vec![0; len.min(1 << 20) as usize];
        while len > 0 {
            let n = len.min(zeroes.len() as u64);
            self.write_at(offset, &[IoSlice::new(&zeroes[..n as usize])])?;
            (offset, len) = (offset + n, len - n);
        }
        Ok(())
    }

    /// Makes `len` bytes at `offset` refer to the same space of the host as those at `from_offset`
    /// of `from`: what is written to one later is not seen in the other. Extends the length as
    /// [`write_at`](Storage::write_at). `false`, and nothing done, where the host cannot.
    pub fn share(
        &self,
        offset: u64,
        from: &FileStorage,
        from_offset: u64,
        len: u64,
    ) -> Result<bool> {
        if from.device || self.device {
            return Ok(false);
        }
        *self.stretch() = 0..0;
        share::range(&self.file, offset, &from.file, from_offset, len)
            .map_err(|e| self.error("made to share its space", e).at_offset(offset))
    }

    fn stretch(&self) -> MutexGuard<'_, Range<u64>> {
        self.stretch.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn seek(&self, offset: u64, whence: Whence) -> Result<Option<u64>> {
        match lseek(self.file.as_fd(), signed(offset)?, whence) {
            Ok(at) => Ok(Some(at as u64)),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(self.error("searched for holes", errno.into())),
        }
    }
}

/// Whether it is one of those that only exist to hold nothing: `/dev/null`, `/dev/zero`,
/// `/dev/full`. Other character devices may do anything when they are opened or read.
fn is_empty_device(meta: &Metadata) -> bool {
    /// The major number of the host's memory devices, and the minor ones of these three.
    const MEMORY: u64 = 1;
    const MINORS: [u64; 3] = [3, 5, 7];
    let number = meta.rdev();
    meta.file_type().is_char_device() && major(number) == MEMORY && MINORS.contains(&minor(number))
}

fn signed(offset: u64) -> Result<i64> {
    i64::try_from(offset)
        .map_err(|_| Error::invalid("a file offset is past 2^63 bytes").at_offset(offset))
}

impl Storage for FileStorage {
    fn len(&self) -> Result<u64> {
        if self.device {
            let end = self.seek(0, Whence::SeekEnd)?;
            return end.ok_or_else(|| Error::unsupported("has no size").at_path(&self.path));
        }
        Ok(self.file.metadata().map_err(|e| self.error("examined", e))?.len())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        if self.device {
            let have = self.len()?;
            if len <= have {
                return Ok(());
            }
            let message = format!("is a device of {have} bytes and cannot hold {len}");
            let full = Error::new(ErrorKind::NoSpace, message).with_os_error(Errno::ENOSPC as i32);
            return Err(full.at_path(&self.path));
        }
        *self.stretch() = 0..0;
        self.file.set_len(len).map_err(|e| self.error("resized", e))
    }

    fn is_fixed(&self) -> bool {
        self.device
    }

    fn read_at(&self, mut offset: u64, mut bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        if let [only] = bufs {
            // The host is done sooner with a buffer than with a list of one.
            return self.file.read_exact_at(only, signed(offset)? as u64).map_err(|e| {
                let early = e.kind() == io::ErrorKind::UnexpectedEof;
                let doing = if early { "read: it ends too early" } else { "read" };
                self.error(doing, e).at_offset(offset)
            });
        }
        IoSliceMut::advance_slices(&mut bufs, 0);
        while !bufs.is_empty() {
            let count = bufs.len().min(MAX_BUFS);
            match preadv(self.file.as_fd(), &mut bufs[..count], signed(offset)?) {
                Ok(0) => {
                    let end = io::Error::from(io::ErrorKind::UnexpectedEof);
                    return Err(self.error("read: it ends too early", end).at_offset(offset));
                }
                Ok(n) => {
                    IoSliceMut::advance_slices(&mut bufs, n);
                    offset += n as u64;
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(self.error("read", errno.into()).at_offset(offset)),
            }
        }
        Ok(())
    }

    fn write_at(&self, mut offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        if let [only] = bufs {
            let written = self.file.write_all_at(only, signed(offset)? as u64);
            return written.map_err(|e| self.error("written", e).at_offset(offset));
        }
        let mut bufs = bufs.to_vec();
        let mut bufs = &mut bufs[..];
        IoSlice::advance_slices(&mut bufs, 0);
        while !bufs.is_empty() {
            let count = bufs.len().min(MAX_BUFS);
            match pwritev(self.file.as_fd(), &bufs[..count], signed(offset)?) {
                Ok(0) => {
                    let full = io::Error::from(io::ErrorKind::WriteZero);
                    return Err(self.error("written", full).at_offset(offset));
                }
                Ok(n) => {
                    IoSlice::advance_slices(&mut bufs, n);
                    offset += n as u64;
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(self.error("written", errno.into()).at_offset(offset)),
            }
        }
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        let len = len.min(self.len()?.saturating_sub(offset));
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        // A device that gives nothing back may still be told to write zeroes itself.
        let ways = [hole, FallocateFlags::FALLOC_FL_ZERO_RANGE];
        if len == 0 {
            Ok(())
        } else {
            self.zero(&ways[..1 + usize::from(self.device)], offset, len)
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            Ok(())
        } else {
            self.zero(&[FallocateFlags::FALLOC_FL_ZERO_RANGE], offset, len)
        }
    }

    fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| self.error("synced", e))
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        let len = self.len()?;
        if offset >= len || self.device {
            return Ok((offset < len).then_some((offset, len)));
        }
        let known = self.stretch().clone();
        if known.contains(&offset) {
            return Ok(Some((offset, known.end.min(len))));
        }
        let Some(start) = self.seek(offset, Whence::SeekData)? else { return Ok(None) };
        let end = self.seek(start, Whence::SeekHole)?.unwrap_or(len);
        *self.stretch() = start..end;
        Ok(Some((start, end)))
    }

    fn as_file(&self) -> Option<&FileStorage> {
        Some(self)
    }

    fn allocated(&self) -> Result<u64> {
        Ok(self.file.metadata().map_err(|e| self.error("examined", e))?.blocks() * 512)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_zeroes_and_short_reads_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let file = FileStorage::create(&dir.path().join("f")).unwrap();
        let storage: &dyn Storage = &file;
        storage.write_all_at(1 << 20, &[7; 4096]).unwrap();
        assert_eq!(storage.next_data(0).unwrap(), Some((1 << 20, (1 << 20) + 4096)));
        storage.punch_hole(1 << 20, 2048).unwrap();
        let mut buf = [1; 4096];
        storage.read_exact_at(1 << 20, &mut buf).unwrap();
        assert!(buf[..2048].iter().all(|b| *b == 0) && buf[2048..].iter().all(|b| *b == 7));
        assert!(storage.read_exact_at((1 << 20) + 1, &mut buf).is_err(), "reaches past the end");
        assert_eq!(
            FileStorage::create(&dir.path().join("f")).unwrap_err().kind(),
            ErrorKind::Exists
        );
    }

    #[test]
    fn a_fifo_is_refused_and_does_not_hang() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let options = FileOptions { access: None, write: false };
        assert_eq!(FileStorage::open(&path, options).unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
