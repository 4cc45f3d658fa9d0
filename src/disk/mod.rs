//! The face of the library: a disk as a program uses it that knows nothing of layers.
//!
//! All that stands here is a thin word for what other rooms do; nothing is decided here. What other
//! programs rely on is this room, the traits and the errors: the other rooms change as they need to.

mod clone;
mod convert;
mod files;
mod options;
mod report;
#[cfg(feature = "serve")]
mod serve;
mod snapshots;

use std::io::{IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::block::{BlockDevice, BlockExtent};
use crate::chain::Chain;
use crate::change::live::Live;
use crate::error::{Error, ErrorKind, Result};

pub use clone::{create_clone, unseal};
pub use convert::Convert;
pub use files::{DirEntry, Files};
pub use options::{CreateOptions, OpenOptions, create_image, open_image};
pub use report::{CheckReport, DiskInfo, LayerInfo};
#[cfg(feature = "serve")]
pub use serve::NbdServer;
pub use snapshots::{Plan, Snapshot, Snapshots};

/// An open disk: a head and the layers that it stands on, as one flat disk of bytes.
///
/// Many threads may use it at once. It is locked against every other program that honours QEMU's
/// locks, QEMU and the `vdisk` command among them, until it is [closed](Disk::close) or dropped.
///
/// It is a [`BlockDevice`]: vectored reads and writes, zeroes, discards and the extents of the disk are
/// that trait's.
pub struct Disk {
    /// As it was opened.
    path: PathBuf,
    access: Access,
}

/// What may be done with the disk.
enum Access {
    /// Everything: its tree of snapshots too.
    Whole(Live),
    /// Reading, or writing into what is thrown away.
    Bytes(Arc<Chain>),
}

impl Disk {
    /// Opens the disk at `path` for reading and writing; [`OpenOptions`] open it otherwise.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] names who has it; [`ErrorKind::Sealed`] where clones stand on it;
    /// [`ErrorKind::BaseChanged`] where what it stands on is not what it was made on.
    pub fn open(path: impl AsRef<Path>) -> Result<Disk> {
        OpenOptions::new().open(path)
    }

    /// Makes a new, empty qcow2 disk of `size` bytes at `path`, which must not exist, and opens it;
    /// [`CreateOptions`] make others.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] where something has that name.
    pub fn create(path: impl AsRef<Path>, size: u64) -> Result<Disk> {
        CreateOptions::new(size).create(path)
    }

    fn of(path: &Path, chain: Chain, whole: bool) -> Result<Disk> {
        let chain = Arc::new(chain);
        let access =
            if whole { Access::Whole(Live::new(chain, path)?) } else { Access::Bytes(chain) };
        Ok(Disk { path: path.to_path_buf(), access })
    }

    fn chain(&self) -> &Arc<Chain> {
        match &self.access {
            Access::Whole(live) => live.chain(),
            Access::Bytes(chain) => chain,
        }
    }

    fn live(&self) -> Result<&Live> {
        match &self.access {
            Access::Whole(live) => Ok(live),
            Access::Bytes(_) => {
                let message = "is open for reading only, or its writes are thrown away";
                Err(Error::new(ErrorKind::ReadOnly, message).at_path(&self.path))
            }
        }
    }

    /// The name that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.chain().size()
    }

    /// Fills `buf` with the bytes from `offset`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], and nothing done, past the end of the disk.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.chain().read_at(offset, &mut [IoSliceMut::new(buf)])
    }

    /// Writes all of `data` at `offset`. Durable after [`flush`](Disk::flush) or
    /// [`close`](Disk::close).
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], and nothing done, past the end of the disk.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.chain().write_at(offset, &[IoSlice::new(data)])
    }

    /// Returns when every write that completed before the call is durable.
    pub fn flush(&self) -> Result<()> {
        self.chain().flush()
    }

    /// Makes all durable and closes the disk: what dropping it does, and says how that went.
    ///
    /// # Errors
    /// What could not be written. The disk is closed in any case, and what was flushed before is there.
    pub fn close(self) -> Result<()> {
        self.chain().close().map_err(|e| e.at_path(&self.path))
    }

    /// Changes the size. New bytes read as zeroes. A disk that is open does not get smaller.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] for a smaller size.
    pub fn resize(&self, size: u64) -> Result<()> {
        self.live()?.resize(size)
    }

    /// Gives space that the disk does not need back to the host; returns how many bytes.
    pub fn compact(&self) -> Result<u64> {
        let done = self.live()?.compact(&mut |_, _| true)?;
        Ok(done.before.saturating_sub(done.after))
    }

    /// Keeps the disk as it is under `name`, and goes on in a new, empty layer: a snapshot of a disk in
    /// use. What the guest or the program above has not written yet is not in it.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] where a snapshot has that name; [`ErrorKind::Unsupported`] for a disk that
    /// is not qcow2.
    pub fn take_snapshot(&self, name: &str) -> Result<()> {
        self.live()?.snapshot(name, "", None).map(drop)
    }

    /// What the user should know of how it was opened: that a base was found elsewhere, or has changed
    /// and was accepted.
    pub fn notes(&self) -> &[String] {
        self.chain().notes()
    }
}

impl BlockDevice for Disk {
    fn size(&self) -> u64 {
        self.chain().size()
    }

    fn block_size(&self) -> u32 {
        self.chain().block_size()
    }

    fn read_only(&self) -> bool {
        self.chain().read_only()
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.chain().read_at(offset, bufs)
    }

    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.chain().write_at(offset, bufs)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        self.chain().write_zeroes(offset, len, may_unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.chain().discard(offset, len)
    }

    fn flush(&self) -> Result<()> {
        self.chain().flush()
    }

    fn extents(&self, offset: u64, len: u64, limit: usize) -> Result<Vec<BlockExtent>> {
        self.chain().extents(offset, len, limit)
    }
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("path", &self.path).finish_non_exhaustive()
    }
}
