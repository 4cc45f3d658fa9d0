//! `vdisk apply`: an overlay's changes go into a disk, whole or not at all.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use vdisk::change::apply::{Applied, apply};
use vdisk::{Error, ErrorKind, Result, filesystem};
use vdisk_fuse::mount::is_host_root;
use vdisk_fuse::overlay::marks::Words;

use super::changes::{self, Changes};
use crate::cli::open::options::Opening;
use crate::cli::open::rest::Rest;
use crate::cli::terminal::output;

/// Put the changes of an overlay into a disk, whole or not at all
///
/// UPPER is what `mount --overlay UPPER DISK DIR`, or the kernel's overlayfs over a mount of the disk,
/// has left: afterwards the disk shows what DIR showed. UPPER stays as it is. A process that is killed
/// leaves the disk as it was, or as it is to be.
#[derive(clap::Args)]
pub struct ApplyArgs {
    /// The directory with the changes; not in use by an overlay
    upper: PathBuf,
    /// The disk, which is not in use
    disk: PathBuf,
    /// The directory that the overlay worked in; UPPER.work by default
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// The overlay's own attributes are user.overlay.*, as in an ordinary user's, and not trusted.overlay.*
    #[arg(long)]
    userxattr: bool,
    /// The file system in partition N of the disk
    #[arg(long, value_name = "N")]
    partition: Option<u32>,
    /// Print what was changed as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    opening: Opening,
}

/// What was changed.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    changes: Changes,
    /// The snapshot that the disk stands on where it could not be merged.
    snapshot: Option<String>,
}

/// Runs the command.
pub fn run(args: &ApplyArgs) -> Result<u8> {
    let upper = args
        .upper
        .canonicalize()
        .map_err(|e| Error::io("cannot be used as the changes of an overlay", e))
        .map_err(|e| e.at_path(&args.upper))?;
    if !upper.is_dir() {
        return Err(Error::invalid("is no directory, and so no overlay's changes").at_path(&upper));
    }
    let _lock = take(&upper, args.work.as_deref())?;
    args.opening.govern(&args.disk)?;
    Rest::new().disk(&args.disk).read(&upper).close()?;
    let mut done = Changes::default();
    let applied = apply(&args.disk, &args.opening.options()?, |device| {
        let fs =
            filesystem::open(device, args.partition, false).map_err(|e| e.at_path(&args.disk))?;
        done = changes::put(&fs, &upper, Words::new(args.userxattr || !is_trusted()))?;
        fs.close().map_err(|e| e.at_path(&args.disk))
    })?;
    let snapshot = match applied {
        Applied::Merged => None,
        Applied::Snapshot(name, error) => {
            eprintln!(
                "vdisk: warning: the changes are in the disk; what it was before stays as snapshot \
                 '{name}', as it could not be merged: {error}"
            );
            Some(name)
        }
    };
    if args.json {
        return output::json(&Report { changes: done, snapshot }).map(|()| 0);
    }
    println!("{} made or changed, {} removed, {} moved", done.changed, done.removed, done.moved);
    Ok(0)
}

/// Whether this process sees `trusted.*` attributes, as root does outside of user namespaces: then its
/// overlays' own attributes are such, and `user.overlay.*` is any program's.
fn is_trusted() -> bool {
    is_host_root()
}

/// Keeps overlays away from the directory as long as what is returned lives.
fn take(upper: &Path, work: Option<&Path>) -> Result<Option<File>> {
    let busy = |by: &str| {
        let text = format!("is in use by {by}: unmount that first");
        Error::new(ErrorKind::InUse, text).at_path(upper)
    };
    if let Some(point) = kernels(upper) {
        return Err(busy(&format!("the overlay at {}", point.display())));
    }
    let beside = || {
        let mut name = upper.file_name().unwrap_or_default().to_owned();
        name.push(".work");
        upper.with_file_name(name)
    };
    let work = work.map_or_else(beside, Path::to_owned);
    let Ok(file) = File::open(&work) else { return Ok(None) };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(busy("an overlay")),
        // A file system without locks.
        Err(_) => Ok(None),
    }
}

/// Where the kernel's overlayfs has mounted an overlay with this upper directory.
fn kernels(upper: &Path) -> Option<PathBuf> {
    let table = std::fs::read("/proc/self/mountinfo").ok()?;
    let wanted = [b"upperdir=", upper.as_os_str().as_bytes()].concat();
    table.split(|byte| *byte == b'\n').find_map(|line| {
        let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let options = words.last()?.split(|byte| *byte == b',');
        let here = options.into_iter().any(|option| option == wanted);
        let point = words.get(4).filter(|_| here)?;
        Some(PathBuf::from(String::from_utf8_lossy(point).into_owned()))
    })
}
