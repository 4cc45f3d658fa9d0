//! The host process's part while the container runs: it starts the keeper, tells the processes
//! inside what to do, passes on signals and the terminal, and learns how the program ended.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::cgroup::freezer::{self, Cold, Frozen};
use super::handle::Order;
use super::keeper::STOP;
use super::network::{Network, user};
use super::scratch::Scratch;
use super::seats::Seats;
use super::seccomp::notify;
use super::terminal::{self, Relay};
use super::wire::{self, Message};
use super::{Ids, KEEPER, Limits, Outcome, STAGE, Space, Spec, cgroup, sys, visit};
use crate::error::{Error, ErrorKind, Result};

pub(super) fn run(
    space: &mut Space,
    root: &Path,
    spec: &Spec,
    resolver: Option<String>,
) -> Result<Outcome> {
    let doing = |what: &'static str| move |e: io::Error| Error::io(what, e);
    let order = order(space, root, spec, resolver);
    let mut container = Container {
        space,
        spec,
        root,
        order,
        deaf: false,
        groups: Vec::new(),
        init: None,
        relay: None,
        ended_by: None,
        failure: None,
        status: None,
        frozen: None,
        cold: None,
    };
    let watched = container.watch();
    container.space.handle.close();
    container.relay = None;
    let Container { space, groups, ended_by, failure, status, cold, .. } = container;
    if watched.is_err() {
        // All ends with it.
        space.keeper.kill().map_err(doing("cannot end the container's keeper"))?;
    }
    let lost = if status.is_none() {
        Some(space.keeper.wait().map_err(doing("cannot wait for the container"))?)
    } else {
        None
    };
    // A keeper that was killed has left them.
    cgroup::remove(groups);
    drop(cold);
    watched.map_err(doing("lost the container"))?;
    if let Some((failed_with, reason)) = failure {
        let kind = if failed_with == Some(127) { ErrorKind::NotFound } else { ErrorKind::Io };
        let error = Error::new(kind, reason);
        return match failed_with {
            Some(status) => Ok(Outcome { status, not_started: Some(error) }),
            None => Err(error),
        };
    }
    match (ended_by, status, lost) {
        (Some(signal), ..) => {
            let status = u8::try_from(128 + signal).unwrap_or(1);
            Ok(Outcome { status, not_started: None })
        }
        (None, Some(status), _) => Ok(Outcome { status, not_started: None }),
        (None, None, lost) => {
            let how = lost.map(|status| format!(": {status}")).unwrap_or_default();
            Err(Error::new(ErrorKind::Io, format!("the container's keeper was lost{how}")))
        }
    }
}

/// Starts the keeper as the first process of a new pid namespace, with its end of the link to this
/// process, and the control group that this process has moved to. For a thread that has a file table of its own and ends then: it leaves the link open to
/// what it starts, and its next children are in that namespace, too.
pub(super) fn start_keeper(
    scratch: &Scratch,
    leaf: Option<&Path>,
    limits: &Limits,
    link: BorrowedFd<'_>,
) -> io::Result<Child> {
    unshare(CloneFlags::CLONE_NEWPID)?;
    fcntl(link, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Command::new(scratch.executable())
        .args([STAGE, KEEPER])
        .arg(scratch.path())
        .args([link.as_raw_fd().to_string(), std::process::id().to_string()])
        .args(limits.words())
        .args(leaf)
        .env_clear()
        .current_dir("/")
        .spawn()
}

/// What the container's /etc/resolv.conf says, where the disk's own does not.
pub(super) fn resolver(network: &Network) -> Result<Option<String>> {
    let hosts = || fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    match network {
        Network::None => Ok(None),
        Network::Host => Ok(Some(hosts())),
        Network::User(_) => user::resolver(&hosts()).map(Some),
    }
}

fn order(space: &Space, root: &Path, spec: &Spec, resolver: Option<String>) -> Message {
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
    for (name, set) in [
        ("read-only", spec.read_only),
        ("make-workdir", spec.make_workdir),
        ("no-new-privileges", spec.no_new_privileges),
        ("unfiltered", spec.unfiltered),
        ("hand-over", space.ids == Ids::One && spec.owners.is_some()),
    ] {
        if set {
            message.push(name, "");
        }
    }
    message.push("ids", space.ids.word());
    message.push("capabilities", spec.capabilities.bits().to_string());
    message.push("network", if spec.network == Network::Host { "host" } else { "own" });
    if let Some(resolver) = resolver {
        message.push("resolver", resolver);
    }
    for volume in &spec.volumes {
        message.push("volume-source", &volume.source);
        message.push("volume-at", &volume.at);
        message.push("volume-read-only", if volume.read_only { "yes" } else { "no" });
    }
    let term = std::env::var_os("TERM").filter(|_| spec.terminal || terminal::wanted());
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
    space: &'a mut Space,
    spec: &'a Spec,
    root: &'a Path,
    order: Message,
    /// Whether the keeper will say nothing more.
    deaf: bool,
    /// The control groups that the keeper has made.
    groups: Vec<PathBuf>,
    init: Option<Init>,
    relay: Option<Relay>,
    /// The signal by which it was ended.
    ended_by: Option<i32>,
    failure: Option<(Option<u8>, String)>,
    /// How the container ended, by the keeper's word.
    status: Option<u8>,
    /// What stands still while it is paused.
    frozen: Option<Frozen>,
    /// The group that was made for that.
    cold: Option<Cold>,
}

impl Container<'_> {
    /// Serves the container until the keeper says that it has ended, or has ended itself.
    fn watch(&mut self) -> io::Result<()> {
        loop {
            let [lost, signal, caller, keeper, init, ordered] = self.wait()?;
            if caller {
                self.welcome()?;
            }
            // Reasons before the end: both may be there at once.
            if keeper {
                self.hear_keeper()?;
            }
            while lost && !self.deaf && self.status.is_none() {
                self.hear_keeper()?;
            }
            if lost || self.status.is_some() {
                return self.last_words();
            }
            if init {
                self.hear_init()?;
            }
            if signal {
                while let Some(received) = self.space.signals.read_signal()? {
                    self.forward(i32::try_from(received.ssi_signo).unwrap_or_default())?;
                }
            }
            if ordered {
                for (order, told) in self.space.handle.take() {
                    // Who has asked may have given up.
                    let _ = told.send(self.obey(order).map_err(|e| Error::io("", e)));
                }
            }
        }
    }

    /// What has happened: the keeper's end, a signal, a caller, a word from the keeper, one from
    /// the init, an order.
    fn wait(&self) -> io::Result<[bool; 6]> {
        let init_link = self.init.as_ref().and_then(|init| init.link.as_ref());
        let watched = [
            Some(self.space.end.as_fd()),
            Some(self.space.signals.as_fd()),
            self.space.listener.as_ref().map(AsFd::as_fd),
            Some(self.space.link.as_fd()).filter(|_| !self.deaf),
            init_link.map(AsFd::as_fd),
            Some(self.space.handle.wake()),
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

    /// The init calls.
    fn welcome(&mut self) -> io::Result<()> {
        let Some(listener) = self.space.listener.take() else { return Ok(()) };
        let (link, _) = listener.accept()?;
        if self.ended_by.is_some() || self.failure.is_some() {
            // Too late: a caller whose link is closed goes home.
            return Ok(());
        }
        let pid = getsockopt(&link, PeerCredentials)?.pid();
        // It waits for its orders, and the number is still its own; or it has been killed.
        let Ok(handle) = pidfd(pid) else { return Ok(()) };
        wire::send(&link, &self.order)?;
        self.init = Some(Init { pid, handle, link: Some(link) });
        Ok(())
    }

    fn hear_keeper(&mut self) -> io::Result<()> {
        let Some(message) = wire::receive(&self.space.link)? else {
            self.deaf = true;
            return Ok(());
        };
        let failed = message.get("failed").is_some();
        if failed {
            self.failed(&message);
        }
        if let Some(status) = message.number("ended") {
            self.status = Some(u8::try_from(status).unwrap_or(1));
        } else if failed {
            // An init that waits for its network waits for nothing.
            self.stop();
        } else if message.get("connected").is_some() {
            self.go()?;
        } else {
            self.groups = message.all("group").map(PathBuf::from).collect();
        }
        Ok(())
    }

    /// Has the keeper end what there is. One who cannot be told is about to be lost.
    fn stop(&self) {
        let _ = wire::send(&self.space.link, &Message::default().with(STOP, ""));
    }

    fn hear_init(&mut self) -> io::Result<()> {
        let Some(init) = &mut self.init else { return Ok(()) };
        let Some(link) = &init.link else { return Ok(()) };
        match wire::receive(link)? {
            None => {
                init.link = None;
                let pid = init.pid;
                self.tell_started(pid);
            }
            Some(message) if message.get("failed").is_some() => self.failed(&message),
            Some(message) if message.get(notify::LISTENER).is_some() => {
                let listener = wire::receive_open(link)?;
                if let Some(owners) = self.spec.owners.clone() {
                    let device = || Ok(fs::metadata(self.root)?.dev());
                    let device = self.space.place.run(&[], device).flatten()?;
                    notify::serve(listener, device, owners)?;
                }
            }
            Some(_) => match &self.spec.network {
                Network::User(publish) => {
                    wire::send(&self.space.link, &user::wish(init.pid, publish))?;
                }
                _ => self.go()?,
            },
        }
        Ok(())
    }

    /// The init has become the program, which closes its link, or has said why not.
    fn tell_started(&self, init: i32) {
        if let (None, Some(started)) = (&self.failure, &self.spec.started) {
            let keeper = self.space.keeper.id().cast_signed();
            let (scratch, groups) = (&self.space.scratch, &self.groups);
            started(&visit::entrance(&self.order, scratch, keeper, init, groups));
        }
    }

    /// Why the program was not started, where the init has said so as it ended; or that it was, of one whose
    /// end was heard of first.
    fn last_words(&mut self) -> io::Result<()> {
        while let Some((link, pid)) =
            self.init.as_ref().and_then(|init| Some((init.link.as_ref()?, init.pid)))
        {
            match wire::receive(link)? {
                None => {
                    self.init = None;
                    if self.status.is_some() {
                        self.tell_started(pid);
                    }
                }
                Some(message) if message.get("failed").is_some() => self.failed(&message),
                Some(message) if message.get(notify::LISTENER).is_some() => {
                    drop(wire::receive_open(link)?);
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Lets the init become the program.
    fn go(&mut self) -> io::Result<()> {
        let Some(init) = &self.init else { return Ok(()) };
        let Some(link) = &init.link else { return Ok(()) };
        let mut go = Message::default();
        if self.spec.terminal || terminal::wanted() {
            let seats = self.spec.console.clone().map(Seats::at).transpose()?;
            let relay = Relay::start(init.pid, seats.map(Arc::new))?;
            go.push("terminal", relay.name());
            if self.spec.terminal {
                go.push("errors-too", "");
            }
            self.relay = Some(relay);
        }
        wire::send(link, &go)
    }

    fn failed(&mut self, message: &Message) {
        let reason = message.get("failed").unwrap_or_default().to_string_lossy().into_owned();
        let status = message.number("status").and_then(|status| u8::try_from(status).ok());
        self.failure.get_or_insert((status, reason));
    }

    /// Does with a signal what it would do to a program that is not process 1.
    fn forward(&mut self, signal: i32) -> io::Result<()> {
        if let (WINDOW, Some(relay)) = (signal, &self.relay) {
            relay.resize();
            return Ok(());
        }
        match &self.init {
            Some(init) if init.link.is_none() => {
                let mut sent = signal;
                if ends_by_default(signal) && takes_default_action(init.pid, signal) {
                    self.ended_by = Some(signal);
                    sent = Signal::SIGKILL as i32;
                }
                match sys::send_signal(init.handle.as_fd(), sent) {
                    // It has just ended by itself.
                    Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => Ok(()),
                    sent => sent,
                }
            }
            _ if !ends_by_default(signal) => Ok(()),
            _ => {
                // Not a program yet.
                self.ended_by = Some(signal);
                self.stop();
                Ok(())
            }
        }
    }

    fn obey(&mut self, order: Order) -> io::Result<()> {
        match order {
            Order::Signal(number) => self.forward(number),
            Order::Kill => {
                self.ended_by.get_or_insert(Signal::SIGKILL as i32);
                self.stop();
                Ok(())
            }
            Order::Pause => match &self.init {
                _ if self.frozen.is_some() => Ok(()),
                Some(init) if init.link.is_none() => {
                    self.frozen = Some(freezer::freeze(init.pid, &self.groups, &mut self.cold)?);
                    Ok(())
                }
                _ => Err(io::Error::new(io::ErrorKind::WouldBlock, "it has not started yet")),
            },
            Order::Resume => self.frozen.take().map_or(Ok(()), freezer::thaw),
        }
    }
}

const WINDOW: i32 = Signal::SIGWINCH as i32;

/// signal(7): whether a process ends of a signal that it does not handle.
fn ends_by_default(signal: i32) -> bool {
    use Signal::{SIGCHLD, SIGCONT, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU, SIGURG, SIGWINCH};
    let spared = [SIGCHLD, SIGCONT, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU, SIGURG, SIGWINCH];
    !spared.iter().any(|spared| *spared as i32 == signal)
}

pub(super) fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Whether a process neither handles, ignores nor holds back a signal.
pub(super) fn takes_default_action(pid: i32, signal: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    default_action_in(&status, signal)
}

/// proc_pid_status(5): the masks are hexadecimal, signal 1 is the lowest bit.
fn default_action_in(status: &str, signal: i32) -> bool {
    let bit = u32::try_from(signal - 1).ok().and_then(|bit| 1u64.checked_shl(bit)).unwrap_or(0);
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
        assert!(default_action_in(&masks(0, 0, 0), 15));
        assert!(default_action_in(&masks(1, 2, 4), 15));
        assert!(!default_action_in(&masks(term, 0, 0), 15));
        assert!(!default_action_in(&masks(0, term, 0), 15));
        assert!(!default_action_in(&masks(0, 0, term), 15));
    }
}
