//! `vdisk create`: a new, empty disk.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use clap::{Args as ClapArgs, ValueEnum};
use vdisk::addr::Unit;
use vdisk::image::Label;
use vdisk::luks;
use vdisk::open::{self, resolve};
use vdisk::qcow2::{Compression, CreateOptions, Encryption, Extension, Method, Preallocation};
use vdisk::storage::device::is_device;
use vdisk::{Error, Result};

use crate::cli::disk::device;
use crate::cli::open::passphrase;
use crate::cli::open::rest::Rest;
use crate::cli::terminal::size;

/// What a guest reads and writes at least.
const SECTOR: u64 = 512;

/// Make a new, empty disk.
///
/// On a block device it stands over what that held, once that is agreed to; a device that is mounted
/// or used otherwise is refused.
#[derive(ClapArgs)]
pub struct Args {
    /// The file to make, which must not exist, or a block device.
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
    /// Keep the data in this new file, named relative to the disk's directory.
    #[arg(long, value_name = "NAME")]
    data_file: Option<PathBuf>,
    /// Keep the data file readable as a raw disk, without the tables.
    #[arg(long, requires = "data_file")]
    data_file_raw: bool,
    /// Encrypt the data (LUKS) under the passphrase in --passphrase-file.
    #[arg(long)]
    encrypt: bool,
    /// How long one try of the passphrase is to take, in milliseconds.
    #[arg(long, value_name = "MS", requires = "encrypt", default_value_t = 2000)]
    iter_time: u32,
    /// How clusters are compressed when they are.
    #[arg(long, value_enum, default_value_t)]
    compression: CompressionArg,
    /// Lose what the device holds without being asked.
    #[arg(long)]
    yes: bool,
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
    if args.format == FormatArg::Raw && (args.data_file.is_some() || args.encrypt) {
        return Err(Error::invalid("a raw disk has no data file and is not encrypted"));
    }
    if args.format == FormatArg::Raw {
        enclose(args)?;
        match device::taken(&args.file, args.yes)? {
            Some(device) => open::create_raw_on(&device, size, preallocation)?,
            None => open::create_raw(&args.file, size, preallocation)?,
        }
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
        encryption: encryption(args)?,
        extensions: vec![label],
        ..CreateOptions::new(size)
    };
    enclose(args)?;
    if let Some(name) = &args.data_file {
        open::create_with_data(&args.file, name, args.data_file_raw, options)?;
        let inside = |part| matches!(part, Component::Normal(_) | Component::CurDir);
        if !Path::new(name).components().all(inside) {
            eprintln!(
                "vdisk: warning: {}: its data may stand outside its directory: it is opened with \
                 --follow, or --format qcow2",
                args.file.display()
            );
        }
        return Ok(0);
    }
    match device::taken(&args.file, args.yes)? {
        Some(device) => open::create_on(&device, &options)?,
        None => open::create(&args.file, &options)?,
    }
    Ok(0)
}

/// Closes the jail around a disk that is made; what is read for it has been.
fn enclose(args: &Args) -> Result<()> {
    let data = args.data_file.as_deref().and_then(Path::to_str);
    let data = data.and_then(|name| resolve(&args.file, name).ok());
    let rest = match is_device(&args.file) {
        true => Rest::new().disk(&args.file),
        false => Rest::new().made(&args.file),
    };
    data.iter().fold(rest, |rest, data| rest.made(data)).close()
}

fn encryption(args: &Args) -> Result<Option<Encryption>> {
    if !args.encrypt {
        return Ok(None);
    }
    let passphrase =
        passphrase::given()?.ok_or_else(|| Error::invalid("--encrypt needs --passphrase-file"))?;
    let iter_time = Duration::from_millis(args.iter_time.into());
    let options = luks::Options { iter_time, ..luks::Options::default() };
    Ok(Some(Encryption { passphrase, method: Method::Luks(options) }))
}
