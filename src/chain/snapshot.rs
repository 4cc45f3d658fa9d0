//! Snapshots of an idle disk: take one, go back to one, drop one, rename one.
//!
//! Every change writes new files, makes them durable, and takes effect with one rename over the
//! head's name. A crash leaves the old tree or the new one; what it leaves besides, the next open
//! for writing puts right (see [`super::heal`]).

use std::path::Path;
use std::time::SystemTime;

use super::open::{OpenOptions, open, open_image};
use super::tree::{Family, Member, clones_of, frozen_path};
use super::{Chain, Layer, heal, sealed, witness};
use crate::addr::GuestOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Backing, Id, Identity, Image, Label, Mapping, Parent, Role};
use crate::qcow2::{self, CreateOptions, Extension};
use crate::storage::Draft;
use crate::storage::draft::{link, remove, rename, sync_directory};

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
    (label.name, label.description) = (name.to_owned(), description.to_owned());
    freeze(&head, label)?;
    let done = put_head_on(path, &head);
    done.inspect_err(|_| thaw(path, &head))
}

/// Takes the disk back to the snapshot `name`. What changed since is dropped, or kept as a snapshot
/// of the name `keep`.
pub fn revert(path: &Path, name: &str, keep: Option<&str>) -> Result<()> {
    let head = open_head(path)?;
    let family = Family::of(path)?;
    let target = family.snapshot(name)?;
    if let Some(keep) = keep {
        check_new_name(path, keep)?;
        let mut label = head_label(&head)?;
        label.name = keep.to_owned();
        freeze(&head, label)?;
    }
    let parent = open_frozen(&target.path)?;
    let done = put_head_on(path, &parent);
    done.inspect_err(|_| keep.into_iter().for_each(|_| thaw(path, &head)))
}

/// The bytes of changes that going back to the snapshot `name` drops.
pub fn head_bytes(path: &Path, name: &str) -> Result<u64> {
    Family::of(path)?.snapshot(name)?;
    data_bytes(&*open_frozen_or_head(path)?.image)
}

/// What deleting a snapshot takes away.
#[derive(Debug, Clone)]
pub struct Deletion {
    /// Whether the disk goes back to the snapshot.
    pub moves_head: bool,
    /// The bytes of changes that are dropped.
    pub dropped: u64,
    /// Other snapshots that go with it.
    pub snapshots: Vec<String>,
}

/// What [`delete`] would take away.
///
/// # Errors
/// [`ErrorKind::Sealed`] where clones stand on the snapshot or, unless `tree`, other snapshots: the
/// text lists them.
pub fn plan_delete(path: &Path, name: &str, tree: bool) -> Result<Deletion> {
    let family = Family::of(path)?;
    let target = family.snapshot(name)?;
    let above = family.descendants(target.label.layer);
    let is_head = |m: &&Member| m.label.layer == family.head.label.layer;
    let others: Vec<&Member> = above.iter().copied().filter(|m| !is_head(m)).collect();
    let names: Vec<String> = others.iter().map(|m| m.label.name.clone()).collect();
    if !others.is_empty() && !tree {
        let message = format!(
            "snapshot '{name}' is not deleted: {} stand on the changes made since it. Delete or \
             merge them first, or drop them too with --tree",
            names.join(", ")
        );
        return Err(Error::new(ErrorKind::Sealed, message).at_path(path));
    }
    for member in others.iter().copied().chain([target]) {
        refuse_clones(member)?;
    }
    let moves_head = above.iter().any(is_head);
    let mut dropped = 0;
    // Where the disk goes back to the snapshot, its layer stays: only what came after goes.
    for member in above.iter().copied().chain((!moves_head).then_some(target)) {
        dropped += data_bytes(&*open_frozen_or_head(&member.path)?.image)?;
    }
    Ok(Deletion { moves_head, dropped, snapshots: names })
}

/// Deletes the snapshot `name` and the changes made since it: the disk returns to the moment it was
/// taken. A snapshot beside the disk's own line goes alone. With `tree`, snapshots that stand on
/// those changes go too.
///
/// # Errors
/// As [`plan_delete`].
pub fn delete(path: &Path, name: &str, tree: bool) -> Result<()> {
    let head = open_head(path)?;
    let plan = plan_delete(path, name, tree)?;
    let family = Family::of(path)?;
    let target = family.snapshot(name)?;
    let head_layer = family.head.label.layer;
    let above = family.descendants(target.label.layer);
    let direct = family.head.parent() == Some(target.label.layer);
    if plan.moves_head && !direct {
        // The head first leaves the layers that go: then each can go without breaking another.
        put_head_on(path, &open_frozen(&target.path)?)?;
    }
    for member in above.iter().filter(|m| m.label.layer != head_layer) {
        remove(&member.path)?;
    }
    if !plan.moves_head {
        remove(&target.path)?;
        return sync_directory(path);
    }
    drop(head);
    rename(&target.path, path)?;
    sync_directory(path)?;
    heal::heal(path)
}

/// Gives the snapshot `old` the name `new`.
pub fn rename_snapshot(path: &Path, old: &str, new: &str) -> Result<()> {
    let _head = open_head(path)?;
    let family = Family::of(path)?;
    let target = family.snapshot(old)?;
    check_new_name(path, new)?;
    witness::keeping_time(&target.path, || {
        let layer = open_image(&target.path, &unprotected())?;
        let mut identity = layer.image.identity()?;
        if let Some(label) = &mut identity.label {
            label.name = new.to_owned();
        }
        layer.image.set_identity(&identity).map_err(|e| e.at_path(&target.path))
    })
}

/// The bytes of data that a layer holds itself.
pub fn data_bytes(image: &dyn Image) -> Result<u64> {
    let (mut at, mut bytes) = (0, 0);
    while at < image.size() {
        let extent = image.map(GuestOffset(at), image.size() - at)?;
        if matches!(extent.mapping, Mapping::Data { .. } | Mapping::Compressed { .. }) {
            bytes += extent.len;
        }
        at += extent.len;
    }
    Ok(bytes)
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
    if identity.label.is_none() {
        sealed::refuse_unlabelled(path)?;
    }
    Ok(head)
}

fn open_frozen(path: &Path) -> Result<Layer> {
    open_image(path, &OpenOptions { unprotected: true, ..OpenOptions::default() })
}

/// Opens a layer for looking at its tables, whether or not this process holds it.
fn open_frozen_or_head(path: &Path) -> Result<Layer> {
    open_image(path, &OpenOptions { unprotected: true, shared: true, ..OpenOptions::default() })
}

/// The head's label; a new one for a file that other programs made.
fn head_label(head: &Layer) -> Result<Label> {
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

/// Makes the head's file a frozen layer with `label`'s name, under a second name beside the disk.
fn freeze(head: &Layer, mut label: Label) -> Result<()> {
    label.role = Role::Snapshot;
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
fn thaw(path: &Path, head: &Layer) {
    let _ = heal::thaw(path, head);
}

/// Replaces the head by an empty delta on the frozen layer `parent`.
fn put_head_on(path: &Path, parent: &Layer) -> Result<()> {
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

fn refuse_clones(member: &Member) -> Result<()> {
    let clones = clones_of(&member.path, Some(member.label.disk))?;
    if clones.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = clones.iter().map(|p| p.display().to_string()).collect();
    let message = format!(
        "is the layer of snapshot '{}', and clones stand on it: {}",
        member.label.name,
        names.join(", ")
    );
    Err(Error::new(ErrorKind::Sealed, message).at_path(&member.path))
}

pub(super) fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |d| d.as_millis() as u64)
}
