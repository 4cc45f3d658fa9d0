//! How `run` and `boot` become instances: a process that looks after it, and one that runs it.
//!
//! All three, the user's own command, the keeper and the turn, are the same command line; a hidden
//! option before it says which it is.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use clap::{Args as ClapArgs, ValueEnum};
use vdisk::change::plan_remove;
use vdisk::instance::keeper::{self, Plan};
use vdisk::instance::place::Claim;
use vdisk::instance::{Kind, LOG_SIZE, Phase, Policy, Record, now, parse_name};
use vdisk::{Error, ErrorKind, Result};

use super::named::Named;
use crate::cli::image::Which;
use crate::cli::mount::{READY, daemon};
use crate::cli::terminal::{output, size};

/// How an instance is kept.
#[derive(ClapArgs)]
#[command(next_help_heading = "Instance")]
pub struct Keeping {
    /// The instance's name, for `vdisk ps`, `stop` and so on; with an image, the clone is kept under it
    /// and found again the next time
    #[arg(long, value_name = "N", value_parser = parse_name)]
    pub name: Option<String>,
    /// Return when it runs, and print its id; what it prints is in `vdisk logs`
    #[arg(short, long)]
    pub detach: bool,
    /// Leave nothing of the instance when it ends: also not the clone of an image
    #[arg(long = "rm")]
    remove: bool,
    /// Start it again when it ends by itself
    #[arg(long, value_name = "no|on-failure|always", hide_possible_values = true)]
    restart: Option<Restart>,
    /// With --detach, how large a log becomes before a new one is begun; the one before is kept
    #[arg(long, value_name = "SIZE", value_parser = size::parse, requires = "detach", default_value_t = LOG_SIZE, hide_default_value = true)]
    log_size: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Restart {
    No,
    OnFailure,
    Always,
}

impl Keeping {
    /// Whether it is an instance at all.
    fn wanted(&self) -> bool {
        self.name.is_some() || self.detach || self.remove || self.restart.is_some()
    }
}

/// Which of the three this process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// The user's own.
    User,
    /// Looks after an instance that is detached.
    Keeper,
    /// Runs the instance whose directory this is.
    Turn(PathBuf),
}

static ROLE: OnceLock<Role> = OnceLock::new();

/// The hidden option's name.
pub const OPTION: &str = "instance-role";

/// Reads the hidden option.
pub fn role(word: &std::ffi::OsStr) -> Role {
    match word.to_str() {
        Some("keeper") => Role::Keeper,
        _ => Role::Turn(PathBuf::from(word)),
    }
}

/// Says which this process is.
pub fn keep_role(role: Option<OsString>) {
    let _ = ROLE.set(role.map_or(Role::User, |word| self::role(&word)));
}

/// What is run, as its record says it.
pub struct About {
    pub kind: Kind,
    /// What the user calls its disk or image.
    pub named: PathBuf,
    pub command: Vec<String>,
    pub stop_signal: i32,
    pub exposed_ports: Vec<String>,
}

/// What a process has to do.
pub enum Part {
    /// Run it itself; for the instance in this directory, where there is one.
    Run(Option<PathBuf>),
    /// Nothing more: it was an instance, and this is the exit status.
    Done(u8),
}

/// Does what there is to be done for an instance, if one is wanted.
pub fn part(
    keeping: &Keeping,
    named: &Named,
    which: &Which,
    about: impl FnOnce() -> Result<About>,
) -> Result<Part> {
    match ROLE.get() {
        Some(Role::Turn(dir)) => Ok(Part::Run(Some(dir.clone()))),
        Some(Role::Keeper) => look_after(keeping, named, which, about()?).map(Part::Done),
        _ if !keeping.wanted() => Ok(Part::Run(None)),
        _ if keeping.detach => {
            // What is wrong is said before anything is started.
            about()?;
            detach().map(Part::Done)
        }
        _ => look_after(keeping, named, which, about()?).map(Part::Done),
    }
}

/// This command line, for another role.
fn command(role: &std::ffi::OsStr) -> Command {
    let mut option = OsString::from(format!("--{OPTION}="));
    option.push(role);
    let mut command = Command::new("/proc/self/exe");
    command.arg0("vdisk").arg(option).args(own_words());
    command
}

/// The words of this command line that are the user's.
fn own_words() -> impl Iterator<Item = OsString> {
    let option = format!("--{OPTION}=");
    let words = std::env::args_os().skip(1);
    words.skip_while(move |word| word.to_string_lossy().starts_with(&option))
}

/// Starts the keeper and returns when what it looks after runs.
fn detach() -> Result<u8> {
    let failed = |e| Error::io("cannot start the instance's process", e);
    let mut command = command("keeper".as_ref());
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(failed)?;
    let mut said = String::new();
    if let Some(mut out) = child.stdout.take() {
        out.read_to_string(&mut said).map_err(failed)?;
    }
    match said.trim().strip_prefix(READY) {
        Some(id) => output::text(&format!("{}\n", id.trim())).map(|()| 0),
        None => {
            let ended = child.wait().map_err(failed)?;
            Ok(ended.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
        }
    }
}

/// Looks after an instance to its end.
fn look_after(keeping: &Keeping, named: &Named, which: &Which, about: About) -> Result<u8> {
    if keeping.detach {
        daemon::leave_session();
    }
    let claim = Claim::new(record(keeping, named, about)?)?;
    let made = match named.make(which) {
        Ok(made) => made,
        Err(error) => {
            claim.forget()?;
            return Err(error);
        }
    };
    let plan = Plan {
        command: &|dir: &Path| command(dir.as_os_str()),
        log: keeping.detach.then_some(keeping.log_size),
        ready: &mut |record| if keeping.detach { announce(record) } else { Ok(()) },
        // A clone that was made for what never ran holds nothing.
        ended: &mut |record, ran| {
            let goes = record.clone && (record.remove || (made && !ran));
            if goes { plan_remove(&named.disk, false)?.execute().map(drop) } else { Ok(()) }
        },
    };
    let outcome = keeper::keep(claim, plan)?;
    if !outcome.ran {
        // Nobody is left to tell it to but the one who waits.
        let _ = std::io::stderr().write_all(&outcome.last_words);
    }
    Ok(outcome.status)
}

fn record(keeping: &Keeping, named: &Named, about: About) -> Result<Record> {
    let disk = std::path::absolute(&named.disk)
        .map_err(|e| Error::io("cannot name the disk", e).at_path(&named.disk))?;
    let restart = match keeping.restart {
        None | Some(Restart::No) => Policy::No,
        Some(Restart::OnFailure) => Policy::OnFailure,
        Some(Restart::Always) => Policy::Always,
    };
    let image = named.image.as_ref();
    Ok(Record {
        id: String::new(),
        name: keeping.name.clone().unwrap_or_default(),
        kind: about.kind,
        disk: output::path(disk),
        image: image.map(|image| output::path(&image.name)),
        clone: image.is_some() && keeping.name.is_some(),
        command: about.command,
        words: own_words().map(output::path).collect(),
        named: output::path(about.named),
        directory: std::env::current_dir().map(output::path).unwrap_or_default(),
        restart,
        remove: keeping.remove,
        detached: keeping.detach,
        stop_signal: about.stop_signal,
        exposed_ports: about.exposed_ports,
        created: now(),
        pid: std::process::id(),
        turn: None,
        phase: Phase::Starting,
        started: None,
        ended: None,
        status: None,
        restarts: 0,
    })
}

/// Tells the caller that it runs, and lets go of his output.
fn announce(record: &Record) -> Result<()> {
    let failed = |e: std::io::Error| Error::io("the caller is gone", e);
    let mut out = std::io::stdout();
    writeln!(out, "{} {}", READY, record.id).and_then(|()| out.flush()).map_err(failed)?;
    let null = File::options().read(true).write(true).open("/dev/null").map_err(failed)?;
    nix::unistd::dup2_stdout(&null).map_err(|e| failed(e.into()))?;
    nix::unistd::dup2_stderr(&null).map_err(|e| failed(e.into()))
}

/// What is wrong with a stop signal that a disk's configuration names.
pub fn stop_signal(word: &str) -> Result<i32> {
    if word.is_empty() {
        return Ok(nix::sys::signal::Signal::SIGTERM as i32);
    }
    vdisk::instance::signal::parse(word)
        .map_err(|why| Error::new(ErrorKind::Invalid, format!("the stop signal: {why}")))
}
