//! Making files: new disks, deltas on a base, and throw-away heads.

use std::path::Path;
use std::sync::Arc;

use super::{Chain, Format, Layer};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::qcow2::{self, CreateOptions, Preallocation};
use crate::storage::draft::unsynced;
use crate::storage::{Draft, FileStorage, Storage};

/// Makes a qcow2 file at `path`, which must not exist. It is durable afterwards.
///
/// # Errors
/// [`ErrorKind::Exists`](crate::ErrorKind::Exists) where something has that name.
pub fn create(path: &Path, options: &CreateOptions) -> Result<()> {
    refuse_existing(path)?;
    let draft = Draft::new(path)?;
    let made = qcow2::create(draft.storage(), options).and_then(|image| image.flush());
    made.map_err(|e| e.at_path(path))?;
    draft.publish()
}

/// Makes a raw file of `size` bytes at `path`, which must not exist. It is durable afterwards.
pub fn create_raw(path: &Path, size: u64, preallocation: Preallocation) -> Result<()> {
    refuse_existing(path)?;
    let draft = Draft::new(path)?;
    let storage = draft.file();
    storage.set_len(size)?;
    match preallocation {
        Preallocation::Off => {}
        Preallocation::Falloc => storage.write_zeroes(0, size)?,
        Preallocation::Full => storage.write_zero_bytes(0, size)?,
        Preallocation::Metadata => {
            return Err(Error::invalid("a raw disk has no metadata to preallocate"));
        }
    }
    draft.publish()
}

/// Says so before work is done; the name is taken without replacing anything in any case.
pub(super) fn refuse_existing(path: &Path) -> Result<()> {
    match path.symlink_metadata() {
        Ok(_) => Err(Error::io("could not be created", std::io::ErrorKind::AlreadyExists.into())
            .at_path(path)),
        Err(_) => Ok(()),
    }
}

/// A disk that shows `chain`, opened for reading, and keeps all writes in a nameless file in the
/// directory for temporary files: they are gone with the process.
pub fn ephemeral(chain: Chain, memory: u64) -> Result<Chain> {
    use crate::block::BlockDevice;
    let file = Arc::new(FileStorage::temporary(&std::env::temp_dir())?);
    let lower = chain.all_layers();
    let cluster = chain.head().image.cluster();
    let options = CreateOptions {
        cluster: if (9..=21).contains(&cluster.bits()) {
            cluster
        } else {
            CreateOptions::new(0).cluster
        },
        ..CreateOptions::new(chain.size())
    };
    let image: Arc<dyn Image> = Arc::new(qcow2::create(unsynced(file.clone()), &options)?);
    let path = chain.head().path;
    let head = Layer { path, format: Format::Qcow2, image, file };
    Ok(Chain::new(head, lower, memory))
}
