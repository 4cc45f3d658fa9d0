//! What an instance's keeper and the process that runs it say to each other: lines of JSON on a socket
//! in the instance's directory.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What steers a container or a virtual machine.
pub trait Switches: Send + Sync {
    /// Asks it to stop by itself, with this signal where signals reach it.
    fn ask(&self, signal: i32) -> Result<()>;

    /// Sends it a signal.
    fn signal(&self, number: i32) -> Result<()>;

    /// Ends it at once; what it has written is kept.
    fn kill(&self) -> Result<()>;

    /// Stops it where it is.
    fn pause(&self) -> Result<()>;

    /// Lets it go on.
    fn resume(&self) -> Result<()>;
}

/// What the keeper wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "wish", rename_all = "snake_case")]
pub(super) enum Wish {
    Ask { signal: i32 },
    Signal { number: i32 },
    Kill,
    Pause,
    Resume,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Wished {
    /// Which answer is its.
    pub id: u64,
    #[serde(flatten)]
    pub wish: Wish,
}

/// What the one who runs it says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub(super) enum Said {
    /// The program has started.
    Started,
    /// A wish was carried out, or why not.
    Done { id: u64, failed: Option<String> },
}

/// The socket in an instance's directory at which its keeper hears.
pub(super) const SOCKET: &str = "turn";

/// Says one thing.
pub(super) fn say(mut stream: &UnixStream, what: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// The link to the keeper, in the process that runs the instance.
#[derive(Clone)]
pub struct Link(Arc<Mutex<UnixStream>>);

impl Link {
    /// Connects to the keeper of the instance in this directory.
    pub fn connect(dir: &Path) -> Result<Link> {
        let path = dir.join(SOCKET);
        let stream = UnixStream::connect(&path)
            .map_err(|e| Error::io("the instance's process is gone", e).at_path(path))?;
        Ok(Link(Arc::new(Mutex::new(stream))))
    }

    /// Says that it runs. A keeper that is gone is noticed by who [`serve`](Link::serve)s.
    pub fn started(&self) {
        self.say(&Said::Started);
    }

    fn say(&self, said: &Said) {
        let stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = say(&stream, said);
    }

    /// Does what the keeper wants, in a thread of its own. When the keeper is gone, it ends what runs:
    /// nobody could look after it any more.
    pub fn serve(&self, switches: Arc<dyn Switches>) -> Result<()> {
        let own = self.clone();
        let failed = |e| Error::io("cannot hear the instance's process", e);
        let stream = self.0.lock().unwrap_or_else(PoisonError::into_inner).try_clone();
        let stream = stream.map_err(failed)?;
        let work = move || {
            for line in BufReader::new(stream).lines() {
                let wished = line.ok().and_then(|line| serde_json::from_str::<Wished>(&line).ok());
                let Some(Wished { id, wish }) = wished else { break };
                let (own, switches) = (own.clone(), Arc::clone(&switches));
                // One that waits must not keep the next from being heard.
                let obey = move || {
                    let done = obey(&*switches, wish);
                    own.say(&Said::Done { id, failed: done.err().map(|e| e.to_string()) });
                };
                if std::thread::Builder::new().name("wish".into()).spawn(obey).is_err() {
                    break;
                }
            }
            let _ = switches.kill();
        };
        std::thread::Builder::new().name("keeper".into()).spawn(work).map(drop).map_err(failed)
    }
}

pub(super) fn obey(switches: &dyn Switches, wish: Wish) -> Result<()> {
    match wish {
        Wish::Ask { signal } => switches.ask(signal),
        Wish::Signal { number } => switches.signal(number),
        Wish::Kill => switches.kill(),
        Wish::Pause => switches.pause(),
        Wish::Resume => switches.resume(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_comes_back_as_it_was_said() {
        for wish in [Wish::Ask { signal: 15 }, Wish::Signal { number: 10 }, Wish::Kill, Wish::Pause]
        {
            let line = serde_json::to_string(&Wished { id: 7, wish }).unwrap();
            let heard: Wished = serde_json::from_str(&line).unwrap();
            assert_eq!((heard.id, heard.wish), (7, wish), "{line}");
        }
    }
}
