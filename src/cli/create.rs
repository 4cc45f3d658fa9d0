//! `vdisk create`: a new, empty disk.

use std::path::PathBuf;

use clap::{Args as ClapArgs, ValueEnum};
use vdisk::addr::Unit;
use vdisk::chain;
use vdisk::image::Label;
use vdisk::qcow2::{Compression, CreateOptions, Extension, Preallocation};
use vdisk::{Error, Result};

use super::size;

/// What a guest reads and writes at least.
const SECTOR: u64 = 512;

/// Make a new, empty disk.
#[derive(ClapArgs)]
pub struct Args {
    /// The file to make; it must not exist.
    file: PathBuf,
    /// The size that the guest sees, such as 20G.
    #[arg(value_parser = size::parse)]
    size: u64,
    /// Unit of allocation, 512 to 2M.
    #[arg(long, value_parser = size::parse, default_value = "64K")]
    cluster_size: u64,
    /// 32 subclusters for each cluster: small writes to a clone copy less.
    #[arg(long)]
    extended_l2: bool,
    /// Width of a reference count, 1 to 64.
    #[arg(long, value_name = "N", default_value_t = 16)]
    refcount_bits: u32,
    /// What to allocate at once.
    #[arg(long, value_enum, default_value_t)]
    preallocation: PreallocationArg,
    /// The file's format.
    #[arg(long, value_enum, default_value_t)]
    format: FormatArg,
    /// How clusters are compressed when they are.
    #[arg(long, value_enum, default_value_t)]
    compression: CompressionArg,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum FormatArg {
    #[default]
    Qcow2,
    Raw,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum CompressionArg {
    #[default]
    Zlib,
    Zstd,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum PreallocationArg {
    /// Nothing.
    #[default]
    Off,
    /// The tables.
    Metadata,
    /// The tables, and room for the data.
    Falloc,
    /// The tables, and the data as zeroes.
    Full,
}

impl From<PreallocationArg> for Preallocation {
    fn from(arg: PreallocationArg) -> Preallocation {
        match arg {
            PreallocationArg::Off => Preallocation::Off,
            PreallocationArg::Metadata => Preallocation::Metadata,
            PreallocationArg::Falloc => Preallocation::Falloc,
            PreallocationArg::Full => Preallocation::Full,
        }
    }
}

pub fn run(args: &Args) -> Result<u8> {
    // Whole sectors, as qemu-img makes them.
    let size = args
        .size
        .checked_next_multiple_of(SECTOR)
        .ok_or_else(|| Error::invalid("the size is too large").at_path(&args.file))?;
    let preallocation = args.preallocation.into();
    if args.format == FormatArg::Raw {
        chain::create_raw(&args.file, size, preallocation)?;
        return Ok(0);
    }
    let cluster = Unit::from_bytes(args.cluster_size).ok_or_else(|| {
        Error::invalid("Cluster size must be a power of two between 512 and 2048k")
    })?;
    let label = Extension { magic: Label::MAGIC, data: Label::new().encode()? };
    let options = CreateOptions {
        cluster,
        refcount_bits: args.refcount_bits,
        extended_l2: args.extended_l2,
        compression: match args.compression {
            CompressionArg::Zlib => Compression::Zlib,
            CompressionArg::Zstd => Compression::Zstd,
        },
        preallocation,
        extensions: vec![label],
        ..CreateOptions::new(size)
    };
    chain::create(&args.file, &options)?;
    Ok(0)
}
