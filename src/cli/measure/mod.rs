//! `vdisk measure`: the same disk as a container and as a virtual machine, side by side.

pub mod disk;
pub mod marks;
mod report;
mod scratch;
mod used;
mod world;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args as ClapArgs;
use vdisk::{Error, ErrorKind, Result};

use crate::cli::image::Which;
use crate::cli::open::options::{Moment, Opening};
use crate::cli::open::turn;
use crate::cli::terminal::{size, stop};
use scratch::Scratch;
use world::{Kind, Measured, Setting};

/// Run a disk as a container and as a virtual machine, in turn, and compare what that takes
///
/// Both run the same command, the one that the disk's or the image's configuration says where none is given,
/// each in a throw-away clone: the disk stays as it is. The virtual machine runs it by a kernel that `vdisk
/// kernel add --modules` keeps. A world that cannot run here, or not in time, is said, and why.
///
/// Told for each: the time until the command starts, until it ends, and until the disk is free again; the
/// processor time of it all; the memory that the world takes beyond what the command's own processes take;
/// the bytes that it wrote to its clone, and those of the disk that it shares. What the command prints is not
/// shown.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk, or an image.
    #[arg(value_name = "DISK|IMAGE")]
    disk: PathBuf,
    /// Seconds that each world has.
    #[arg(long, value_name = "S", default_value = "60", value_parser = turn::seconds)]
    timeout: Duration,
    /// Processors of each world; without, one of the virtual machine, and no limit of the container.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=32))]
    cpus: Option<u8>,
    /// Memory of each world; without, 512M of the virtual machine, and no limit of the container.
    #[arg(long, value_name = "M", value_parser = size::parse)]
    memory: Option<u64>,
    /// The kernel of the virtual machine: one that `vdisk kernel` keeps.
    #[arg(long, value_name = "K")]
    kernel: Option<PathBuf>,
    #[command(flatten)]
    moment: Moment,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    store: Which,
    /// Print JSON: times in seconds, sizes in bytes.
    #[arg(long)]
    json: bool,
    /// What both run.
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub fn run(args: &Args) -> Result<u8> {
    let scratch = Scratch::new(args)?;
    let setting = Setting {
        command: command(args, &scratch)?,
        timeout: args.timeout,
        cpus: args.cpus,
        memory: args.memory,
        kernel: args.kernel.clone(),
        store: args.store.dir().ok(),
    };
    let asked = stop::on_signals()?;
    let one = |kind: Kind| -> Result<Measured> {
        if asked.asked() {
            return Err(Error::new(ErrorKind::Interrupted, "interrupted: nothing is left of it"));
        }
        setting.measure(kind, &scratch, &|| asked.asked())
    };
    let container = one(Kind::Container)?;
    let machine = one(Kind::Machine)?;
    drop(scratch);
    let compared = report::Compared::new(&args.disk, &setting.command, container, machine);
    compared.show(args.json)?;
    // A world in which the command failed has run it all the same.
    Ok(u8::from(!compared.any()))
}

/// What both run: they have no other way to be told than by its words.
fn command(args: &Args, scratch: &Scratch) -> Result<Vec<OsString>> {
    // A disk that cannot be read is said before anything is run.
    let said: Vec<OsString> = scratch.command()?.into_iter().map(OsString::from).collect();
    Ok(match (args.command.is_empty(), said.is_empty()) {
        (false, _) => args.command.clone(),
        (true, false) => said,
        (true, true) => vec!["/bin/true".into()],
    })
}
