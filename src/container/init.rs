//! The init: the process that goes into the container's namespaces and becomes its program.

use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::io;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::SigSet;
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, sethostname, setsid};
use rustix::process::{Resource, getrlimit, setrlimit};

use super::privilege::User;
use super::wire::{self, Message};
use super::{cgroup, network, root};
use crate::error::{Error, Result};

/// Where programs are looked for, as podman has it.
const SEARCH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Returns only when the program could not be started, which the host process has been told then.
pub(super) fn run(control: &Path, groups: &[PathBuf]) -> Result<u8> {
    let host = UnixStream::connect(control).map_err(|e| Error::io("no container to enter", e))?;
    let failure = match enter(&host, groups) {
        Ok(order) => start(&order),
        Err(error) => Failure { status: None, reason: error.to_string() },
    };
    let mut message = Message::default().with("failed", failure.reason);
    if let Some(status) = failure.status {
        message.push("status", status.to_string());
    }
    wire::send(&host, &message).map_err(|e| Error::io("cannot tell the host process", e))?;
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
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWCGROUP;
    let doing = |what: &'static str| move |e: nix::Error| Error::io(what, e.into());
    unshare(namespaces).map_err(doing("cannot make the container's namespaces"))?;
    sethostname(order.get("hostname").unwrap_or_default())
        .map_err(doing("cannot set the host name"))?;
    network::loopback_up().map_err(|e| Error::io("cannot set the loopback interface up", e))?;
    root::enter(Path::new(order.get("root").unwrap_or_default()))?;
    root::host_names(order.get("hostname").unwrap_or_default())
        .map_err(|e| Error::io("cannot name the host", e).at_path("/etc/hosts"))?;
    // A program in the session of the user's shell could type into its terminal (TIOCSTI).
    setsid().map_err(doing("cannot start a session"))?;
    wire::send(host, &Message::default()).map_err(|e| Error::io("cannot report", e))?;
    if let Some(terminal) = hear(host)?.get("terminal") {
        let terminal = terminal.to_string_lossy();
        attach(&terminal)
            .map_err(|e| Error::io("cannot use the terminal", e).at_path(&*terminal))?;
    }
    Ok(order)
}

/// Makes a terminal of the container the controlling one of this session.
fn attach(terminal: &str) -> io::Result<()> {
    // The first terminal that a session's leader opens becomes the session's.
    let file = OpenOptions::new().read(true).write(true).open(terminal)?;
    dup2_stdin(&file)?;
    dup2_stdout(&file)?;
    if rustix::termios::isatty(rustix::stdio::stderr()) {
        dup2_stderr(&file)?;
    }
    root::console(terminal)
}

/// Becomes the program; what comes back is why not.
fn start(order: &Message) -> Failure {
    match prepare(order) {
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

fn prepare(order: &Message) -> Result<Command> {
    let user = User::find(order.get("user").and_then(OsStr::to_str).unwrap_or("0"))?;
    let workdir = Path::new(order.get("workdir").unwrap_or(OsStr::new("/")));
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
    user.become_user().map_err(|e| Error::io("cannot give up privileges", e))?;
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
