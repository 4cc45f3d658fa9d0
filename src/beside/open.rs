//! What a copy of a process has open that it does not need: the original's files, and locks on them.

use std::io;
use std::os::fd::RawFd;

use nix::libc;
use nix::unistd::close;

/// Closes what is open in this thread's table of files but standard input, output and error and `keep`.
/// Nobody must use any of it again.
pub(crate) fn close_others(keep: &[RawFd]) -> io::Result<()> {
    let mut kept: Vec<u32> = keep.iter().map(|fd| fd.unsigned_abs()).collect();
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept {
        close_all(first, fd.saturating_sub(1))?;
        first = first.max(fd.saturating_add(1));
    }
    close_all(first, u32::MAX)
}

/// Closes what is open under these numbers, where the first is not past the last.
fn close_all(first: u32, last: u32) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: whoever calls has no more use of them.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0 {
        return Ok(());
    }
    // Before Linux 5.9.
    let entries = std::fs::read_dir("/proc/thread-self/fd")?.flatten();
    let open: Vec<i32> = entries.filter_map(|fd| fd.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| (first..=last).contains(&fd.unsigned_abs())) {
        // The listing's own is closed by now.
        let _ = close(fd);
    }
    Ok(())
}
