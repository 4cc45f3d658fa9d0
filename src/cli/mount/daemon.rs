//! The process that serves a mount of `vdisk mount` until it is unmounted, by whomever.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::signal::SigSet;
use vdisk::block::BlockDevice;
use vdisk::chain::Chain;
use vdisk::control::{self, Kind, place};
use vdisk::mount::volume::{DeviceVolume, Lost};
use vdisk::mount::{AttachOptions, Attached, attach, table, unmount};
use vdisk::{Error, ErrorKind, Result};
use vdisk_fuse::apart::Apart;
use vdisk_fuse::{Caching, Options, Server};

use crate::cli::instance::holding::{self, Bystander, Files, UserSpaceFiles, Whole};
use crate::cli::mount::apart::READY;
use crate::cli::mount::args::Args;
use crate::cli::mount::snapshots::Shown;
use crate::cli::mount::umount;
use crate::cli::mount::user_space::UserSpace;
use crate::cli::open::disk::{self, Use};
use crate::cli::terminal::stop;

/// How many requests on a raw mount are worked on at a time.
const THREADS: usize = 4;

/// Serves the mount that `args` name.
pub fn run(args: &Args) -> Result<u8> {
    let args = &args.clone().settled();
    leave_caller();
    let ending = stop::hold_endings()?;
    let chain = open(args)?;
    let device: Arc<dyn BlockDevice> = chain.clone();
    let shown = Arc::new(Shown::new(&chain, &args.disk, args.opening.options()?)?);
    let (mount, number) = if args.raw {
        let mount = Raw::mount(device, shown.clone(), args)?;
        let number = table::at(&args.dir).map(|mount| mount.device);
        (Mount::Raw(mount), number)
    } else if args.user_space {
        let mount = UserSpace::mount(device, args).map_err(|e| e.at_path(&args.disk))?;
        let number = table::at(&args.dir).map(|mount| mount.device);
        (Mount::UserSpace(mount), number)
    } else {
        let name = args.disk.to_string_lossy().into_owned();
        let (read_only, partition) = (args.read_only, args.partition);
        let options =
            AttachOptions { read_only, partition, inert: true, name, ..AttachOptions::default() };
        let mount = attach(device, &options, &args.dir).map_err(|e| e.at_path(&args.disk))?;
        let number = mount.loop_device();
        (Mount::Files(mount), Some(number))
    };
    let number = number
        .ok_or_else(|| Error::new(ErrorKind::Io, "the mount is gone already").at_path(&args.dir));
    let started = number.and_then(|number| {
        let control = listen(&chain, shown, args, &mount, &number)?;
        unmount_when_asked(ending, args.dir.clone(), number)?;
        announced(control)
    });
    let control = match started {
        Ok(control) => control,
        Err(error) => {
            mount.abandon(&args.dir);
            return Err(error);
        }
    };
    drop(chain);
    let result = mount.wait();
    control.end(&result);
    result.map(|()| 0)
}

/// Makes the mount's control socket: for `umount`, and for whoever wants something of the disk.
fn listen(
    chain: &Arc<Chain>,
    shown: Arc<Shown>,
    args: &Args,
    mount: &Mount,
    number: &str,
) -> Result<control::Server> {
    let doing = format!("mounted at {}", args.dir.display());
    let kind: Arc<dyn Kind> = match mount {
        Mount::Raw(_) => Arc::new(
            // What cannot be read leaves the names that there were.
            Whole::new(doing, "who uses its file", || {}).showing(move || drop(shown.refresh())),
        ),
        Mount::Files(_) => Arc::new(Files::new(doing, (&Apart::here(), &args.dir), number)?),
        Mount::UserSpace(mount) => {
            Arc::new(UserSpaceFiles::new(doing, (&Apart::here(), &args.dir), mount.file_system())?)
        }
    };
    let own = place::mount(number);
    match holding::serve(chain, &args.disk, kind)? {
        None => control::Server::listen(&own, Arc::new(Bystander)),
        Some(server) => server.also(&own).map(|()| server),
    }
}

/// What is served.
enum Mount {
    Files(Attached),
    UserSpace(UserSpace),
    Raw(Raw),
}

impl Mount {
    /// Returns when it is unmounted, everything is durable and the disk is free.
    fn wait(self) -> Result<()> {
        match self {
            Mount::Files(attached) => attached.wait(),
            Mount::UserSpace(files) => files.wait(),
            Mount::Raw(raw) => raw.wait(),
        }
    }

    /// Takes away what nobody has used yet.
    fn abandon(self, dir: &Path) {
        match self {
            Mount::Files(attached) => drop(attached.detach()),
            Mount::UserSpace(files) => {
                if umount::detach(dir).is_ok() {
                    let _ = files.wait();
                }
            }
            Mount::Raw(raw) => {
                if umount::detach(dir).is_ok() {
                    let _ = raw.wait();
                }
            }
        }
    }
}

/// A disk shown as a file.
struct Raw {
    server: Server,
    device: Arc<dyn BlockDevice>,
    lost: Arc<Lost>,
}

impl Raw {
    fn mount(device: Arc<dyn BlockDevice>, shown: Arc<Shown>, args: &Args) -> Result<Raw> {
        let volume = DeviceVolume::new(device.clone(), args.read_only);
        let lost = volume.lost();
        let options = Options {
            name: args.disk.to_string_lossy().into_owned(),
            caching: Caching::WriteBack,
            threads: THREADS,
        };
        let failed = |e| Error::io("cannot mount over FUSE", e).at_path(&args.dir);
        shown.tree().add("disk.raw", Arc::new(volume)).map_err(failed)?;
        let server = Server::mount(shown.tree().clone(), &args.dir, &options).map_err(failed)?;
        Ok(Raw { server, device, lost })
    }

    fn wait(self) -> Result<()> {
        self.server.join().map_err(|e| Error::io("the FUSE server failed", e))?;
        if !self.device.read_only() {
            self.device.flush()?;
        }
        self.lost.check()
    }
}

/// Frees the caller of us: his terminal, his directory, and the descriptors that his shell gave
/// us along the way, such as a lock's.
pub fn leave_caller() {
    leave_session();
    let _ = std::env::set_current_dir("/");
}

/// The same, but for his directory.
pub fn leave_session() {
    // What errors about a held disk call us; executed by its link, the program would be `exe`.
    let _ = nix::sys::prctl::set_name(c"vdisk");
    // Fails only for a process that leads its group already.
    let _ = nix::unistd::setsid();
    let open: Vec<i32> = std::fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in open {
        // The directory's own descriptor is gone by now.
        let _ = nix::unistd::close(fd);
    }
}

/// Unmounts when somebody asks this process to end. While the mount is in use it is served on:
/// to end then would lose what its users have written.
pub fn unmount_when_asked(ending: SigSet, dir: PathBuf, number: String) -> Result<()> {
    let wait = move || {
        while ending.wait().is_ok() {
            // Somebody else's mount may stand on ours.
            let here = table::at(&dir).and_then(|mount| table::ours(&mount));
            if here.is_some_and(|kind| kind.device() == number) {
                let _ = unmount(&Apart::here(), &dir);
            }
        }
    };
    std::thread::Builder::new()
        .name("ending".into())
        .spawn(wait)
        .map(drop)
        .map_err(|e| Error::io("cannot start a thread", e))
}

/// Tells the caller that the mount can be used, and lets go of his output.
pub fn announced(control: control::Server) -> Result<control::Server> {
    let mut out = std::io::stdout();
    let failed = |e| Error::io("the caller is gone", e);
    writeln!(out, "{READY}").and_then(|()| out.flush()).map_err(failed)?;
    let null = File::options().read(true).write(true).open("/dev/null").map_err(failed)?;
    nix::unistd::dup2_stdout(&null).map_err(|e| failed(e.into()))?;
    nix::unistd::dup2_stderr(&null).map_err(|e| failed(e.into()))?;
    Ok(control)
}

fn open(args: &Args) -> Result<Arc<Chain>> {
    let using = Use {
        write: args.ephemeral || !(args.read_only || args.snapshot.is_some()),
        ephemeral: args.ephemeral,
        snapshot: args.snapshot.as_deref(),
        ..Use::default()
    };
    disk::open(&args.disk, &args.opening.holding(using))
}
