//! How `vdisk umount` learns how a mount ended: a socket of the process that serves it.
//!
//! Whoever connects before the end gets one line at the end, when the disk is free: `done`, or
//! `failed: ` and why. Nothing is ever sent to the process. The socket is named after the device
//! number of the mount, which the kernel's table of mounts shows.

use std::fs::DirBuilder;
use std::io::{ErrorKind as IoErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vdisk::{Error, ErrorKind, Result};

/// The line after an end without loss.
pub const DONE: &str = "done";
/// What a line about an end with loss begins with.
pub const FAILED: &str = "failed: ";

/// How long a process may need from the end of its mount to its own.
const HANDOVER: Duration = Duration::from_secs(30);
/// How often a thing that is waited for is looked at.
const PAUSE: Duration = Duration::from_millis(5);

/// The serving process's end.
pub struct Control {
    listener: UnixListener,
    /// Taken when the name is removed: from then on it may be another process's.
    path: Option<PathBuf>,
}

impl Control {
    /// Makes the socket of the mount on device `major:minor`.
    pub fn listen(device: &str) -> Result<Control> {
        let path = path(device)?;
        let failed = |e| Error::io("cannot make the mount's control socket", e).at_path(&path);
        let deadline = Instant::now() + HANDOVER;
        loop {
            match UnixStream::connect(&path) {
                // The last mount on this device has just ended, and its process is about to.
                Ok(_) if Instant::now() < deadline => std::thread::sleep(PAUSE),
                // Left by a process that was killed; the device number is ours now.
                Err(e) if e.kind() == IoErrorKind::ConnectionRefused => {
                    break std::fs::remove_file(&path).map_err(failed)?;
                }
                _ => break,
            }
        }
        let listener = UnixListener::bind(&path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Control { listener, path: Some(path) })
    }

    /// Tells everyone who has asked how the mount ended.
    pub fn end(mut self, result: &Result<()>) {
        let line = match result {
            Ok(()) => format!("{DONE}\n"),
            Err(error) => format!("{FAILED}{}\n", error.to_string().replace('\n', " ")),
        };
        self.remove();
        while let Ok((mut stream, _)) = self.listener.accept() {
            // Whoever asked and left need not know.
            let _ = stream.set_write_timeout(Some(Duration::from_secs(1)));
            let _ = stream.write_all(line.as_bytes());
        }
    }

    fn remove(&mut self) {
        if let Some(path) = self.path.take() {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Connects to the process that serves the mount on device `major:minor`; `None` where it is
/// gone.
pub fn connect(device: &str) -> Result<Option<UnixStream>> {
    let path = path(device)?;
    match UnixStream::connect(&path) {
        Ok(stream) => Ok(Some(stream)),
        Err(e) if e.kind() == IoErrorKind::NotFound => Ok(None),
        Err(e) if e.kind() == IoErrorKind::ConnectionRefused => {
            let _ = std::fs::remove_file(&path);
            Ok(None)
        }
        Err(e) => Err(Error::io("cannot reach the process that serves the mount", e).at_path(path)),
    }
}

fn path(device: &str) -> Result<PathBuf> {
    Ok(directory()?.join(format!("mount-{}.sock", device.replace(':', "-"))))
}

/// A directory of this user's that nobody else can write to.
fn directory() -> Result<PathBuf> {
    let user = nix::unistd::geteuid();
    let dir = match std::env::var_os("XDG_RUNTIME_DIR") {
        _ if user.is_root() => PathBuf::from("/run/vdisk"),
        Some(dir) if !dir.is_empty() => PathBuf::from(dir).join("vdisk"),
        _ => std::env::temp_dir().join(format!("vdisk-{user}")),
    };
    let failed = |e| Error::io("cannot use the directory for control sockets", e).at_path(&dir);
    match DirBuilder::new().mode(0o700).create(&dir) {
        Err(e) if e.kind() != IoErrorKind::AlreadyExists => return Err(failed(e)),
        _ => {}
    }
    let meta = std::fs::symlink_metadata(&dir).map_err(failed)?;
    if !meta.is_dir() || meta.uid() != user.as_raw() || meta.mode() & 0o022 != 0 {
        let text = "the directory for control sockets belongs to, or is open to, somebody else";
        return Err(Error::new(ErrorKind::Denied, text).at_path(dir));
    }
    Ok(dir)
}
