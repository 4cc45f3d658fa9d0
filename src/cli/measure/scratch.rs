//! A directory for what is measured, and clones in it: they go with it, and leave no word in their base.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use vdisk::image::Backing;
use vdisk::open::{self, OpenOptions, open_image};
use vdisk::qcow2::CreateOptions;
use vdisk::{Error, Result};

/// The directory.
pub struct Scratch {
    dir: PathBuf,
    /// The disk, without symbolic links, and its format's name.
    base: PathBuf,
    format: String,
    options: CreateOptions,
}

impl Scratch {
    /// A directory for clones of the layer at `base`.
    ///
    /// # Errors
    /// Where that cannot be read, or somebody writes to it.
    pub fn new(base: &Path, options: &OpenOptions) -> Result<Scratch> {
        let base =
            fs::canonicalize(base).map_err(|e| Error::io("could not be found", e).at_path(base))?;
        let layer = open_image(&base, options)?;
        if layer.image.encrypted() {
            let text = "is encrypted: what its clone writes to a temporary directory would not be";
            return Err(Error::unsupported(text).at_path(&base));
        }
        let cluster = layer.image.cluster();
        let usual = CreateOptions::new(layer.image.size());
        let cluster = if (9..=21).contains(&cluster.bits()) { cluster } else { usual.cluster };
        let options = CreateOptions { cluster, ..usual };
        let format = layer.format.name().to_owned();
        let dir = std::env::temp_dir().join(format!("vdisk-measure-{}", uuid::Uuid::new_v4()));
        let made = DirBuilder::new().mode(0o700).create(&dir);
        made.map_err(|e| Error::io("cannot be made", e).at_path(&dir))?;
        Ok(Scratch { dir, base, format, options })
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A new clone in it.
    pub fn clone(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        let name = self.base.to_str().ok_or_else(|| {
            Error::invalid("has a name that no image can record").at_path(&self.base)
        })?;
        let backing = Backing { name: name.to_owned(), format: Some(self.format.clone()) };
        let options = CreateOptions { backing: Some(backing), ..self.options.clone() };
        open::create(&path, &options)?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Best effort: it holds nothing that anybody wants.
        let _ = fs::remove_dir_all(&self.dir);
    }
}
