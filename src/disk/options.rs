//! How disks are opened and made.

use std::path::Path;
use std::sync::Arc;

use zeroize::Zeroizing;

use crate::addr::Unit;
use crate::change;
use crate::change::snapshot;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, Label};
use crate::luks::{self, Passphrase};
use crate::open::{self, Format};
use crate::qcow2::{self, Compression, Encryption, Extension, Method, Preallocation};
use crate::storage::Storage;

/// How to open a disk.
///
/// Without further words it is opened for reading and writing, in the format that its contents show.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    inner: open::OpenOptions,
    snapshot: Option<String>,
    ephemeral: bool,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions::new()
    }
}

impl OpenOptions {
    /// For reading and writing.
    #[must_use]
    pub fn new() -> OpenOptions {
        OpenOptions { inner: open::OpenOptions::writable(), snapshot: None, ephemeral: false }
    }

    /// Refuses writes. Several programs may have a disk open so.
    #[must_use]
    pub fn read_only(mut self, yes: bool) -> OpenOptions {
        self.inner.read_only = yes;
        self
    }

    /// Reads although somebody else is writing: what is read may be out of date.
    #[must_use]
    pub fn shared(mut self, yes: bool) -> OpenOptions {
        self.inner.shared = yes;
        self
    }

    /// What the file is. Say it wherever it is known: a guest that writes a raw disk can write another
    /// format's header too.
    #[must_use]
    pub fn format(mut self, format: Format) -> OpenOptions {
        self.inner.format = Some(format);
        self
    }

    /// Opens the files that images name as their bases wherever those stand. Otherwise only those in
    /// the disk's own directory and below, and those that vdisk itself put it on. For images whose
    /// maker is trusted.
    #[must_use]
    pub fn follow(mut self, yes: bool) -> OpenOptions {
        self.inner.follow = yes;
        self
    }

    /// Takes bases that have changed under the disk as they are now; [`Disk::notes`] says so.
    #[must_use]
    pub fn accept_base(mut self, yes: bool) -> OpenOptions {
        self.inner.accept_base = yes;
        self
    }

    /// What opens a disk that is encrypted.
    #[must_use]
    pub fn passphrase(mut self, passphrase: Vec<u8>) -> OpenOptions {
        self.inner.passphrase = Some(Passphrase::new(Zeroizing::new(passphrase)));
        self
    }

    /// Bytes of memory for the disk's tables, about; 32 MiB without a word.
    #[must_use]
    pub fn cache_size(mut self, bytes: u64) -> OpenOptions {
        self.inner.cache = bytes;
        self
    }

    /// The disk as it was when the snapshot `name` was taken. It is only read, or
    /// [`ephemeral`](OpenOptions::ephemeral).
    #[must_use]
    pub fn snapshot(mut self, name: impl Into<String>) -> OpenOptions {
        self.snapshot = Some(name.into());
        self
    }

    /// Puts all writes into a nameless file that goes with the process.
    #[must_use]
    pub fn ephemeral(mut self, yes: bool) -> OpenOptions {
        self.ephemeral = yes;
        self
    }

    /// Opens the disk at `path`.
    ///
    /// # Errors
    /// As [`Disk::open`]; [`ErrorKind::NotFound`] for a snapshot that the disk does not have, and tells
    /// which it has; [`ErrorKind::Invalid`] for a passphrase that does not fit.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Disk> {
        let path = path.as_ref();
        let read_only = self.inner.read_only || self.ephemeral || self.snapshot.is_some();
        let options = open::OpenOptions { read_only, ..self.inner.clone() };
        let chain = match &self.snapshot {
            Some(name) => snapshot::open_at(path, name, &options)?,
            None => change::open(path, &options)?,
        };
        if self.ephemeral {
            return Disk::of(path, open::ephemeral(chain, options.cache)?, false);
        }
        Disk::of(path, chain, !read_only)
    }
}

/// How to make a disk.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    format: Format,
    cluster_size: u64,
    passphrase: Option<Passphrase>,
    inner: qcow2::CreateOptions,
}

impl CreateOptions {
    /// A qcow2 disk of `size` bytes with clusters of 64 KiB, nothing allocated.
    #[must_use]
    pub fn new(size: u64) -> CreateOptions {
        let inner = qcow2::CreateOptions::new(size);
        let cluster_size = inner.cluster.bytes();
        CreateOptions { format: Format::Qcow2, cluster_size, passphrase: None, inner }
    }

    /// [`Format::Qcow2`] or [`Format::Raw`].
    #[must_use]
    pub fn format(mut self, format: Format) -> CreateOptions {
        self.format = format;
        self
    }

    /// The unit of allocation in bytes: a power of two from 512 to 2 MiB.
    #[must_use]
    pub fn cluster_size(mut self, bytes: u64) -> CreateOptions {
        self.cluster_size = bytes;
        self
    }

    /// 32 subclusters for each cluster: small writes to a clone copy less.
    #[must_use]
    pub fn subclusters(mut self, yes: bool) -> CreateOptions {
        self.inner.extended_l2 = yes;
        self
    }

    /// Takes all of the disk's space at once.
    #[must_use]
    pub fn allocate(mut self, yes: bool) -> CreateOptions {
        self.inner.preallocation =
            if yes { Preallocation::Falloc } else { qcow2::CreateOptions::new(0).preallocation };
        self
    }

    /// Compresses clusters with zstd instead of zlib, where something compresses them.
    #[must_use]
    pub fn zstd(mut self, yes: bool) -> CreateOptions {
        self.inner.compression = if yes { Compression::Zstd } else { Compression::Zlib };
        self
    }

    /// Encrypts the data (LUKS) under this passphrase.
    #[must_use]
    pub fn passphrase(mut self, passphrase: Vec<u8>) -> CreateOptions {
        self.passphrase = Some(Passphrase::new(Zeroizing::new(passphrase)));
        self
    }

    /// Makes the disk at `path`, which must not exist, and opens it. It is durable by then.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] where something has that name; [`ErrorKind::Invalid`] for an option that is
    /// out of bounds.
    pub fn create(&self, path: impl AsRef<Path>) -> Result<Disk> {
        let path = path.as_ref();
        let inner = open::OpenOptions {
            format: Some(self.format),
            passphrase: self.passphrase.clone(),
            ..open::OpenOptions::writable()
        };
        match self.format {
            Format::Qcow2 => open::create(path, &self.of_qcow2()?)?,
            Format::Raw if self.passphrase.is_some() => {
                return Err(Error::invalid("a raw disk is not encrypted").at_path(path));
            }
            Format::Raw => open::create_raw(path, self.inner.size, self.inner.preallocation)?,
            other => {
                let message = format!("{other} disks are not made: qcow2 and raw ones are");
                return Err(Error::unsupported(message).at_path(path));
            }
        }
        OpenOptions { inner, snapshot: None, ephemeral: false }.open(path)
    }

    /// The format to be made.
    pub(super) fn made_as(&self) -> Format {
        self.format
    }

    /// The same for the engine: a disk that has an identity of its own.
    pub(super) fn of_qcow2(&self) -> Result<qcow2::CreateOptions> {
        let cluster = Unit::from_bytes(self.cluster_size)
            .ok_or_else(|| Error::invalid("a cluster is a power of two from 512 bytes to 2 MiB"))?;
        let method = || Method::Luks(luks::Options::default());
        Ok(qcow2::CreateOptions {
            cluster,
            encryption: self
                .passphrase
                .clone()
                .map(|passphrase| Encryption { passphrase, method: method() }),
            extensions: vec![Extension { magic: Label::MAGIC, data: Label::new().encode()? }],
            ..self.inner.clone()
        })
    }
}

/// Opens one qcow2 layer alone, in bytes of any kind: the engine without files, chains and locks.
///
/// # Errors
/// [`ErrorKind::Corrupt`] and [`ErrorKind::Unsupported`] say what is wrong with it.
pub fn open_image(storage: Arc<dyn Storage>, read_only: bool) -> Result<Box<dyn Image>> {
    let options = qcow2::OpenOptions { read_only, ..qcow2::OpenOptions::default() };
    Ok(Box::new(qcow2::Image::open(storage, options)?))
}

/// Makes a new qcow2 layer in bytes of any kind, over what they hold.
///
/// # Errors
/// [`ErrorKind::Invalid`] for an option that is out of bounds, and for another format.
pub fn create_image(storage: Arc<dyn Storage>, options: &CreateOptions) -> Result<Box<dyn Image>> {
    if options.format != Format::Qcow2 {
        return Err(Error::new(ErrorKind::Invalid, "only a qcow2 layer is made so"));
    }
    Ok(Box::new(qcow2::create(storage, &options.of_qcow2()?)?))
}
