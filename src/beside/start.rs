//! Starting a process that works for this one, and has nothing of it but what it is to have.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::RawFd;

use nix::sys::prctl;
use nix::sys::signal::SigSet;
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::open::close_others;
use super::prepared;

/// Has a copy of this process, which is called `name` and has nothing open but `keep`, do `work`. It ends with
/// that, and has to when this process does: of `keep` there has to be something by which it sees that.
///
/// # Errors
/// Where it cannot be made: this process has other threads, say.
pub fn start(name: &'static CStr, keep: &[RawFd], work: impl FnOnce()) -> io::Result<()> {
    let done = || {
        work();
        0
    };
    prepared(|| settle(name, keep), done).map(drop)
}

/// Leaves all that is the other process's alone: its files and locks, its terminal, the signals that end it.
fn settle(name: &CStr, keep: &[RawFd]) -> io::Result<()> {
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
    close_others(keep)
}
