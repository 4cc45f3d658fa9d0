//! A process beside the host process: a copy of it, made while it has one thread, that shares no memory with
//! it from then on, and ends when it does. Knows not what it is for.

use std::io;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, getpid, getppid};

use super::keeper::close_above;
use super::sys;

/// What a shell says of a program that was aborted.
const PANICKED: u8 = 134;

/// The copy. It is ended when this is dropped, and gone then.
#[derive(Debug)]
pub(super) struct Beside(Pid);

impl Beside {
    /// Has a copy of this process do `work`, with nothing open but standard input, output and error and
    /// `keep`; what `work` returns is its exit status.
    pub(super) fn start(keep: &[RawFd], work: impl FnOnce() -> u8) -> io::Result<Beside> {
        let original = getpid();
        let ready = || {
            set_pdeathsig(Signal::SIGKILL)?;
            // It may have ended before.
            if getppid() != original {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            // What tells others of the original's end must not be open here.
            close_above(2, keep)
        };
        sys::copy(|| match ready() {
            // The frames below are the original's to unwind.
            Ok(()) => catch_unwind(AssertUnwindSafe(work)).unwrap_or(PANICKED),
            Err(_) => 1,
        })
        .map(Beside)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}
