//! `vdisk convert`: the contents of a disk of any format as one new file.

use std::path::{Path, PathBuf};

use clap::{Args as ClapArgs, ValueEnum};
use vdisk::addr::Unit;
use vdisk::block::BlockDevice;
use vdisk::chain::Chain;
use vdisk::copy;
use vdisk::copy::{Copying, Target};
use vdisk::image::Label;
use vdisk::jail::{Jail, Reach, Work};
use vdisk::oci::config::raw_of_disk;
use vdisk::open::Format;
use vdisk::qcow2::{Compression, CreateOptions, Extension};
use vdisk::storage::name::directory;
use vdisk::{Error, Result};

use crate::cli::disk::device;
use crate::cli::image::Which;
use crate::cli::open::disk::{self, Use};
use crate::cli::open::jail;
use crate::cli::open::options::{self as opening, Links, Moment, Opening};
use crate::cli::terminal::output::Progress;
use crate::cli::terminal::size;

/// Copy the contents of a disk of any format into one new file, or onto a block device.
///
/// What reads as zeroes takes no space. The new file gets its name when it is whole. A qcow2 copy says of
/// what is run in it what the disk says (`vdisk image config`). A device is written over, once that is
/// agreed to; one that is mounted or used otherwise is refused.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk to copy.
    source: PathBuf,
    /// The file to make, which must not exist, or a block device.
    target: PathBuf,
    /// The new file's format: qcow2 or raw.
    #[arg(long, value_parser = opening::parse, default_value = "qcow2")]
    format: Format,
    /// Format of the source; found out if not given.
    #[arg(long, value_name = "FORMAT", value_parser = opening::parse)]
    source_format: Option<Format>,
    #[command(flatten)]
    links: Links,
    #[command(flatten)]
    moment: Moment,
    /// Compress the data.
    #[arg(long)]
    compress: bool,
    /// How clusters are compressed.
    #[arg(long, value_enum, default_value_t)]
    compression: CompressionArg,
    /// Unit of allocation, 512 to 2M.
    #[arg(long, value_parser = size::parse, default_value = "64K")]
    cluster_size: u64,
    /// 32 subclusters for each cluster.
    #[arg(long)]
    extended_l2: bool,
    /// Copy it although a base has changed under it.
    #[arg(long)]
    accept_base: bool,
    /// Lose what the target device holds without being asked.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    store: Which,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum CompressionArg {
    #[default]
    Zlib,
    Zstd,
}

pub fn run(args: &Args) -> Result<u8> {
    let opening = Opening { format: args.source_format, links: args.links.clone() };
    let config = match args.format {
        Format::Qcow2 => config_of(&args.source, &opening, &args.moment, &args.store)?,
        _ => None,
    };
    let target = target(args, config)?;
    let using = Use { accept_base: args.accept_base, ..opening.reading(&args.moment) };
    let source = disk::open(&args.source, &using)?;
    let device = device::taken(&args.target, args.yes)?;
    enclose(args, &source, device.is_some())?;
    let progress = Progress::new("converting", source.size());
    let progress = |done| progress.at(done);
    let how = Copying { compress: args.compress, bitmaps: &[], progress: &progress };
    match device {
        Some(device) => copy::convert_onto(&*source, &device, &target, &how)?,
        None => copy::convert(&*source, &args.target, &target, &how)?,
    }
    Ok(0)
}

/// Closes the jail around a copy whose source is open: a new file can be made where it is to be.
fn enclose(args: &Args, source: &Chain, device: bool) -> Result<()> {
    let mut jail = Jail::new(Work::Command);
    // It is opened again where another command was at work on the target.
    jail::disk(&mut jail, source, false)?;
    match device {
        true => jail.reach(&args.target, Reach::Write),
        false => jail.reach(directory(&args.target), Reach::Change),
    }
    jail::close(jail)
}

/// What goes with a full copy beside what the disk shows.
pub struct Along {
    /// Its persistent bitmaps.
    pub bitmaps: bool,
    /// What is run in it.
    pub config: Option<Vec<u8>>,
}

/// Copies all that a disk shows into a new disk that stands on nothing.
pub fn flatten(source: &Chain, target: &Path, along: &Along) -> Result<()> {
    let bitmaps = if along.bitmaps { source.head().image.bitmaps()? } else { Vec::new() };
    let extensions = vec![new_label(along.config.clone())?];
    let options = CreateOptions { extensions, ..CreateOptions::new(0) };
    let progress = Progress::new("copying", source.size());
    let progress = |done| progress.at(done);
    let how = Copying { compress: false, bitmaps: &bitmaps, progress: &progress };
    copy::convert(source, target, &Target::Qcow2(Box::new(options)), &how)
}

/// What is run in a disk at a moment: a copy that stands on nothing must say it itself. `None`, and a
/// warning, where it is too long for that.
pub fn config_of(
    disk: &Path,
    opening: &Opening,
    moment: &Moment,
    store: &Which,
) -> Result<Option<Vec<u8>>> {
    if opening.format.is_some_and(|format| format != Format::Qcow2) {
        // What a guest wrote into its disk must not pass for what the disk says of itself.
        return Ok(None);
    }
    // An NBD server, and a device that is no image, say nothing: opening them says what is wrong.
    let Ok((file, _)) = opening.file_at(disk, moment) else { return Ok(None) };
    let raw = raw_of_disk(&file, store.existing()?.as_ref()).unwrap_or_default();
    if raw.as_ref().is_some_and(|raw| raw.len() > Label::MAX_CONFIG) {
        eprintln!(
            "vdisk: warning: what {} says of what is run in it is longer than the {} bytes that a disk \
             of its own has room for: the copy says nothing (`vdisk image config` tells it)",
            disk.display(),
            Label::MAX_CONFIG
        );
        return Ok(None);
    }
    Ok(raw)
}

fn new_label(config: Option<Vec<u8>>) -> Result<Extension> {
    let label = Label { config, ..Label::new() };
    Ok(Extension { magic: Label::MAGIC, data: label.encode()? })
}

fn target(args: &Args, config: Option<Vec<u8>>) -> Result<Target> {
    match args.format {
        Format::Raw => Ok(Target::Raw),
        Format::Qcow2 => {
            let cluster = Unit::from_bytes(args.cluster_size).ok_or_else(|| {
                Error::invalid("Cluster size must be a power of two between 512 and 2048k")
            })?;
            Ok(Target::Qcow2(Box::new(CreateOptions {
                cluster,
                extended_l2: args.extended_l2,
                compression: match args.compression {
                    CompressionArg::Zlib => Compression::Zlib,
                    CompressionArg::Zstd => Compression::Zstd,
                },
                extensions: vec![new_label(config)?],
                ..CreateOptions::new(0)
            })))
        }
        other => Err(Error::unsupported(format!(
            "{other} images are only read here: new files are qcow2 or raw"
        ))),
    }
}
