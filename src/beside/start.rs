//! Starting a process beside this one, which has nothing of it but the channel.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::libc;
use nix::sys::prctl;
use nix::sys::signal::SigSet;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{close, dup2_stderr, dup2_stdin, dup2_stdout};

use super::{Channel, copy};

/// Has a copy of this process, which is called `name` and has nothing open but its end of a channel, do
/// `work`. It ends with that, and has to when the other end is closed, which is returned.
///
/// # Errors
/// Where it cannot be made: this process has other threads, say.
pub fn start(name: &'static CStr, work: impl FnOnce(Channel)) -> io::Result<Channel> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (own, its) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    copy(|| {
        if settle(name, its.as_raw_fd()).is_err() {
            return 1;
        }
        // The frames below are the original's to unwind.
        u8::from(catch_unwind(AssertUnwindSafe(|| work(Channel(its)))).is_err())
    })?;
    Ok(Channel(own))
}

/// Leaves all that is the other process's alone: its files and locks, its terminal, the signals that end it.
fn settle(name: &CStr, channel: i32) -> io::Result<()> {
    // What ends the other is for the other.
    SigSet::all().thread_set_mask()?;
    prctl::set_name(name)?;
    // What it stands in could not be unmounted.
    std::env::set_current_dir("/")?;
    // Nobody of this user looks into it.
    prctl::set_dumpable(false)?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    drop(null);
    let kept = channel.unsigned_abs();
    close_all(3, kept.saturating_sub(1))?;
    close_all(kept.saturating_add(1), u32::MAX)
}

/// Closes what is open under these numbers, where the first is not past the last.
fn close_all(first: u32, last: u32) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: in a copy that ends without running what the original would: nobody uses them again.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0 {
        return Ok(());
    }
    // Before Linux 5.9.
    let entries = std::fs::read_dir("/proc/self/fd")?.flatten();
    let open: Vec<i32> = entries.filter_map(|fd| fd.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| (first..=last).contains(&fd.unsigned_abs())) {
        // The listing's own is closed by now.
        let _ = close(fd);
    }
    Ok(())
}
