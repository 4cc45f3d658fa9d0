//! A directory in which one process at a time gives names and takes them away.

use std::fs::File;
use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// How often it is tried.
const BEAT: Duration = Duration::from_millis(1);

/// Nobody else has the directory while this lives.
pub type DirectoryLock = Flock<File>;

/// Keeps other processes that ask for it from changing names in `dir`, if those that do so now are done
/// `within` that time.
///
/// # Errors
/// [`WouldBlock`](io::ErrorKind::WouldBlock) where they are not; that the directory cannot be opened.
pub fn lock_directory(dir: &Path, within: Duration) -> io::Result<DirectoryLock> {
    let mut file = File::open(dir)?;
    let until = Instant::now() + within;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((file, Errno::EWOULDBLOCK)) if Instant::now() < until => file,
            Err((_, errno)) => return Err(errno.into()),
        };
        thread::sleep(BEAT);
    }
}
