//! Another program in a container that runs: by the namespaces of its process 1, with the same system
//! calls and capabilities.
//!
//! Who visits enters the container's user namespace, and starts a process in its pid namespace from the
//! binary on the read-only mount, so that no program in there gets hold of the host's; that process goes
//! on into all other namespaces and becomes the program. It is no process 1: signals reach it as they
//! are.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::{Mode, umask};
use nix::unistd::setsid;
use vdisk_fuse::apart::Apart;

use super::scratch::Scratch;
use super::supervise::pidfd;
use super::terminal::{self, Relay};
use super::wire::{self, Message};
use super::{FORWARDED, Outcome, STAGE, VISIT, cgroup, init, sys};
use crate::error::{Error, ErrorKind, Result};

/// What is to run in a container besides its own program.
#[derive(Debug, Clone, Default)]
pub struct Visit {
    /// The program and its arguments.
    pub command: Vec<OsString>,
    /// Variables that are set besides, or instead of, the container's.
    pub env: Vec<(OsString, OsString)>,
    /// The directory to start in, the container's program's when not given.
    pub workdir: Option<PathBuf>,
    /// `USER[:GROUP]`, the container's program's when not given.
    pub user: Option<String>,
    /// Gives it a terminal also where its user does not sit at both ends.
    pub terminal: bool,
}

/// The way into a container, as bytes for [`visit`]: its order, its processes, its control groups.
pub(super) fn entrance(
    order: &Message,
    scratch: &Scratch,
    keeper: i32,
    init: i32,
    groups: &[PathBuf],
) -> Vec<u8> {
    let mut entrance = order.clone();
    entrance.push("scratch", scratch.path());
    for (name, pid) in [("keeper", keeper), ("init", init)] {
        entrance.push(name, pid.to_string());
        entrance.push(&format!("{name}-start"), start_of(pid).unwrap_or_default());
    }
    groups.iter().for_each(|group| entrance.push("group", group));
    entrance.encode()
}

/// When a process was started, in ticks since the host's: field 22 of proc_pid_stat(5).
fn start_of(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19).map(str::to_owned)
}

/// Runs a program in the container to which `entrance` leads. To be called while the process has one
/// thread.
///
/// # Errors
/// [`ErrorKind::NotFound`] where the container has ended. That the program cannot be executed is an
/// [`Outcome`].
pub fn visit(entrance: &[u8], visit: &Visit) -> Result<Outcome> {
    let doing = |what: &'static str| move |e: io::Error| Error::io(what, e);
    let mut order = Message::decode(entrance)
        .ok_or_else(|| Error::corrupt("the way into the container cannot be read"))?;
    let keeper = process(&order, "keeper")?;
    let init = process(&order, "init")?;
    let mut mask = SigSet::empty();
    mask.extend(FORWARDED);
    mask.thread_block().map_err(|e| Error::io("cannot hold signals back", e.into()))?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(|e| Error::io("cannot wait for signals", e.into()))?;
    if !same_namespace(keeper.0, "user") {
        setns(&keeper.1, CloneFlags::CLONE_NEWUSER)
            .map_err(|e| Error::io("cannot enter the container's user namespace", e.into()))?;
    }
    let (link, theirs) = UnixStream::pair().map_err(doing("cannot speak with the container"))?;
    let keep = [keeper.1.as_fd(), init.1.as_fd(), theirs.as_fd()];
    let scratch = Scratch::at(Path::new(order.get("scratch").unwrap_or_default()));
    let mut child = Apart::here()
        .run(&keep, || send_in(&scratch, keep))
        .flatten()
        .map_err(doing("cannot enter the container"))?;
    drop(theirs);
    say(&mut order, visit);
    let ended = wire::send(&link, &order).and_then(|()| {
        Inside { signals, link, init: init.0, visit, relay: None }.watch(&mut child)
    });
    ended.map_err(doing("lost the container"))
}

/// A process of the container and its number, if it is the one that is meant.
fn process(entrance: &Message, name: &str) -> Result<(i32, OwnedFd)> {
    let gone = || Error::new(ErrorKind::NotFound, "the container has ended");
    let pid = entrance.number(name).and_then(|pid| i32::try_from(pid).ok()).ok_or_else(gone)?;
    let handle = pidfd(pid).map_err(|_| gone())?;
    // Looked at once it cannot become another's number unnoticed.
    let same =
        start_of(pid).map(OsString::from).as_deref() == entrance.get(&format!("{name}-start"));
    if same { Ok((pid, handle)) } else { Err(gone()) }
}

fn same_namespace(pid: i32, which: &str) -> bool {
    let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{which}")).ok();
    of("self").is_some() && of("self") == of(&pid.to_string())
}

/// The container's own order, with what the visitor wants instead.
fn say(order: &mut Message, visit: &Visit) {
    order.remove("arg");
    visit.command.iter().for_each(|word| order.push("arg", word));
    for (name, value) in &visit.env {
        let mut variable = name.clone();
        variable.push("=");
        variable.push(value);
        order.push("env", variable);
    }
    if let Some(workdir) = &visit.workdir {
        order.remove("workdir");
        order.remove("make-workdir");
        order.push("workdir", workdir);
    }
    if let Some(user) = &visit.user {
        order.remove("user");
        order.push("user", user);
    }
    // Only the container's own host process could note owners.
    order.remove("hand-over");
}

/// Starts the process that goes in. For a thread of its own: its children are in the container's pid
/// namespace from then on.
fn send_in(scratch: &Scratch, [keeper, init, link]: [BorrowedFd<'_>; 3]) -> io::Result<Child> {
    unshare(CloneFlags::CLONE_FS)?;
    setns(keeper, CloneFlags::CLONE_NEWNS)?;
    setns(init, CloneFlags::CLONE_NEWPID)?;
    for open in [init, link] {
        fcntl(open, FcntlArg::F_SETFD(FdFlag::empty()))?;
    }
    Command::new(scratch.executable())
        .args([STAGE, VISIT])
        .arg(scratch.path())
        .args([init, link].map(|open| open.as_raw_fd().to_string()))
        .env_clear()
        .current_dir("/")
        .spawn()
}

struct Inside<'a> {
    signals: SignalFd,
    link: UnixStream,
    init: i32,
    visit: &'a Visit,
    relay: Option<Relay>,
}

impl Inside<'_> {
    fn watch(mut self, child: &mut Child) -> io::Result<Outcome> {
        let end = pidfd(child.id().cast_signed())?;
        let (mut failure, mut deaf) = (None, false);
        loop {
            let fds =
                [Some(end.as_fd()), Some(self.signals.as_fd()), (!deaf).then(|| self.link.as_fd())];
            let mut polled: Vec<_> =
                fds.iter().flatten().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
            match poll(&mut polled, PollTimeout::NONE) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let mut ready = polled.iter().map(|fd| fd.any().unwrap_or(false));
            let [over, signal, word] = fds.map(|fd| fd.is_some() && ready.next().unwrap_or(false));
            if word {
                match wire::receive(&self.link)? {
                    // It has become the program, or has ended.
                    None => deaf = true,
                    Some(message) if message.get("failed").is_some() => failure = Some(message),
                    Some(_) => self.go()?,
                }
                continue;
            }
            if signal {
                self.pass_on(&end)?;
            }
            if over {
                let ended = child.wait()?;
                self.relay = None;
                return outcome(failure.as_ref(), ended);
            }
        }
    }

    /// Lets it become the program.
    fn go(&mut self) -> io::Result<()> {
        let mut go = Message::default();
        if self.visit.terminal || terminal::wanted() {
            let relay = Relay::start(self.init, None)?;
            go.push("terminal", relay.name());
            if self.visit.terminal {
                go.push("errors-too", "");
            }
            self.relay = Some(relay);
        }
        wire::send(&self.link, &go)
    }

    fn pass_on(&self, program: &OwnedFd) -> io::Result<()> {
        while let Some(received) = self.signals.read_signal()? {
            let number = i32::try_from(received.ssi_signo).unwrap_or_default();
            match (&self.relay, number == nix::libc::SIGWINCH) {
                (Some(relay), true) => relay.resize(),
                // One that has just ended needs none.
                _ => drop(sys::send_signal(program.as_fd(), number)),
            }
        }
        Ok(())
    }
}

fn outcome(failure: Option<&Message>, ended: std::process::ExitStatus) -> io::Result<Outcome> {
    let code = ended.code().or_else(|| Some(128 + ended.signal()?));
    let status = code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    let Some(failure) = failure else { return Ok(Outcome { status, not_started: None }) };
    let reason = failure.get("failed").unwrap_or_default().to_string_lossy().into_owned();
    match failure.number("status").and_then(|status| u8::try_from(status).ok()) {
        Some(status) => {
            let error = Error::new(ErrorKind::NotFound, reason);
            Ok(Outcome { status, not_started: Some(error) })
        }
        None => Err(io::Error::other(reason)),
    }
}

/// The process on its way in; returns only when it could not become the program, which who visits has
/// been told then.
pub(super) fn run(words: &[&OsStr]) -> Result<u8> {
    let own_use = || Error::invalid("this command is for vdisk's own use");
    let open = |at: usize| {
        let number = words.get(at)?.to_str()?.parse().ok()?;
        sys::inherited(number).ok()
    };
    let (Some(target), Some(link)) = (open(0), open(1)) else { return Err(own_use()) };
    let link = UnixStream::from(link);
    match enter(&target, &link) {
        Ok(order) => init::become_program(&order, &link),
        Err(error) => init::give_up(&link, error),
    }
}

fn enter(target: &OwnedFd, link: &UnixStream) -> Result<Message> {
    let hear = || {
        let message = wire::receive(link).map_err(|e| Error::io("cannot hear who visits", e));
        message?.ok_or_else(|| Error::invalid("who visits has ended"))
    };
    let order = hear()?;
    for group in order.all("group") {
        cgroup::join(Path::new(group))?;
    }
    let mut namespaces = CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::CLONE_NEWNS;
    if order.get("network").unwrap_or_default() != "host" {
        namespaces |= CloneFlags::CLONE_NEWNET;
    }
    let doing = |what: &'static str| move |e: nix::Error| Error::io(what, e.into());
    setns(target, namespaces).map_err(doing("cannot enter the container's namespaces"))?;
    // The keys of the user's own session are not the container's.
    sys::new_keyring();
    setsid().map_err(doing("cannot start a session"))?;
    // The container's, not the visitor's.
    umask(Mode::from_bits_truncate(0o022));
    wire::send(link, &Message::default()).map_err(|e| Error::io("cannot report", e))?;
    let go = hear()?;
    if let Some(terminal) = go.get("terminal") {
        init::sit_at(&terminal.to_string_lossy(), go.get("errors-too").is_some())
            .map_err(|e| Error::io("cannot use the terminal", e))?;
    }
    Ok(order)
}
