//! The host process's part while the container runs: it starts the keeper, tells the processes
//! inside what to do, passes on signals and the terminal, and learns how the program ended.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};

use super::terminal::{self, Relay};
use super::wire::{self, Message};
use super::{KEEPER, Outcome, STAGE, Space, Spec, executable};
use crate::error::{Error, ErrorKind, Result};

pub(super) fn run(space: &Space, root: &Path, spec: &Spec) -> Result<Outcome> {
    let doing = |what: &'static str| move |e: io::Error| Error::io(what, e);
    let keeper = start_keeper().map_err(doing("cannot start the container's keeper"))?;
    let end = pidfd(keeper.id().cast_signed()).map_err(doing("cannot watch the container"))?;
    let mut container = Container {
        space,
        order: order(root, spec),
        limits: limits(spec),
        keeper,
        keeper_link: None,
        init: None,
        relay: None,
        ended_by: None,
        failure: None,
    };
    let watched = container.watch(&end);
    if container.keeper_link.take().is_none() && watched.is_err() {
        // A keeper that has lost its link ends what it has started, but this one has none yet.
        container.keeper.kill().map_err(doing("cannot end the container's keeper"))?;
    }
    let status = container.keeper.wait().map_err(doing("cannot wait for the container"))?;
    container.relay = None;
    watched.map_err(doing("lost the container"))?;
    if let Some((failed_with, reason)) = container.failure {
        let kind = if failed_with == Some(127) { ErrorKind::NotFound } else { ErrorKind::Io };
        let error = Error::new(kind, reason);
        return match failed_with {
            Some(status) => Ok(Outcome { status, not_started: Some(error) }),
            None => Err(error),
        };
    }
    if let Some(signal) = container.ended_by {
        return Ok(Outcome { status: 128 + signal as u8, not_started: None });
    }
    let lost = || Error::new(ErrorKind::Io, format!("the container's keeper was lost: {status}"));
    let code = status.code().ok_or_else(lost)?;
    Ok(Outcome { status: u8::try_from(code).map_err(|_| lost())?, not_started: None })
}

/// Starts the keeper as the first process of a new pid namespace.
fn start_keeper() -> io::Result<Child> {
    // In a thread that ends at once: the namespace for new children is the thread's, and this
    // process must go on to be able to have threads and children of its own.
    let start = || {
        unshare(CloneFlags::CLONE_NEWPID)?;
        Command::new(executable()).args([STAGE, KEEPER]).env_clear().current_dir("/").spawn()
    };
    let thread = thread::Builder::new().name("keeper".into()).spawn(start)?;
    thread.join().map_err(|_| io::Error::other("the thread that starts it has failed"))?
}

fn limits(spec: &Spec) -> Message {
    let mut message = Message::default().with("host", std::process::id().to_string());
    let limits = [
        ("memory", spec.limits.memory),
        ("milli-cpus", spec.limits.milli_cpus),
        ("pids", spec.limits.pids),
    ];
    for (name, limit) in limits {
        if let Some(limit) = limit {
            message.push(name, limit.to_string());
        }
    }
    message
}

fn order(root: &Path, spec: &Spec) -> Message {
    let mut message = Message::default().with("root", root).with("hostname", &spec.hostname);
    if let Some(workdir) = &spec.workdir {
        // Relative to the root, where the init stands.
        message.push("workdir", workdir);
    }
    if let Some(user) = &spec.user {
        message.push("user", user);
    }
    if let Some(files) = spec.open_files {
        message.push("open-files", files.to_string());
    }
    let term = std::env::var_os("TERM").filter(|_| terminal::wanted());
    message.push("env", joined("TERM", term.unwrap_or_else(|| "xterm".into())));
    for (name, value) in &spec.env {
        message.push("env", joined(name, value));
    }
    for word in &spec.command {
        message.push("arg", word);
    }
    message
}

fn joined(name: impl Into<OsString>, value: impl AsRef<std::ffi::OsStr>) -> OsString {
    let mut variable = name.into();
    variable.push("=");
    variable.push(value);
    variable
}

/// The first process inside, on its way to the program and then the program.
struct Init {
    pid: i32,
    handle: OwnedFd,
    /// Closed by the kernel when the program starts.
    link: Option<UnixStream>,
}

struct Container<'a> {
    space: &'a Space,
    order: Message,
    limits: Message,
    keeper: Child,
    keeper_link: Option<UnixStream>,
    init: Option<Init>,
    relay: Option<Relay>,
    ended_by: Option<Signal>,
    failure: Option<(Option<u8>, String)>,
}

impl Container<'_> {
    /// Serves the container until the keeper has ended.
    fn watch(&mut self, end: &OwnedFd) -> io::Result<()> {
        loop {
            let [ended, signal, caller, keeper, init] = self.wait(end)?;
            if caller {
                self.welcome()?;
            }
            // Reasons before the end: both may be there at once.
            if keeper {
                self.hear_keeper()?;
            }
            if init {
                self.hear_init()?;
            }
            if ended {
                return Ok(());
            }
            if signal {
                while let Some(received) = self.space.signals.read_signal()? {
                    let number = i32::try_from(received.ssi_signo).unwrap_or_default();
                    self.forward(Signal::try_from(number)?)?;
                }
            }
        }
    }

    /// What has happened: the keeper's end, a signal, a caller, a word from the keeper, one from
    /// the init.
    fn wait(&self, end: &OwnedFd) -> io::Result<[bool; 5]> {
        let init_link = self.init.as_ref().and_then(|init| init.link.as_ref());
        let watched = [
            Some(end.as_fd()),
            Some(self.space.signals.as_fd()),
            self.init.is_none().then(|| self.space.listener.as_fd()),
            self.keeper_link.as_ref().map(AsFd::as_fd),
            init_link.map(AsFd::as_fd),
        ];
        let mut fds: Vec<PollFd<'_>> =
            watched.iter().flatten().map(|&fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut happened = fds.iter().map(|fd| fd.any().unwrap_or(false));
        Ok(watched.map(|fd| fd.is_some() && happened.next().unwrap_or(false)))
    }

    /// The keeper calls first, then the init.
    fn welcome(&mut self) -> io::Result<()> {
        let (link, _) = self.space.listener.accept()?;
        if self.ended_by.is_some() {
            // Too late: a caller whose link is closed goes home.
            return Ok(());
        }
        let pid = getsockopt(&link, PeerCredentials)?.pid();
        if pid == self.keeper.id().cast_signed() && self.keeper_link.is_none() {
            wire::send(&link, &self.limits)?;
            self.keeper_link = Some(link);
            return Ok(());
        }
        // The init waits for its orders: the number is still its own.
        let handle = pidfd(pid)?;
        wire::send(&link, &self.order)?;
        self.init = Some(Init { pid, handle, link: Some(link) });
        Ok(())
    }

    fn hear_keeper(&mut self) -> io::Result<()> {
        let Some(link) = &self.keeper_link else { return Ok(()) };
        match wire::receive(link)? {
            Some(message) => self.failed(&message),
            None => self.keeper_link = None,
        }
        Ok(())
    }

    fn hear_init(&mut self) -> io::Result<()> {
        let Some(init) = &mut self.init else { return Ok(()) };
        let Some(link) = &init.link else { return Ok(()) };
        match wire::receive(link)? {
            None => init.link = None,
            Some(message) if message.get("failed").is_some() => self.failed(&message),
            Some(_) => {
                let mut go = Message::default();
                if terminal::wanted() {
                    let relay = Relay::start(init.pid)?;
                    go.push("terminal", relay.name());
                    self.relay = Some(relay);
                }
                wire::send(link, &go)?;
            }
        }
        Ok(())
    }

    fn failed(&mut self, message: &Message) {
        let reason = message.get("failed").unwrap_or_default().to_string_lossy().into_owned();
        let status = message.number("status").and_then(|status| u8::try_from(status).ok());
        self.failure.get_or_insert((status, reason));
    }

    /// Does with a signal what it would do to a program that is not process 1.
    fn forward(&mut self, signal: Signal) -> io::Result<()> {
        if let (Signal::SIGWINCH, Some(relay)) = (signal, &self.relay) {
            relay.resize();
            return Ok(());
        }
        match &self.init {
            Some(init) if init.link.is_none() => {
                let mut sent = signal;
                if signal != Signal::SIGWINCH && takes_default_action(init.pid, signal) {
                    // All that are passed on would end it by default.
                    self.ended_by = Some(signal);
                    sent = Signal::SIGKILL;
                }
                let number = rustix::process::Signal::from_named_raw(sent as i32);
                match pidfd_send_signal(
                    &init.handle,
                    number.unwrap_or(rustix::process::Signal::KILL),
                ) {
                    // It has just ended by itself.
                    Err(rustix::io::Errno::SRCH) => Ok(()),
                    sent => Ok(sent?),
                }
            }
            _ if signal == Signal::SIGWINCH => Ok(()),
            _ => {
                // Not a program yet. The keeper sees that we are gone, and ends what there is.
                self.ended_by = Some(signal);
                self.keeper_link = None;
                Ok(())
            }
        }
    }
}

fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Whether a process neither handles, ignores nor holds back a signal.
pub(super) fn takes_default_action(pid: i32, signal: Signal) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    default_action_in(&status, signal)
}

/// proc_pid_status(5): the masks are hexadecimal, signal 1 is the lowest bit.
fn default_action_in(status: &str, signal: Signal) -> bool {
    let bit = 1u64 << (signal as u32 - 1);
    let mut masks = status.lines().filter_map(|line| {
        let (name, mask) = line.split_once(':')?;
        let mask = u64::from_str_radix(mask.trim(), 16).ok();
        ["SigBlk", "SigIgn", "SigCgt"].contains(&name).then_some(mask)?
    });
    masks.all(|mask| mask & bit == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handled_ignored_or_blocked_signal_is_left_to_the_program() {
        let masks = |blocked: u64, ignored: u64, caught: u64| {
            let masks = [("SigBlk", blocked), ("SigIgn", ignored), ("SigCgt", caught)];
            masks.map(|(name, mask)| format!("{name}:\t{mask:016x}\n")).concat()
        };
        let term = 1 << 14;
        assert!(default_action_in(&masks(0, 0, 0), Signal::SIGTERM));
        assert!(default_action_in(&masks(1, 2, 4), Signal::SIGTERM));
        assert!(!default_action_in(&masks(term, 0, 0), Signal::SIGTERM));
        assert!(!default_action_in(&masks(0, term, 0), Signal::SIGTERM));
        assert!(!default_action_in(&masks(0, 0, term), Signal::SIGTERM));
    }
}
