//! `vdisk kernel`: kernels for disks without one.

use std::path::{Path, PathBuf};

use clap::{Args as ClapArgs, Subcommand};
use serde_json::json;
use vdisk::Result;
use vdisk::kernel::kept::{Keep, Kept, New, PROGRAMS};
use vdisk::oci::store::Store;

use crate::cli::open::rest::Rest;
use crate::cli::terminal::output;

/// Keep kernels for disks that have none, such as images of containers
///
/// `vdisk boot` takes the kernel that is kept where a disk has none; where several are, --kernel says
/// which.
#[derive(ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

/// Where kernels are kept.
#[derive(ClapArgs, Clone)]
pub struct Which {
    /// The directory of the store, below which kernels are kept; also from VDISK_STORE.
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
}

impl Which {
    /// The kernels there.
    pub fn keep(&self) -> Result<Keep> {
        let store = self.store.clone().map_or_else(Store::default_dir, Ok)?;
        Ok(below(&store))
    }
}

/// The kernels of the store in this directory.
pub fn below(store: &Path) -> Keep {
    Keep::at(store.join("kernels"))
}

#[derive(Subcommand)]
enum Verb {
    /// Keep a copy of a kernel.
    Add {
        /// What it is to be called.
        name: String,
        /// The kernel: an x86-64 ELF or bzImage file.
        kernel: PathBuf,
        /// Its initial RAM disk.
        #[arg(long, value_name = "I")]
        initrd: Option<PathBuf>,
        /// Its modules, such as /lib/modules/VERSION: an initial RAM disk is made that loads those which
        /// a guest's root needs. This host must have a static busybox (Debian: busybox-static)
        #[arg(long, value_name = "DIR", conflicts_with = "initrd")]
        modules: Option<PathBuf>,
        #[command(flatten)]
        which: Which,
    },
    /// List the kernels that are kept.
    List {
        #[command(flatten)]
        which: Which,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Remove a kernel.
    Rm {
        /// What it is called.
        name: String,
        #[command(flatten)]
        which: Which,
    },
}

/// Runs the verb.
pub fn run(args: &Args) -> Result<u8> {
    match &args.verb {
        Verb::Add { name, kernel, initrd, modules, which } => {
            let (initrd, modules) = (initrd.as_deref(), modules.as_deref());
            let read = [Some(kernel.as_path()), initrd, modules];
            enclose(which, &read.into_iter().flatten().collect::<Vec<_>>())?;
            which.keep()?.add(&New { name, kernel, initrd, modules })?;
        }
        Verb::List { which, json } => {
            let keep = which.keep()?;
            Rest::new().read(keep.place()).close()?;
            list(&keep.list()?, *json)?;
        }
        Verb::Rm { name, which } => {
            enclose(which, &[])?;
            which.keep()?.remove(name)?;
        }
    }
    Ok(0)
}

/// Closes the jail around what is kept: it reads these, and changes the place where kernels are.
fn enclose(which: &Which, read: &[&Path]) -> Result<()> {
    let keep = which.keep()?;
    keep.make()?;
    let rest = Rest::new().made(&keep.place().join("kernel"));
    let programs = PROGRAMS.map(Path::new);
    read.iter().chain(&programs).fold(rest, |rest, path| rest.read(path)).close()
}

fn list(kept: &[Kept], json: bool) -> Result<()> {
    if json {
        let row = |kept: &Kept| {
            json!({
                "name": kept.name,
                "kernel": output::path(&kept.kernel),
                "initrd": kept.initrd.as_ref().map(output::path),
                "size": kept.size,
            })
        };
        return output::json(&json!({ "kernels": kept.iter().map(row).collect::<Vec<_>>() }));
    }
    let line = |kept: &Kept| {
        let initrd = if kept.initrd.is_some() { "with an initrd" } else { "without an initrd" };
        format!("{}\t{}\t{initrd}\n", kept.name, kept.size)
    };
    output::text(&kept.iter().map(line).collect::<String>())
}
