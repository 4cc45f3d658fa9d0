//! Making files: new disks, deltas on a base, and throw-away heads.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use zeroize::Zeroizing;

use crate::chain::{Chain, Layer};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::luks::{self, Passphrase};
use crate::open::{Format, gate};
use crate::qcow2::{self, CreateOptions, DataFile, Encryption, Method, Preallocation};
use crate::storage::name::{remove, sync_directory};
use crate::storage::unsynced;
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

/// Like [`create`], with the data in a new file of their own: `data` is its name, relative to the
/// directory of `path`. With `raw` that file can be read without the image.
///
/// # Errors
/// [`ErrorKind::Exists`](crate::ErrorKind::Exists) where something has one of the names.
pub fn create_with_data(path: &Path, data: &Path, raw: bool, options: CreateOptions) -> Result<()> {
    refuse_existing(path)?;
    let at = path.parent().unwrap_or(Path::new("")).join(data);
    let name = gate::record(data).map_err(|e| e.at_path(&at))?;
    let storage = Arc::new(FileStorage::create(&at)?);
    let data_file = Some(DataFile { name, raw, storage });
    let made = create(path, &CreateOptions { data_file, ..options });
    let made = made.and_then(|()| sync_directory(&at));
    made.inspect_err(|_| {
        // Nothing refers to it, and it holds nothing.
        let _ = remove(&at);
    })
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
        Preallocation::Metadata => return Err(no_metadata()),
    }
    draft.publish()
}

/// Makes a qcow2 image on a block device, over whatever stands there, durably.
///
/// # Errors
/// [`ErrorKind::NoSpace`](crate::ErrorKind::NoSpace) where the device is too small for its tables,
/// or for all that is to be allocated.
pub fn create_on(device: &Arc<FileStorage>, options: &CreateOptions) -> Result<()> {
    let reserved = matches!(options.preallocation, Preallocation::Falloc | Preallocation::Full);
    let tables = options.cluster.bytes().saturating_mul(4);
    let needed = if reserved { options.size.saturating_add(tables) } else { tables };
    fits(device, needed)?;
    let made = qcow2::create(device.clone(), options).and_then(|image| image.flush());
    made.map_err(|e| e.at_path(device.path()))
}

/// Makes a block device a raw disk of zeroes, durably.
///
/// # Errors
/// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) unless `size` is the device's.
pub fn create_raw_on(device: &FileStorage, size: u64, how: Preallocation) -> Result<()> {
    fits(device, size)?;
    let have = device.len()?;
    if size != have {
        let message = format!(
            "is a device of {have} bytes, and so is a raw disk on it: give that size, or another format"
        );
        return Err(Error::invalid(message).at_path(device.path()));
    }
    match how {
        Preallocation::Off => device.punch_hole(0, size)?,
        Preallocation::Falloc => device.write_zeroes(0, size)?,
        Preallocation::Full => device.write_zero_bytes(0, size)?,
        Preallocation::Metadata => return Err(no_metadata()),
    }
    device.sync()
}

fn fits(device: &FileStorage, needed: u64) -> Result<()> {
    let have = device.len()?;
    if needed <= have {
        return Ok(());
    }
    let message =
        format!("is a device of {have} bytes, and {needed} are needed: nothing was written");
    Err(Error::new(ErrorKind::NoSpace, message).at_path(device.path()))
}

fn no_metadata() -> Error {
    Error::invalid("a raw disk has no metadata to preallocate")
}

/// Says so before work is done; the name is taken without replacing anything in any case.
pub(crate) fn refuse_existing(path: &Path) -> Result<()> {
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
    // What is written above an encrypted layer is encrypted as well, by a key that goes with it.
    let secret = lower.iter().any(|layer| layer.image.encrypted());
    let options = CreateOptions {
        encryption: if secret { Some(throw_away_key()?) } else { None },
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

fn throw_away_key() -> Result<Encryption> {
    let mut bytes = Zeroizing::new(vec![0; 32]);
    getrandom::fill(&mut bytes).map_err(|e| {
        Error::io("no random numbers for a key", std::io::Error::other(e.to_string()))
    })?;
    // The passphrase is as long as the key: hashing it often adds nothing.
    let options = luks::Options { iter_time: Duration::from_millis(1), ..luks::Options::default() };
    Ok(Encryption { passphrase: Passphrase::new(bytes), method: Method::Luks(options) })
}
