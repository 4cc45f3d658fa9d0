//! What a command has done inside a jail that is in none itself, since it starts programs: a process of its own
//! opens, reads and changes the disks. The command asks for it, and reads no disk.
//!
//! It is this program once more, under a hidden verb, and knows what it is for by its words: it closes its jail by
//! them before it is asked anything.

pub mod link;

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::sys::prctl;
use nix::sys::signal::Signal;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vdisk::control::Failure;
use vdisk::{Error, ErrorKind, Result};

use crate::cli::open::rest::Rest;
use crate::cli::open::{jail, memory, passphrase, turn};
use crate::cli::terminal::stop;
use link::Link;

/// The process, as who has started it sees it.
pub struct Inside {
    process: Child,
    link: Link,
}

/// What it says once it is in its jail: what of that is missing, or why there is none.
#[derive(Debug, Serialize, Deserialize)]
enum Begun {
    Closed(Option<String>),
    Failed(Failure),
}

impl Inside {
    /// Starts this program as `verb` with `words`, which is in its jail then. It ends when this is dropped, and
    /// with the thread that calls this.
    ///
    /// # Errors
    /// Where there is no such jail and one is required, or the process cannot be started.
    pub fn start(verb: &str, words: Vec<OsString>) -> Result<Inside> {
        let failed = |e| Error::io("cannot start the process that works on the disk", e);
        let (link, its) = Link::pair().map_err(failed)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("vdisk").arg(verb);
        command.args(passphrase::words()).args(memory::words()).args(jail::words());
        command.args(turn::words()).args(words);
        command.stdin(OwnedFd::from(its)).stdout(Stdio::null());
        let process = command.spawn().map_err(failed)?;
        // It holds the other's end of the link.
        drop(command);
        let inside = Inside { process, link };
        match inside.hear()? {
            Begun::Closed(missing) => {
                missing.iter().for_each(|missing| jail::tell(missing));
                Ok(inside)
            }
            Begun::Failed(failure) => Err(told(failure)),
        }
    }

    /// Asks it, and waits for the answer.
    ///
    /// # Errors
    /// Why it has not done it, or that it is gone.
    pub fn ask<A: DeserializeOwned>(&self, question: &impl Serialize) -> Result<A> {
        self.link.say(question).map_err(lost)?;
        self.hear::<std::result::Result<A, Failure>>()?.map_err(told)
    }

    fn hear<T: DeserializeOwned>(&self) -> Result<T> {
        let heard = self.link.hear().map_err(lost)?;
        heard.ok_or_else(|| lost(io::ErrorKind::UnexpectedEof.into()))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // What it was asked is done; and who has taken it over may stay.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn lost(error: io::Error) -> Error {
    Error::io("the process that works on the disk was lost", error)
}

/// What went wrong there, as text for a terminal: it comes from who reads what others wrote.
pub fn told(failure: Failure) -> Error {
    let error = Error::from(failure);
    Error::new(error.kind(), plain(&error.to_string()))
}

/// Text without what a terminal would take for an order.
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Is the process: closes the jail that `prepare` says, and answers with what goes with it until the other is gone.
pub fn serve<T, Q: DeserializeOwned, A: Serialize>(
    prepare: impl FnOnce() -> Result<(Rest, T)>,
    mut answer: impl FnMut(&T, Q) -> Result<A>,
) -> Result<u8> {
    let failed = |e: nix::Error| Error::io("cannot work for another process", e.into());
    // What errors about a held disk call it.
    prctl::set_name(c"vdisk").map_err(failed)?;
    // Who is not there to hear of it begins nothing: what is asked after this is not gone on with alone.
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(failed)?;
    // What the user stops is the whole command, which ends what it has begun.
    let _asked = stop::on_signals()?;
    let own = io::stdin().as_fd().try_clone_to_owned();
    let link = Link::from(own.map_err(|e| Error::io("cannot work for another process", e))?);
    // It is read for the first disk that is encrypted, where it cannot be opened any more.
    let _ = passphrase::given();
    let closed = prepare().and_then(|(rest, with)| Ok((rest.close_untold()?, with)));
    let (begun, with) = match closed {
        Ok((missing, with)) => (Begun::Closed(missing), Some(with)),
        Err(error) => (Begun::Failed(Failure::from(&error)), None),
    };
    let said = link.say(&begun);
    said.map_err(|e| Error::io("this is a part of other commands", e))?;
    if let Some(with) = with {
        link.answer(|question: Q| answer(&with, question).map_err(|error| Failure::from(&error)));
    }
    Ok(0)
}

/// An answer to one of several questions.
///
/// # Errors
/// Where it is none that can be said.
pub fn answer(value: impl Serialize) -> Result<serde_json::Value> {
    let failed = |e| Error::new(ErrorKind::Invalid, format!("no answer: {e}"));
    serde_json::to_value(value).map_err(failed)
}
