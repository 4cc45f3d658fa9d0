//! What a server cannot do by itself, being in a jail, done by a process beside it that does nothing else and
//! ends with it: it unmounts the server's mount, and looks at the processes that use it.
//!
//! It is in no jail: who unmounts may have to run the program that may do so, which has rights of its own.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use vdisk::beside::{self, Channel};
use vdisk::mount::table;
use vdisk::{Error, Result};
use vdisk_fuse::files::{ask_of_callers, has_capability};

use crate::cli::mount::umount;

/// The process, as the server sees it. It ends when the last of these is gone.
#[derive(Clone)]
pub struct Outside(Arc<Mutex<Channel>>);

impl Outside {
    /// Starts it, while this process has no other thread.
    pub fn start() -> Result<Outside> {
        let started = beside::start(c"vdisk-unmount", |channel| drop(run(&channel)));
        let channel =
            started.map_err(|e| Error::io("cannot start the process that unmounts", e))?;
        Ok(Outside(Arc::new(Mutex::new(channel))))
    }

    /// Tells it which mount is meant: that of the device `number` at a directory.
    ///
    /// # Errors
    /// Where it is gone.
    pub fn tell(&self, dir: &Path, number: &str) -> Result<()> {
        let words = [number.as_bytes(), b"\0", dir.as_os_str().as_bytes()].concat();
        self.say(&words).map_err(|e| Error::io("the process that unmounts is gone", e))
    }

    /// Has it unmount. While the mount is in use it stays.
    pub fn unmount(&self) {
        // Where it is gone, somebody else may unmount still.
        let _ = self.say(&[UNMOUNT]);
    }

    /// Has it take the mount away, whoever uses it.
    pub fn detach(&self) {
        let _ = self.say(&[DETACH]);
    }

    /// Has it say from now on what the processes that use the mount can do.
    pub fn watch(&self) {
        let outside = self.clone();
        ask_of_callers(Box::new(move |process, capability| outside.ask(process, capability)));
    }

    fn say(&self, words: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).send(words, None)
    }

    fn ask(&self, process: u32, capability: u32) -> Option<bool> {
        let [a, b, c, d] = process.to_ne_bytes();
        let channel = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        channel.send(&[CAPABLE, a, b, c, d, u8::try_from(capability).ok()?], None).ok()?;
        let mut answer = [0];
        let got = channel.receive(&mut answer).ok()?;
        match answer.get(..got.len) {
            Some([NO]) => Some(false),
            Some([YES]) => Some(true),
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

/// The most bytes that it is told: the path of a directory, and a number.
const MOST: usize = 8192;

/// Is that process: does what it is told, until the server is gone.
fn run(channel: &Channel) -> io::Result<()> {
    let mut words = vec![0; MOST];
    let told = channel.receive(&mut words)?;
    let words = words.get(..told.len).unwrap_or_default();
    let Some(end) = words.iter().position(|byte| *byte == 0) else { return Ok(()) };
    let (number, dir) = words.split_at(end);
    let number = String::from_utf8_lossy(number);
    let dir = Path::new(OsStr::from_bytes(dir.get(1..).unwrap_or_default()));
    thread::scope(|scope| {
        loop {
            let mut what = [0; 8];
            let told = channel.receive(&mut what)?;
            match *what.get(..told.len).unwrap_or_default() {
                [] => return Ok(()),
                [CAPABLE, a, b, c, d, capability] => {
                    let process = u32::from_ne_bytes([a, b, c, d]);
                    channel.send(&[answer(process, capability)], None)?;
                }
                // To unmount may wait for the server, which may ask meanwhile.
                [DETACH] => drop(scope.spawn(|| drop(umount::detach(dir)))),
                [UNMOUNT] => drop(scope.spawn(|| unmount_ours(dir, &number))),
                _ => {}
            }
        }
    })
}

fn answer(process: u32, capability: u8) -> u8 {
    match has_capability(process, capability.into()) {
        Some(false) => NO,
        Some(true) => YES,
        None => UNSEEN,
    }
}

/// Unmounts what stands at a directory, where it is the mount of the device `number`: somebody else's may
/// stand on it.
pub fn unmount_ours(dir: &Path, number: &str) {
    let here = table::at(dir).and_then(|mount| table::ours(&mount));
    if let Some(kind) = here.filter(|kind| kind.device() == number) {
        let _ = umount::release_once(dir, &kind);
    }
}
