//! `vdisk umount`: ends a mount of `vdisk mount`; returns when everything is durable and the
//! disk is free.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use vdisk::control::{self, Connection, Request, place};
use vdisk::mount::table::{self, Kind};
use vdisk::mount::{busy, unmount};
use vdisk::storage::fsfreeze;
use vdisk::{Error, ErrorKind, Result};
use vdisk_fuse::apart::Apart;

/// How long the serving process may take to end. What programs have written is durable before
/// this begins.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long it may take before the user is told what is waited for.
const QUIET: Duration = Duration::from_secs(3);

/// Unmount what `vdisk mount` has mounted at DIR
#[derive(clap::Args)]
pub struct Args {
    /// The directory
    dir: PathBuf,
    /// Take it out of sight at once, whoever uses it, and wait for nothing
    #[arg(long)]
    lazy: bool,
    /// End its connection first: whoever waits for it gets an error; nothing more is written out
    #[arg(long)]
    force: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<u8> {
    let dir = mount_point(&args.dir)?;
    let Some(mount) = table::at(&dir) else {
        return Err(Error::new(ErrorKind::NotFound, "nothing is mounted there").at_path(&args.dir));
    };
    let Some(kind) = table::ours(&mount) else {
        let text = format!("what is mounted there ({}) is not a vdisk mount", mount.kind);
        return Err(Error::invalid(text).at_path(&args.dir));
    };
    if args.lazy || args.force {
        return take_away(&dir, args).map(|()| 0);
    }
    let device = kind.device();
    // Asked before: what happens from then on is told.
    let server = control::ask_at(&place::mount(device), &Request::Wait)?;
    if server.is_none() || !is_at_work(device) {
        let_go_on(&dir, &kind);
    }
    match (server, release(&dir, &kind)) {
        (Some(server), result) => {
            result?;
            wait(server, device).map_err(|error| error.at_path(&args.dir))?;
        }
        // Nobody to ask, but the sync went through to a server: it is out of our reach.
        (None, Ok(())) => {}
        (None, Err(error)) if error.kind() == ErrorKind::InUse => return Err(error),
        (None, Err(_)) => {
            detach(&dir)?;
            return Err(Error::new(
                ErrorKind::Io,
                "unmounted, but the process that served it is gone: \
                 what was written since the last sync may be lost",
            )
            .at_path(&args.dir));
        }
    }
    Ok(0)
}

/// Whether the server of a mount does something to its disk that was asked of it, as to take a snapshot.
fn is_at_work(device: &str) -> bool {
    let asked = control::ask_at(&place::mount(device), &Request::Info).ok().flatten();
    let info = asked.and_then(|asked| control::result_of(asked, &mut |_, _| true).ok().flatten());
    info.is_some_and(|info| info.get("running").is_some_and(|running| !running.is_null()))
}

/// Lets a file system go on that was at rest, for a snapshot, when who was to let it go on was killed: its
/// server, or the process outside. Unmounted as it is, it would keep its loop device for good, and whoever waits to write there would never end.
fn let_go_on(dir: &Path, kind: &Kind) {
    if let (Kind::Files(_), Ok(root)) = (kind, File::open(dir)) {
        fsfreeze::let_go(&root);
    }
}

/// Writes everything out and unmounts, with the rights that the user has. Who uses it for a moment only,
/// as a program does that is just being started, is waited for.
fn release(dir: &Path, kind: &Kind) -> Result<()> {
    const MOMENT: Duration = Duration::from_millis(20);
    const MOMENTS: usize = 15;
    for _ in 1..MOMENTS {
        match release_once(dir, kind) {
            Err(e) if e.kind() == ErrorKind::InUse => std::thread::sleep(MOMENT),
            done => return done,
        }
    }
    release_once(dir, kind)
}

/// The same, where nobody is waited for.
pub fn release_once(dir: &Path, kind: &Kind) -> Result<()> {
    match unmount(&Apart::here(), dir) {
        Err(error) if matches!(kind, Kind::Raw(_)) && error.raw_os_error() == Some(libc::EPERM) => {
            fusermount(dir, &["-u"])
        }
        result => result,
    }
}

/// The full path, also of a mount whose server is gone and whose root cannot be looked at.
fn mount_point(dir: &Path) -> Result<PathBuf> {
    let failed = |e| Error::io("cannot unmount there", e).at_path(dir);
    match dir.canonicalize() {
        Ok(full) => Ok(full),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTCONN | libc::EIO)) => {
            let full = std::path::absolute(dir).map_err(failed)?;
            match (full.parent(), full.file_name()) {
                (Some(parent), Some(name)) => Ok(parent.canonicalize().map_err(failed)?.join(name)),
                _ => Err(failed(e)),
            }
        }
        Err(e) => Err(failed(e)),
    }
}

/// Unmounts without waiting for who uses it, or for who serves it.
fn take_away(dir: &Path, args: &Args) -> Result<()> {
    let force = if args.force { MntFlags::MNT_FORCE } else { MntFlags::empty() };
    match args.lazy {
        true => detach_with(dir, force),
        false => unmount_with(dir, force, &["-u"]),
    }
}

/// Takes a mount away whose server is gone, whoever uses it.
pub fn detach(dir: &Path) -> Result<()> {
    detach_with(dir, MntFlags::empty())
}

fn detach_with(dir: &Path, flags: MntFlags) -> Result<()> {
    unmount_with(dir, flags | MntFlags::MNT_DETACH, &["-u", "-z"])
}

/// Has the kernel unmount, or `fusermount3` where that is not this user's to ask for.
fn unmount_with(dir: &Path, flags: MntFlags, words: &[&str]) -> Result<()> {
    match umount2(dir, flags | MntFlags::UMOUNT_NOFOLLOW) {
        Err(nix::Error::EPERM) => fusermount(dir, words),
        Err(nix::Error::EBUSY) => {
            let text = match busy::users(dir) {
                users if users.is_empty() => "still in use".into(),
                users => format!("still in use by {}", users.join(", ")),
            };
            Err(Error::new(ErrorKind::InUse, text).at_path(dir))
        }
        result => result.map_err(|e| Error::io("cannot unmount", e.into()).at_path(dir)),
    }
}

fn fusermount(dir: &Path, options: &[&str]) -> Result<()> {
    let run = Command::new("fusermount3").args(options).arg("--").arg(dir).output();
    let output = run.map_err(|e| Error::io("cannot run fusermount3", e))?;
    if output.status.success() {
        return Ok(());
    }
    let users = busy::users(dir);
    if !users.is_empty() {
        let text = format!("still in use by {}; everything is written", users.join(", "));
        return Err(Error::new(ErrorKind::InUse, text).at_path(dir));
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::new(ErrorKind::Io, format!("cannot unmount: {said}")).at_path(dir))
}

/// Waits for the serving process to say how it ended.
fn wait(server: Connection, device: &str) -> Result<()> {
    let begun = Instant::now();
    let (mut told, mut next, mut holders) = (false, QUIET, Vec::new());
    let ended = control::wait_for(server, &mut |_, _| {
        if begun.elapsed() < next {
            return true;
        }
        next += QUIET;
        holders = busy::namespaces(device);
        if !told {
            match holders.is_empty() {
                true => eprintln!("vdisk: waiting until everything is durable"),
                false => eprintln!(
                    "vdisk: waiting: still mounted in the mount namespace of {}",
                    holders.join(", ")
                ),
            }
            told = true;
        }
        begun.elapsed() < PATIENCE
    });
    if begun.elapsed() > PATIENCE {
        let text = match holders.is_empty() {
            true => "unmounted, but the process that serves the disk has not ended".into(),
            false => format!(
                "unmounted here, but still mounted in the mount namespace of {}",
                holders.join(", ")
            ),
        };
        return Err(Error::new(ErrorKind::InUse, text));
    }
    let lost = |_| {
        let text = "unmounted, but the process that served it died before everything was durable";
        Error::new(ErrorKind::Io, text)
    };
    ended
        .map_err(lost)?
        .map_err(|why| Error::new(ErrorKind::Io, format!("unmounted, but not without loss: {why}")))
}
