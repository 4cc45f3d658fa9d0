//! Opening by name: the only place that names concrete formats.

use std::path::Path;
use std::sync::Arc;

use super::gate::{self, Format, Gate};
use super::{Chain, Layer, foreign, heal};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::{probe as signature, raw};
use crate::image::{Identity, Image, Role};
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
    /// Writing copies into the head what the disk shows already: it stays what others were made on.
    pub same_contents: bool,
    /// Open for writing what is marked corrupt or was not closed well, to check and mend it.
    pub repair: bool,
    /// Bytes of metadata to keep in memory, for the whole chain.
    pub cache: u64,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions {
            read_only: true,
            format: None,
            shared: false,
            unprotected: false,
            same_contents: false,
            repair: false,
            cache: 32 << 20,
        }
    }
}

impl OpenOptions {
    /// For writing, with the defaults otherwise.
    pub fn writable() -> OpenOptions {
        OpenOptions { read_only: false, ..OpenOptions::default() }
    }

    fn access(&self) -> Access {
        match (self.shared, self.read_only) {
            (true, true) => Access::ReadShared,
            (false, true) => Access::Read,
            (_, false) => Access::Write,
        }
    }
}

/// Opens the disk at `path` with all layers below it.
///
/// # Errors
/// [`ErrorKind::Sealed`] for writing to a layer that others stand on; [`ErrorKind::BaseChanged`]
/// where a layer below is not the one its child was made from; [`ErrorKind::InUse`],
/// [`ErrorKind::Denied`] and [`ErrorKind::Corrupt`] name the file that they are about.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Chain> {
    let mut gate = Gate::new();
    gate.pass(path)?;
    if !options.read_only && !options.unprotected {
        heal::heal(path)?;
    }
    let head = open_image(path, options)?;
    let mut identity = identity(&head)?;
    if !options.read_only && !options.unprotected {
        check_not_frozen(path, &identity)?;
    }
    let below = OpenOptions { read_only: true, format: None, ..options.clone() };
    let mut lower: Vec<Layer> = Vec::new();
    while let Some(backing) = identity.backing.clone() {
        let child = lower.last().unwrap_or(&head);
        let (parent, format) = gate::admit(&child.path, &backing)?;
        let named = |e: Error| match e.kind() {
            ErrorKind::NotFound => Error::new(
                ErrorKind::NotFound,
                format!("is missing; '{}' names it as its backing file", child.path.display()),
            )
            .at_path(&parent),
            _ => e,
        };
        gate.pass(&parent).map_err(named)?;
        let layer = open_image(&parent, &OpenOptions { format: Some(format), ..below.clone() })?;
        let found = self::identity(&layer)?;
        if !options.unprotected {
            check_unchanged(&child.path, &identity, &parent, &found)?;
            foreign::check_parent(child, &layer)?;
        }
        lower.push(layer);
        identity = found;
    }
    // A quarter for the head's tables, the rest for the map over all others.
    Ok(Chain::new(head, lower, options.cache / 2))
}

/// Opens one layer alone.
pub fn open_image(path: &Path, options: &OpenOptions) -> Result<Layer> {
    let file_options = FileOptions { access: Some(options.access()), write: !options.read_only };
    let file = Arc::new(FileStorage::open(path, file_options)?);
    let format = match options.format {
        Some(format) => format,
        None => probe(&*file)?,
    };
    let cache = if options.read_only { 256 << 10 } else { options.cache / 4 };
    let image: Arc<dyn Image> = match format {
        Format::Raw => Arc::new(raw::Image::open(file.clone(), options.read_only)?),
        Format::Qcow2 => {
            let OpenOptions { read_only, same_contents, repair, .. } = *options;
            let inner = qcow2::OpenOptions { read_only, cache, same_contents, repair };
            Arc::new(qcow2::Image::open(file.clone(), inner).map_err(|e| e.at_path(path))?)
        }
        other => foreign::open(other, path, file.clone(), file_options)?,
    };
    Ok(Layer { path: path.to_path_buf(), format, image, file })
}

/// What the header of a layer says, without opening the layer: no lock is taken, so it may be out
/// of date by the time it is used. `None` where the file is no qcow2 image.
pub fn peek(path: &Path) -> Result<Option<Peek>> {
    let file = FileStorage::open(path, FileOptions { access: None, write: false })?;
    if probe(&file)? != Format::Qcow2 {
        return Ok(None);
    }
    let header = qcow2::Header::read(&file).map_err(|e| e.at_path(path))?;
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

fn identity(layer: &Layer) -> Result<Identity> {
    layer.image.identity().map_err(|e| e.at_path(&layer.path))
}

/// A layer that others stand on is not written.
fn check_not_frozen(path: &Path, identity: &Identity) -> Result<()> {
    let Some(label) = &identity.label else { return Ok(()) };
    let message = match label.role {
        Role::Head => return Ok(()),
        Role::Base => {
            "is a base: clones stand on it, and writing would change them. Make a clone of \
                       it and write to that, or `vdisk unseal` it when no clone is left"
                .to_owned()
        }
        Role::Snapshot | Role::Merging | Role::Leaving => format!(
            "is the frozen layer of snapshot '{}'; write to the disk itself or to a clone of this",
            label.name
        ),
    };
    Err(Error::new(ErrorKind::Sealed, message).at_path(path))
}

/// The parent's contents are those that the child was made on.
fn check_unchanged(
    child: &Path,
    child_identity: &Identity,
    parent: &Path,
    parent_identity: &Identity,
) -> Result<()> {
    let Some(own) = &child_identity.label else { return Ok(()) };
    let Some(expected) = own.parent else { return Ok(()) };
    let what = match &parent_identity.label {
        // A merge that was stopped: the parent holds all of the child, and is to take its name.
        Some(label) if label.layer == own.layer => return Ok(()),
        None => "it is another file than before, or its label was removed",
        Some(label) if label.layer != expected.layer => "it is another layer than before",
        Some(_) if expected.content.is_nil() => return Ok(()),
        // It is being overwritten with what its child holds anyway.
        Some(label) if label.role == Role::Merging => return Ok(()),
        Some(label) if label.content != expected.content => "its contents were given a new id",
        // A merge that was stopped: whatever it has written there, the child shows itself.
        Some(label) if label.role == Role::Merging => return Ok(()),
        Some(_) if !parent_identity.vouched => "another program has opened it for writing",
        Some(_) => return Ok(()),
    };
    Err(Error::new(
        ErrorKind::BaseChanged,
        format!(
            "has changed since '{}' was made on it: {what}. Bring the old file back, or take it as \
             it is now with `vdisk rebase {} --unsafe --backing {}`",
            child.display(),
            child.display(),
            parent.display()
        ),
    )
    .at_path(parent))
}
