//! A process that shares this one's standard input, output and error, and no memory, and ends when it does.

use std::io;
use std::os::fd::RawFd;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, getpid, getppid};

use super::open::close_others;
use super::prepared;

/// The copy. It is ended when this is dropped, and gone then.
#[derive(Debug)]
pub(crate) struct Child(Pid);

impl Child {
    /// Has a copy of this process do `work`, with nothing open but standard input, output and error and
    /// `keep`; what `work` returns is its exit status.
    pub(crate) fn start(keep: &[RawFd], work: impl FnOnce() -> u8) -> io::Result<Child> {
        let original = getpid();
        let ready = || {
            end_with(original)?;
            // What tells others of the original's end must not be open here.
            close_others(keep)
        };
        prepared(ready, work).map(Child)
    }

    /// The same with all that this process has open, for work on that.
    #[cfg(feature = "cli")]
    pub(crate) fn start_with_all(work: impl FnOnce() -> u8) -> io::Result<Child> {
        let original = getpid();
        prepared(|| end_with(original), work).map(Child)
    }
}

/// Has this process, a copy of that one, end when that does.
fn end_with(original: Pid) -> io::Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    // It may have ended before.
    if getppid() == original { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}
