//! `vdisk mount`: a disk's file system, or the disk itself, at a directory.
//!
//! The command starts a process that serves the disk and returns when the mount can be used.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vdisk::mount::table;
use vdisk::{Error, ErrorKind, Result};

use super::mount_daemon::READY;
use super::{memory, passphrase};

/// Mount the file system in DISK at DIR, or with --raw DISK itself as DIR/disk.raw
#[derive(clap::Args, Clone)]
pub struct Args {
    /// The disk
    pub disk: PathBuf,
    /// The directory to mount at
    pub dir: PathBuf,
    /// Show the disk as DIR/disk.raw and its snapshots as DIR/snapshots/NAME.raw (needs no root)
    #[arg(long, conflicts_with_all = ["partition", "snapshot"])]
    pub raw: bool,
    /// Refuse writes, and replay no journal
    #[arg(long)]
    pub read_only: bool,
    /// Mount what snapshot NAME holds, for reading only unless --ephemeral
    #[arg(long, value_name = "NAME")]
    pub snapshot: Option<String>,
    /// Mount partition N of the disk
    #[arg(long, value_name = "N")]
    pub partition: Option<u32>,
    /// Put all writes into a throw-away delta
    #[arg(long, conflicts_with = "read_only")]
    pub ephemeral: bool,
}

impl Args {
    /// The words that name the same mount to the serving process.
    fn words(&self) -> Vec<OsString> {
        let mut words = Vec::new();
        let flags =
            [("--raw", self.raw), ("--read-only", self.read_only), ("--ephemeral", self.ephemeral)];
        words.extend(flags.iter().filter(|(_, set)| *set).map(|(word, _)| OsString::from(word)));
        words.extend(self.snapshot.iter().map(|name| format!("--snapshot={name}").into()));
        words.extend(self.partition.iter().map(|number| format!("--partition={number}").into()));
        words.extend(["--".into(), self.disk.clone().into(), self.dir.clone().into()]);
        words
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<u8> {
    let mut args = args.clone();
    if !args.raw && !nix::unistd::geteuid().is_root() {
        return Err(Error::new(
            ErrorKind::Denied,
            "only root can mount the file system in a disk (it takes a loop device); \
             `vdisk mount --raw` shows the disk as a file to any user",
        ));
    }
    args.dir = directory(&args.dir)?;
    args.disk = std::path::absolute(&args.disk)
        .map_err(|e| Error::io("cannot name the disk", e).at_path(&args.disk))?;
    let program = std::env::current_exe().map_err(|e| Error::io("cannot find this program", e))?;
    let mut child = Command::new("/proc/self/exe")
        .arg0(program)
        .arg("mount-daemon")
        .args(passphrase::words())
        .args(memory::words())
        .args(args.words())
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
        Some(code) if code != 0 => Ok(u8::try_from(code).unwrap_or(super::FAILED)),
        _ => Err(Error::new(
            ErrorKind::Io,
            format!("the process that serves the mount ended early ({status})"),
        )),
    }
}

/// The directory by its full path, as the kernel's table of mounts will name it.
fn directory(dir: &Path) -> Result<PathBuf> {
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
