//! The bytes of a copy: shared with the source where the file system can, else copied, holes as holes.
//! Knows no overlay.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use crate::layer::LayerFile;
use crate::overlay::node::Tri;

/// How much of a file is read at a time where the kernel cannot copy it alone.
const CHUNK: usize = 1 << 20;

/// Up to here a file's holes are looked for only in front of its data: what is copied is then just
/// what the kernel's overlayfs copies, hole for hole, and in one go.
const SMALL: u64 = 1 << 20;

/// What came of copying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Copied {
    /// The whole file, which may be longer than was asked for: both share the same bytes.
    Shared,
    /// What there is, up to where the last data ends.
    Until(u64),
}

/// Copies the first `len` bytes, holes as holes. `clones` keeps whether the two file systems can share
/// bytes.
pub(super) fn copy_data(
    from: &dyn LayerFile,
    to: &File,
    len: u64,
    clones: &Tri,
) -> io::Result<Copied> {
    if clones.get() != Some(false)
        && let Some(fd) = from.fd()
    {
        match rustix::fs::ioctl_ficlone(to, fd) {
            Ok(()) => return Ok(Copied::Shared),
            Err(Errno::OPNOTSUPP | Errno::XDEV) => clones.set(false),
            Err(_) => {}
        }
    }
    if len <= SMALL {
        let start = match from.seek(0, libc::SEEK_DATA) {
            Ok(start) => start.min(len),
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return Ok(Copied::Until(0)),
            // A file system that knows no holes.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => 0,
            Err(e) => return Err(e),
        };
        copy_range(from, to, start, len)?;
        return Ok(Copied::Until(len));
    }
    // Where the next hole is first: most files have none, and that is all there is to ask then.
    let (mut at, mut end) = (0, hole(from, 0, len)?);
    loop {
        if end > at {
            copy_range(from, to, at, end)?;
        }
        if end >= len {
            return Ok(Copied::Until(end));
        }
        let start = match from.seek(end, libc::SEEK_DATA) {
            Ok(start) if start > end && start < len => start,
            Ok(start) if start >= len => return Ok(Copied::Until(end)),
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return Ok(Copied::Until(end)),
            // Nothing is certain: as data, then.
            _ => {
                copy_range(from, to, end, len)?;
                return Ok(Copied::Until(len));
            }
        };
        (at, end) = (start, hole(from, start, len)?);
    }
}

/// Where the first hole from `at` on begins, `len` where there is none before.
fn hole(from: &dyn LayerFile, at: u64, len: u64) -> io::Result<u64> {
    match from.seek(at, libc::SEEK_HOLE) {
        Ok(hole) => Ok(hole.clamp(at, len)),
        // A file system that knows no holes.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENXIO | libc::EINVAL)) => Ok(len),
        Err(e) => Err(e),
    }
}

fn copy_range(from: &dyn LayerFile, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut at = start;
    if let Some(fd) = from.fd() {
        while at < end {
            let want = usize::try_from(end - at).unwrap_or(usize::MAX).min(1 << 30);
            let (mut source, mut target) = (at, at);
            match rustix::fs::copy_file_range(fd, Some(&mut source), to, Some(&mut target), want) {
                Ok(0) => return Ok(()),
                Ok(len) => at += len as u64,
                // Not between these two: byte by byte, then.
                Err(_) if at == start => break,
                Err(e) => return Err(e.into()),
            }
        }
    }
    let mut buffer = vec![0; CHUNK.min(usize::try_from(end - at).unwrap_or(CHUNK))];
    while at < end {
        let want = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
        let Some(part) = buffer.get_mut(..want) else { break };
        let len = from.read_at(at, part)?;
        if len == 0 {
            break;
        }
        to.write_all_at(part.get(..len).unwrap_or_default(), at)?;
        at += len as u64;
    }
    Ok(())
}
