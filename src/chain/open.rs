//! Opening by name: the only place that names concrete formats.

use std::path::Path;
use std::sync::Arc;

use super::descent::Descent;
use super::gate::Format;
use super::{Chain, Layer, data_file, foreign};
use crate::error::Result;
use crate::formats::{luks, probe as signature, raw};
use crate::image::{Identity, Image};
use crate::luks::Passphrase;
use crate::qcow2;
use crate::storage::{Access, FileOptions, FileStorage, Storage};

/// How to open a disk.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Refuse writes, and let others read.
    pub read_only: bool,
    /// The head's format; `None` looks at its first bytes.
    pub format: Option<Format>,
    /// Read although others write: what is read may be out of date or torn.
    pub shared: bool,
    /// Open a layer although it is sealed, frozen or not the one its child was made from.
    pub unprotected: bool,
    /// Take the layers below as they are now, although they are not those that the layers above were
    /// made on. What they are not any more is in [`Chain::notes`].
    pub accept_base: bool,
    /// Writing copies into the head what the disk shows already: it stays what others were made on.
    pub same_contents: bool,
    /// Open for writing what is marked corrupt or was not closed well, to check and mend it.
    pub repair: bool,
    /// Guess the format of a backing file whose child does not say it. Not safe where a guest may
    /// have written it: it can make a raw disk look like any other format.
    pub probe_backing: bool,
    /// The caller's lock on an image speaks for its external data file too.
    pub locked: bool,
    /// What opens the layers that are encrypted. Without it their tables can be read.
    pub passphrase: Option<Passphrase>,
    /// Bytes of metadata to keep in memory, about, for the whole chain: a quarter for the head's
    /// tables, a quarter for its refcounts, the rest for the map over the layers below.
    pub cache: u64,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions {
            read_only: true,
            format: None,
            shared: false,
            unprotected: false,
            accept_base: false,
            same_contents: false,
            repair: false,
            probe_backing: false,
            locked: false,
            passphrase: None,
            cache: OpenOptions::CACHE,
        }
    }
}

impl OpenOptions {
    /// The default of [`OpenOptions::cache`].
    pub const CACHE: u64 = 32 << 20;

    /// For writing, with the defaults otherwise.
    pub fn writable() -> OpenOptions {
        OpenOptions { read_only: false, ..OpenOptions::default() }
    }

    pub(super) fn file_options(&self) -> FileOptions {
        let access = match (self.shared, self.read_only) {
            (true, true) => Access::ReadShared,
            (false, true) => Access::Read,
            (_, false) => Access::Write,
        };
        FileOptions { access: Some(access), write: !self.read_only }
    }
}

/// Opens the disk at `path` with all layers below it.
///
/// # Errors
/// [`ErrorKind::Sealed`](crate::ErrorKind::Sealed) for writing to a layer that others stand on;
/// [`ErrorKind::BaseChanged`](crate::ErrorKind::BaseChanged) where a layer below is not the one its
/// child was made from; others name the file that they are about.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Chain> {
    let mut descent = Descent::begin(path, options)?;
    while descent.step()? {}
    Ok(descent.finish())
}

/// Opens one layer alone.
pub fn open_image(path: &Path, options: &OpenOptions) -> Result<Layer> {
    let file = Arc::new(FileStorage::open(path, options.file_options())?);
    open_file(path, file, options)
}

/// Opens one layer alone, in a file that is open already.
pub fn open_file(path: &Path, file: Arc<FileStorage>, options: &OpenOptions) -> Result<Layer> {
    let format = match options.format {
        Some(format) => format,
        None => probe(&*file)?,
    };
    // What is only read is mapped once, into the chain's flattened map.
    let cache = if options.read_only { options.cache / 128 } else { options.cache / 4 };
    let image: Arc<dyn Image> = match format {
        Format::Raw => Arc::new(raw::Image::open(file.clone(), options.read_only)?),
        Format::Qcow2 => {
            let image = data_file::open_qcow2(path, file.clone(), options, cache);
            Arc::new(image.map_err(|e| e.at_path(path))?)
        }
        Format::Luks => {
            let image =
                luks::Luks::open(file.clone(), options.read_only, options.passphrase.as_ref());
            Arc::new(image.map_err(|e| e.at_path(path))?)
        }
        other => foreign::open(other, path, file.clone(), options.file_options())?,
    };
    Ok(Layer { path: path.to_path_buf(), format, image, file })
}

/// What the header of a layer says, without opening the layer: no lock is taken, so it may be out
/// of date by the time it is used. `None` where the file is no qcow2 image.
pub fn peek(path: &Path) -> Result<Option<Peek>> {
    let file = FileStorage::open(path, FileOptions { access: None, write: false })?;
    let mut magic = [0; 4];
    // Most files beside a disk are qcow2: those are read once.
    let short = file.len()? < magic.len() as u64;
    let header = match short {
        true => return Ok(None),
        false => qcow2::Header::read(&file),
    };
    let header = match header {
        Ok(header) => header,
        Err(e) => {
            file.read_exact_at(0, &mut magic)?;
            return if qcow2::probe(&magic) { Err(e.at_path(path)) } else { Ok(None) };
        }
    };
    let identity = header.identity().map_err(|e| e.at_path(path))?;
    Ok(Some(Peek { identity, size: header.size, allocated: file.allocated()? }))
}

/// What [`peek`] sees.
#[derive(Debug, Clone)]
pub struct Peek {
    /// Who the layer is.
    pub identity: Identity,
    /// The guest disk's size in bytes.
    pub size: u64,
    /// Bytes that the file takes on the host, holes left out.
    pub allocated: u64,
}

/// The format that a file's first bytes show; raw where they show none.
pub fn probe(storage: &dyn Storage) -> Result<Format> {
    let len = storage.len()?;
    let mut first = [0; signature::HEAD];
    let first = &mut first[..len.min(signature::HEAD as u64) as usize];
    storage.read_exact_at(0, first)?;
    match signature::foreign(first, len) {
        _ if qcow2::probe(first) => Ok(Format::Qcow2),
        Some(name) => Format::from_name(name),
        None => Ok(Format::Raw),
    }
}
