//! An overlay between its opening and its mount: disks are opened outside the jail, and what layers hold is read
//! within.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vdisk::chain::Chain;
use vdisk::filesystem;
use vdisk::jail::{Jail, Reach, Work};
use vdisk::mount::layer::DiskLayer;
use vdisk::{Error, Result};
use vdisk_fuse::host::HostLayer;
use vdisk_fuse::layer::Layer;
use vdisk_fuse::overlay::{Layers, Overlay};

use super::Wanted;
use crate::cli::open::jail;

/// An overlay whose disks are open, and nothing of its layers is read.
pub struct Ready {
    wanted: Wanted,
    below: Vec<Below>,
}

/// A lower layer.
enum Below {
    Directory(PathBuf),
    /// The files in a disk.
    Disk(PathBuf, Arc<Chain>),
}

impl Ready {
    /// Opens its disks.
    pub fn open(wanted: Wanted) -> Result<Ready> {
        let below = wanted.lowers.iter().map(|lower| match lower.is_dir() {
            true => Ok(Below::Directory(lower.clone())),
            false => Ok(Below::Disk(lower.clone(), wanted.of_disk.disk(lower)?)),
        });
        let below = below.collect::<Result<_>>()?;
        Ok(Ready { wanted, below })
    }

    /// A jail in which it reads its lower layers, and has all of its upper one.
    pub fn jail(&self) -> Result<Jail> {
        let mut jail = Jail::new(Work::Overlay);
        for below in &self.below {
            match below {
                Below::Directory(lower) => jail.reach(lower, Reach::Lend),
                Below::Disk(_, disk) => jail::disk(&mut jail, disk, false)?,
            }
        }
        for own in self.wanted.upper.iter().chain(&self.wanted.work) {
            jail.reach(own, Reach::Tree);
            jail.reach(own, Reach::Lend);
        }
        for device in ["/dev/fuse", "/dev/null"] {
            jail.reach(Path::new(device), Reach::Write);
        }
        // In which groups who makes a request is.
        jail.reach(Path::new("/proc"), Reach::Read);
        Ok(jail)
    }

    /// Lays it: what its layers hold is read.
    pub fn lay(&self) -> Result<Arc<Overlay>> {
        let Ready { wanted, below } = self;
        // No device of the host's has such a number.
        let lowers = (1 << 63..).zip(below).map(|(number, below)| below.layer(wanted, number));
        let lowers = lowers.collect::<Result<Vec<_>>>()?;
        let user_xattrs = wanted.has("userxattr").then_some(true);
        let layers =
            Layers { lowers, upper: wanted.upper.clone().zip(wanted.work.clone()), user_xattrs };
        // Half of what may be open is for files.
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let half = usize::try_from(limit.unwrap_or(u64::MAX) / 2).unwrap_or(usize::MAX);
        let descriptors = half.min(8192);
        let overlay = Overlay::new(layers, descriptors).map_err(|e| {
            let upper = wanted.upper.as_deref().unwrap_or(Path::new("."));
            Error::io("cannot lay this overlay", e).at_path(upper)
        })?;
        if wanted.has("volatile") || wanted.has("nofsync") {
            overlay.set_volatile();
        }
        Ok(Arc::new(overlay))
    }
}

impl Below {
    /// Its files, for reading. `device` tells those of a disk from other layers'.
    fn layer(&self, wanted: &Wanted, device: u64) -> Result<Arc<dyn Layer>> {
        match self {
            Below::Directory(lower) => {
                let layer = HostLayer::open(lower)
                    .map_err(|e| Error::io("cannot use this lower directory", e).at_path(lower))?;
                Ok(Arc::new(layer))
            }
            Below::Disk(path, disk) => {
                let fs = filesystem::open(disk.clone(), wanted.of_disk.partition, true);
                let fs = fs.map_err(|e| e.at_path(path))?;
                Ok(Arc::new(DiskLayer::new(Arc::new(fs), device)))
            }
        }
    }
}
