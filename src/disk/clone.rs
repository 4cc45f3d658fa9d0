//! Linked clones.

use std::path::Path;

use crate::change::{self, Base};
use crate::disk::Disk;
use crate::error::Result;

/// Makes a linked clone of the disk at `base` at `clone`, which must not exist, and opens it. It holds
/// only what is written to it; the base is sealed: it is not written while clones stand on it.
///
/// The work does not depend on the size of the base.
///
/// # Errors
/// [`ErrorKind::InUse`](crate::ErrorKind::InUse) where somebody writes to the base;
/// [`ErrorKind::Exists`](crate::ErrorKind::Exists) where something has the clone's name.
pub fn create_clone(base: impl AsRef<Path>, clone: impl AsRef<Path>) -> Result<Disk> {
    let (base, clone) = (base.as_ref(), clone.as_ref());
    Base::seal_with(base, &crate::open::OpenOptions::default(), &[clone.to_path_buf()])?
        .clone_to(clone)?;
    Disk::open(clone)
}

/// Makes a base on which no clone stands any more an ordinary disk again.
///
/// # Errors
/// [`ErrorKind::Sealed`](crate::ErrorKind::Sealed) lists the clones that are found to stand on it.
pub fn unseal(base: impl AsRef<Path>) -> Result<()> {
    change::unseal(base.as_ref(), false).map(drop)
}
