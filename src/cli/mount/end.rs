//! Unmounting for a server that cannot by itself, being in a jail: by a process that does nothing else, and
//! ends with the server.

use std::ffi::OsStr;
use std::io::{BufRead, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};

use vdisk::mount::table;
use vdisk::{Error, Result};

use crate::cli::mount::umount;
use crate::cli::terminal::stop;

/// The verb of that process.
pub const VERB: &str = "mount-end";

/// The process, as the server sees it.
pub struct Unmounter(ChildStdin);

impl Unmounter {
    /// Starts it for the mount of the device `number` at a directory.
    pub fn start(dir: &Path, number: &str) -> Result<Unmounter> {
        let failed = |e| Error::io("cannot start the process that unmounts", e);
        let mut child = Command::new("/proc/self/exe")
            .arg0("vdisk")
            .arg(VERB)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed)?;
        let gone = || failed(std::io::ErrorKind::BrokenPipe.into());
        let mut told = child.stdin.take().ok_or_else(gone)?;
        let words = [number.as_bytes(), dir.as_os_str().as_bytes()];
        let said = words.iter().try_for_each(|word| {
            told.write_all(word)?;
            told.write_all(b"\0")
        });
        said.map_err(failed)?;
        Ok(Unmounter(told))
    }

    /// Has it unmount. While the mount is in use it stays.
    pub fn unmount(&mut self) {
        self.say(UNMOUNT);
    }

    /// Has it take the mount away, whoever uses it.
    pub fn detach(&mut self) {
        self.say(DETACH);
    }

    fn say(&mut self, what: u8) {
        // Where it is gone, somebody else may unmount still.
        let _ = self.0.write_all(&[what]);
    }
}

/// What it is told.
const UNMOUNT: u8 = b'u';
const DETACH: u8 = b'd';

/// Is that process: unmounts whenever it is told to, until the server is gone.
pub fn run() -> Result<u8> {
    // What ends the server is for the server.
    stop::hold_endings()?;
    let failed = |e| Error::io("cannot hear the server", e);
    let mut told = std::io::stdin().lock();
    let mut words = [Vec::new(), Vec::new()];
    for word in &mut words {
        told.read_until(0, word).map_err(failed)?;
        word.pop();
    }
    let [number, dir] = words;
    let number = String::from_utf8_lossy(&number);
    let dir = Path::new(OsStr::from_bytes(&dir));
    let mut what = [0];
    while told.read(&mut what).map_err(failed)? > 0 {
        match what {
            [DETACH] => drop(umount::detach(dir)),
            _ => unmount_ours(dir, &number),
        }
    }
    Ok(0)
}

/// Unmounts what stands at a directory, where it is the mount of the device `number`: somebody else's may
/// stand on it.
pub fn unmount_ours(dir: &Path, number: &str) {
    let here = table::at(dir).and_then(|mount| table::ours(&mount));
    if let Some(kind) = here.filter(|kind| kind.device() == number) {
        let _ = umount::release_once(dir, &kind);
    }
}
