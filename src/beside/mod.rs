//! Copies of this process that do one thing: a process beside it, which ends with it. What the two say to each
//! other is theirs.
//!
//! Who is to be jailed starts, while it is small and knows nothing yet, what does for it later what the jail
//! refuses it ([`start`]). Who needs a right that is nothing for a jail starts what is to be jailed instead
//! ([`Child`]).

#[cfg(feature = "jail")]
mod channel;
#[cfg(feature = "container")]
mod child;
mod open;
#[cfg(feature = "jail")]
mod start;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::libc;
use nix::unistd::{ForkResult, Pid, fork};

#[cfg(feature = "jail")]
pub use channel::{Channel, Received};
#[cfg(feature = "container")]
pub(crate) use child::Child;
#[cfg(feature = "container")]
pub(crate) use open::close_others;
#[cfg(feature = "jail")]
pub use start::start;

/// What a shell says of a program that was aborted.
const PANICKED: u8 = 134;

/// Runs `work` in a copy of this process that is `ready`.
fn prepared(ready: impl FnOnce() -> io::Result<()>, work: impl FnOnce() -> u8) -> io::Result<Pid> {
    copy(|| match ready() {
        // The frames below are the original's to unwind.
        Ok(()) => catch_unwind(AssertUnwindSafe(work)).unwrap_or(PANICKED),
        Err(_) => 1,
    })
}

/// Runs `work` in a copy of this process, which ends with what it returned. The copy has no other
/// thread than its own, so this process must have none, either.
pub(crate) fn copy(work: impl FnOnce() -> u8) -> io::Result<Pid> {
    if !is_alone() {
        return Err(io::Error::other("a process with several threads cannot be copied"));
    }
    // SAFETY: there is one thread: no lock is held by a thread that the copy would lack.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let status = work();
            // SAFETY: ends the process without the handlers that belong to the original.
            unsafe { libc::_exit(status.into()) }
        }
    }
}

/// Set among a thread's flags where it is the kernel's own, at work for this process: KVM has such.
const PF_USER_WORKER: u32 = 0x4000;

/// Whether this process has one thread. One that ends takes a moment to be gone.
pub(crate) fn is_alone() -> bool {
    let threads = || {
        let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        tasks.filter(|task| !is_worker(&task.path()).unwrap_or(false)).count()
    };
    (0..50).any(|_| {
        let alone = threads() <= 1;
        if !alone {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        alone
    })
}

/// Whether the kernel runs this thread and no code of the process: proc_pid_stat(5), field 9.
fn is_worker(task: &std::path::Path) -> Option<bool> {
    let stat = std::fs::read_to_string(task.join("stat")).ok()?;
    // The name, in which anything may stand, ends at the last bracket.
    let flags = stat.rsplit(") ").next()?.split(' ').nth(6)?.parse::<u32>().ok()?;
    Some(flags & PF_USER_WORKER != 0)
}
