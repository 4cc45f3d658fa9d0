//! The asking side: finding the process that holds a disk, and asking it.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind as IoErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::place;
use super::wire::{MAX_ANSWER, Named, Question, Reply, Request};
use crate::change::merge::Progress;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::FileStorage;

/// How often a wait for an answer looks whether it is to go on.
const BEAT: Duration = Duration::from_millis(100);
/// How long a question may take to be taken.
const TO_ASK: Duration = Duration::from_secs(10);
/// How long a holder is looked for that is about to be heard: its disk's file, and with that the name of
/// its socket, may change at that moment.
const TO_LISTEN: Duration = Duration::from_millis(300);
/// The same, where somebody was heard who holds that disk under another file.
const TO_SETTLE: Duration = Duration::from_secs(3);
/// Between two such looks.
const PAUSE: Duration = Duration::from_millis(25);

/// Asks the process that holds `disk`, if there is one with a control socket.
///
/// # Errors
/// What the holder says; [`ErrorKind::Interrupted`] where `progress` asked to stop.
pub fn ask(disk: &Path, request: &Request, progress: &mut Progress<'_>) -> Result<Option<Value>> {
    let since = Instant::now();
    loop {
        let mut patience = TO_LISTEN;
        let Ok(named) = place::named(disk) else { return Ok(None) };
        for socket in sockets(&place::prefix(disk)?)? {
            let Some(connection) = connect(&socket)? else { continue };
            match connection.say(Some(named), request)?.answer(progress)? {
                Answer::Done(answer) => return Ok(Some(answer)),
                Answer::Failed(error) => return Err(error),
                Answer::Elsewhere => patience = TO_SETTLE,
            }
        }
        // What nobody writes to has no holder; nor has it changed while we looked.
        let written = FileStorage::is_written(disk).unwrap_or(false);
        let same = place::named(disk).ok() == Some(named);
        if same && !written || since.elapsed() >= patience {
            return Ok(None);
        }
        std::thread::sleep(PAUSE);
    }
}

/// Asks at the socket `name`; `None` where nobody listens there.
pub fn ask_at(name: &str, request: &Request) -> Result<Option<Connection>> {
    match connect(&place::directory()?.join(name))? {
        None => Ok(None),
        Some(connection) => connection.say(None, request).map(Some),
    }
}

/// Waits for what was asked: what the holder says in the end, how it ended. `progress` is called now
/// and then and may stop the wait.
///
/// # Errors
/// Where the holder cannot be heard any more.
pub fn wait_for(connection: Connection, progress: &mut Progress<'_>) -> Result<Result<()>> {
    connection.answer(progress).map(|answer| match answer {
        Answer::Failed(error) => Err(error),
        Answer::Done(_) | Answer::Elsewhere => Ok(()),
    })
}

/// As [`wait_for`], with what the answer is; nothing where the holder has nothing to say of it any more.
///
/// # Errors
/// What the holder says, also.
pub fn result_of(connection: Connection, progress: &mut Progress<'_>) -> Result<Option<Value>> {
    match connection.answer(progress)? {
        Answer::Done(value) => Ok(Some(value)),
        Answer::Failed(error) => Err(error),
        Answer::Elsewhere => Ok(None),
    }
}

/// What a holder says in the end.
enum Answer {
    Done(Value),
    Failed(Error),
    Elsewhere,
}

impl Answer {
    /// What a line says; `None` for one that does not end it.
    fn of(reply: Reply) -> std::result::Result<Answer, (u64, u64)> {
        match reply {
            Reply::At { done, total } => Err((done, total)),
            Reply::Done { result } => Ok(Answer::Done(result)),
            Reply::Failed(failure) => Ok(Answer::Failed(failure.into())),
            Reply::Elsewhere => Ok(Answer::Elsewhere),
        }
    }
}

fn sockets(prefix: &str) -> Result<Vec<PathBuf>> {
    let dir = place::directory()?;
    let entries = fs::read_dir(&dir)
        .map_err(|e| Error::io("cannot look for control sockets", e).at_path(&dir))?;
    let names = entries.flatten().map(|e| e.file_name());
    let ours = names.filter(|name| name.to_str().is_some_and(|name| name.starts_with(prefix)));
    Ok(ours.map(|name| dir.join(name)).collect())
}

fn connect(socket: &Path) -> Result<Option<Connection>> {
    match UnixStream::connect(socket) {
        Ok(stream) => Ok(Some(Connection { stream, path: socket.to_path_buf() })),
        Err(e) if e.kind() == IoErrorKind::NotFound => Ok(None),
        // Left by a process that was killed, for the next holder to remove; or made a moment ago by
        // one that does not listen yet.
        Err(e) if e.kind() == IoErrorKind::ConnectionRefused => Ok(None),
        Err(e) => Err(Error::io("cannot reach the process that holds the disk", e).at_path(socket)),
    }
}

/// A connection to a holder.
pub struct Connection {
    stream: UnixStream,
    path: PathBuf,
}

impl Connection {
    fn say(self, disk: Option<Named>, request: &Request) -> Result<Connection> {
        let question = Question { disk, request: request.clone() };
        let mut line = serde_json::to_vec(&question)
            .map_err(|e| Error::invalid(format!("cannot be asked: {e}")))?;
        line.push(b'\n');
        let mut stream = &self.stream;
        let said = stream
            .set_write_timeout(Some(TO_ASK))
            .and_then(|()| stream.set_read_timeout(Some(BEAT)))
            .and_then(|()| stream.write_all(&line));
        said.map_err(|e| self.broken(e))?;
        Ok(self)
    }

    fn broken(&self, e: std::io::Error) -> Error {
        Error::io("lost the process that holds the disk", e).at_path(&self.path)
    }

    fn answer(self, progress: &mut Progress<'_>) -> Result<Answer> {
        let mut reader = BufReader::new((&self.stream).take(MAX_ANSWER));
        let (mut line, mut last, mut cancelled) = (Vec::new(), (0, 0), false);
        loop {
            match reader.read_until(b'\n', &mut line) {
                Ok(_) if line.ends_with(b"\n") => match Answer::of(self.parse(&line)?) {
                    Ok(answer) => return Ok(answer),
                    Err(at) => last = at,
                },
                Ok(_) => return Err(self.broken(IoErrorKind::UnexpectedEof.into())),
                Err(e)
                    if matches!(e.kind(), IoErrorKind::WouldBlock | IoErrorKind::Interrupted) => {}
                Err(e) => return Err(self.broken(e)),
            }
            if line.ends_with(b"\n") {
                line.clear();
            }
            if !cancelled && !progress(last.0, last.1) {
                // Anything said cancels; what becomes of it is still to be heard.
                (&self.stream).write_all(b"cancel\n").map_err(|e| self.broken(e))?;
                cancelled = true;
            }
        }
    }

    fn parse(&self, line: &[u8]) -> Result<Reply> {
        serde_json::from_slice(line).map_err(|e| {
            let text = format!("the process that holds the disk says nothing sensible: {e}");
            Error::new(ErrorKind::Io, text).at_path(&self.path)
        })
    }
}
