//! A jail around work on what others made: from the moment it is closed this process names no file but
//! those that were let through, runs no program, makes no connection, and gains no right.
//!
//! Two walls: Landlock bounds which files can be named (landlock(7)), and a filter on system calls, one for
//! each kind of thread, bounds what can be asked of the kernel (seccomp(2)). Files that are open stay as
//! they are. It knows paths, not what the files hold, and prints nothing.

pub mod broker;
mod calls;
mod files;
mod rights;
mod threads;

use std::os::fd::OwnedFd;
use std::path::Path;

use crate::beside::is_alone;
use crate::error::{Error, ErrorKind, Result};

pub use calls::Work;
pub use files::Reach;
pub use threads::{Thread, narrow};

/// How much of a jail there has to be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// All of it, or the work is not done.
    Require,
    /// As much as this kernel has.
    #[default]
    Best,
    /// None.
    Off,
}

/// A jail that is not closed yet: what is let through.
pub struct Jail {
    work: Work,
    files: files::Files,
}

/// A jail that was closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closed {
    /// What of it there is not, in words that go on after "the jail is not whole: ".
    pub missing: Option<String>,
}

impl Jail {
    /// Lets nothing through but what is open already, this process's own place in /proc, and how many
    /// processors it may use.
    pub fn new(work: Work) -> Jail {
        let mut jail = Jail::empty(work);
        for path in ["/proc/self", "/sys/fs/cgroup"] {
            jail.reach(Path::new(path), Reach::Read);
        }
        jail
    }

    /// The same without these two.
    fn empty(work: Work) -> Jail {
        Jail { work, files: files::Files::default() }
    }

    /// The same for other work.
    #[must_use]
    pub fn with_work(self, work: Work) -> Jail {
        Jail { work, ..self }
    }

    /// Lets through the file at `path`, or the directory there with all below it. What is not there stays
    /// out.
    pub fn reach(&mut self, path: &Path, reach: Reach) {
        self.files.add(path, reach);
    }

    /// Lets through an open directory with all below it.
    pub fn reach_open(&mut self, dir: OwnedFd, reach: Reach) {
        self.files.add_open(dir, reach);
    }

    /// Closes it, for this process and for ever. To be called once, and before any other thread starts:
    /// files are bounded for this thread and those that it starts.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where a part of it is missing that `mode` asks for.
    pub fn close(self, mode: Mode) -> Result<Closed> {
        if mode == Mode::Off {
            return Ok(Closed { missing: None });
        }
        let missing = self.walls(mode);
        match (missing, mode) {
            (Some(missing), Mode::Require) => {
                let text = format!("the jail that was asked for cannot be had: {missing}");
                Err(Error::new(ErrorKind::Unsupported, text))
            }
            (missing, _) => Ok(Closed { missing }),
        }
    }

    /// Puts up the walls; what could not be had.
    fn walls(self, mode: Mode) -> Option<String> {
        let Jail { work, files } = self;
        let alone = || match is_alone() {
            true => Ok(()),
            false => Err("other threads run already".to_owned()),
        };
        let bounded = || filter(work).map_err(|e| format!("system calls are not bounded ({e})"));
        let walls: [Box<dyn FnOnce() -> std::result::Result<(), String>>; 4] = [
            Box::new(alone),
            Box::new(move || files.restrict(work.connects())),
            Box::new(move || rights::keep(work.rights())),
            Box::new(bounded),
        ];
        let mut missing = Vec::new();
        for wall in walls {
            missing.extend(wall().err());
            // What is not to be done without a wall is not begun: it may have to be taken back.
            if mode == Mode::Require && !missing.is_empty() {
                break;
            }
        }
        (!missing.is_empty()).then(|| missing.join("; "))
    }
}

/// Bounds the system calls of all threads.
fn filter(work: Work) -> seccompiler::Result<()> {
    let process = std::process::id();
    let program = calls::program(&work.calls(), process)?;
    // First, since the other lets through what this one refuses.
    seccompiler::apply_filter_all_threads(&calls::absent()?)?;
    seccompiler::apply_filter_all_threads(&program)?;
    threads::keep(process);
    Ok(())
}

/// From now on a jailed process makes no more connections, with all of its threads, and does what a
/// [`Work::Command`] does. Nothing where it is in no jail. Where it cannot be had, the jail itself still
/// holds.
pub fn leave_network() {
    let narrowed = threads::process().map(|process| {
        let program = calls::program(&Work::Command.calls(), process)?;
        seccompiler::apply_filter_all_threads(&program)
    });
    debug_assert!(narrowed.as_ref().is_none_or(std::result::Result::is_ok), "{narrowed:?}");
}
