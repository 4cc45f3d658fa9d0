//! Linked clones: an empty delta on a base, which is sealed from then on.

use std::fs;
use std::path::{Component, Path, PathBuf};

use super::open::{OpenOptions, open_image};
use super::snapshot::{delta_options, refuse_encrypted, unprotected};
use super::tree::{clones_of, same_file};
use super::{Format, Layer, create, heal, sealed, witness};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Backing, Id, Identity, Image as _, Label, Parent, Role};
use crate::qcow2;
use crate::storage::Draft;
use crate::storage::draft::{directory, publish_all};

/// How many clones are made at once: each is an open file.
const BATCH: usize = 256;

/// A base that clones can be made of.
pub struct Base {
    layer: Layer,
    /// The base's file, without symbolic links.
    path: PathBuf,
    parent: Parent,
}

impl Base {
    /// Opens and seals the layer at `path`: it is not written any more while it is a base. A file
    /// that cannot be written, and one that has no header, stay as they are.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where somebody writes to it.
    pub fn seal(path: &Path) -> Result<Base> {
        Base::seal_as(path, None)
    }

    /// The same for a layer whose format is known: nothing is guessed from what a guest wrote.
    pub(super) fn seal_as(path: &Path, format: Option<Format>) -> Result<Base> {
        let path =
            fs::canonicalize(path).map_err(|e| Error::io("could not be found", e).at_path(path))?;
        let options = OpenOptions { unprotected: true, format, ..OpenOptions::default() };
        let read = || open_image(&path, &options);
        let mut layer = read()?;
        refuse_encrypted(&*layer.image).map_err(|e| e.at_path(&path))?;
        let mut identity = layer.image.identity()?;
        refuse_passing(&path, &identity)?;
        if !is_sealed(&layer, &identity) {
            let format = layer.format;
            drop(layer);
            if format == Format::Qcow2 {
                witness::keeping_time(&path, || seal(&path))?;
            }
            layer = read()?;
            identity = layer.image.identity()?;
        }
        let parent = as_parent(&layer, &identity)?;
        Ok(Base { layer, path, parent })
    }

    /// Makes a clone at each of `paths`, none of which must exist. The work does not depend on the
    /// base's size. Thousands of clones are made durable a few hundred at a time; what is made when
    /// it fails or is interrupted stays, and is whole.
    ///
    /// # Errors
    /// [`ErrorKind::Interrupted`] where `progress`, told how many are made, asks to stop.
    pub fn clone_all(
        &self,
        paths: &[PathBuf],
        progress: &mut dyn FnMut(usize) -> bool,
    ) -> Result<()> {
        for (number, batch) in paths.chunks(BATCH).enumerate() {
            if !progress(number * BATCH) {
                let message = format!("interrupted; {} clones were made", number * BATCH);
                return Err(Error::new(ErrorKind::Interrupted, message));
            }
            let drafts = batch.iter().map(|path| self.draft(path)).collect::<Result<Vec<_>>>()?;
            publish_all(drafts)?;
        }
        Ok(())
    }

    /// Makes a clone at `path`, which must not exist.
    pub fn clone_to(&self, path: &Path) -> Result<()> {
        self.clone_all(&[path.to_path_buf()], &mut |_| true)
    }

    fn draft(&self, path: &Path) -> Result<Draft> {
        create::refuse_existing(path)?;
        let label = Label { parent: Some(self.parent), ..Label::new() };
        let options = delta_options(&*self.layer.image, self.backing_for(path)?, &label)?;
        let draft = Draft::new(path)?;
        let made = qcow2::create(draft.storage(), &options).and_then(|image| image.flush());
        made.map_err(|e| e.at_path(path))?;
        Ok(draft)
    }

    /// The base's file, without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The base as its clones remember it.
    pub(super) fn parent(&self) -> Parent {
        self.parent
    }

    /// Refuses a base that stands on `disk` itself.
    pub(super) fn refuse_below(&self, disk: &Path) -> Result<()> {
        let options = OpenOptions { unprotected: true, ..OpenOptions::default() };
        let stands_on = super::open(&self.path, &options)?.all_layers();
        if stands_on.iter().any(|layer| same_file(&layer.path, disk)) {
            let message = format!("cannot stand on '{}', which stands on it", self.path.display());
            return Err(Error::invalid(message).at_path(disk));
        }
        Ok(())
    }

    /// The base as an image at `path` names it: relative to the image's directory.
    pub(super) fn backing_for(&self, path: &Path) -> Result<Backing> {
        let dir = directory(path);
        let dir =
            fs::canonicalize(dir).map_err(|e| Error::io("could not be found", e).at_path(dir))?;
        let name = relative(&dir, &self.path);
        let name = name.to_str().ok_or_else(|| {
            Error::unsupported("the base's path is not UTF-8").at_path(&self.path)
        })?;
        Ok(Backing { name: name.to_owned(), format: Some(self.layer.format.name().to_owned()) })
    }
}

/// Sealed, and vouched for where its format can say so.
fn is_sealed(layer: &Layer, identity: &Identity) -> bool {
    let can_vouch = layer.image.details().is_some_and(|d| d.version != Some(2));
    let frozen = identity.label.as_ref().is_some_and(|l| l.role != Role::Head);
    frozen && (identity.vouched || !can_vouch)
}

/// The layer at `path` as one that is put on it should remember it. It is not sealed.
pub fn remembered(path: &Path, format: Option<Format>) -> Result<Parent> {
    let options = OpenOptions { unprotected: true, format, ..OpenOptions::default() };
    let layer = open_image(path, &options)?;
    as_parent(&layer, &layer.image.identity()?)
}

/// A layer as those on it remember it.
fn as_parent(layer: &Layer, identity: &Identity) -> Result<Parent> {
    let label = identity.label.as_ref();
    let content = label.filter(|_| identity.vouched).map_or(Id::nil(), |l| l.content);
    let witness = Some(witness::of(layer, !content.is_nil())?);
    Ok(Parent { layer: label.map_or(Id::nil(), |l| l.layer), content, witness })
}

/// Refuses a layer that will not stay.
fn refuse_passing(path: &Path, identity: &Identity) -> Result<()> {
    let message = match identity.label.as_ref().map(|l| l.role) {
        None | Some(Role::Head | Role::Snapshot | Role::Base) => return Ok(()),
        Some(Role::Merging | Role::Rising | Role::Leaving) => "is being merged",
        Some(_) => "is only kept aside for `vdisk snapshot undo`",
    };
    Err(Error::new(ErrorKind::Sealed, message).at_path(path))
}

fn seal(path: &Path) -> Result<()> {
    heal::heal(path)?;
    let layer = match open_image(path, &unprotected()) {
        // A golden image that only root may write is as good as sealed.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS)) => {
            return Ok(());
        }
        other => other?,
    };
    let mut identity = layer.image.identity()?;
    let label = identity.label.get_or_insert_default();
    if label.role == Role::Head {
        label.role = Role::Base;
    }
    label.content = Id::new_v4();
    identity.vouched = true;
    layer.image.set_identity(&identity).map_err(|e| e.at_path(path))
}

/// Makes a base an ordinary disk again.
///
/// # Errors
/// [`ErrorKind::Sealed`] lists the clones in its directory that stand on it.
pub fn unseal(path: &Path) -> Result<()> {
    let clones = clones_of(path, None)?;
    if !clones.is_empty() {
        let message = format!("clones stand on it: {}", sealed::list(&clones));
        return Err(Error::new(ErrorKind::Sealed, message).at_path(path));
    }
    let layer = open_image(path, &unprotected())?;
    let mut identity = layer.image.identity()?;
    match &mut identity.label {
        Some(label) if label.role == Role::Base => label.role = Role::Head,
        _ => return Err(Error::invalid("is not sealed").at_path(path)),
    }
    identity.vouched = false;
    layer.image.set_identity(&identity).map_err(|e| e.at_path(path))
}

/// The path from the directory `from` to `to`; both are absolute and without symbolic links.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let mut from = from.components().peekable();
    let mut to = to.components().peekable();
    while let (Some(a), Some(b)) = (from.peek(), to.peek()) {
        if a != b {
            break;
        }
        from.next();
        to.next();
    }
    from.map(|_| Component::ParentDir).chain(to).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_is_named_relative_to_its_clone() {
        let of = |a: &str, b: &str| relative(Path::new(a), Path::new(b)).display().to_string();
        assert_eq!(of("/vm", "/vm/base"), "base");
        assert_eq!(of("/vm/clones", "/vm/base"), "../base");
        assert_eq!(of("/a/b", "/c/base"), "../../c/base");
    }
}
