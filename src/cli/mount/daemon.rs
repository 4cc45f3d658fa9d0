//! The process that serves a mount of `vdisk mount` until it is unmounted, by whomever.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use nix::sys::signal::SigSet;
use vdisk::block::BlockDevice;
use vdisk::chain::Chain;
use vdisk::control::{self, Kind, place};
use vdisk::jail::broker::{self, Broker};
use vdisk::jail::{Reach, Work};
use vdisk::mount::volume::{DeviceVolume, Lost};
use vdisk::mount::{AttachOptions, Attached, attach, table};
use vdisk::{Error, ErrorKind, Result};
use vdisk_fuse::apart::Apart;
use vdisk_fuse::{Caching, Options, Server};

use crate::cli::instance::holding::{self, Bystander, Files, UserSpaceFiles, Whole};
use crate::cli::mount::apart::READY;
use crate::cli::mount::args::Args;
use crate::cli::mount::end::{Outside, unmount_ours};
use crate::cli::mount::snapshots::Shown;
use crate::cli::mount::umount;
use crate::cli::mount::user_space::UserSpace;
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
    // The kernel's mounts are made by threads that serve already.
    let is_jailed = args.raw || args.user_space;
    let helpers = if is_jailed { Some(Helpers::start(args)?) } else { None };
    let chain = open(args)?;
    let shown = Arc::new(Shown::new(&chain, &args.disk, args.opening.options()?)?);
    let (mount, control) = match helpers {
        Some(helpers) => jailed(args, ending, (&chain, shown), helpers)?,
        None => free(args, ending, &chain)?,
    };
    drop(chain);
    let result = mount.wait();
    control.end_after(&result, broker::leave);
    result.map(|()| 0)
}

/// Mounts and begins to serve.
fn free(args: &Args, ending: SigSet, chain: &Arc<Chain>) -> Result<(Mount, control::Server)> {
    jail::refuse("what the kernel mounts is served without")?;
    let device: Arc<dyn BlockDevice> = chain.clone();
    let named = |e: Error| e.at_path(&args.disk);
    let name = args.disk.to_string_lossy().into_owned();
    let (read_only, partition) = (args.read_only, args.partition);
    let options =
        AttachOptions { read_only, partition, inert: true, name, ..AttachOptions::default() };
    let mount = attach(device, &options, &args.dir).map_err(named)?;
    let number = mount.loop_device();
    let started = (|| {
        let at = (&Apart::here(), args.dir.as_path());
        let kind = Arc::new(Files::new(doing(args), at, &number)?);
        let control = bind(chain, args, &number, kind)?.serve()?;
        let (dir, number) = (args.dir.clone(), number.clone());
        when_asked(ending, move || unmount_ours(&dir, &number))?;
        announced(control)
    })();
    match started {
        Ok(control) => Ok((Mount::Files(mount), control)),
        Err(error) => {
            drop(mount.detach());
            Err(error)
        }
    }
}

/// The processes that do for a jailed server what it cannot: started before it knows anything.
struct Helpers {
    outside: Outside,
    broker: Option<Broker>,
}

impl Helpers {
    fn start(args: &Args) -> Result<Helpers> {
        let changes = !args.read_only && !args.ephemeral && args.snapshot.is_none();
        Ok(Helpers { outside: Outside::start()?, broker: jail::broker(changes)? })
    }
}

/// Mounts, and begins to serve in a jail.
fn jailed(
    args: &Args,
    ending: SigSet,
    (chain, shown): (&Arc<Chain>, Arc<Shown>),
    Helpers { outside, broker }: Helpers,
) -> Result<(Mount, control::Server)> {
    let mut jail = Around::new(Work::Files, broker);
    // What is mounted here is looked at to bring it to rest.
    jail.reach(&args.dir, Reach::Read);
    jail.reach(Path::new("/dev/fuse"), Reach::Write);
    jail.reach(Path::new("/dev/null"), Reach::Write);
    let device: Arc<dyn BlockDevice> = chain.clone();
    let waiting = if args.raw {
        Waiting::Raw(Raw::mount(device, shown.clone(), args)?)
    } else {
        // In which groups who makes a request is.
        jail.reach(Path::new("/proc"), Reach::Read);
        Waiting::UserSpace(UserSpace::mount(device, args).map_err(|e| e.at_path(&args.disk))?)
    };
    let closed = number_at(&args.dir).and_then(|number| {
        let kind = waiting.kind(args, &number, shown)?;
        let bound = bind(chain, args, &number, kind)?;
        outside.tell(&args.dir, &number)?;
        outside.watch();
        jail.disk(chain, !chain.read_only() && !args.ephemeral)?;
        jail.reach(&place::directory()?, Reach::Sockets);
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
    let mount = waiting.serve().inspect_err(|_| outside.detach())?;
    match bound.serve().and_then(announced) {
        Ok(control) => {
            when_asked(ending, move || outside.unmount())?;
            Ok((mount, control))
        }
        Err(error) => {
            outside.detach();
            let _ = mount.wait();
            Err(error)
        }
    }
}

/// The number of the device that is mounted at a directory.
fn number_at(dir: &Path) -> Result<String> {
    let gone = || Error::new(ErrorKind::Io, "the mount is gone already").at_path(dir);
    Ok(table::at(dir).ok_or_else(gone)?.device)
}

fn doing(args: &Args) -> String {
    format!("mounted at {}", args.dir.display())
}

/// Makes the mount's control socket: for `umount`, and for whoever wants something of the disk.
fn bind(
    chain: &Arc<Chain>,
    args: &Args,
    number: &str,
    kind: Arc<dyn Kind>,
) -> Result<control::Bound> {
    let own = place::mount(number);
    match holding::bind(chain, &args.disk, kind)? {
        None => control::Server::bind(&own, Arc::new(Bystander)),
        Some(bound) => bound.also(&own).map(|()| bound),
    }
}

/// What is mounted, and not served yet.
enum Waiting {
    UserSpace(UserSpace<vdisk_fuse::Waiting>),
    Raw(Raw<vdisk_fuse::Waiting>),
}

impl Waiting {
    /// What it will have to do when its disk changes.
    fn kind(&self, args: &Args, number: &str, shown: Arc<Shown>) -> Result<Arc<dyn Kind>> {
        let doing = doing(args);
        let files = match self {
            // What cannot be read leaves the names that there were.
            Waiting::Raw(_) => {
                let whole = Whole::new(doing, "who uses its file", || {});
                return Ok(Arc::new(whole.showing(move || drop(shown.refresh()))));
            }
            Waiting::UserSpace(files) => files.file_system(),
        };
        let parts = number.split_once(':').and_then(|(major, minor)| {
            Some(nix::sys::stat::makedev(major.parse().ok()?, minor.parse().ok()?))
        });
        let device = parts.ok_or_else(|| Error::invalid("a mount without a number"))?;
        let at = (&Apart::here(), args.dir.as_path());
        Ok(Arc::new(UserSpaceFiles::on(device, doing, at, files)))
    }

    /// Serves it from now on.
    fn serve(self) -> Result<Mount> {
        match self {
            Waiting::UserSpace(files) => files.serve().map(Mount::UserSpace),
            Waiting::Raw(raw) => raw.serve().map(Mount::Raw),
        }
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
}

/// A disk shown as a file.
struct Raw<S = Server> {
    server: S,
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
        Ok(Raw { server, device, lost })
    }

    fn serve(self) -> Result<Raw> {
        let Raw { server, device, lost } = self;
        let server = server.serve().map_err(|e| Error::io("cannot serve over FUSE", e))?;
        Ok(Raw { server, device, lost })
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
