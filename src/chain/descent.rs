//! Going down a chain a layer at a time: from the head to the base, each name through the gate.

use std::path::Path;

use super::gate::{self, Gate};
use super::open::{OpenOptions, open_image};
use super::{Chain, Layer, foreign, heal};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Backing, Identity, Role};

/// The layers of a chain that are open so far.
pub struct Descent {
    gate: Gate,
    options: OpenOptions,
    head: Layer,
    /// From the layer below the head down.
    lower: Vec<Layer>,
    /// What the lowest layer so far says.
    identity: Identity,
}

impl Descent {
    /// Opens the head at `path`, as [`super::open`] does.
    pub fn begin(path: &Path, options: &OpenOptions) -> Result<Descent> {
        let mut gate = Gate::new();
        gate.pass(path)?;
        let guarded = !options.read_only && !options.unprotected;
        if guarded {
            heal::heal(path)?;
        }
        let head = open_image(path, options)?;
        let identity = identity(&head)?;
        if guarded {
            check_not_frozen(path, &identity)?;
        }
        Ok(Descent { gate, options: options.clone(), head, lower: Vec::new(), identity })
    }

    /// Begins at a head that is open already.
    pub fn from_head(head: Layer, options: &OpenOptions) -> Result<Descent> {
        let mut gate = Gate::new();
        gate.pass(&head.path)?;
        let identity = identity(&head)?;
        if !options.read_only && !options.unprotected {
            check_not_frozen(&head.path, &identity)?;
        }
        Ok(Descent { gate, options: options.clone(), head, lower: Vec::new(), identity })
    }

    /// How many layers are open.
    pub fn depth(&self) -> usize {
        self.lower.len() + 1
    }

    /// The lowest layer so far.
    pub fn lowest(&self) -> &Layer {
        self.lower.last().unwrap_or(&self.head)
    }

    /// What the lowest layer so far records for the one below it.
    pub fn recorded(&self) -> Option<&Backing> {
        self.identity.backing.as_ref()
    }

    /// Opens the layer that the lowest one names as its backing file; `false` where it names none.
    pub fn step(&mut self) -> Result<bool> {
        let Some(backing) = self.identity.backing.clone() else { return Ok(false) };
        let child = self.lowest().path.clone();
        let (parent, format) = gate::admit(&child, &backing, self.options.probe_backing)?;
        self.gate.pass(&parent).map_err(|e| missing(e, &child, &parent))?;
        let options = OpenOptions { read_only: true, format, ..self.options.clone() };
        let layer = open_image(&parent, &options)?;
        let found = identity(&layer)?;
        if !options.unprotected {
            check_unchanged(&child, &self.identity, &parent, &found)?;
            foreign::check_parent(self.lowest(), &layer)?;
        }
        self.lower.push(layer);
        self.identity = found;
        Ok(true)
    }

    /// Puts `layer` below the lowest one, whatever that names.
    pub fn put(&mut self, layer: Layer) -> Result<()> {
        self.gate.pass(&layer.path)?;
        self.identity = identity(&layer)?;
        self.lower.push(layer);
        Ok(())
    }

    /// Makes the layers one disk. What the lowest one names and was not opened reads as zeroes.
    pub fn finish(self) -> Chain {
        // A quarter of the memory is for the head's tables, the rest for the map over all others.
        Chain::new(self.head, self.lower, self.options.cache / 2)
    }
}

fn missing(error: Error, child: &Path, parent: &Path) -> Error {
    match error.kind() {
        ErrorKind::NotFound => Error::new(
            ErrorKind::NotFound,
            format!("is missing; '{}' names it as its backing file", child.display()),
        )
        .at_path(parent),
        _ => error,
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
        Role::Snapshot | Role::Merging | Role::Leaving | Role::Rising => format!(
            "is the frozen layer of snapshot '{}'; write to the disk itself or to a clone of this",
            label.name
        ),
        Role::Dropped | Role::Dropping | Role::Returning | Role::Unnamed => {
            "is a frozen layer of a disk; write to the disk itself".to_owned()
        }
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
        Some(label) if matches!(label.role, Role::Merging | Role::Rising) => return Ok(()),
        Some(label) if label.content != expected.content => "its contents were given a new id",
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
