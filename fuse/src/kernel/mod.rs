//! What a served tree of files may tell the kernel by itself. Knows nothing of what the tree is.

mod crew;
pub(crate) mod device;
mod dispatch;
mod linger;
mod near;
mod pipe;
pub(crate) mod session;
mod wire;

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::io::writev;

use crate::kernel::device::BackingNumber;
pub use crate::kernel::device::Device;
pub(crate) use crate::kernel::pipe::MOST as MOST_PIPED;
use wire::Reply;

/// The kernel's side of a served tree, for the tree to speak to.
#[derive(Debug, Clone)]
pub struct Kernel {
    pub(crate) device: Arc<Device>,
    pub(crate) passthrough: bool,
}

/// A file that the kernel reads and writes by itself in the place of one of ours, as long as this
/// lives. A file opened with it goes on working after.
#[derive(Debug)]
pub struct Backing(BackingNumber);

impl Backing {
    pub(crate) fn number(&self) -> u32 {
        self.0.get()
    }
}

impl Kernel {
    /// Whether the kernel can use other files in the place of ours at all.
    pub fn can_back(&self) -> bool {
        self.passthrough
    }

    /// Has the kernel use `file` in the place of one of ours. Needs `CAP_SYS_ADMIN`; refused
    /// where the file's file system is itself stacked too deep.
    ///
    /// # Errors
    /// What the kernel said; `EOPNOTSUPP` where it cannot at all.
    pub fn back(&self, file: BorrowedFd<'_>) -> io::Result<Arc<Backing>> {
        if !self.passthrough {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        Ok(Arc::new(Backing(self.device.back(file)?)))
    }

    /// Asks the kernel to forget those of these nodes that nobody uses.
    ///
    /// # Errors
    /// `EINVAL` where the kernel knows no such request (before Linux 6.18).
    pub fn prune(&self, nodes: &[u64]) -> io::Result<()> {
        let mut out = Reply::new(Vec::new());
        out.u32(u32::try_from(nodes.len()).unwrap_or(0)).u32(0).u64(0);
        for node in nodes {
            out.u64(*node);
        }
        self.notify(out, wire::NOTIFY_PRUNE)
    }

    /// Drops the attributes that the kernel keeps of a node, not its bytes.
    ///
    /// # Errors
    /// `ENOENT` where the kernel does not know the node; others where the mount is gone.
    pub fn forget_attributes(&self, node: u64) -> io::Result<()> {
        let mut out = Reply::new(Vec::new());
        out.u64(node).u64(u64::MAX).u64(0);
        self.notify(out, wire::NOTIFY_INVAL_INODE)
    }

    /// Has the kernel write out what it keeps of a node's bytes, and drop them. Returns when the
    /// tree has got all of them, by other requests: some other thread has to be there for those.
    ///
    /// # Errors
    /// `ENOENT` where the kernel does not know the node; others where the mount is gone.
    pub fn write_out(&self, node: u64) -> io::Result<()> {
        let mut out = Reply::new(Vec::new());
        out.u64(node).u64(0).u64(0);
        self.notify(out, wire::NOTIFY_INVAL_INODE)
    }

    /// Puts bytes of a node into the kernel's page cache, where they need not be asked for then. No
    /// program may have the node's file open: a page that is being read in would be waited for,
    /// and that may be for the caller.
    ///
    /// # Errors
    /// `ENOENT` where the kernel does not know the node; others where the mount is gone.
    pub fn store(&self, node: u64, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut out = Reply::new(Vec::new());
        let len = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        out.u64(node).u64(offset).u32(len).u32(0);
        let head = out.finish_with(0, -wire::NOTIFY_STORE, bytes.len());
        writev(self.device.as_fd(), &[IoSlice::new(head), IoSlice::new(bytes)])?;
        Ok(())
    }

    fn notify(&self, mut out: Reply, code: i32) -> io::Result<()> {
        // A reply to no request carries its code where others carry their error, not negated.
        let bytes = out.finish(0, -code);
        writev(self.device.as_fd(), &[IoSlice::new(bytes)])?;
        Ok(())
    }
}
