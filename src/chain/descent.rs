//! Going down a chain a layer at a time: from the head to the base, each name through the gate.

use std::path::{Path, PathBuf};

use super::gate::{self, Format, Gate};
use super::open::{OpenOptions, open_image};
use super::{Chain, Layer, foreign, heal, parent, sealed, search};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Backing, Identity};

/// The layers of a chain that are open so far.
pub struct Descent {
    gate: Gate,
    options: OpenOptions,
    head: Layer,
    /// From the layer below the head down.
    lower: Vec<Layer>,
    /// What the lowest layer so far says.
    identity: Identity,
    /// What the user should know.
    notes: Vec<String>,
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
            sealed::refuse(path, &identity)?;
            sealed::refuse_unaware(path, &identity)?;
        }
        Ok(Descent::new(gate, options, head, identity))
    }

    /// Begins at a head that is open already.
    pub fn from_head(head: Layer, options: &OpenOptions) -> Result<Descent> {
        let mut gate = Gate::new();
        gate.pass(&head.path)?;
        let identity = identity(&head)?;
        if !options.read_only && !options.unprotected {
            sealed::refuse(&head.path, &identity)?;
        }
        Ok(Descent::new(gate, options, head, identity))
    }

    fn new(gate: Gate, options: &OpenOptions, head: Layer, identity: Identity) -> Descent {
        let (lower, notes) = (Vec::new(), Vec::new());
        Descent { gate, options: options.clone(), head, lower, identity, notes }
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
        let (path, format) = gate::admit(&child, &backing, self.options.probe_backing)?;
        let (layer, identity) = match self.enter(&path, format) {
            Ok((layer, identity)) => self.check(&child, layer, identity)?,
            Err(e) if e.kind() == ErrorKind::NotFound => match self.moved(&child, &path) {
                Some(found) => {
                    let (layer, identity) = self.enter(&found, format)?;
                    self.notes.push(self.moved_note(&path, &found));
                    self.check(&child, layer, identity)?
                }
                None => return Err(missing(e, &child, &path)),
            },
            Err(e) => return Err(e),
        };
        if !self.options.unprotected {
            foreign::check_parent(self.lowest(), &layer)?;
        }
        self.lower.push(layer);
        self.identity = identity;
        Ok(true)
    }

    /// Opens the layer at `path`, below the lowest one.
    fn enter(&mut self, path: &Path, format: Option<Format>) -> Result<(Layer, Identity)> {
        self.gate.pass(path)?;
        // Hundreds of layers share what one may have.
        let cache = self.options.cache.saturating_mul(4) / (self.depth() as u64).max(4);
        let options = OpenOptions { read_only: true, format, cache, ..self.options.clone() };
        let layer = open_image(path, &options).map_err(|e| self.too_many(e))?;
        let identity = identity(&layer)?;
        Ok((layer, identity))
    }

    /// Says why the host opens no further file, where that is so.
    fn too_many(&self, error: Error) -> Error {
        let limit = match error.raw_os_error() {
            Some(libc::EMFILE) => {
                "this process may have open (`ulimit -n` tells, and sets, how many)"
            }
            Some(libc::ENFILE) => "this host may have open (the sysctl fs.file-max says how many)",
            _ => return error,
        };
        let text = format!(
            "layer {} of the disk needs one more file than {limit}; `vdisk snapshot merge` and \
             `vdisk rebase --flatten` make chains shorter",
            self.depth() + 1
        );
        let source = std::io::Error::from_raw_os_error(error.raw_os_error().unwrap_or_default());
        let told = Error::io(text, source);
        match error.path() {
            Some(path) => told.at_path(path),
            None => told,
        }
    }

    /// Makes sure that `layer` is what the lowest layer was made on, or finds what is.
    fn check(
        &mut self,
        child: &Path,
        layer: Layer,
        identity: Identity,
    ) -> Result<(Layer, Identity)> {
        if self.options.unprotected {
            return Ok((layer, identity));
        }
        let Some(change) = parent::change(&self.identity, &layer, &identity)? else {
            return Ok((layer, identity));
        };
        let error = parent::changed(&self.head.path, child, &layer.path, &change);
        if self.options.accept_base {
            self.notes.push(format!(
                "{}: {}; it is taken as it is",
                layer.path.display(),
                change.what
            ));
            return Ok((layer, identity));
        }
        let Some(found) = self.moved(child, &layer.path).filter(|_| change.another) else {
            return Err(error);
        };
        self.gate.turn_back();
        let (right, identity) = self.enter(&found, Some(layer.format))?;
        if parent::change(&self.identity, &right, &identity)?.is_some() {
            return Err(error);
        }
        self.notes.push(self.moved_note(&layer.path, &found));
        Ok((right, identity))
    }

    /// Where the layer that the lowest one stands on is now, if not at `path`.
    fn moved(&self, child: &Path, path: &Path) -> Option<PathBuf> {
        if self.options.unprotected {
            return None;
        }
        search::find(child, path, &self.identity.label.as_ref()?.parent?)
    }

    fn moved_note(&self, old: &Path, new: &Path) -> String {
        format!(
            "the base was found by its id at '{}', not at '{}'; `vdisk rebase {} --accept-base` \
             records that",
            new.display(),
            old.display(),
            self.head.path.display()
        )
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
        let mut chain = Chain::new(self.head, self.lower, self.options.cache / 2);
        chain.notes = self.notes;
        chain
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
