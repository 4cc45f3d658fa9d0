//! Bytes of one file copied into another, without a way through the kernel.

use std::io;

use vdisk_fuse::files::Copy;

use super::{DiskFiles, inode_of};

/// How much is copied at a time.
const PIECE: u64 = 1 << 20;

impl DiskFiles {
    /// Copies as copy_file_range(2) does; returns how much. What is a hole becomes zeroes that are written,
    /// as where the kernel copies within its own ext4.
    pub(super) fn copy(&self, copy: &Copy) -> io::Result<u64> {
        let (from, to) = (inode_of(copy.from.0), inode_of(copy.to.0));
        let size = self.done(self.fs.attributes(from))?.size;
        let len = copy.len.min(size.saturating_sub(copy.from.1));
        if len == 0 {
            return Ok(0);
        }
        self.changed();
        self.done(self.drop_privileges_of(to, copy.caller))?;
        let mut piece = vec![0; len.min(PIECE) as usize];
        let mut copied = 0;
        while copied < len {
            let most = (len - copied).min(PIECE) as usize;
            let piece = piece.get_mut(..most).unwrap_or_default();
            let read = self.fs.read(from, copy.from.1 + copied, piece);
            let written = read.and_then(|read| {
                self.fs.write(to, copy.to.1 + copied, piece.get(..read).unwrap_or_default())
            });
            match self.done(written) {
                // The file has become shorter.
                Ok(0) => break,
                Ok(done) => copied += done as u64,
                // The next call is told why.
                Err(_) if copied > 0 => break,
                Err(e) => return Err(e),
            }
        }
        let _ = self.done(self.fs.note_access(from));
        Ok(copied)
    }
}
