//! A disk's contents as one new file.

use std::path::Path;

use crate::block::BlockDevice;
use crate::copy::{self, Copying, Target};
use crate::disk::CreateOptions;
use crate::error::{Error, Result};
use crate::open::Format;

/// A copy of all that a disk shows, as one new file that stands on nothing.
///
/// What reads as zeroes takes no space.
#[derive(Debug, Clone)]
pub struct Convert {
    target: CreateOptions,
    compress: bool,
}

impl Convert {
    /// Into what `target` says; its size is not asked, the copy has the source's.
    #[must_use]
    pub fn to(target: CreateOptions) -> Convert {
        Convert { target, compress: false }
    }

    /// Compresses every cluster for which that saves space.
    #[must_use]
    pub fn compress(mut self, yes: bool) -> Convert {
        self.compress = yes;
        self
    }

    /// Copies `source` into a new file at `path`, which must not exist. The file gets its name when it
    /// is whole and durable: an interruption leaves nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`](crate::ErrorKind::Exists) where something has that name;
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for a format that is not made.
    pub fn run(&self, source: &dyn BlockDevice, path: impl AsRef<Path>) -> Result<()> {
        self.run_with(source, path, &|_| ())
    }

    /// The same; `progress` hears from many threads how many bytes of the disk are done.
    ///
    /// # Errors
    /// As [`run`](Convert::run).
    pub fn run_with(
        &self,
        source: &dyn BlockDevice,
        path: impl AsRef<Path>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<()> {
        let target = match self.target.made_as() {
            Format::Qcow2 => Target::Qcow2(Box::new(self.target.of_qcow2()?)),
            Format::Raw => Target::Raw,
            other => {
                let message = format!("{other} disks are not made: qcow2 and raw ones are");
                return Err(Error::unsupported(message).at_path(path));
            }
        };
        let how = Copying { compress: self.compress, bitmaps: &[], progress };
        copy::convert(source, path.as_ref(), &target, &how)
    }
}
