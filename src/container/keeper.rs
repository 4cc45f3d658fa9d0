//! The keeper: the first process of the outer pid namespace. It holds the control groups, starts
//! the init and outlives all other processes of the container, also when the host process is
//! killed.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::setsid;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::cgroup::{Groups, Limits};
use super::wire::{self, Message};
use super::{INIT, STAGE};
use crate::error::{Error, Result};

/// The keeper's whole life; the container's exit status, as a shell would give it.
pub(super) fn run(control: &Path) -> Result<u8> {
    // A signal to the terminal's or the host process's group must not reach the keeper.
    setsid().map_err(|e| Error::io("cannot start a session", e.into()))?;
    close_inherited().map_err(|e| Error::io("cannot close what was left open", e))?;
    let host = UnixStream::connect(control).map_err(|e| Error::io("no container to keep", e))?;
    let mut groups = Groups::default();
    let started = start(&host, &mut groups);
    let ended = started.and_then(|child| {
        wait(&host, child).map_err(|e| Error::io("cannot wait for the container", e))
    });
    groups.remove();
    match ended {
        Ok(status) => Ok(shell_status(status)),
        Err(error) => {
            // The host process says it to the user, unless it is gone.
            let _ = wire::send(&host, &Message::default().with("failed", error.to_string()));
            Ok(1)
        }
    }
}

fn start(host: &UnixStream, groups: &mut Groups) -> Result<Child> {
    let order = wire::receive(host).map_err(|e| Error::io("cannot hear the host process", e))?;
    let order = order.ok_or_else(|| Error::invalid("the host process has ended"))?;
    let limits = Limits {
        memory: order.number("memory"),
        milli_cpus: order.number("milli-cpus"),
        pids: order.number("pids"),
    };
    let name = format!("vdisk-{}", order.number("host").unwrap_or_default());
    *groups = Groups::create(&limits, &name)?;
    unshare(CloneFlags::CLONE_NEWPID)
        .map_err(|e| Error::io("cannot make a pid namespace", e.into()))?;
    Command::new("/proc/self/exe")
        .args([STAGE, INIT])
        .args(groups.dirs())
        .env_clear()
        .spawn()
        .map_err(|e| Error::io("cannot start the container's first process", e))
}

/// Waits for the container's end, and brings it about when the host process ends.
fn wait(host: &UnixStream, mut child: Child) -> io::Result<ExitStatus> {
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
        let [host_gone, ended] = fds.map(|fd| fd.any().unwrap_or(false));
        // The host process sends nothing more: what can be read is the end.
        if host_gone && !ended {
            child.kill()?;
        }
        if host_gone || ended {
            return child.wait();
        }
    }
}

/// Closes all but the standard streams: the user's shell may have left a directory of the host
/// open.
fn close_inherited() -> io::Result<()> {
    let entries = fs::read_dir("/proc/self/fd")?;
    let numbers: Vec<i32> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|&number| number > 2) {
        // The listing's own descriptor is among them, closed already.
        let _ = nix::unistd::close(number);
    }
    Ok(())
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
