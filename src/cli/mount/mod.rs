//! `vdisk mount`: a disk's file system, or the disk itself, at a directory.
//!
//! The command starts a process that serves the disk and returns when the mount can be used.

pub mod daemon;
pub mod end;
pub mod helper;
pub mod overlay;
pub mod snapshots;
pub mod umount;
pub mod user_space;

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vdisk::control::place;
use vdisk::mount::table;
use vdisk::{Error, ErrorKind, Result};

use crate::cli::open::options::Opening;
use crate::cli::open::{jail, memory, passphrase};
use daemon::READY;
use overlay::{OfDisk, Wanted};

/// Mount the file system in DISK at DIR, or with --raw DISK itself as DIR/disk.raw
///
/// For root the kernel mounts it. Any other user mounts ext2, ext3 and ext4, over FUSE.
///
/// Whoever wrote the disk made its device files and set-uid programs: they are only files there.
/// `mount -o remount,dev,suid DIR` trusts them.
#[derive(clap::Args, Clone)]
pub struct Args {
    /// The disk; left out with --lower
    pub disk: PathBuf,
    /// The directory to mount at
    #[arg(value_name = "DIR", required_unless_present = "lower")]
    at: Option<PathBuf>,
    /// The same, once it is known to be one.
    #[arg(skip)]
    pub dir: PathBuf,
    /// Lay an overlay: what is changed at DIR goes into UPPER, in the form of overlayfs
    #[arg(long, value_name = "UPPER", conflicts_with_all = ["raw", "ephemeral"])]
    pub overlay: Option<PathBuf>,
    /// A directory under the overlay, uppermost first; can be given 500 times
    #[arg(long, value_name = "DIR", requires = "overlay", conflicts_with = "at")]
    pub lower: Vec<PathBuf>,
    /// A directory for the overlay to work in, on UPPER's file system; UPPER.work by default
    #[arg(long, value_name = "DIR", requires = "overlay")]
    pub work: Option<PathBuf>,
    /// Show the disk as DIR/disk.raw and its snapshots as DIR/snapshots/NAME.raw (needs no root)
    #[arg(long, conflicts_with_all = ["partition", "snapshot"])]
    pub raw: bool,
    /// Mount ext2, ext3 or ext4 without the kernel's driver, as an ordinary user does
    #[arg(long, conflicts_with = "raw")]
    pub user_space: bool,
    /// Refuse writes, and replay no journal
    #[arg(long)]
    pub read_only: bool,
    /// Mount what snapshot NAME holds, for reading only unless --ephemeral
    #[arg(long, value_name = "NAME")]
    pub snapshot: Option<String>,
    /// Mount partition N of the disk
    #[arg(long, value_name = "N")]
    pub partition: Option<u32>,
    /// Let no program be run from there
    #[arg(long, hide = true, conflicts_with = "raw")]
    pub no_exec: bool,
    /// Put all writes into a throw-away delta
    #[arg(long, conflicts_with = "read_only")]
    pub ephemeral: bool,
    #[command(flatten)]
    pub opening: Opening,
}

impl Args {
    /// With the directory in its place.
    pub fn settled(mut self) -> Args {
        self.dir = self.at.clone().unwrap_or_else(|| self.disk.clone());
        self
    }

    /// The words that name the same mount to the serving process.
    fn words(&self) -> Vec<OsString> {
        let mut words = Vec::new();
        let flags = [
            ("--raw", self.raw),
            ("--user-space", self.user_space),
            ("--read-only", self.read_only),
            ("--no-exec", self.no_exec),
            ("--ephemeral", self.ephemeral),
        ];
        words.extend(flags.iter().filter(|(_, set)| *set).map(|(word, _)| OsString::from(word)));
        words.extend(self.opening.words());
        words.extend(self.snapshot.iter().map(|name| format!("--snapshot={name}").into()));
        words.extend(self.partition.iter().map(|number| format!("--partition={number}").into()));
        words.extend(["--".into(), self.disk.clone().into(), self.dir.clone().into()]);
        words
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<u8> {
    let mut args = args.clone().settled();
    if let Some(upper) = &args.overlay {
        let lowers = match args.lower.is_empty() {
            true => std::slice::from_ref(&args.disk),
            false => &args.lower[..],
        };
        let wanted = Wanted::new(upper, lowers, args.work.as_deref(), &args.dir);
        let of_disk = OfDisk {
            opening: args.opening.clone(),
            snapshot: args.snapshot.clone(),
            partition: args.partition,
        };
        return overlay::start(wanted.of_disk(of_disk).read_only(args.read_only));
    }
    // Only the host's root can have loop devices.
    args.user_space |= !args.raw && !place::user().is_root();
    args.dir = directory(&args.dir)?;
    args.disk = std::path::absolute(&args.disk)
        .map_err(|e| Error::io("cannot name the disk", e).at_path(&args.disk))?;
    let status = serve_apart("mount-daemon", args.words())?;
    if status == 0 && args.no_exec && !args.user_space {
        refuse_programs(&args)?;
    }
    Ok(status)
}

/// Lets no program be run from what the kernel has mounted for us.
fn refuse_programs(args: &Args) -> Result<()> {
    use nix::mount::{MsFlags, mount};
    let always = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let mut flags = always | MsFlags::MS_NOEXEC;
    if nix::sys::statvfs::statvfs(&args.dir)
        .is_ok_and(|fs| fs.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY))
    {
        flags |= MsFlags::MS_RDONLY;
    }
    mount(None::<&str>, &args.dir, None::<&str>, flags, None::<&str>)
        .map_err(|e| Error::io("cannot refuse programs there", e.into()).at_path(&args.dir))
}

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
        Some(code) if code != 0 => Ok(u8::try_from(code).unwrap_or(crate::cli::FAILED)),
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
