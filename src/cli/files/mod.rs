//! `vdisk ls`, `cat`, `cp`, `rm` and `apply`: files in a disk without mounting it.

mod apply;
mod changes;
mod copy;
mod into;
mod list;
mod out;
pub mod remove;
mod target;

use std::path::Path;
use std::sync::Arc;

use vdisk::chain::Chain;
use vdisk::filesystem;
use vdisk::filesystem::ext4::mounted::Mounted;
use vdisk::{Error, Result};

use crate::cli::open::disk;
use crate::cli::open::options::{Moment, Opening};

pub use apply::ApplyArgs;
pub use copy::CopyArgs;
pub use list::{CatArgs, ListArgs};
pub use target::{disk_of, is_in_disk};
pub use {
    apply::run as apply, copy::run as copy, list::cat, list::run as list, remove::run as remove,
};

const TYPE: u16 = 0o170_000;
const FIFO: u16 = 0o010_000;
const CHARACTER: u16 = 0o020_000;
const DIRECTORY: u16 = 0o040_000;
const BLOCK: u16 = 0o060_000;
const REGULAR: u16 = 0o100_000;
const LINK: u16 = 0o120_000;
const SOCKET: u16 = 0o140_000;
/// Bytes that are read and written at a time.
const PIECE: usize = 1 << 20;

/// Which of a disk's file systems.
#[derive(clap::Args, Clone, Default)]
pub struct Which {
    #[command(flatten)]
    pub opening: Opening,
    #[command(flatten)]
    pub moment: Moment,
    /// The files in partition N of the disk
    #[arg(long, value_name = "N")]
    pub partition: Option<u32>,
}

impl Which {
    /// Opens the file system in a disk.
    fn open(&self, disk: &Path, write: bool) -> Result<Mounted> {
        let chain = self.disk(disk, write)?;
        self.files(chain, disk, write)
    }

    /// Opens a disk.
    fn disk(&self, disk: &Path, write: bool) -> Result<Arc<Chain>> {
        if write && self.moment.name().is_some() {
            return Err(Error::invalid("a snapshot is only read"));
        }
        let using = if write { self.opening.writing() } else { self.opening.reading(&self.moment) };
        disk::open(disk, &using)
    }

    /// Opens the file system in `chain`, which is the disk at `disk`.
    fn files(&self, chain: Arc<Chain>, disk: &Path, write: bool) -> Result<Mounted> {
        filesystem::open(chain, self.partition, !write).map_err(|e| e.at_path(disk))
    }
}
