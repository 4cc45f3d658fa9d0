//! One world: the command in it, run once by a process of this program, and watched.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use vdisk::{Error, Result};

use super::marks::{ENDED, STARTED};
use super::scratch::Scratch;
use super::used::{Memory, of_ended};
use crate::cli::instance::start::last_words;
use crate::cli::open::jail;

/// Between two looks whether it has ended.
const LOOK: Duration = Duration::from_millis(2);
/// Between two looks at its memory, at most.
const SAMPLE: Duration = Duration::from_millis(100);
/// How long a world may take beyond its time to end in good order.
const TO_END: Duration = Duration::from_secs(10);
/// What ends the thread that hears marks.
const OVER: &str = "over";

/// Which world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Container,
    Machine,
}

/// How a command is run in either.
pub struct Setting {
    pub command: Vec<OsString>,
    pub timeout: Duration,
    pub cpus: Option<u8>,
    pub memory: Option<u64>,
    pub kernel: Option<PathBuf>,
    pub store: Option<PathBuf>,
}

/// What was seen: times in seconds, sizes in bytes.
#[derive(Debug, Clone, Default)]
pub struct Measured {
    /// Whether the command came to its end there.
    pub ran: bool,
    /// Why not.
    pub why: Option<String>,
    /// Its exit status.
    pub exit_status: Option<i32>,
    /// Until it started.
    pub start: Option<f64>,
    /// Until it ended, from then on.
    pub run: Option<f64>,
    /// Until the disk was free, from then on.
    pub stop: Option<f64>,
    /// Processor time of it all.
    pub cpu: Option<f64>,
    /// The most memory of this program's processes: a virtual machine's is one of those, with all in it.
    pub memory: Option<u64>,
    /// The most memory of the command's own processes, where they are the host's.
    pub memory_of_command: Option<u64>,
    /// Bytes that its clone holds.
    pub written: Option<u64>,
    /// Bytes of the disk that its clone shows.
    pub shared: Option<u64>,
}

impl Setting {
    /// Runs the command in a new clone.
    pub fn measure(
        &self,
        kind: Kind,
        scratch: &Scratch,
        asked: &dyn Fn() -> bool,
    ) -> Result<Measured> {
        let name = if kind == Kind::Container { "container" } else { "machine" };
        let clone_name = format!("{name}.qcow2");
        let clone = scratch.clone(&clone_name)?;
        let marks = Marks::hear(scratch.path(&format!("{name}.marks")))?;
        let mut command = self.words(kind, &clone, &marks.path);
        let failed = |e| Error::io("cannot start it", e);
        let before = of_ended();
        let begun = Instant::now();
        let (output, own) = std::io::pipe().map_err(failed)?;
        command.stdout(own.try_clone().map_err(failed)?).stderr(own);
        let mut child = command.spawn().map_err(failed)?;
        // It holds the other ends of the pipe.
        drop(command);
        let said = spawn(move || last_words(output));
        let (memory, in_time) = self.watch(&mut child, begun, asked);
        let ended = child.wait().map_err(failed)?;
        let over = Instant::now();
        let cpu = of_ended().saturating_sub(before);
        let seen = marks.end()?;
        let said = said.join().unwrap_or_default();
        let at = |mark: &str| seen.iter().find(|(word, _)| word == mark).map(|(_, at)| *at);
        let (started, finished) = (at(STARTED), at(ENDED));
        let between = |from: Option<Instant>, to: Option<Instant>| {
            Some(to?.saturating_duration_since(from?).as_secs_f64())
        };
        // An initrd that was made by an earlier version does not say that the command starts.
        let begun_there = started.is_some() || kind == Kind::Machine;
        let measured = Measured {
            ran: in_time && begun_there && finished.is_some() && ended.code().is_some(),
            exit_status: ended.code(),
            start: between(Some(begun), started),
            run: between(started, finished),
            stop: between(finished, Some(over)),
            cpu: Some(cpu.as_secs_f64()),
            memory: Some(memory.own),
            memory_of_command: Some(memory.others).filter(|_| kind == Kind::Container),
            ..Measured::default()
        };
        if !measured.ran {
            let why = if in_time { why(&said) } else { self.too_long(started.is_some(), &said) };
            return Ok(Measured { why: Some(why), ..Measured::default() });
        }
        let used = scratch.used(&clone_name)?;
        Ok(Measured { written: Some(used.written), shared: Some(used.shared), ..measured })
    }

    /// The command line that runs it.
    fn words(&self, kind: Kind, clone: &Path, marks: &Path) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("vdisk").stdin(Stdio::null()).process_group(0);
        if let Some(store) = &self.store {
            command.env("VDISK_STORE", store);
        }
        command.arg(if kind == Kind::Container { "run" } else { "boot" });
        command.args(jail::words()).arg("--marks").arg(marks).arg("--follow");
        let limits = [("--cpus", self.cpus.map(u64::from)), ("--memory", self.memory)];
        for (option, limit) in limits {
            limit.iter().for_each(|limit| {
                command.arg(option).arg(limit.to_string());
            });
        }
        if kind == Kind::Container {
            // All of the command is said.
            command.arg("--entrypoint").arg("");
        } else if let Some(kernel) = &self.kernel {
            command.arg("--kernel").arg(kernel);
        }
        command.arg(clone).arg("--").args(&self.command);
        command
    }

    /// Waits for its end, and ends it when its time is over; the most memory that was seen, and whether it
    /// ended in time.
    fn watch(&self, child: &mut Child, begun: Instant, asked: &dyn Fn() -> bool) -> (Memory, bool) {
        let (mut memory, mut in_time) = (Memory::default(), true);
        let mut until = begun + self.timeout;
        let mut signals = [Signal::SIGTERM, Signal::SIGKILL].into_iter();
        let (mut sample, mut pause) = (begun, LOOK);
        while !matches!(child.try_wait(), Ok(Some(_)) | Err(_)) {
            if Instant::now() >= sample {
                memory = memory.most(Memory::of(child.id()));
                // What takes long is looked at less often: to look takes time as well.
                pause = (pause * 2).min(SAMPLE);
                sample = Instant::now() + pause;
            }
            if Instant::now() >= until || (asked() && in_time) {
                in_time = false;
                let pid = i32::try_from(child.id()).map(Pid::from_raw);
                if let (Ok(pid), Some(signal)) = (pid, signals.next()) {
                    let _ = killpg(pid, signal);
                }
                until = Instant::now() + TO_END;
            }
            sleep(LOOK);
        }
        (memory, in_time)
    }

    fn too_long(&self, started: bool, said: &[u8]) -> String {
        let what = if started { "the command did not end" } else { "the command did not start" };
        let said = line(said).map_or(String::new(), |line| format!(": {line}"));
        format!("{what} within {:?}{said}", self.timeout)
    }
}

/// The last that was said, as far as it is this program's; or else of all.
fn line(said: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(said);
    let lines = || text.lines().rev().map(str::trim).filter(|line| !line.is_empty());
    let own = lines().find_map(|line| line.strip_prefix("vdisk: "));
    let found = own.or_else(|| lines().next())?;
    Some(found.chars().filter(|c| !c.is_control()).collect())
}

fn why(said: &[u8]) -> String {
    line(said).unwrap_or_else(|| "it ended, and said nothing".to_owned())
}

/// What the process that runs it says, and when.
struct Marks {
    path: PathBuf,
    own: File,
    heard: Receiver<(String, Instant)>,
    hearing: JoinHandle<()>,
}

impl Marks {
    fn hear(path: PathBuf) -> Result<Marks> {
        let failed = |e: std::io::Error| Error::io("cannot hear what is measured", e);
        mkfifo(&path, Mode::from_bits_truncate(0o600)).map_err(|e| failed(e.into()))?;
        // Open at both ends, so that nobody waits for the other.
        let own = File::options().read(true).write(true).open(&path).map_err(failed)?;
        let from = own.try_clone().map_err(failed)?;
        let (tell, heard) = channel();
        let hear = move || {
            for line in BufReader::new(from).lines().map_while(std::result::Result::ok) {
                if line == OVER || tell.send((line, Instant::now())).is_err() {
                    break;
                }
            }
        };
        Ok(Marks { path, own, heard, hearing: spawn(hear) })
    }

    fn end(mut self) -> Result<Vec<(String, Instant)>> {
        let failed = |e| Error::io("cannot hear what is measured", e);
        writeln!(self.own, "{OVER}").map_err(failed)?;
        // A panic there has been reported.
        drop(self.hearing.join());
        Ok(self.heard.try_iter().collect())
    }
}
