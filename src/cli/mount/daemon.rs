//! The process that serves a mount of `vdisk mount` until it is unmounted, by whomever.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use nix::sys::signal::SigSet;
use vdisk::block::BlockDevice;
use vdisk::chain::Chain;
use vdisk::control::{self, Bound, Kind, place};
use vdisk::jail::broker::{self, Broker};
use vdisk::jail::{Reach, Work};
use vdisk::mount::volume::{DeviceVolume, Lost};
use vdisk::mount::{self, AttachOptions, table};
use vdisk::{Error, ErrorKind, Result};
use vdisk_fuse::kernel::Device;
use vdisk_fuse::{Caching, Options, Server};

use crate::cli::instance::holding::{self, Bystander, Whole};
use crate::cli::mount::apart::READY;
use crate::cli::mount::args::Args;
use crate::cli::mount::outside::link::Opened;
use crate::cli::mount::outside::{self, Held, Outside};
use crate::cli::mount::snapshots::Shown;
use crate::cli::mount::umount;
use crate::cli::mount::user_space::{self, Found, UserSpace};
use crate::cli::open::disk::{self, Use};
use crate::cli::open::jail::{self, Around};
use crate::cli::terminal::stop;

/// How many requests on a raw mount are worked on at a time.
const THREADS: usize = 4;

/// Serves the mount that `args` name.
pub fn run(args: &Args) -> Result<u8> {
    let args = &args.clone().settled();
    leave_caller();
    let ending = stop::hold_endings()?;
    let helpers = Helpers::start(args)?;
    let chain = open(args)?;
    let outside = helpers.outside.clone();
    let (mount, bound) = jailed(args, &chain, helpers)?;
    drop(chain);
    let end = outside.clone();
    let started = bound.serve().and_then(|control| {
        when_asked(ending, move || end.unmount())?;
        announced(control)
    });
    let control = match started {
        Ok(control) => control,
        Err(error) => {
            outside.detach();
            let _ = mount.wait();
            return Err(error);
        }
    };
    let result = mount.wait();
    control.end_after(&result, broker::leave);
    result.map(|()| 0)
}

/// The processes that do for a jailed server what it cannot: started before it knows anything.
struct Helpers {
    outside: Outside,
    /// To the kernel, where the one outside mounts the kernel's file system on what is shown by it.
    connection: Option<Device>,
    broker: Option<Broker>,
}

impl Helpers {
    fn start(args: &Args) -> Result<Helpers> {
        let changes = !args.read_only && !args.ephemeral && args.snapshot.is_none();
        let named = |e: Error| e.at_path(&args.disk);
        let (outside, connection) = if args.raw {
            (Outside::start(&args.dir)?, None)
        } else if args.user_space {
            (Outside::start_to_mount_files(&args.dir, user_space::mount_options(args))?, None)
        } else {
            let name = args.disk.to_string_lossy().into_owned();
            let options = AttachOptions { inert: true, name, ..AttachOptions::default() };
            let started = Outside::start_to_mount(&args.dir, options).map_err(named)?;
            (started.0, Some(started.1))
        };
        Ok(Helpers { outside, connection, broker: jail::broker(changes)? })
    }
}

/// Mounts, and begins to serve in a jail.
fn jailed(args: &Args, chain: &Arc<Chain>, helpers: Helpers) -> Result<(Mount, Bound)> {
    let Helpers { outside, connection, broker } = helpers;
    let mut jail = Around::new(Work::Files, broker);
    jail.reach(Path::new("/dev/fuse"), Reach::Write);
    jail.reach(Path::new("/dev/null"), Reach::Write);
    jail.reach(&place::directory()?, Reach::Sockets);
    jail.disk(chain, !chain.read_only() && !args.ephemeral)?;
    match connection {
        Some(connection) => by_kernel(args, chain, (outside, connection), jail),
        None if args.user_space => in_user_space(args, chain, &outside, jail),
        None => as_file(args, chain, &outside, jail),
    }
}

/// Shows the disk to the kernel, whose own driver has the file system in it. It looks at what is shown as it
/// mounts it: that is done outside once this process serves, and is in its jail.
fn by_kernel(
    args: &Args,
    chain: &Arc<Chain>,
    (outside, connection): (Outside, Device),
    jail: Around,
) -> Result<(Mount, Bound)> {
    let held = Arc::new(Held::by_kernel(doing(args), outside.clone()));
    let bound = bind(chain, args, held)?;
    jail.close()?;
    let device: Arc<dyn BlockDevice> = chain.clone();
    let disk = outside::found(device.as_ref(), args.partition, args.read_only)
        .map_err(|e| e.at_path(&args.disk))?;
    let read_only = disk.read_only;
    outside.mount(Opened::Disk(disk))?;
    let shown = mount::Shown::on(connection, device, read_only)?;
    let named = outside.stood().and_then(|number| {
        // A jail makes no socket, and gives names to one that is there.
        bound.also(&place::mount(&number)).inspect_err(|_| outside.detach())
    });
    match named {
        Ok(()) => Ok((Mount::Files(shown), bound)),
        Err(error) => {
            shown.abandon();
            Err(error)
        }
    }
}

/// Serves the files in the disk, which are read in the jail alone, and mounted outside.
fn in_user_space(
    args: &Args,
    chain: &Arc<Chain>,
    outside: &Outside,
    mut jail: Around,
) -> Result<(Mount, Bound)> {
    // In which groups who makes a request is.
    jail.reach(Path::new("/proc"), Reach::Read);
    let held = Arc::new(Held::in_user_space(doing(args), outside.clone()));
    let bound = bind(chain, args, held.clone())?;
    jail.close()?;
    let found = Found::open(chain.clone(), args).map_err(|e| e.at_path(&args.disk))?;
    held.serve(found.file_system());
    let (number, connection) = outside.mount_files(found.file_system().read_only())?;
    let served = bound.also(&place::mount(&number)).and_then(|()| found.serve(connection));
    let served = served.inspect_err(|_| outside.detach())?;
    Ok((Mount::UserSpace(served), bound))
}

/// Mounts the disk as a file: of what is in it nothing is read.
fn as_file(
    args: &Args,
    chain: &Arc<Chain>,
    outside: &Outside,
    jail: Around,
) -> Result<(Mount, Bound)> {
    let shown = Arc::new(Shown::new(chain, &args.disk, args.opening.options()?)?);
    let raw = Raw::mount(chain.clone(), shown.clone(), args)?;
    let closed = number_at(&args.dir).and_then(|number| {
        // What cannot be read leaves the names that there were.
        let whole = Whole::new(doing(args), "who uses its file", || {});
        let kind = Arc::new(whole.showing(move || drop(shown.refresh())));
        let bound = bind(chain, args, kind)?;
        bound.also(&place::mount(&number))?;
        outside.mounted_here(&number)?;
        jail.close()?;
        Ok(bound)
    });
    let bound = match closed {
        Ok(bound) => bound,
        Err(error) => {
            let _ = umount::detach(&args.dir);
            return Err(error);
        }
    };
    let raw = raw.serve().inspect_err(|_| outside.detach())?;
    Ok((Mount::Raw(raw), bound))
}

/// The number of the device that is mounted at a directory.
fn number_at(dir: &Path) -> Result<String> {
    let gone = || Error::new(ErrorKind::Io, "the mount is gone already").at_path(dir);
    Ok(table::at(dir).ok_or_else(gone)?.device)
}

fn doing(args: &Args) -> String {
    format!("mounted at {}", args.dir.display())
}

/// Makes the mount's control socket: for whoever wants something of the disk, and for `umount`, which knows
/// the mount's number.
fn bind(chain: &Arc<Chain>, args: &Args, kind: Arc<dyn Kind>) -> Result<Bound> {
    match holding::bind(chain, &args.disk, kind)? {
        None => control::Server::bind(&place::mounting(), Arc::new(Bystander)),
        Some(bound) => Ok(bound),
    }
}

/// What is served.
enum Mount {
    Files(mount::Shown),
    UserSpace(UserSpace),
    Raw(Raw),
}

impl Mount {
    /// Returns when it is unmounted, everything is durable and the disk is free.
    fn wait(self) -> Result<()> {
        match self {
            Mount::Files(shown) => shown.wait(),
            Mount::UserSpace(files) => files.wait(),
            Mount::Raw(raw) => raw.wait(),
        }
    }
}

/// A disk shown as a file.
struct Raw<S = Server> {
    server: S,
    shown: Arc<Shown>,
    device: Arc<dyn BlockDevice>,
    lost: Arc<Lost>,
}

impl Raw<vdisk_fuse::Waiting> {
    fn mount(device: Arc<dyn BlockDevice>, shown: Arc<Shown>, args: &Args) -> Result<Self> {
        let volume = DeviceVolume::new(device.clone(), args.read_only);
        let lost = volume.lost();
        let options = Options {
            name: args.disk.to_string_lossy().into_owned(),
            caching: Caching::WriteBack,
            threads: THREADS,
        };
        let failed = |e| Error::io("cannot mount over FUSE", e).at_path(&args.dir);
        shown.tree().add("disk.raw", Arc::new(volume)).map_err(failed)?;
        let tree = shown.tree().clone();
        let server = vdisk_fuse::Waiting::mount(tree, &args.dir, &options).map_err(failed)?;
        Ok(Raw { server, shown, device, lost })
    }

    fn serve(self) -> Result<Raw> {
        let Raw { server, shown, device, lost } = self;
        let server = server.serve().map_err(|e| Error::io("cannot serve over FUSE", e))?;
        Ok(Raw { server, shown, device, lost })
    }
}

impl Raw {
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
pub fn when_asked(ending: SigSet, mut unmount: impl FnMut() + Send + 'static) -> Result<()> {
    let wait = move || {
        while ending.wait().is_ok() {
            unmount();
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
