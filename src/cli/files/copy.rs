//! `vdisk cp`: files into a disk and out of it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use vdisk::jail::Work;
use vdisk::storage::name::directory;
use vdisk::{Error, Result};

use super::target::{Target, parse};
use super::{Which, into, out};
use crate::cli::open::rest::Rest;

/// Copy files into a disk, or out of one: one side is DISK:PATH
#[derive(clap::Args)]
pub struct CopyArgs {
    /// What to copy
    #[arg(value_name = "SOURCE", required = true)]
    sources: Vec<OsString>,
    /// Where to: a directory that is there, or the copy's name
    #[arg(value_name = "TARGET")]
    target: OsString,
    #[command(flatten)]
    pub how: How,
    #[command(flatten)]
    which: Which,
}

/// How to copy.
#[derive(clap::Args, Clone, Copy)]
pub struct How {
    /// Copy directories and what is in them
    #[arg(long, short, short_alias = 'R')]
    pub recursive: bool,
    /// Keep owners, times, extended attributes, links and devices too; implies --recursive
    #[arg(long, short)]
    pub archive: bool,
}

impl How {
    /// Whether directories are copied.
    pub fn deep(self) -> bool {
        self.recursive || self.archive
    }
}

/// Runs the command.
pub fn run(args: &CopyArgs) -> Result<u8> {
    let several = args.sources.len() > 1;
    let sources: Vec<Target> = args.sources.iter().map(|word| parse(word)).collect();
    match parse(&args.target) {
        Target::Disk { disk, path } => {
            let sources: Vec<PathBuf> = sources.into_iter().map(host).collect::<Result<_>>()?;
            let rest = Rest::new().disk(&disk);
            sources.iter().fold(rest, |rest, source| rest.read(source)).close()?;
            let fs = args.which.open(&disk, true)?;
            let done = into::copy(&fs, &sources, &path, args.how, several);
            // What was copied before something failed is there.
            let closed = fs.close();
            done.and(closed).map_err(|e| e.at_path(&disk))?;
        }
        Target::Host(target) => {
            enclose(&sources, &target)?;
            for source in sources {
                let Target::Disk { disk, path } = source else {
                    let text = "one side has to be in a disk that is there: DISK:PATH";
                    return Err(Error::invalid(text));
                };
                let fs = args.which.open(&disk, false)?;
                out::copy(&fs, &path, &target, args.how, several).map_err(|e| e.at_path(&disk))?;
            }
        }
    }
    Ok(0)
}

/// Closes the jail around a copy out of disks.
fn enclose(sources: &[Target], target: &Path) -> Result<()> {
    let disks = sources.iter().filter_map(|source| match source {
        Target::Disk { disk, .. } => Some(disk),
        Target::Host(_) => None,
    });
    let rest = disks.fold(Rest::of(Work::Trees), |rest, disk| rest.disk(disk));
    rest.tree(if target.is_dir() { target } else { directory(target) }).close()
}

fn host(source: Target) -> Result<PathBuf> {
    match source {
        Target::Host(path) => Ok(path),
        Target::Disk { disk, .. } => {
            let text = "only one side can be in a disk: copy out, and then in";
            Err(Error::invalid(text).at_path(disk))
        }
    }
}
