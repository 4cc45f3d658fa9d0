//! What a server cannot do by itself, being in a jail, done by a process outside that does nothing else and
//! ends with the server: it unmounts the server's mount, and looks at the processes that use it.

use std::ffi::OsStr;
use std::io::{self, BufRead, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use vdisk::mount::table;
use vdisk::{Error, Result};
use vdisk_fuse::files::{ask_of_callers, has_capability};

use crate::cli::mount::umount;
use crate::cli::terminal::stop;

/// The verb of that process.
pub const VERB: &str = "mount-end";

/// The process, as the server sees it. It ends when the last of these is gone.
#[derive(Clone)]
pub struct Outside(Arc<Mutex<(ChildStdin, ChildStdout)>>);

impl Outside {
    /// Starts it for the mount of the device `number` at a directory.
    pub fn start(dir: &Path, number: &str) -> Result<Outside> {
        let failed = |e| Error::io("cannot start the process that unmounts", e);
        let mut child = Command::new("/proc/self/exe")
            .arg0("vdisk")
            .arg(VERB)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed)?;
        let gone = || failed(io::ErrorKind::BrokenPipe.into());
        let mut told = child.stdin.take().ok_or_else(gone)?;
        let answers = child.stdout.take().ok_or_else(gone)?;
        let words = [number.as_bytes(), dir.as_os_str().as_bytes()];
        let said = words.iter().try_for_each(|word| {
            told.write_all(word)?;
            told.write_all(b"\0")
        });
        said.map_err(failed)?;
        Ok(Outside(Arc::new(Mutex::new((told, answers)))))
    }

    /// Has it unmount. While the mount is in use it stays.
    pub fn unmount(&self) {
        self.say(&[UNMOUNT]);
    }

    /// Has it take the mount away, whoever uses it.
    pub fn detach(&self) {
        self.say(&[DETACH]);
    }

    /// Has it say from now on what the processes that use the mount can do.
    pub fn watch(&self) {
        let outside = self.clone();
        ask_of_callers(Box::new(move |process, capability| outside.ask(process, capability)));
    }

    fn say(&self, words: &[u8]) {
        let mut ends = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Where it is gone, somebody else may unmount still.
        let _ = ends.0.write_all(words);
    }

    fn ask(&self, process: u32, capability: u32) -> Option<bool> {
        let [a, b, c, d] = process.to_ne_bytes();
        let mut ends = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ends.0.write_all(&[CAPABLE, a, b, c, d, u8::try_from(capability).ok()?]).ok()?;
        let mut answer = [0];
        ends.1.read_exact(&mut answer).ok()?;
        match answer {
            [NO] => Some(false),
            [YES] => Some(true),
            _ => None,
        }
    }
}

/// What it is told.
const UNMOUNT: u8 = b'u';
const DETACH: u8 = b'd';
/// A process and the number of a capability follow.
const CAPABLE: u8 = b'c';

/// What it answers to the last.
const NO: u8 = 0;
const YES: u8 = 1;
const UNSEEN: u8 = 2;

/// Is that process: does what it is told, until the server is gone.
pub fn run() -> Result<u8> {
    // What ends the server is for the server.
    stop::hold_endings()?;
    let failed = |e| Error::io("cannot hear the server", e);
    let mut told = io::stdin().lock();
    let mut words = [Vec::new(), Vec::new()];
    for word in &mut words {
        told.read_until(0, word).map_err(failed)?;
        word.pop();
    }
    let [number, dir] = words;
    let number = String::from_utf8_lossy(&number);
    let dir = Path::new(OsStr::from_bytes(&dir));
    let mut what = [0];
    thread::scope(|scope| {
        while told.read(&mut what)? > 0 {
            match what {
                [CAPABLE] => answer(&mut told)?,
                // To unmount may wait for the server, which may ask meanwhile.
                [DETACH] => drop(scope.spawn(|| drop(umount::detach(dir)))),
                _ => drop(scope.spawn(|| unmount_ours(dir, &number))),
            }
        }
        Ok(0)
    })
    .map_err(failed)
}

fn answer(told: &mut impl Read) -> io::Result<()> {
    let mut question = [0; 5];
    told.read_exact(&mut question)?;
    let [a, b, c, d, capability] = question;
    let process = u32::from_ne_bytes([a, b, c, d]);
    let word = match has_capability(process, capability.into()) {
        Some(false) => NO,
        Some(true) => YES,
        None => UNSEEN,
    };
    let mut out = io::stdout().lock();
    out.write_all(&[word]).and_then(|()| out.flush())
}

/// Unmounts what stands at a directory, where it is the mount of the device `number`: somebody else's may
/// stand on it.
pub fn unmount_ours(dir: &Path, number: &str) {
    let here = table::at(dir).and_then(|mount| table::ours(&mount));
    if let Some(kind) = here.filter(|kind| kind.device() == number) {
        let _ = umount::release_once(dir, &kind);
    }
}
