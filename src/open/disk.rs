//! Opening one layer by name, and looking at what it says of itself: the only place that names concrete
//! formats. It knows no chain.

use std::path::Path;
use std::sync::Arc;

use crate::chain::Layer;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::{luks, probe as signature, raw};
use crate::image::{Identity, Image};
use crate::open::gate::Format;
pub use crate::open::options::OpenOptions;
use crate::open::{data_file, foreign};
use crate::qcow2;
use crate::storage::{FileOptions, FileStorage, Storage};

/// Opens one layer alone.
pub fn open_image(path: &Path, options: &OpenOptions) -> Result<Layer> {
    let file = Arc::new(FileStorage::open(path, options.file_options())?);
    open_file(path, file, options)
}

/// Opens one layer alone, in a file that is open already.
pub fn open_file(path: &Path, file: Arc<FileStorage>, options: &OpenOptions) -> Result<Layer> {
    let format = match options.format {
        Some(format) => format,
        None => probe_named(path, &*file)?,
    };
    let guessed = options.format.is_none();
    // What is only read is mapped once, into the chain's flattened map.
    let cache = if options.read_only { options.cache / 128 } else { options.cache / 4 };
    let image: Arc<dyn Image> = match format {
        Format::Raw if guessed => Arc::new(open_guessed(file.clone(), options.read_only)?),
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
        other => foreign::open(other, path, file.clone(), options)?,
    };
    Ok(Layer { path: path.to_path_buf(), format, image, file })
}

/// What the header of a layer says, without opening the layer: no lock is taken, so it may be out
/// of date by the time it is used. `None` where the file is no qcow2 image.
pub fn peek(path: &Path) -> Result<Option<Peek>> {
    let file = FileStorage::open(path, FileOptions { access: None, write: false })?;
    let mut magic = [0; 8];
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
    // Somebody may just be writing the label.
    let identity = header.identity().or_else(|_| qcow2::Header::read(&file)?.identity());
    let identity = identity.map_err(|e| e.at_path(path))?;
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

/// The format that a file's name and contents show; raw where they show none.
pub fn probe_named(path: &Path, storage: &dyn Storage) -> Result<Format> {
    let found = probe(storage)?;
    let Some(name) = path.file_name().filter(|_| found == Format::Raw) else { return Ok(found) };
    let mut tail = [0; 4];
    let Some(at) = storage.len()?.checked_sub(signature::TAIL) else { return Ok(found) };
    storage.read_exact_at(at, &mut tail)?;
    match signature::dmg(name.as_encoded_bytes(), &tail) {
        true => Format::from_name("dmg"),
        false => Ok(found),
    }
}

/// The format that a file's first bytes show; raw where they show none.
pub fn probe(storage: &dyn Storage) -> Result<Format> {
    let len = storage.len()?;
    let mut first = [0; signature::HEAD];
    let first = &mut first[..len.min(signature::HEAD as u64) as usize];
    storage.read_exact_at(0, first)?;
    shown(first, len)
}

/// The format of a file of `len` bytes that begins with `first`.
fn shown(first: &[u8], len: u64) -> Result<Format> {
    match signature::foreign(first, len) {
        _ if qcow2::probe(first) => Ok(Format::Qcow2),
        Some(name) => Format::from_name(name),
        None => Ok(Format::Raw),
    }
}

/// Opens what was taken for raw by its first bytes alone: whoever opens it next by its name has to
/// come to the same conclusion, whatever its guest writes.
///
/// # Errors
/// As [`raw::Image::open`].
pub fn open_guessed(storage: Arc<dyn Storage>, read_only: bool) -> Result<raw::Image> {
    let image = raw::Image::open(storage, read_only)?;
    Ok(image.guarded(signature::HEAD, stays_raw))
}

/// Refuses a change after which a disk that shows no format shows one.
fn stays_raw(change: raw::Change<'_>) -> Result<()> {
    let raw::Change { before, after, len } = change;
    let is_raw = |first: &[u8], len| matches!(shown(first, len), Ok(Format::Raw));
    // Some marks count here in small files only, and elsewhere in all: as if it were one.
    let (here, small) = (is_raw(after, len), is_raw(after, 0) || !is_raw(before, 0));
    if here && small {
        return Ok(());
    }
    let shown = shown(after, if here { 0 } else { len });
    let what = shown.map_or_else(|_| "an image of a kind", |format| format.name());
    let message = format!(
        "was taken for a raw disk by its contents, and refuses a change that would make it look like \
         {what} to whoever opens it next: say `--format raw` to allow it"
    );
    Err(Error::new(ErrorKind::Denied, message))
}
