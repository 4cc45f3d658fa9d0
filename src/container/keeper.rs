//! The keeper: the first process of the outer pid namespace. It holds the mount namespace and the
//! control groups, starts the init and outlives all other processes of the container, also when the
//! host process is killed.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{getpid, setsid};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::cgroup::room::Room;
use super::cgroup::{Groups, Limits};
use super::network::user;
use super::scratch::Scratch;
use super::wire::{self, Message};
use super::{INIT, STAGE, sys};
use crate::beside::close_others;
use crate::error::{Error, Result};
use crate::storage::fsfreeze;

/// The keeper's whole life.
pub(super) fn run(scratch: &Scratch, words: &[&OsStr]) -> Result<u8> {
    let own_use = || Error::invalid("this command is for vdisk's own use");
    // What it kills is everybody in its pid namespace, which must not be another's.
    if getpid().as_raw() != 1 {
        return Err(own_use());
    }
    // A signal to the terminal's or the host process's group must not reach the keeper.
    setsid().map_err(|e| Error::io("cannot start a session", e.into()))?;
    let (link, words) = words.split_first().ok_or_else(own_use)?;
    let link = link.to_str().and_then(|link| link.parse().ok()).ok_or_else(own_use)?;
    // The user's shell may have left a directory of the host open.
    close_others(&[link]).map_err(|e| Error::io("cannot close what was left open", e))?;
    let host = sys::inherited(link).map_err(|e| Error::io("cannot hear the host process", e))?;
    let host = UnixStream::from(host);
    let mut groups = Groups::default();
    let ended = start(scratch, &host, words, &mut groups).and_then(|child| {
        wait(scratch, &host, child).map_err(|e| Error::io("cannot wait for the container", e))
    });
    end_all();
    groups.remove();
    let last = match ended {
        Ok(status) => Message::default().with("ended", shell_status(status).to_string()),
        // The host process says it to the user, unless it is gone.
        Err(error) => Message::default().with("failed", error.to_string()).with("ended", "1"),
    };
    if wire::send(&host, &last).is_ok() {
        // Until the host process has unmounted the root.
        while let Ok(Some(_)) = wire::receive(&host) {}
    }
    thaw(scratch);
    // The host process does it, too, unless it was killed.
    drop(words.get(4).and_then(|leaf| Room::of(Path::new(leaf))));
    Ok(0)
}

fn start(
    scratch: &Scratch,
    host: &UnixStream,
    words: &[&OsStr],
    groups: &mut Groups,
) -> Result<Child> {
    let process = words.first().copied().unwrap_or_default().display();
    let name = format!("vdisk-{process}");
    let limits = Limits::from_words(words.get(1..).unwrap_or_default());
    *groups = Groups::create(&limits, &name)?;
    let mut made = Message::default();
    groups.dirs().iter().for_each(|dir| made.push("group", dir));
    wire::send(host, &made).map_err(|e| Error::io("cannot tell the host process", e))?;
    // By a thread that ends at once: what this process starts later, such as what carries the
    // container's network, is not the container's to see.
    let init = || {
        unshare(CloneFlags::CLONE_NEWPID)?;
        Command::new("/proc/self/exe")
            .args([STAGE, INIT])
            .arg(scratch.path())
            .args(groups.dirs())
            .env_clear()
            .spawn()
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("init".into()).spawn_scoped(scope, init)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
    })
    .map_err(|e| Error::io("cannot start the container's first process", e))
}

/// Waits for the container's end, and brings it about when the host process wants it or ends.
fn wait(scratch: &Scratch, host: &UnixStream, mut child: Child) -> io::Result<ExitStatus> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    let child_end = pidfd_open(pid, PidfdFlags::empty())?;
    loop {
        let mut fds = [
            PollFd::new(host.as_fd(), PollFlags::POLLIN),
            PollFd::new(child_end.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [heard, ended] = fds.map(|fd| fd.any().unwrap_or(false));
        if heard && !ended {
            match wire::receive(host) {
                Ok(Some(wish)) if wish.get(STOP).is_some() => child.kill()?,
                Ok(Some(wish)) if wire::send(host, &connect(&wish, scratch)).is_ok() => {}
                // The host process is gone.
                _ => {
                    thaw(scratch);
                    child.kill()?;
                    return child.wait();
                }
            }
        }
        if ended {
            return child.wait();
        }
    }
}

/// The word by which the host process wants the container's end.
pub(super) const STOP: &str = "stop";

/// Ends all processes of the pid namespace but this one, its first.
fn end_all() {
    let _ = kill(nix::unistd::Pid::from_raw(-1), Signal::SIGKILL);
    // All that have lost their parents are this one's children.
    while !matches!(waitpid(None, None), Err(nix::Error::ECHILD)) {}
}

/// Lets the root's file system go on, where the host process had brought it to rest when it was
/// killed: who writes there could not end, and nobody could unmount it. By then no thread of the
/// host process's is about to do that: the link would still be open.
fn thaw(scratch: &Scratch) {
    let Ok(root) = fs::File::open(scratch.root()) else { return };
    fsfreeze::let_go(&root);
}

/// Connects the container's network, as the host process has asked: whatever does that is in this
/// pid namespace and ends with it.
fn connect(wish: &Message, scratch: &Scratch) -> Message {
    match user::connect(wish, scratch) {
        Ok(()) => Message::default().with("connected", ""),
        Err(error) => Message::default().with("failed", error.to_string()),
    }
}

/// The exit status of a shell whose last command ended like this.
fn shell_status(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| Some(128 + status.signal()?));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_counts_from_128() {
        assert_eq!(shell_status(ExitStatus::from_raw(0)), 0);
        assert_eq!(shell_status(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(shell_status(ExitStatus::from_raw(9)), 137);
        assert_eq!(shell_status(ExitStatus::from_raw(0x80 | 11)), 139);
    }
}
