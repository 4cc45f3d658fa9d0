//! Going down a chain a layer at a time: from the head to the base, each name through the gate.

use std::path::{Path, PathBuf};

use crate::chain::{Chain, Layer};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Backing, Identity, Role};
use crate::open::disk::open_image;
use crate::open::gate::{Format, Gate, Named};
use crate::open::options::OpenOptions;
use crate::open::{foreign, gate, parent, search};
use crate::storage::follow;

/// Asked before a head is written, by its file and what that says of itself: whether it may be. What
/// stands on whom is not known here.
pub type Guard<'a> = dyn Fn(&Path, &Identity) -> Result<()> + 'a;

/// The guard of those who know no trees: by the label alone.
///
/// # Errors
/// [`ErrorKind::Sealed`] for whatever is no head.
pub fn by_label(path: &Path, identity: &Identity) -> Result<()> {
    match &identity.label {
        Some(label) if label.role != Role::Head => {
            let message = format!("is sealed ({}), and is not written", label.role.name());
            Err(Error::new(ErrorKind::Sealed, message).at_path(path))
        }
        _ => Ok(()),
    }
}

/// Opens the disk at `path` with all layers below it as they stand: what an interrupted change of the
/// tree left is left. For the user of a disk, [`crate::change::open`] is right.
///
/// # Errors
/// [`ErrorKind::Sealed`] for writing to a layer that others stand on;
/// [`ErrorKind::BaseChanged`] where a layer below is not the one its child was made from; others name
/// the file that they are about.
pub(crate) fn open_layers(path: &Path, options: &OpenOptions) -> Result<Chain> {
    Walk::begin(path, options, &by_label)?.down_to_the_base()
}

/// Going down a chain: the layers that are open so far.
pub struct Walk {
    gate: Gate,
    options: OpenOptions,
    head: Layer,
    /// The name that was given for the head, where that is a link to its file.
    given: Option<PathBuf>,
    /// From the layer below the head down.
    lower: Vec<Layer>,
    /// What the lowest layer so far says.
    identity: Identity,
    /// What the user should know.
    notes: Vec<String>,
}

impl Walk {
    /// Opens the head at `path`. Where that is a symbolic link, the head is the file that it leads to.
    /// `guard` is asked where it is opened for writing, unless it is opened
    /// [unprotected](OpenOptions::unprotected).
    pub fn begin(path: &Path, options: &OpenOptions, guard: &Guard<'_>) -> Result<Walk> {
        let real = follow(path)?;
        let given = (real != path).then(|| path.to_path_buf());
        let path = &real;
        let head = open_image(path, options)?;
        // Not before it is open: who had it until then may have given its name to another file.
        let walk = Walk::from_head(head, options, guard)?;
        Ok(Walk { given, ..walk })
    }

    /// Begins at a head that is open already.
    pub fn from_head(head: Layer, options: &OpenOptions, guard: &Guard<'_>) -> Result<Walk> {
        let mut gate = Gate::new();
        gate.pass(&head.path)?;
        let identity = identity(&head)?;
        if options.is_guarded() {
            guard(&head.path, &identity)?;
        }
        let (lower, notes) = (Vec::new(), Vec::new());
        Ok(Walk { gate, options: options.clone(), head, given: None, lower, identity, notes })
    }

    /// Opens all layers that are left, down to the base.
    pub fn down_to_the_base(mut self) -> Result<Chain> {
        while self.step()? {}
        Ok(self.finish())
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
        let other = match path.exists() {
            true => None,
            false => self.by_other_name(&child, &backing),
        };
        // Which of the two names it is beside is the user's to say: he gave both.
        let (named_by, path) = other.unwrap_or((child.clone(), path));
        let provable = self.identity.label.as_ref().is_some_and(|label| label.parent.is_some());
        if !self.options.follow && !provable {
            gate::admit_beside(&named_by, &backing.name, &path, Named::Base)?;
        }
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

    /// Whether the lowest layer, `child`, reaches `target` by the name that it records, or by what that
    /// means from where its other name stands.
    fn reaches(&self, child: &Path, backing: &Backing, target: &Path) -> bool {
        let other = || self.by_other_name(child, backing).filter(|(_, path)| path == target);
        gate::reaches(child, &backing.name, target)
            || other().is_some_and(|(name, path)| gate::reaches(&name, &backing.name, &path))
    }

    /// What `backing` means from where the other name of the lowest layer, `child`, stands: that of a
    /// link to it, or that of the file itself. `None` where there is nothing.
    fn by_other_name(&self, child: &Path, backing: &Backing) -> Option<(PathBuf, PathBuf)> {
        let other = match self.lower.is_empty() {
            true => self.given.clone(),
            false => follow(child).ok().filter(|real| real != child),
        };
        let other = other?;
        let path = gate::resolve(&other, &backing.name).ok().filter(|path| path.exists())?;
        Some((other, path))
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
        let reached = self.options.follow
            || self.recorded().is_some_and(|b| self.reaches(child, b, &layer.path))
            || parent::vouches(&self.identity, &layer, &identity)?;
        let refused = || gate::refused(child, &layer.path, Named::Base);
        if self.options.unprotected {
            return if reached { Ok((layer, identity)) } else { Err(refused()) };
        }
        let Some(change) = parent::change(&self.identity, &layer, &identity)? else {
            return if reached { Ok((layer, identity)) } else { Err(refused()) };
        };
        let error = parent::changed(&self.head.path, child, &layer.path, &change, !reached);
        if self.options.accept_base && !reached {
            return Err(refused());
        }
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
