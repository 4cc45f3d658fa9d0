//! `vdisk convert`: the contents of a disk of any format as one new file.

use std::path::{Path, PathBuf};

use clap::{Args as ClapArgs, ValueEnum};
use vdisk::addr::Unit;
use vdisk::block::BlockDevice;
use vdisk::chain::{self, Copying, Format, Target};
use vdisk::image::Label;
use vdisk::qcow2::{Compression, CreateOptions, Extension};
use vdisk::{Error, Result};

use super::disk::{self, Use};
use super::output::Progress;
use super::size;

/// Copy the contents of a disk of any format into one new file.
///
/// What reads as zeroes takes no space. The new file gets its name when it is whole.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk to copy.
    source: PathBuf,
    /// The file to make; it must not exist.
    target: PathBuf,
    /// The new file's format: qcow2 or raw.
    #[arg(long, value_parser = format, default_value = "qcow2")]
    format: Format,
    /// Format of the source; found out if not given.
    #[arg(long, value_name = "FORMAT", value_parser = format)]
    source_format: Option<Format>,
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
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum CompressionArg {
    #[default]
    Zlib,
    Zstd,
}

/// Parses the name of a format.
pub fn format(name: &str) -> std::result::Result<Format, String> {
    Format::from_name(name).map_err(|e| e.message().to_owned())
}

pub fn run(args: &Args) -> Result<u8> {
    let target = target(args)?;
    let (format, accept_base) = (args.source_format, args.accept_base);
    let source = disk::open(&args.source, &Use { format, accept_base, ..Use::reading() })?;
    let progress = Progress::new("converting", source.size());
    let how = Copying { compress: args.compress, progress: &|done| progress.at(done) };
    chain::convert(&*source, &args.target, &target, &how)?;
    Ok(0)
}

/// Copies all that a disk shows into a new disk that stands on nothing.
pub fn flatten(source: &Path, target: &Path) -> Result<()> {
    let source = disk::open(source, &Use::reading())?;
    let options = CreateOptions { extensions: vec![new_label()?], ..CreateOptions::new(0) };
    let progress = Progress::new("copying", source.size());
    let how = Copying { compress: false, progress: &|done| progress.at(done) };
    chain::convert(&*source, target, &Target::Qcow2(Box::new(options)), &how)
}

fn new_label() -> Result<Extension> {
    Ok(Extension { magic: Label::MAGIC, data: Label::new().encode()? })
}

fn target(args: &Args) -> Result<Target> {
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
                extensions: vec![new_label()?],
                ..CreateOptions::new(0)
            })))
        }
        other => Err(Error::unsupported(format!(
            "{other} images are only read here: new files are qcow2 or raw"
        ))),
    }
}
