//! `vdisk mount`: a disk's file system, or the disk itself, at a directory.
//!
//! The command starts a process that serves the disk and returns when the mount can be used.

mod apart;
mod args;
pub mod daemon;
pub mod helper;
pub mod outside;
pub mod overlay;
pub mod snapshots;
pub mod umount;
pub mod user_space;

use vdisk::control::place;
use vdisk::{Error, Result};

pub use apart::READY;
use apart::{directory, serve_apart};
pub use args::Args;
use overlay::{OfDisk, Wanted};

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
