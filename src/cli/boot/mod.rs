//! `vdisk boot`: a disk as a KVM microVM, its serial console on the terminal.

pub mod keep;
mod kernel;
mod network;
mod search;
mod show;
mod status;

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args as ClapArgs;
use nix::sys::signal::{SigSet, Signal};
use vdisk::block::BlockDevice;
use vdisk::chain::Chain;
use vdisk::control::Bound;
use vdisk::instance::Kind;
use vdisk::jail::Work;
use vdisk::jail::broker::Broker;
use vdisk::open::{Format, follow_links};
use vdisk::vm::{Config, Disk, Ended, Guest, Handle, MAX_DISKS, MAX_QUEUES, Streams};
use vdisk::{Error, ErrorKind, Result};

use kernel::{Chosen, Sources, Wanted};

use crate::cli::fleet::many;
use crate::cli::image::Which;
use crate::cli::instance::holding::{self, Whole};
use crate::cli::instance::named::Named;
use crate::cli::instance::start::{self, About, As, Keeping, Part};
use crate::cli::instance::switches::{Doors, KILLED, OfMachine};
use crate::cli::measure::marks::Marks;
use crate::cli::open::disk::{self, Use};
use crate::cli::open::jail::{self, Around};
use crate::cli::open::options::{self as opening, Opening};
use crate::cli::terminal::{size, stop};

/// Queues of a disk where the user does not say how many: more than the host's own disk has no use.
const USUAL_QUEUES: u16 = 8;

/// Boot a disk, or an image, as a KVM microVM with its serial console on the terminal.
///
/// Of an image a clone is booted that goes when it ends; with --name it is kept, and booted again the
/// next time, until `vdisk rm N`. What an image's configuration runs is for `vdisk run`: a guest's own
/// init says what runs in it, or `--append init=...`.
///
/// With --name, --detach, --rm or --restart it is an instance: `vdisk ps` lists it, and `vdisk stop`,
/// which presses its power button, `kill`, `pause`, `attach`, `logs`, `wait` and `inspect` find it.
///
/// The kernel and its initial RAM disk are found in the disk, as its own boot loader would find them:
/// entries in loader/entries, GRUB's or SYSLINUX's default, the newest kernel in /boot. File systems
/// other than ext2, ext3 and ext4 are not read for that, but may be the root. A disk without a kernel
/// boots with the one that `vdisk kernel` keeps.
///
/// The guest ends when it powers off or resets itself. On a terminal, Ctrl-A p presses its power
/// button, Ctrl-A x ends it at once, and Ctrl-A Ctrl-A types a Ctrl-A; the signal PWR presses the button
/// too. When the command ends, all that the guest wrote is durable. Exit status: 0 when the guest
/// powered off, reset itself or was ended, 1 when it crashed or did not end in time.
#[derive(ClapArgs)]
pub struct Args {
    /// The first disk: /dev/vda in a Linux guest; or an image.
    #[arg(value_name = "DISK|IMAGE")]
    disk: PathBuf,
    /// Another disk: /dev/vdb and so on.
    #[arg(long = "disk", value_name = "MORE")]
    more: Vec<PathBuf>,
    /// The kernel, instead of the disk's own: an x86-64 ELF or bzImage file, or the name of one that
    /// `vdisk kernel` keeps
    #[arg(long, value_name = "K")]
    kernel: Option<PathBuf>,
    /// An initial RAM disk, instead of the kernel's own.
    #[arg(long, value_name = "I")]
    initrd: Option<PathBuf>,
    /// Show which kernel would be booted and how, and boot nothing.
    #[arg(long)]
    show: bool,
    /// Print JSON, with --show.
    #[arg(long, requires = "show")]
    json: bool,
    /// More words for the kernel's command line; they win over those that vdisk and the disk put there.
    #[arg(long, value_name = "ARGS", default_value = "", allow_hyphen_values = true)]
    append: String,
    /// Number of processors, 32 at most.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u8,
    /// Queues of each disk, 32 at most; as many as there are processors by default, but 8 at most
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    queues: Option<u16>,
    /// A network card: none, the host's network in user space (by passt), or a TAP device
    #[arg(long, value_name = "none|user|tap:NAME", default_value = "none")]
    net: network::Wanted,
    /// End the guest after that many seconds: at once, and the command fails
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: Option<u64>,
    /// Memory.
    #[arg(long, value_name = "M", value_parser = size::parse, default_value = "512M")]
    memory: u64,
    /// Open the disks for reading only.
    #[arg(long)]
    read_only: bool,
    /// Put all writes into throw-away deltas.
    #[arg(long, conflicts_with = "read_only")]
    ephemeral: bool,
    /// Boot what snapshot NAME of the first disk holds, with --read-only or --ephemeral
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
    /// The first disk's format, and whether the disks' links are followed.
    #[command(flatten)]
    opening: Opening,
    /// The format of the other disks: once for all, or once for each, in their order
    #[arg(long, value_name = "F", value_parser = opening::parse, requires = "more")]
    disk_format: Vec<Format>,
    #[command(flatten)]
    store: Which,
    #[command(flatten)]
    keeping: Keeping,
    /// Tell a FIFO when the command starts and ends
    #[arg(long, hide = true, value_name = "FILE")]
    marks: Option<PathBuf>,
    /// A command to run in the guest instead of what the disk starts, by a kernel that is kept with its
    /// modules: the guest ends with it, and its exit status is returned
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Runs the guest to its end.
pub fn run(args: &Args) -> Result<u8> {
    if let Some(count) = args.keeping.many()? {
        return many::run(&args.keeping, count);
    }
    let named = start::named(&args.disk, &args.keeping, &args.store)?;
    if args.show {
        return show(args, &named);
    }
    let about = || {
        Ok(About {
            kind: Kind::Machine,
            named: args.disk.clone(),
            command: args.command.iter().map(|w| w.to_string_lossy().into_owned()).collect(),
            stop_signal: start::stop_signal("")?,
            exposed_ports: Vec::new(),
        })
    };
    match start::part(&args.keeping, &named, &args.store, about)? {
        Part::Done(status) => Ok(status),
        Part::Run(As::Turn(instance)) => boot(args, &named, Some(&instance)),
        Part::Run(_) => boot(args, &named, None),
    }
}

/// Runs the guest in this process.
fn boot(args: &Args, named: &Named, instance: Option<&Path>) -> Result<u8> {
    // Before any thread is started, so that the signals reach the one that waits for them.
    let mut signals = stop::hold_endings()?;
    signals.add(Signal::SIGPWR);
    signals.thread_block().map_err(|e| Error::io("cannot hold signals back", e.into()))?;
    let broker = jail::broker(!args.read_only && !args.ephemeral && !named.is_ephemeral())?;
    let (mut disks, chains) = open_disks(args, named)?;
    let status = Arc::new(status::Status::told(Marks::to(args.marks.as_deref())?));
    if !args.command.is_empty() {
        disks.push(status.disk());
    }
    let chosen = choose(args, named, &chains)?;
    let Sources { kernel, initrd } = chosen.sources;
    let guest = Guest::new(Config {
        kernel,
        initrd,
        command_line: chosen.command_line,
        cpus: args.cpus,
        memory: args.memory,
        disks,
        queues: args.queues.unwrap_or_else(|| u16::from(args.cpus).clamp(1, USUAL_QUEUES)),
        network: args.net.plug(&named.disk)?,
        console: streams()?,
    })?;
    let controls = control(args, named, &guest, &chains)?;
    let doors = instance.map(Doors::open).transpose()?;
    enclose(broker, &chains, &controls)?;
    drop(chains);
    heed(signals, guest.handle())?;
    if let Some(seconds) = args.timeout {
        end_after(seconds, guest.handle())?;
    }
    let serve = |bound: Bound| bound.serve();
    let controls = controls.into_iter().flatten().map(serve).collect::<Result<Vec<_>>>()?;
    let switches = OfMachine::of(guest.handle());
    if let Some(doors) = doors {
        switches.serve(doors)?;
    }
    let ended = guest.run();
    let done = ended.as_ref().map(drop).map_err(|e| Error::new(e.kind(), e.to_string()));
    controls.into_iter().for_each(|control| control.end(&done));
    match ended? {
        Ended::PowerOff | Ended::Reset if args.command.is_empty() => Ok(0),
        Ended::PowerOff | Ended::Reset => status.read().ok_or_else(|| {
            Error::new(ErrorKind::Io, "the guest ended without saying how its command had")
        }),
        Ended::Stopped if switches.killed() => Ok(KILLED),
        Ended::Stopped => {
            eprintln!("vdisk: the guest was ended; all it wrote is on its disks");
            Ok(0)
        }
        Ended::TripleFault => {
            Err(Error::new(ErrorKind::Io, "the guest crashed: its processor met a triple fault"))
        }
    }
}

/// Shows what would be booted. The disk is only read.
fn show(args: &Args, named: &Named) -> Result<u8> {
    let using = Use {
        snapshot: args.snapshot.as_deref(),
        format: args.opening.format,
        follow: args.opening.links.follow,
        ..Use::default()
    };
    let chain = disk::open(named.there(), &using)?;
    show::show(&choose(args, named, &[chain])?, args.json)?;
    Ok(0)
}

fn choose(args: &Args, named: &Named, chains: &[Arc<Chain>]) -> Result<Chosen> {
    let wanted = Wanted {
        kernel: args.kernel.as_deref(),
        initrd: args.initrd.as_deref(),
        append: &args.append,
        command: &args.command,
        read_only: args.read_only,
        keep: args.store.dir().ok().map(|dir| keep::below(&dir)),
    };
    let Some(first) = chains.first() else { return Err(Error::invalid("a guest needs a disk")) };
    let device: Arc<dyn BlockDevice> = first.clone();
    wanted.choose(&device, &named.disk)
}

fn streams() -> Result<Streams> {
    let failed = |e| Error::io("cannot use the terminal", e);
    Ok(Streams {
        input: std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?,
        output: std::io::stdout().as_fd().try_clone_to_owned().map_err(failed)?,
    })
}

/// The sockets at which commands reach the disks: those that the guest writes.
fn control(
    args: &Args,
    named: &Named,
    guest: &Guest,
    chains: &[Arc<Chain>],
) -> Result<Vec<Option<Bound>>> {
    let paths = std::iter::once(&named.disk).chain(&args.more);
    let serve = |(number, (path, chain)): (usize, (&PathBuf, &Arc<Chain>))| {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let doing = format!("disk {number} of a guest");
        let kind = Whole::new(doing, "the guest", guest.announce_size(number));
        holding::bind(chain, &path, Arc::new(kind))
    };
    paths.zip(chains).enumerate().map(serve).collect()
}

/// Closes the jail around the guest. No thread runs yet.
fn enclose(
    broker: Option<Broker>,
    chains: &[Arc<Chain>],
    controls: &[Option<Bound>],
) -> Result<()> {
    let mut jail = Around::new(Work::Machine, broker);
    for (chain, control) in chains.iter().zip(controls) {
        jail.disk(chain, control.is_some())?;
    }
    jail.close()
}

fn open_disks(args: &Args, named: &Named) -> Result<(Vec<Disk>, Vec<Arc<Chain>>)> {
    if args.more.len() >= MAX_DISKS {
        return Err(Error::unsupported(format!("a guest can have {MAX_DISKS} disks at most")));
    }
    let using = Use {
        write: !args.read_only,
        ephemeral: args.ephemeral,
        follow: args.opening.links.follow,
        ..Use::default()
    };
    if args.opening.links.follow {
        follow_links();
    }
    let (snapshot, format) = (args.snapshot.as_deref(), args.opening.format);
    let ephemeral = args.ephemeral || (named.is_ephemeral() && !args.read_only);
    let first = (&named.disk, Use { snapshot, format, ephemeral, ..using.clone() });
    let formats = formats_of_more(args)?;
    let more = args.more.iter().zip(formats).map(|(path, format)| {
        let using = Use { format, ..using.clone() };
        (path, using)
    });
    std::iter::once(first)
        .chain(more)
        .map(|(path, using)| {
            let name = path.file_name().unwrap_or(path.as_os_str());
            let chain = disk::open(path, &using)?;
            let device: Arc<dyn BlockDevice> = chain.clone();
            Ok((Disk { device, id: name.to_string_lossy().into_owned() }, chain))
        })
        .collect()
}

/// What the user says of the formats of the disks behind the first.
fn formats_of_more(args: &Args) -> Result<Vec<Option<Format>>> {
    let (disks, said) = (args.more.len(), &args.disk_format);
    match said.as_slice() {
        [] => Ok(vec![None; disks]),
        [all] => Ok(vec![Some(*all); disks]),
        each if each.len() == disks => Ok(each.iter().copied().map(Some).collect()),
        each => Err(Error::invalid(format!(
            "--disk-format stands once, or once for each --disk: it stands {} times for {disks}",
            each.len()
        ))),
    }
}

/// Ends the guest in good order when one of these signals comes; PWR presses its power button.
fn heed(signals: SigSet, handle: Handle) -> Result<()> {
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            while let Ok(signal) = signals.wait() {
                match signal {
                    Signal::SIGPWR => handle.press_power_button(),
                    _ => return handle.kill(),
                }
            }
        })
        .map_err(|e| Error::io("cannot wait for signals", e))?;
    Ok(())
}

/// Ends a guest that has not ended by itself.
fn end_after(seconds: u64, handle: Handle) -> Result<()> {
    std::thread::Builder::new()
        .name("timeout".into())
        .spawn(move || {
            std::thread::sleep(Duration::from_secs(seconds));
            let text = format!("the guest did not end within {seconds} seconds and was ended");
            handle.fail(Error::new(ErrorKind::Io, text));
        })
        .map_err(|e| Error::io("cannot start a clock", e))?;
    Ok(())
}
