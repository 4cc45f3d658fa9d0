//! The process that serves a mount: started apart from the command, which goes when it is ready.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vdisk::mount::table;
use vdisk::{Error, ErrorKind, Result};

use crate::cli::open::{jail, memory, passphrase};

/// What a process says on its stdout once what it serves can be used.
pub const READY: &str = "ready";
/// How many heaps the C library keeps.
const ARENAS: &str = "MALLOC_ARENA_MAX";

/// Starts this program once more, as `verb` with `words`, and returns when what it mounts can be
/// used.
pub fn serve_apart(verb: &str, words: Vec<OsString>) -> Result<u8> {
    let program = std::env::current_exe().map_err(|e| Error::io("cannot find this program", e))?;
    let mut command = Command::new("/proc/self/exe");
    if std::env::var_os(ARENAS).is_none() {
        // The C library gives each thread a heap of its own, and none gives back what others free.
        command.env(ARENAS, "1");
    }
    let mut child = command
        .arg0(program)
        .arg(verb)
        .args(passphrase::words())
        .args(memory::words())
        .args(jail::words())
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| Error::io("cannot start the process that serves the mount", e))?;
    let mut line = String::new();
    if let Some(pipe) = child.stdout.take() {
        // Only the end of the pipe counts besides the word; a broken pipe is an end.
        let _ = BufReader::new(pipe).read_line(&mut line);
    }
    if line.trim_end() == READY {
        return Ok(0);
    }
    // It has told the user why on the stderr that we share.
    let status = child.wait().map_err(|e| Error::io("cannot wait for the serving process", e))?;
    match status.code() {
        Some(code) if code != 0 => Ok(u8::try_from(code).unwrap_or(u8::MAX)),
        _ => Err(Error::new(
            ErrorKind::Io,
            format!("the process that serves the mount ended early ({status})"),
        )),
    }
}

/// The directory by its full path, as the kernel's table of mounts will name it.
pub fn directory(dir: &Path) -> Result<PathBuf> {
    let failed = |e| Error::io("cannot mount there", e).at_path(dir);
    let full = dir.canonicalize().map_err(failed)?;
    if !full.is_dir() {
        return Err(failed(std::io::ErrorKind::NotADirectory.into()));
    }
    if table::at(&full).is_some_and(|mount| table::ours(&mount).is_some()) {
        let text = "a vdisk mount stands there already; `vdisk umount` takes it away";
        return Err(Error::new(ErrorKind::Exists, text).at_path(dir));
    }
    Ok(full)
}
