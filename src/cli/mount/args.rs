//! What can be said of a mount.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::cli::open::options::Opening;

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
    pub fn words(&self) -> Vec<OsString> {
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
