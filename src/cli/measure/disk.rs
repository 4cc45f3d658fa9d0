//! The disk that is measured, and its clones: opened, made and read by a process of its own, inside a jail. Who runs
//! programs in them asks it.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;
use serde::{Deserialize, Serialize};
use vdisk::block::BlockDevice;
use vdisk::change::snapshot::data_bytes;
use vdisk::image::{Backing, Mapping};
use vdisk::open::{self, OpenOptions, open_image};
use vdisk::qcow2::CreateOptions;
use vdisk::{Error, Result};

use crate::cli::image::Which;
use crate::cli::inside::{self, answer};
use crate::cli::instance::named::Named;
use crate::cli::open::disk::{self, Use};
use crate::cli::open::options::{Moment, Opening};
use crate::cli::open::rest::Rest;

/// The verb of that process.
pub const VERB: &str = "measure-disk";

/// What that process is told.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk, or an image.
    disk: PathBuf,
    /// The directory for its clones.
    #[arg(long)]
    scratch: PathBuf,
    #[command(flatten)]
    moment: Moment,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    store: Which,
}

/// What it is asked.
#[derive(Debug, Serialize, Deserialize)]
pub enum Question {
    /// What is run in the disk.
    Command,
    /// A new clone of this name.
    Clone(String),
    /// What the clone of this name holds and shows.
    Used(String),
}

/// What a clone holds and shows, in bytes.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Used {
    /// What it holds.
    pub written: u64,
    /// What it shows of the layers below.
    pub shared: u64,
}

/// What clones are made of.
struct Base {
    /// The disk, without symbolic links, and its format's name.
    path: PathBuf,
    format: String,
    options: CreateOptions,
}

/// Is the process.
pub fn run(args: &Args) -> Result<u8> {
    let prepare = || {
        let named = Named::find(&args.disk, &args.store, None)?;
        let (file, options) = args.opening.file_at(named.there(), &args.moment)?;
        let rest = Rest::new().looked_at(&file).made(&args.scratch.join("clone"));
        let rest = match args.store.existing()? {
            Some(store) => rest.read(store.dir()),
            None => rest,
        };
        Ok((rest, (named, file, options)))
    };
    inside::serve(prepare, |(named, file, options), question| match question {
        Question::Command => answer(command(&named.config(&args.opening)?)),
        Question::Clone(name) => answer(Base::of(file, options)?.clone(&args.in_scratch(&name)?)?),
        Question::Used(name) => answer(used(&args.in_scratch(&name)?)?),
    })
}

/// What a configuration says is run.
fn command(config: &vdisk::oci::config::RunConfig) -> Vec<String> {
    config.entrypoint.iter().chain(&config.cmd).cloned().collect()
}

impl Args {
    fn in_scratch(&self, name: &str) -> Result<PathBuf> {
        let is_name = Path::new(name).file_name() == Some(name.as_ref());
        if is_name { Ok(self.scratch.join(name)) } else { Err(Error::invalid("is no name")) }
    }
}

impl Base {
    /// Of the layer at `path`.
    fn of(path: &Path, options: &OpenOptions) -> Result<Base> {
        let path =
            fs::canonicalize(path).map_err(|e| Error::io("could not be found", e).at_path(path))?;
        let layer = open_image(&path, options)?;
        if layer.image.encrypted() {
            let text = "is encrypted: what its clone writes to a temporary directory would not be";
            return Err(Error::unsupported(text).at_path(&path));
        }
        let cluster = layer.image.cluster();
        let usual = CreateOptions::new(layer.image.size());
        let cluster = if (9..=21).contains(&cluster.bits()) { cluster } else { usual.cluster };
        let options = CreateOptions { cluster, ..usual };
        let format = layer.format.name().to_owned();
        Ok(Base { path, format, options })
    }

    /// Makes a clone.
    fn clone(&self, path: &Path) -> Result<()> {
        let name = self.path.to_str().ok_or_else(|| {
            Error::invalid("has a name that no image can record").at_path(&self.path)
        })?;
        let backing = Backing { name: name.to_owned(), format: Some(self.format.clone()) };
        let options = CreateOptions { backing: Some(backing), ..self.options.clone() };
        open::create(path, &options).map(drop)
    }
}

/// The bytes that a clone holds, and those of the layers below that it shows.
fn used(clone: &Path) -> Result<Used> {
    let chain = disk::open(clone, &Use { follow: true, ..Use::reading() })?;
    let written = data_bytes(&*chain.head().image)?;
    let (mut at, mut shared) = (0, 0);
    while at < chain.size() {
        let extent = chain.map(at, chain.size() - at, true)?;
        if extent.depth > 0
            && matches!(extent.mapping, Mapping::Data { .. } | Mapping::Compressed { .. })
        {
            shared += extent.len;
        }
        at += extent.len;
    }
    Ok(Used { written, shared })
}
