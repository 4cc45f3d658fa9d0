//! The init: the process that goes into the container's namespaces and becomes its program.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::SigSet;
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, sethostname, setsid};
use rustix::process::{Resource, getrlimit, setrlimit};

use super::caps::Capabilities;
use super::ids::Ids;
use super::root::View;
use super::root::volume::Volume;
use super::scratch::Scratch;
use super::seccomp::{self, notify};
use super::user::User;
use super::wire::{self, Message};
use super::{cgroup, network, root, sys};
use crate::error::{Error, Result};

/// Where programs are looked for, as podman has it.
const SEARCH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Returns only when the program could not be started, which the host process has been told then.
pub(super) fn run(scratch: &Scratch, groups: &[PathBuf]) -> Result<u8> {
    // Without a host process there is nothing to enter, and nobody to tell.
    let Ok(host) = UnixStream::connect(scratch.control()) else { return Ok(1) };
    match enter(&host, groups) {
        Ok(order) => become_program(&order, &host),
        Err(error) => give_up(&host, error),
    }
}

/// Becomes the program of an order, in the container. Returns only when it could not be started, which
/// `host` has been told then.
pub(super) fn become_program(order: &Message, host: &UnixStream) -> Result<u8> {
    end(host, start(order, host))
}

/// Says what has failed before there was a program to start.
pub(super) fn give_up(host: &UnixStream, error: Error) -> Result<u8> {
    end(host, Failure { status: None, reason: error.to_string() })
}

fn end(host: &UnixStream, failure: Failure) -> Result<u8> {
    let mut message = Message::default().with("failed", failure.reason);
    if let Some(status) = failure.status {
        message.push("status", status.to_string());
    }
    let _ = wire::send(host, &message);
    Ok(failure.status.unwrap_or(1))
}

struct Failure {
    /// The exit status that says that the program, not the container, is at fault.
    status: Option<u8>,
    reason: String,
}

/// Builds the container around this process.
fn enter(host: &UnixStream, groups: &[PathBuf]) -> Result<Message> {
    let hear = |host: &UnixStream| {
        let message = wire::receive(host).map_err(|e| Error::io("cannot hear the host process", e));
        message?.ok_or_else(|| Error::invalid("the host process has ended"))
    };
    let order = hear(host)?;
    for group in groups {
        cgroup::join(group)?;
    }
    let network = order.get("network").unwrap_or_default();
    let host_network = network == "host";
    let mut namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWCGROUP;
    if !host_network {
        namespaces |= CloneFlags::CLONE_NEWNET;
    }
    let doing = |what: &'static str| move |e: nix::Error| Error::io(what, e.into());
    unshare(namespaces).map_err(doing("cannot make the container's namespaces"))?;
    let hostname = order.get("hostname").unwrap_or_default();
    sethostname(hostname).map_err(doing("cannot set the host name"))?;
    if !host_network {
        network::loopback_up().map_err(|e| Error::io("cannot set the loopback interface up", e))?;
    }
    root::enter(&view(&order, host_network)?)?;
    root::names::hosts(hostname)
        .map_err(|e| Error::io("cannot name the host", e).at_path("/etc/hosts"))?;
    if let Some(text) = order.get("resolver") {
        root::names::resolver(&text.to_string_lossy())
            .map_err(|e| Error::io("cannot name the servers", e).at_path("/etc/resolv.conf"))?;
    }
    // The keys of the user's own session are not the container's.
    sys::new_keyring();
    // A program in the session of the user's shell could type into its terminal (TIOCSTI).
    setsid().map_err(doing("cannot start a session"))?;
    wire::send(host, &Message::default()).map_err(|e| Error::io("cannot report", e))?;
    let go = hear(host)?;
    if let Some(terminal) = go.get("terminal") {
        let terminal = terminal.to_string_lossy();
        attach(&terminal, go.get("errors-too").is_some())
            .map_err(|e| Error::io("cannot use the terminal", e).at_path(&*terminal))?;
    }
    Ok(order)
}

fn view(order: &Message, host_network: bool) -> Result<View> {
    let all = |name| order.all(name).map(PathBuf::from);
    let read_only = order.all("volume-read-only").map(|word| word == "yes");
    let volumes = all("volume-source").zip(all("volume-at")).zip(read_only);
    Ok(View {
        root: order.get("root").unwrap_or_default().into(),
        read_only: order.get("read-only").is_some(),
        ids: ids(order)?,
        host_network,
        volumes: volumes
            .map(|((source, at), read_only)| Volume { source, at, read_only })
            .collect(),
    })
}

fn ids(order: &Message) -> Result<Ids> {
    let word = order.get("ids").and_then(OsStr::to_str).unwrap_or_default();
    Ids::from_word(word).ok_or_else(|| Error::invalid("an order without ids"))
}

/// Makes a terminal of the container the controlling one of this session, and its console.
fn attach(terminal: &str, errors_too: bool) -> io::Result<()> {
    sit_at(terminal, errors_too)?;
    root::console(terminal)
}

/// Makes a terminal of the container the controlling one of this session.
pub(super) fn sit_at(terminal: &str, errors_too: bool) -> io::Result<()> {
    // The first terminal that a session's leader opens becomes the session's.
    let file = OpenOptions::new().read(true).write(true).open(terminal)?;
    dup2_stdin(&file)?;
    dup2_stdout(&file)?;
    // Errors that the user has sent elsewhere go there, unless he has asked for a terminal.
    if errors_too || rustix::termios::isatty(rustix::stdio::stderr()) {
        dup2_stderr(&file)?;
    }
    Ok(())
}

/// Becomes the program; what comes back is why not.
fn start(order: &Message, host: &UnixStream) -> Failure {
    match prepare(order, host) {
        Ok(mut command) => {
            let error = command.exec();
            let name = command.get_program().to_string_lossy();
            let reason = format!("cannot run {name} in the container: {error}");
            let status = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
            Failure { status: Some(status), reason }
        }
        Err(error) => Failure { status: None, reason: error.to_string() },
    }
}

fn prepare(order: &Message, host: &UnixStream) -> Result<Command> {
    let ids = ids(order)?;
    let user = User::find(order.get("user").and_then(OsStr::to_str).unwrap_or("0"))?;
    if ids == Ids::One && !user.is_root() {
        return Err(Error::unsupported(
            "the container has no user but root: others need ids in /etc/subuid and /etc/subgid, \
             and newuidmap",
        ));
    }
    let workdir = Path::new(order.get("workdir").unwrap_or(OsStr::new("/")));
    if order.get("make-workdir").is_some() && fs::symlink_metadata(workdir).is_err() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(workdir)
            .map_err(|e| Error::io("cannot make the working directory", e).at_path(workdir))?;
    }
    std::env::set_current_dir(workdir)
        .map_err(|e| Error::io("cannot start in the working directory", e).at_path(workdir))?;
    let mut words = order.all("arg");
    let program = words.next().ok_or_else(|| Error::invalid("there is no command to run"))?;
    let mut command = Command::new(program);
    command.args(words).env_clear();
    command.env("PATH", SEARCH).env("HOME", &user.home).env("container", "vdisk");
    command.env("HOSTNAME", order.get("hostname").unwrap_or_default());
    for variable in order.all("env") {
        let (name, value) = split(variable);
        command.env(name, value);
    }
    if let Some(files) = order.get("open-files").and_then(OsStr::to_str) {
        let mut limit = getrlimit(Resource::Nofile);
        limit.current = files.parse().ok();
        // A program that may open more files than its user said is no reason not to run it.
        let _ = setrlimit(Resource::Nofile, limit);
    }
    let doing = |e| Error::io("cannot give up privileges", e);
    let may = order.number("capabilities").map(Capabilities::from_bits).unwrap_or_default();
    if order.get("no-new-privileges").is_some() {
        rustix::thread::set_no_new_privs(true).map_err(|e| doing(e.into()))?;
    }
    // Without no_new_privs only an administrator may filter, and who has become the user is none.
    let filtering = |e| Error::io("cannot filter system calls (seccomp)", e);
    if order.get("unfiltered").is_none() {
        sys::load_filter(&seccomp::filter(may.set()), false).map_err(filtering)?;
    }
    if order.get("hand-over").is_some() {
        notify::hand_over(host).map_err(filtering)?;
    }
    user.become_user(may, ids).map_err(doing)?;
    SigSet::empty().thread_set_mask()?;
    Ok(command)
}

/// `NAME=VALUE` at the first `=`.
fn split(variable: &OsStr) -> (OsString, OsString) {
    use std::os::unix::ffi::OsStrExt;
    let bytes = variable.as_bytes();
    let equals = bytes.iter().position(|&byte| byte == b'=').unwrap_or(bytes.len());
    let name = bytes.get(..equals).unwrap_or_default();
    let value = bytes.get(equals + 1..).unwrap_or_default();
    (OsStr::from_bytes(name).to_owned(), OsStr::from_bytes(value).to_owned())
}
