//! An overlay between its opening and its mount: disks and directories are opened outside the jail, and what they
//! hold is read within.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vdisk::chain::Chain;
use vdisk::filesystem;
use vdisk::jail::{Jail, Reach, Work};
use vdisk::mount::layer::DiskLayer;
use vdisk::mount::table;
use vdisk::{Error, Result};
use vdisk_fuse::host::HostLayer;
use vdisk_fuse::layer::Layer;
use vdisk_fuse::overlay::{Layers, Lending, Overlay, UpperDirs};

use super::Wanted;
use crate::cli::open::jail;

/// An overlay whose disks and directories are open, and nothing of its layers is read.
pub struct Ready {
    wanted: Wanted,
    below: Vec<Below>,
    upper: Option<UpperDirs>,
}

/// A lower layer.
enum Below {
    Directory {
        path: PathBuf,
        layer: Arc<HostLayer>,
        plain: bool,
    },
    /// The files in a disk.
    Disk(PathBuf, Arc<Chain>),
}

impl Ready {
    /// Opens its disks and directories.
    pub fn open(wanted: Wanted) -> Result<Ready> {
        // Of the others what is mounted in them is shown, too.
        let plain = table::without_mounts(&wanted.lowers);
        let below = wanted.lowers.iter().map(|lower| {
            if !lower.is_dir() {
                return Ok(Below::Disk(lower.clone(), wanted.of_disk.disk(lower)?));
            }
            let plain = plain.contains(&lower.as_path());
            let layer = match plain {
                true => HostLayer::open_detached(lower),
                false => HostLayer::open(lower),
            };
            let layer = layer
                .map_err(|e| Error::io("cannot use this lower directory", e).at_path(lower))?;
            Ok(Below::Directory { path: lower.clone(), layer: Arc::new(layer), plain })
        });
        let below = below.collect::<Result<Vec<_>>>()?;
        let upper = wanted.upper.as_deref().zip(wanted.work.as_deref());
        let upper = upper.map(|(upper, work)| UpperDirs::open(upper, work));
        let mut upper = upper.transpose().map_err(|e| unlaid(&wanted, e))?;
        if let Some(upper) = upper.as_mut().filter(|_| !wanted.has("stackable")) {
            let volatile = wanted.is_volatile();
            let lending = Lending { user_xattrs: wanted.has("userxattr"), volatile };
            for (number, below) in below.iter().enumerate() {
                if let Below::Directory { path, plain: true, .. } = below {
                    // Files of other layers are read through this process.
                    let _ = upper.lend(number, path, lending);
                }
            }
        }
        Ok(Ready { wanted, below, upper })
    }

    /// A jail in which it reads its lower layers, and has all of its upper one.
    pub fn jail(&self) -> Result<Jail> {
        let mut jail = Jail::new(Work::Overlay);
        for below in &self.below {
            match below {
                Below::Directory { path, .. } => jail.reach(path, Reach::Lend),
                Below::Disk(_, disk) => jail::disk(&mut jail, disk, false)?,
            }
        }
        for own in self.wanted.upper.iter().chain(&self.wanted.work) {
            jail.reach(own, Reach::Tree);
            jail.reach(own, Reach::Lend);
        }
        for stand_in in self.upper.iter().flat_map(UpperDirs::stand_ins) {
            for reach in [Reach::Lend, Reach::Write] {
                let root = stand_in.try_clone_to_owned();
                let root = root.map_err(|e| Error::io("cannot lay this overlay", e))?;
                jail.reach_open(root, reach);
            }
        }
        for device in ["/dev/fuse", "/dev/null"] {
            jail.reach(Path::new(device), Reach::Write);
        }
        // In which groups who makes a request is.
        jail.reach(Path::new("/proc"), Reach::Read);
        Ok(jail)
    }

    /// Lays it: what its layers hold is read.
    pub fn lay(self) -> Result<Arc<Overlay>> {
        let Ready { wanted, below, upper } = self;
        // No device of the host's has such a number.
        let lowers = (1 << 63..).zip(&below).map(|(number, below)| below.layer(&wanted, number));
        let lowers = lowers.collect::<Result<Vec<_>>>()?;
        let user_xattrs = wanted.has("userxattr").then_some(true);
        let layers = Layers { lowers, upper, user_xattrs };
        // Half of what may be open is for files.
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let half = usize::try_from(limit.unwrap_or(u64::MAX) / 2).unwrap_or(usize::MAX);
        let descriptors = half.min(8192);
        let overlay = Overlay::new(layers, descriptors).map_err(|e| unlaid(&wanted, e))?;
        if wanted.is_volatile() {
            overlay.set_volatile();
        }
        Ok(Arc::new(overlay))
    }
}

fn unlaid(wanted: &Wanted, why: io::Error) -> Error {
    let upper = wanted.upper.as_deref().unwrap_or(Path::new("."));
    Error::io("cannot lay this overlay", why).at_path(upper)
}

impl Below {
    /// Its files, for reading. `device` tells those of a disk from other layers'.
    fn layer(&self, wanted: &Wanted, device: u64) -> Result<Arc<dyn Layer>> {
        match self {
            Below::Directory { layer, .. } => Ok(layer.clone()),
            Below::Disk(path, disk) => {
                let fs = filesystem::open(disk.clone(), wanted.of_disk.partition, true);
                let fs = fs.map_err(|e| e.at_path(path))?;
                Ok(Arc::new(DiskLayer::new(Arc::new(fs), device)))
            }
        }
    }
}
