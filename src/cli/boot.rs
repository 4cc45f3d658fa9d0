//! `vdisk boot`: a disk as a KVM microVM, its serial console on the terminal.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args as ClapArgs;
use nix::sys::signal::SigSet;
use vdisk::block::BlockDevice;
use vdisk::chain::Chain;
use vdisk::control::Server;
use vdisk::vm::{Config, Control, Disk, Ended, Guest, MAX_DISKS, Streams};
use vdisk::{Error, ErrorKind, Result};

use super::disk::{self, Use};
use super::holding::{self, Whole};
use super::{size, stop};

/// What every guest's kernel is told, before the disks and `--append`: later words win.
const COMMAND_LINE: &str = "console=ttyS0 reboot=k panic=-1";

/// Boot a disk as a KVM microVM with its serial console on the terminal.
///
/// The guest ends when it powers off or resets itself. On a terminal, Ctrl-A x ends it at
/// once, and Ctrl-A Ctrl-A types a Ctrl-A. When the command ends, all that the guest wrote is
/// durable. Exit status: 0 when the guest powered off, reset itself or was ended, 1 when it crashed.
#[derive(ClapArgs)]
pub struct Args {
    /// The first disk: /dev/vda in a Linux guest.
    disk: PathBuf,
    /// Another disk: /dev/vdb and so on.
    #[arg(long = "disk", value_name = "MORE")]
    more: Vec<PathBuf>,
    /// The kernel: an x86-64 ELF or bzImage file.
    #[arg(long, value_name = "K")]
    kernel: Option<PathBuf>,
    /// An initial RAM disk.
    #[arg(long, value_name = "I")]
    initrd: Option<PathBuf>,
    /// More words for the kernel's command line; they win over those that vdisk puts there.
    #[arg(long, value_name = "ARGS", default_value = "", allow_hyphen_values = true)]
    append: String,
    /// Number of processors.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u8,
    /// Memory.
    #[arg(long, value_name = "M", value_parser = size::parse, default_value = "512M")]
    memory: u64,
    /// Open the disks for reading only.
    #[arg(long)]
    read_only: bool,
    /// Put all writes into throw-away deltas.
    #[arg(long, conflicts_with = "read_only")]
    ephemeral: bool,
}

/// Runs the guest to its end.
pub fn run(args: &Args) -> Result<u8> {
    let Some(kernel) = args.kernel.clone() else {
        return Err(Error::unsupported(
            "no kernel to boot: pass one with --kernel (and the matching --initrd), for example \
             the /boot/vmlinuz of the system in the disk",
        ));
    };
    // Before any thread is started, so that the signals reach the one that waits for them.
    let signals = stop::hold_endings()?;
    let (disks, chains) = open_disks(args)?;
    let guest = Guest::new(Config {
        kernel,
        initrd: args.initrd.clone(),
        command_line: command_line(args),
        cpus: args.cpus,
        memory: args.memory,
        disks,
        console: streams()?,
    })?;
    end_on(signals, guest.control())?;
    let controls = control(args, &guest, chains)?;
    let ended = guest.run();
    let done = ended.as_ref().map(drop).map_err(|e| Error::new(e.kind(), e.to_string()));
    controls.into_iter().for_each(|control| control.end(&done));
    match ended? {
        Ended::PowerOff | Ended::Reset => Ok(0),
        Ended::Stopped => {
            eprintln!("vdisk: the guest was ended; all it wrote is on its disks");
            Ok(0)
        }
        Ended::TripleFault => {
            Err(Error::new(ErrorKind::Io, "the guest crashed: its processor met a triple fault"))
        }
    }
}

fn command_line(args: &Args) -> String {
    let access = if args.read_only { "ro" } else { "rw" };
    format!("{COMMAND_LINE} root=/dev/vda {access} {}", args.append)
}

fn streams() -> Result<Streams> {
    let failed = |e| Error::io("cannot use the terminal", e);
    Ok(Streams {
        input: std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?,
        output: std::io::stdout().as_fd().try_clone_to_owned().map_err(failed)?,
    })
}

/// Lets commands reach the disks that the guest writes.
fn control(args: &Args, guest: &Guest, chains: Vec<Arc<Chain>>) -> Result<Vec<Server>> {
    let paths = std::iter::once(&args.disk).chain(&args.more);
    let serve = |(number, (path, chain)): (usize, (&PathBuf, &Arc<Chain>))| {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let doing = format!("disk {number} of a guest");
        let kind = Whole::new(doing, "the guest", guest.announce_size(number));
        holding::serve(chain, &path, Arc::new(kind)).transpose()
    };
    paths.zip(&chains).enumerate().filter_map(serve).collect()
}

fn open_disks(args: &Args) -> Result<(Vec<Disk>, Vec<Arc<Chain>>)> {
    if args.more.len() >= MAX_DISKS {
        return Err(Error::unsupported(format!("a guest can have {MAX_DISKS} disks at most")));
    }
    let using = Use { write: !args.read_only, ephemeral: args.ephemeral, ..Use::default() };
    std::iter::once(&args.disk)
        .chain(&args.more)
        .map(|path| {
            let name = path.file_name().unwrap_or(path.as_os_str());
            let chain = disk::open(path, &using)?;
            let device: Arc<dyn BlockDevice> = chain.clone();
            Ok((Disk { device, id: name.to_string_lossy().into_owned() }, chain))
        })
        .collect()
}

/// Ends the guest in good order when one of these signals comes.
fn end_on(signals: SigSet, control: Arc<Control>) -> Result<()> {
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if signals.wait().is_ok() {
                control.end(Ok(Ended::Stopped));
            }
        })
        .map_err(|e| Error::io("cannot wait for signals", e))?;
    Ok(())
}
