//! What a disk is, and whether it is right.

use std::path::{Path, PathBuf};

use crate::block::BlockDevice;
use crate::chain::Layer;
use crate::disk::{Access, Disk};
use crate::error::{Error, Result};
use crate::image::{Check, Repair};
use crate::open::{self, Format};
use crate::storage::Storage;

/// What a disk consists of.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DiskInfo {
    /// The size in bytes.
    pub size: u64,
    /// The layers from the head down to the base.
    pub layers: Vec<LayerInfo>,
}

/// One layer of a disk.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LayerInfo {
    /// Its file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Bytes of the host that it takes, holes left out.
    pub allocated: u64,
    /// Its unit of allocation in bytes.
    pub cluster_size: u64,
    /// Whether its data are encrypted.
    pub encrypted: bool,
    /// The name that it records for the layer below.
    pub backing: Option<String>,
    /// The name of the snapshot that it is the layer of.
    pub snapshot: Option<String>,
}

/// How the tables of a disk's layers are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// Faults that endanger data.
    pub corruptions: u64,
    /// Clusters that are allocated and that nothing refers to: lost space, and no danger.
    pub leaks: u64,
    /// Tables that could not be read.
    pub errors: u64,
    /// Faults that were mended.
    pub repaired: u64,
    /// One sentence for each fault, for people.
    pub messages: Vec<String>,
}

impl CheckReport {
    /// Whether nothing was found.
    pub fn is_clean(&self) -> bool {
        (self.corruptions, self.leaks, self.errors) == (0, 0, 0)
    }

    fn add(&mut self, check: Check) {
        self.corruptions += check.corruptions;
        self.leaks += check.leaks;
        self.errors += check.errors;
        self.repaired += check.corruptions_fixed + check.leaks_fixed;
        self.messages.extend(check.messages);
    }
}

impl Disk {
    /// What the disk consists of.
    pub fn info(&self) -> Result<DiskInfo> {
        let layers = self.chain().all_layers();
        let layers = layers.iter().map(LayerInfo::of).collect::<Result<_>>()?;
        Ok(DiskInfo { size: self.chain().size(), layers })
    }

    /// Proves the tables of all layers right, or says what is wrong. Nothing is mended; the disk may be
    /// in use meanwhile.
    ///
    /// # Errors
    /// Only where the check itself cannot go on.
    pub fn check(&self) -> Result<CheckReport> {
        let mut report = CheckReport::default();
        match &self.access {
            Access::Whole(live) if self.has_tables() => {
                live.check(true)?.into_iter().for_each(|(_, check)| report.add(check));
            }
            _ => {
                for layer in self
                    .chain()
                    .all_layers()
                    .iter()
                    .filter(|l| l.image.capabilities().check.is_some())
                {
                    let check = layer.image.check(Repair::None);
                    report.add(check.map_err(|e| e.at_path(&layer.path))?);
                }
            }
        }
        Ok(report)
    }

    fn has_tables(&self) -> bool {
        self.chain().head().image.capabilities().check.is_some()
    }

    /// Mends the tables of the head of the disk at `path`, which nobody has open. What the disk shows
    /// stays.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`](crate::ErrorKind::InUse) names who has it;
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for a format without tables.
    pub fn repair(path: impl AsRef<Path>) -> Result<CheckReport> {
        let path = path.as_ref();
        let options = open::OpenOptions { repair: true, ..open::OpenOptions::writable() };
        let layer = open::open_image(path, &options)?;
        if layer.image.capabilities().check.is_none() {
            let message = format!("{} files hold no metadata that could be checked", layer.format);
            return Err(Error::unsupported(message).at_path(path));
        }
        let mut report = CheckReport::default();
        report.add(layer.image.check(Repair::All).map_err(|e| e.at_path(path))?);
        layer.image.close().map_err(|e| e.at_path(path))?;
        Ok(report)
    }
}

impl LayerInfo {
    fn of(layer: &Layer) -> Result<LayerInfo> {
        let identity = layer.image.identity().map_err(|e| e.at_path(&layer.path))?;
        Ok(LayerInfo {
            path: layer.path.clone(),
            format: layer.format,
            allocated: layer.file.allocated()?,
            cluster_size: layer.image.cluster().bytes(),
            encrypted: layer.image.encrypted(),
            backing: identity.backing.map(|b| b.name),
            snapshot: identity.label.map(|l| l.name).filter(|name| !name.is_empty()),
        })
    }
}
