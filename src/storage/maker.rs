//! Who opens files for writing, makes them, and gives and takes away their names: this process, or another
//! that is asked, where this one may not.
//!
//! What is only read this process opens itself, and so does it read and write what is open.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::OnceLock;

use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::unistd::linkat;

/// What is done to files by name. None of it is durable yet.
pub trait FileMaker: Send + Sync {
    /// Opens what is there for reading and writing. A FIFO does not make it wait.
    fn open(&self, path: &Path) -> io::Result<File>;

    /// Makes a file under a name that nothing has, open for reading and writing, of this mode less the umask.
    fn create(&self, path: &Path, mode: u32) -> io::Result<File>;

    /// Makes a file without a name in a directory, in the same way.
    fn nameless(&self, dir: &Path, mode: u32) -> io::Result<File>;

    /// Gives a nameless file a name that nothing has.
    fn name(&self, file: &File, to: &Path) -> io::Result<()>;

    /// Gives a file a second name, which nothing has.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Gives a file another name, which it takes over.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Takes a name away.
    fn remove(&self, path: &Path) -> io::Result<()>;
}

/// This process, by itself.
pub struct Host;

impl FileMaker for Host {
    fn open(&self, path: &Path) -> io::Result<File> {
        let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        OpenOptions::new().read(true).write(true).custom_flags(flags.bits()).open(path)
    }

    fn create(&self, path: &Path, mode: u32) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).create_new(true).mode(mode).open(path)
    }

    fn nameless(&self, dir: &Path, mode: u32) -> io::Result<File> {
        let flags = OFlag::O_TMPFILE.bits();
        OpenOptions::new().read(true).write(true).custom_flags(flags).mode(mode).open(dir)
    }

    fn name(&self, file: &File, to: &Path) -> io::Result<()> {
        let open = format!("/proc/self/fd/{}", file.as_raw_fd());
        linkat(AT_FDCWD, open.as_str(), AT_FDCWD, to, AtFlags::AT_SYMLINK_FOLLOW)?;
        Ok(())
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }
}

static ASKED: OnceLock<Box<dyn FileMaker>> = OnceLock::new();

/// Has all of it done by `other` from now on, for as long as this process lives.
pub fn make_by(other: Box<dyn FileMaker>) {
    // Who may do it no more asks one other, once.
    let _ = ASKED.set(other);
}

/// Who does it.
pub(super) fn maker() -> &'static dyn FileMaker {
    ASKED.get().map_or(&Host, |asked| &**asked)
}
