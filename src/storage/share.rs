//! Files that refer to the same space of the host ("reflinks"), where its file system can.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;

use super::maker::maker;

/// Bytes that the trial shares: no file system has larger blocks.
const TRIAL: u64 = 64 << 10;

/// Makes a range of `to` refer to the space of a range of `from`; `false` where the host cannot:
/// other file systems, ranges that are no whole blocks, a file system that does not share.
pub(super) fn range(
    to: &File,
    offset: u64,
    from: &File,
    from_offset: u64,
    len: u64,
) -> io::Result<bool> {
    if len == 0 {
        // To the kernel it means all the rest of the file.
        return Ok(true);
    }
    let range = libc::file_clone_range {
        src_fd: i64::from(from.as_raw_fd()),
        src_offset: from_offset,
        src_length: len,
        dest_offset: offset,
    };
    loop {
        // SAFETY: FICLONERANGE reads a `file_clone_range`, which lives through the call, and writes
        // no memory; both descriptors are open, since their files are borrowed.
        let done = unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONERANGE, &raw const range) };
        match Errno::result(done) {
            Ok(_) => return Ok(true),
            Err(Errno::EINTR) => {}
            Err(
                Errno::EOPNOTSUPP
                | Errno::ENOTTY
                | Errno::EINVAL
                | Errno::EXDEV
                | Errno::ENOSYS
                | Errno::ETXTBSY
                | Errno::EPERM,
            ) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Whether files in `dir` can share their space. It is tried out.
pub fn shares_space(dir: &Path) -> bool {
    let nameless = || maker().nameless(dir, 0o600);
    let trial = || -> io::Result<bool> {
        let (from, to) = (nameless()?, nameless()?);
        from.write_all_at(&[1; TRIAL as usize], 0)?;
        range(&to, 0, &from, 0, TRIAL)
    };
    trial().unwrap_or(false)
}
