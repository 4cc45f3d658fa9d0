//! Asking an instance how it is.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use vdisk::instance::{Kind, Record, place};
use vdisk::{Error, ErrorKind, Result};

/// Between two looks whether the command has ended.
const LOOK: Duration = Duration::from_millis(10);
/// Between the first two times that it is run, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// How it is asked.
#[derive(Debug, Clone)]
pub struct Health {
    /// A shell command, whose exit status is 0 where all is well.
    pub command: String,
    /// How long that may take.
    pub within: Duration,
}

impl Health {
    /// Asks again until all is well.
    ///
    /// # Errors
    /// Where that is not so in time, or the instance has ended.
    pub fn await_of(&self, record: &Record) -> Result<()> {
        let until = Instant::now() + self.within;
        let mut pause = PAUSES.0;
        loop {
            let now = place::find(&record.id)?;
            if !now.lives() {
                let status = now.status.map_or(String::new(), |s| format!(" with status {s}"));
                return Err(unwell(format!("it has ended{status}: `vdisk logs {}`", now.name)));
            }
            let ended = self.ask(&now, until)?;
            if ended.is_some_and(|status| status.success()) {
                return Ok(());
            }
            if Instant::now() + pause >= until {
                let why = match ended {
                    Some(status) => format!("the command that asks how it is ended with {status}"),
                    None => "the command that asks how it is did not end".to_owned(),
                };
                return Err(unwell(format!("{why}, within {:?}", self.within)));
            }
            sleep(pause);
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// Runs the command once: its exit status, or nothing where it did not end in time.
    fn ask(&self, record: &Record, until: Instant) -> Result<Option<ExitStatus>> {
        let failed = |e| Error::io("the command that asks how it is cannot be run", e);
        let mut child = self.command(record).spawn().map_err(failed)?;
        loop {
            if let Some(status) = child.try_wait().map_err(failed)? {
                return Ok(Some(status));
            }
            if Instant::now() >= until {
                end(&mut child);
                return Ok(None);
            }
            sleep(LOOK);
        }
    }

    fn command(&self, record: &Record) -> Command {
        let kind = match record.kind {
            Kind::Container => "container",
            Kind::Machine => "machine",
        };
        let mut command = Command::new("sh");
        command.arg("-c").arg(&self.command).process_group(0).stdin(Stdio::null());
        // Data of this program goes to standard output, and to it alone.
        command.stdout(std::io::stderr());
        command.env("VDISK_INSTANCE", &record.name).env("VDISK_ID", &record.id);
        command.env("VDISK_PID", record.turn.map_or(String::new(), |pid| pid.to_string()));
        command.env("VDISK_KIND", kind).env("VDISK_DISK", &record.disk);
        command.env("VDISK_IMAGE", record.image.as_deref().unwrap_or_default());
        if let Ok(program) = std::env::current_exe() {
            command.env("VDISK", program);
        }
        command
    }
}

/// Ends a command and all that it has started.
fn end(child: &mut Child) {
    if let Ok(pid) = i32::try_from(child.id()) {
        let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let _ = child.wait();
}

fn unwell(why: String) -> Error {
    Error::new(ErrorKind::Io, format!("is not healthy: {why}"))
}
