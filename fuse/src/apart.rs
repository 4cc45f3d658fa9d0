//! Work that may wait for a file system which this process itself serves: who does it, and in which
//! mount namespace. Knows not what the work is.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::sched::{CloneFlags, setns, unshare};

use crate::sys;

/// Where mounts stand: in this process's mount namespace, or in one that another process is in.
///
/// A process that waits for a file system which it serves itself must do so by [`run`](Apart::run).
/// Such a wait cannot be interrupted; were the process killed meanwhile, the waiting thread would
/// hold the shared file table open, `/dev/fuse` with it, the kernel would never learn that the
/// server is gone, and the thread would wait forever. With a file table of its own the waiting
/// thread keeps nothing alive: the connection ends with the other threads, and the wait with an
/// error.
///
/// For the same reason a process must not be the last in a mount namespace in which something stands
/// that it serves: it would unmount that as it ends, before it lets go of `/dev/fuse`. So another
/// process holds such a namespace, and this one enters it for the length of a call only, by a thread
/// that holds no connection.
#[derive(Debug, Clone, Default)]
pub struct Apart(Option<Arc<Elsewhere>>);

#[derive(Debug)]
struct Elsewhere {
    /// The process (pidfd_open(2)), which does not keep its namespaces alive.
    process: OwnedFd,
    lifeline: OwnedFd,
}

impl Apart {
    /// In this process's namespace.
    pub fn here() -> Apart {
        Apart(None)
    }

    /// In the mount namespace that `process`, a pidfd, is in at the time of each call. `lifeline`
    /// stays open as long as any thread works there, also when this process has been killed: at its
    /// other end it can be seen when the last has ended.
    pub fn beside(process: OwnedFd, lifeline: OwnedFd) -> Apart {
        Apart(Some(Arc::new(Elsewhere { process, lifeline })))
    }

    /// Whether that is this process's namespace.
    pub fn is_here(&self) -> bool {
        self.0.is_none()
    }

    /// Runs `work` there, on a thread whose file table holds only standard input, output and error
    /// and `keep`, and returns what it returned.
    ///
    /// `work` must name files by full paths or by `keep`: no other descriptor of the process is open
    /// there, and what it opens is closed when it ends.
    ///
    /// # Errors
    /// Where there is no such thread; [`is_gone`] tells when the process that held the namespace is
    /// gone, and with it the namespace.
    pub fn run<T: Send>(
        &self,
        keep: &[BorrowedFd<'_>],
        work: impl FnOnce() -> T + Send,
    ) -> io::Result<T> {
        let elsewhere = self.0.as_deref();
        let mut kept = keep.to_vec();
        kept.extend(elsewhere.into_iter().flat_map(|e| [e.process.as_fd(), e.lifeline.as_fd()]));
        let kept: Vec<i32> = kept.iter().map(AsRawFd::as_raw_fd).collect();
        std::thread::scope(|scope| {
            let thread =
                std::thread::Builder::new().name("apart".into()).spawn_scoped(scope, || {
                    unshare(CloneFlags::CLONE_FILES)?;
                    sys::close_all_but(kept)?;
                    if let Some(elsewhere) = elsewhere {
                        // Its own root and working directory: they go along.
                        unshare(CloneFlags::CLONE_FS)?;
                        setns(&elsewhere.process, CloneFlags::CLONE_NEWNS)?;
                    }
                    Ok(work())
                })?;
            thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
        })
    }
}

/// Whether [`Apart::run`] has failed because the process that held the namespace is gone.
pub fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use super::*;

    #[test]
    fn work_done_apart_sees_only_the_descriptors_it_keeps() {
        let open = || File::open("/dev/zero").unwrap();
        let (first, mut other, second) = (open(), open(), open());
        let numbers = [first.as_raw_fd(), other.as_raw_fd(), second.as_raw_fd()];
        // In any order.
        let seen = Apart::here().run(&[second.as_fd(), first.as_fd()], || {
            numbers.map(|fd| std::fs::read_link(format!("/proc/thread-self/fd/{fd}")).is_ok())
        });
        assert_eq!(seen.unwrap(), [true, false, true]);
        let mut byte = [1];
        other.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [0], "the process keeps its own descriptors");
    }

    #[test]
    fn a_namespace_goes_with_the_process_that_held_it() {
        use rustix::process::{Pid, PidfdFlags, pidfd_open};
        let mut held = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_raw(held.id().cast_signed()).unwrap();
        let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        held.kill().unwrap();
        held.wait().unwrap();
        let lifeline = File::open("/dev/null").unwrap().into();
        let done = Apart::beside(process, lifeline).run(&[], || ());
        assert!(is_gone(&done.unwrap_err()));
    }
}
