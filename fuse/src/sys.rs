//! The one place for `unsafe` in this crate: what a process that serves its own mounts needs.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sched::{CloneFlags, unshare};

/// Runs `work` on a thread whose file table holds only standard input, output and error and
/// `keep`, and returns what it returned.
///
/// A process that waits for a file system which it serves itself must do so here. Such a wait
/// cannot be interrupted; were the process killed meanwhile, the waiting thread would hold the
/// shared file table open, `/dev/fuse` with it, the kernel would never learn that the server is
/// gone, and the thread would wait forever. With a file table of its own the waiting thread
/// keeps nothing alive: the connection ends with the other threads, and the wait with an error.
///
/// `work` must name files by path or by `keep`: no other descriptor of the process is open there.
pub fn apart<T: Send>(
    keep: Option<BorrowedFd<'_>>,
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    let keep = keep.map(|fd| fd.as_raw_fd());
    std::thread::scope(|scope| {
        let thread =
            std::thread::Builder::new().name("apart".into()).spawn_scoped(scope, || {
                unshare(CloneFlags::CLONE_FILES)?;
                close_all_but(keep)?;
                Ok(work())
            })?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
    })
}

/// Closes every descriptor above 2 except `keep` in this thread's own file table.
fn close_all_but(keep: Option<i32>) -> io::Result<()> {
    let keep = keep.and_then(|fd| u32::try_from(fd).ok()).filter(|fd| *fd > 2);
    match keep {
        None => close_range(3, u32::MAX),
        Some(fd) => {
            if fd > 3 {
                close_range(3, fd - 1)?;
            }
            close_range(fd + 1, u32::MAX)
        }
    }
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: called only from `apart`, after the thread got a file table of its own: every
    // owned descriptor of the process stays open in the table that its owner uses.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0u32) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn work_done_apart_sees_only_the_descriptor_it_keeps() {
        let (kept, mut other) =
            (File::open("/dev/zero").unwrap(), File::open("/dev/zero").unwrap());
        let (k, o) = (kept.as_raw_fd(), other.as_raw_fd());
        let seen = apart(Some(kept.as_fd()), || {
            [k, o].map(|fd| std::fs::read_link(format!("/proc/thread-self/fd/{fd}")).is_ok())
        });
        assert_eq!(seen.unwrap(), [true, false]);
        let mut byte = [1];
        other.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [0], "the process keeps its own descriptors");
    }
}
