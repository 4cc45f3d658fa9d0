//! Snapshots of an idle disk: take one, go back to one, drop one, rename one.
//!
//! Every change writes new files, makes them durable, and takes effect with one rename over the
//! head's name. A crash leaves the old tree or the new one; what it leaves besides, the next open
//! for writing puts right (see [`super::heal`]).

use std::path::Path;

use super::open::{OpenOptions, open, open_image};
use super::plan::Keeping;
use super::reach::Reach;
use super::tree::{Family, frozen_path};
use super::{Chain, Layer, heal, sealed, witness};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Backing, Id, Identity, Image, Label, Parent, Role};
use crate::qcow2::{self, CreateOptions, Extension};
use crate::storage::Draft;
use crate::storage::draft::link;

pub use super::aside::{KeptAside, kept_aside, plan_forget};
pub use super::cost::data_bytes;
pub use super::delete::{plan_delete, plan_revert};
pub use super::undo::plan_undo;

pub(super) use super::plan::now;

/// Freezes the disk as it is under `name`; the head goes on in a new, empty delta.
///
/// The work does not depend on the disk's size.
///
/// # Errors
/// [`ErrorKind::Exists`] where the disk has a snapshot of that name; [`ErrorKind::InUse`] names who
/// holds the disk.
pub fn create(path: &Path, name: &str, description: &str) -> Result<()> {
    let head = open_head(path)?;
    refuse_encrypted(&*head.image).map_err(|e| e.at_path(path))?;
    let mut label = head_label(&head)?;
    check_new_name(path, name)?;
    label.role = Role::Snapshot;
    (label.name, label.description) = (name.to_owned(), description.to_owned());
    freeze(&head, label)?;
    let done = put_head_on(path, &head);
    done.inspect_err(|_| thaw(path, &head))
}

/// Takes the disk back to the snapshot `name`. What changed since is kept aside for a time, or kept
/// as a snapshot of the name `keep`.
pub fn revert(path: &Path, name: &str, keep: Option<&str>) -> Result<()> {
    plan_revert(path, name, keep, Keeping::default())?.execute(&mut |_, _| true)
}

/// Deletes the snapshot `name` and the changes made since it, which are kept aside for a time. With
/// `tree`, snapshots that stand on those changes go too.
///
/// # Errors
/// As [`plan_delete`].
pub fn delete(path: &Path, name: &str, tree: bool) -> Result<()> {
    plan_delete(path, name, tree, Keeping::default())?.execute(&mut |_, _| true)
}

/// Gives the snapshot `old` the name `new`.
pub fn rename_snapshot(path: &Path, old: &str, new: &str) -> Result<()> {
    let _head = open_head(path)?;
    rename_in(&Reach::Idle, path, old, new)
}

pub(super) fn rename_in(reach: &Reach<'_>, path: &Path, old: &str, new: &str) -> Result<()> {
    let family = Family::of(path)?;
    let target = family.snapshot(old)?;
    check_new_name(path, new)?;
    let layer = reach.open(&target.path)?;
    relabel(&layer, |label| label.name = new.to_owned())
}

/// Changes what an open layer's label says. Its contents stay vouched for if they were, and its
/// clones go on knowing it again.
pub(super) fn relabel(layer: &Layer, change: impl FnOnce(&mut Label)) -> Result<()> {
    witness::keeping_time(&layer.path, || {
        let mut identity = layer.image.identity()?;
        if let Some(label) = &mut identity.label {
            change(label);
        }
        layer.image.set_identity(&identity).map_err(|e| e.at_path(&layer.path))
    })
}

pub(super) fn unprotected() -> OpenOptions {
    OpenOptions { unprotected: true, ..OpenOptions::writable() }
}

/// Opens the disk as it was at the snapshot `name`, for reading.
pub fn open_at(path: &Path, name: &str, options: &OpenOptions) -> Result<Chain> {
    let family = Family::of(path)?;
    let layer = family.snapshot(name)?;
    open(&layer.path, &OpenOptions { read_only: true, format: None, ..options.clone() })
}

/// Opens the head alone, for writing: nobody else has the disk meanwhile.
pub(super) fn open_head(path: &Path) -> Result<Layer> {
    heal::heal(path)?;
    let head = open_image(path, &unprotected())?;
    let identity = head.image.identity()?;
    sealed::refuse(path, &identity)?;
    sealed::refuse_unaware(path, &identity)?;
    Ok(head)
}

/// The head's label; a new one for a file that other programs made.
pub(super) fn head_label(head: &Layer) -> Result<Label> {
    Ok(head.image.identity()?.label.unwrap_or_default())
}

pub(super) fn check_new_name(path: &Path, name: &str) -> Result<()> {
    if name.is_empty() || name.len() > Label::MAX_NAME || name.chars().any(char::is_control) {
        let message = format!(
            "'{}' is no name for a snapshot: 1 to {} bytes, without control characters",
            name.escape_debug(),
            Label::MAX_NAME
        );
        return Err(Error::invalid(message));
    }
    let family = Family::read(path)?;
    if family.is_some_and(|f| f.snapshots().any(|m| m.label.name == name)) {
        let message = format!("has a snapshot '{name}' already");
        return Err(Error::new(ErrorKind::Exists, message).at_path(path));
    }
    Ok(())
}

/// Makes the head's file the frozen layer that `label` says, under a second name beside the disk.
pub(super) fn freeze(head: &Layer, mut label: Label) -> Result<()> {
    label.content = Id::new_v4();
    label.time = now();
    let identity =
        Identity { label: Some(label.clone()), backing: head.image.backing(), vouched: true };
    head.image.flush()?;
    head.image.set_identity(&identity).map_err(|e| e.at_path(&head.path))?;
    let linked = link(&head.path, &frozen_path(&head.path, label.layer));
    linked.inspect_err(|_| thaw(&head.path, head))
}

/// Undoes [`freeze`] after a failure. If that fails too, the next open does it.
pub(super) fn thaw(path: &Path, head: &Layer) {
    let _ = heal::thaw(path, head);
}

/// Replaces the head by an empty delta on the frozen layer `parent`.
pub(super) fn put_head_on(path: &Path, parent: &Layer) -> Result<()> {
    let identity = parent.image.identity()?;
    let label = identity.label.unwrap_or_default();
    let frozen = frozen_path(path, label.layer);
    let name = frozen.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Version 2 images have no bit that vouches for their contents.
    let content = if identity.vouched { label.content } else { Id::nil() };
    let delta = Label {
        disk: label.disk,
        parent: Some(Parent { layer: label.layer, content, witness: None }),
        ..Label::new()
    };
    let backing = Backing { name, format: Some(parent.format.name().to_owned()) };
    let draft = Draft::new(path)?;
    let options = delta_options(&*parent.image, backing, &delta)?;
    drop(qcow2::create(draft.storage(), &options).map_err(|e| e.at_path(path))?);
    draft.replace()
}

/// Refuses to make an ordinary delta on an encrypted layer.
pub(super) fn refuse_encrypted(parent: &dyn Image) -> Result<()> {
    if !parent.encrypted() {
        return Ok(());
    }
    Err(Error::unsupported(
        "is encrypted, and what is written to the new layer of a snapshot or a clone would not be: \
         make a full copy instead",
    ))
}

/// The properties of a delta on `parent`.
pub(super) fn delta_options(
    parent: &dyn Image,
    backing: Backing,
    label: &Label,
) -> Result<CreateOptions> {
    refuse_encrypted(parent)?;
    let defaults = CreateOptions::new(parent.size());
    let (cluster, unit) = (parent.cluster(), parent.granularity());
    let like_parent = (9..=21).contains(&cluster.bits()) && unit.bits() > 0;
    Ok(CreateOptions {
        cluster: if like_parent { cluster } else { defaults.cluster },
        extended_l2: like_parent && unit != cluster,
        backing: Some(backing),
        extensions: vec![Extension { magic: Label::MAGIC, data: label.encode()? }],
        ..defaults
    })
}
