//! How `run` and `boot` become instances: a process that looks after it, and one that runs it.
//!
//! All three, the user's own command, the keeper and the turn, are the same command line; a hidden
//! option before it says which it is.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;

use clap::{Args as ClapArgs, ValueEnum};
use vdisk::change::plan_remove;
use vdisk::instance::keeper::{self, Plan};
use vdisk::instance::place::{self, Claim};
use vdisk::instance::{Kind, LOG_SIZE, Phase, Policy, Record, now, parse_name};
use vdisk::{Error, ErrorKind, Result};

use super::named::Named;
use crate::cli::disk::clone::numbered;
use crate::cli::fleet::again::Words;
use crate::cli::image::Which;
use crate::cli::mount::{READY, daemon};
use crate::cli::terminal::{output, size};

/// How an instance is kept.
#[derive(ClapArgs)]
#[command(next_help_heading = "Instance")]
pub struct Keeping {
    /// The instance's name, for `vdisk ps`, `stop` and so on; with an image, the clone is kept under it
    /// and found again the next time
    #[arg(long, value_name = "N", value_parser = name_or_pattern)]
    pub name: Option<String>,
    /// Return when it runs, and print its id; what it prints is in `vdisk logs`
    #[arg(short, long)]
    pub detach: bool,
    /// Start that many, detached: with --name 'web-{:04}' they are called web-0000 and so on. Where one does
    /// not start no more are begun, and those that run stay
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub count: Option<u32>,
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
    /// How many are to be started, where one command starts several.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where the name is no pattern for them, or one for no count.
    pub fn many(&self) -> Result<Option<u32>> {
        match (&self.name, self.count) {
            (Some(name), None) if name.contains('{') => {
                Err(Error::invalid(format!("'{name}' is a pattern for --count")))
            }
            (Some(name), Some(count)) => numbered(name, count).map(|_| Some(count)),
            (_, count) => Ok(count),
        }
    }

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
    /// The same, of the instance with this id, which has run before.
    Again(String),
    /// Runs the instance whose directory this is.
    Turn(PathBuf),
}

/// How much is told of what an instance said that did not start, in bytes.
const LAST_WORDS: usize = 4096;

const KEEPER: &str = "keeper";
const AGAIN: &str = "again-";

static ROLE: OnceLock<Role> = OnceLock::new();

/// The hidden option's name.
pub const OPTION: &str = "instance-role";

/// Reads the hidden option.
pub fn role(word: &std::ffi::OsStr) -> Role {
    match word.to_str() {
        Some(KEEPER) => Role::Keeper,
        // A turn's directory is absolute.
        Some(text) if text.starts_with(AGAIN) => {
            Role::Again(text.strip_prefix(AGAIN).unwrap_or_default().to_owned())
        }
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
    /// Run it itself.
    Run(As),
    /// Nothing more: it was an instance, and this is the exit status.
    Done(u8),
}

/// As what something is run.
pub enum As {
    /// As no instance.
    Nobody,
    /// As the instance in this directory, which a keeper looks after.
    Turn(PathBuf),
    /// As an instance that nobody else looks after.
    Alone(Box<Record>),
}

/// What is to be run: what the user names, or what the instance that this process is about runs.
pub fn named(disk: &Path, keeping: &Keeping, which: &Which) -> Result<Named> {
    let record = match ROLE.get() {
        Some(Role::Turn(dir)) => place::read(dir),
        Some(Role::Again(id)) => Some(place::find(id)?),
        _ => None,
    };
    // A record has text, and the path of a disk need not be that.
    match record.filter(|record| Path::new(&record.disk).exists()) {
        Some(record) => Named::again(disk, which, &record),
        None => Named::find(disk, which, keeping.name.as_deref()),
    }
}

/// Does what there is to be done for an instance, if one is wanted.
pub fn part(
    keeping: &Keeping,
    named: &Named,
    which: &Which,
    about: impl FnOnce() -> Result<About>,
) -> Result<Part> {
    match ROLE.get() {
        Some(Role::Turn(dir)) => Ok(Part::Run(As::Turn(dir.clone()))),
        Some(Role::Keeper) => look_after(keeping, named, which, about()?).map(Part::Done),
        Some(Role::Again(id)) => {
            let (record, about) = (place::find(id)?, about()?);
            daemon::leave_session();
            let claim = Claim::again(&record, |record| set_out(record, &about))?;
            tend(claim, keeping, named, Origin::Again).map(Part::Done)
        }
        _ if !keeping.wanted() => alone(keeping, named, about()?).map(Part::Run),
        _ if keeping.detach => {
            // What is wrong is said before anything is started.
            about()?;
            detach().map(Part::Done)
        }
        _ => look_after(keeping, named, which, about()?).map(Part::Done),
    }
}

/// What is to be found by others though nobody has given it a name.
fn alone(keeping: &Keeping, named: &Named, about: About) -> Result<As> {
    if about.kind == Kind::Machine {
        // Its process writes down nothing: it is in a jail.
        return Ok(As::Nobody);
    }
    record(keeping, named, about).map(|record| As::Alone(Box::new(record)))
}

/// This command line, for another role.
fn command(role: &std::ffi::OsStr) -> Command {
    let mut command = role_of(role);
    command.args(own_words());
    command
}

/// This program in a role.
fn role_of(role: &std::ffi::OsStr) -> Command {
    let mut option = OsString::from(format!("--{OPTION}="));
    option.push(role);
    let mut command = Command::new("/proc/self/exe");
    command.arg0("vdisk").arg(option);
    command
}

/// The words of this command line that are the user's.
pub fn own_words() -> impl Iterator<Item = OsString> {
    let option = format!("--{OPTION}=");
    let words = std::env::args_os().skip(1);
    words.skip_while(move |word| word.to_string_lossy().starts_with(&option))
}

/// Starts the keeper and returns when what it looks after runs.
fn detach() -> Result<u8> {
    let mut command = command(KEEPER.as_ref());
    match announced(command.stdin(Stdio::null()))? {
        Ok(id) => output::text(&format!("{id}\n")).map(|()| 0),
        Err(ended) => Ok(ended.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)),
    }
}

/// Starts a keeper and waits until what it looks after runs: its id, or how the keeper ended.
fn announced(command: &mut Command) -> Result<std::result::Result<String, ExitStatus>> {
    let failed = |e| Error::io("cannot start the instance's process", e);
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(failed)?;
    wait_for(&mut child)
}

fn wait_for(child: &mut Child) -> Result<std::result::Result<String, ExitStatus>> {
    let failed = |e| Error::io("cannot start the instance's process", e);
    let mut said = String::new();
    if let Some(mut out) = child.stdout.take() {
        out.read_to_string(&mut said).map_err(failed)?;
    }
    match said.trim().strip_prefix(READY) {
        Some(id) => Ok(Ok(id.trim().to_owned())),
        None => Ok(Err(child.wait().map_err(failed)?)),
    }
}

/// Starts a detached instance as these words say; its id.
///
/// # Errors
/// What its keeper says.
pub fn begin(words: &[OsString]) -> Result<String> {
    let mut command = role_of(KEEPER.as_ref());
    begun(command.args(words))
}

/// Starts an instance again, detached, that has ended, as its record says; its id.
///
/// # Errors
/// What its keeper says; [`ErrorKind::Unsupported`] for one whose disk was thrown away.
pub fn begin_again(record: &Record) -> Result<String> {
    if record.image.is_some() && !record.clone {
        let text = format!("{} ran in a throw-away clone: run the image anew", record.name);
        return Err(Error::unsupported(text));
    }
    let record = place::note(record, |record| {
        let name = record.name.clone();
        let words = Words::of(&record.words).with("detach", None);
        let words = words.with("name", Some(name.as_ref())).all();
        record.words = words.iter().map(output::path).collect();
    })?;
    let mut command = role_of(format!("{AGAIN}{}", record.id).as_ref());
    command.args(&record.words).current_dir(&record.directory);
    // What names the store need not be on its command line.
    let store = Path::new(&record.disk).parent().and_then(Path::parent);
    if let Some(store) = store.filter(|_| record.clone) {
        command.env("VDISK_STORE", store);
    }
    begun(&mut command)
}

fn begun(command: &mut Command) -> Result<String> {
    let failed = |e| Error::io("cannot start the instance's process", e);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    let heard = child.stderr.take();
    std::thread::scope(|scope| {
        // Read meanwhile: who is not heard does not come to its end.
        let hearing = scope.spawn(move || heard.map(last_words).unwrap_or_default());
        let done = wait_for(&mut child);
        let said = hearing.join().unwrap_or_default();
        done?.map_err(|_| not_begun(&String::from_utf8_lossy(&said)))
    })
}

/// The last of what a process says.
pub fn last_words(mut from: impl Read) -> Vec<u8> {
    let (mut said, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        said.extend_from_slice(buffer.get(..length).unwrap_or_default());
        let more = said.len().saturating_sub(LAST_WORDS);
        said.drain(..more);
    }
    said
}

/// What a keeper said before it ended.
fn not_begun(said: &str) -> Error {
    let said = said.trim().trim_start_matches("vdisk: ");
    let text = if said.is_empty() { "it did not start, and said nothing" } else { said };
    Error::new(ErrorKind::Io, text)
}

/// Looks after an instance to its end.
fn look_after(keeping: &Keeping, named: &Named, which: &Which, about: About) -> Result<u8> {
    if keeping.detach {
        daemon::leave_session();
    }
    let claim = Claim::new(record(keeping, named, about)?)?;
    match named.make(which) {
        Ok(made) => tend(claim, keeping, named, if made { Origin::Made } else { Origin::New }),
        Err(error) => {
            claim.forget()?;
            Err(error)
        }
    }
}

/// How an instance came to its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// A clone was made for it.
    Made,
    /// It was there.
    New,
    /// It has run before.
    Again,
}

fn tend(claim: Claim, keeping: &Keeping, named: &Named, origin: Origin) -> Result<u8> {
    let plan = Plan {
        command: &|dir: &Path| command(dir.as_os_str()),
        log: keeping.detach.then_some(keeping.log_size),
        again: origin == Origin::Again,
        ready: &mut |record| match keeping.detach.then(|| announce(record)) {
            None => Ok(()),
            // What ran before goes on running, whatever became of who started it again.
            Some(Err(_)) if origin == Origin::Again => let_go(),
            Some(done) => done,
        },
        // A clone that was made for what never ran holds nothing.
        ended: &mut |record, ran| {
            let goes = record.clone && (record.goes() || (origin == Origin::Made && !ran));
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
        plain: false,
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
        again: false,
        before: None,
    })
}

/// What is known of an instance that is about to run again.
fn set_out(record: &mut Record, about: &About) {
    record.command.clone_from(&about.command);
    record.stop_signal = about.stop_signal;
    record.exposed_ports.clone_from(&about.exposed_ports);
    (record.pid, record.detached) = (std::process::id(), true);
    (record.phase, record.turn, record.started) = (Phase::Starting, None, None);
    (record.ended, record.status, record.restarts) = (None, None, 0);
}

/// A name, or with `{}` a pattern for many.
fn name_or_pattern(text: &str) -> std::result::Result<String, String> {
    match numbered(text, 1).as_deref() {
        Ok([first]) => parse_name(first).map(|_| text.to_owned()),
        _ => parse_name(text),
    }
}

/// Tells the caller that it runs, and lets go of his output.
fn announce(record: &Record) -> Result<()> {
    let failed = |e: std::io::Error| Error::io("the caller is gone", e);
    let mut out = std::io::stdout();
    writeln!(out, "{READY} {}", record.id).and_then(|()| out.flush()).map_err(failed)?;
    let_go()
}

/// Lets go of the caller's output.
fn let_go() -> Result<()> {
    let failed = |e: std::io::Error| Error::io("the caller is gone", e);
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
