//! The head's file as a frozen layer, an empty delta in its place, and the way back.

use std::path::Path;

use crate::chain::Layer;
use crate::change::run::layer::{delta_options, same_open_file};
use crate::error::Result;
use crate::family::dropped::now;
use crate::family::frozen_path;
use crate::image::{Backing, Bitmap, Bitmaps as _, Id, Identity, Label, Parent, Role};
use crate::open::gate;
use crate::open::gate::same_file;
use crate::qcow2;
use crate::storage::name::{link, remove, sync_directory};
use crate::storage::{Draft, refuse_fixed};

/// A head that is ready to take the place of the one before.
pub(crate) struct Ready {
    /// Its file, which has no name yet.
    pub draft: Draft,
    /// What it says of itself.
    pub identity: Identity,
    /// How large what it shows is, in bytes.
    pub size: u64,
}

/// Makes the head's file the frozen layer that `label` says, under a second name beside the disk; returns
/// what it says by then.
///
/// # Errors
/// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) where it has a second name already, which would be
/// the layer's too.
pub(crate) fn demote(head: &Layer, mut label: Label) -> Result<Identity> {
    let frozen = frozen_path(&head.path, label.layer);
    refuse_fixed(&head.path, &frozen)?;
    label.content = Id::new_v4();
    label.clones = None;
    label.time = now();
    let identity = Identity { label: Some(label), backing: head.image.backing(), vouched: true };
    head.image.flush()?;
    head.image.set_identity(&identity).map_err(|e| e.at_path(&head.path))?;
    link(&head.path, &frozen).inspect_err(|_| _ = promote(&head.path, head))?;
    Ok(identity)
}

/// Makes a file at the head's name that is marked frozen the head again. Where another file has
/// the name by now, the change took effect, though it failed later: nothing is taken back. If that
/// fails, the next open does it.
pub(crate) fn promote(path: &Path, head: &Layer) -> Result<()> {
    if !same_open_file(path, head)? {
        return Ok(());
    }
    let mut identity = head.image.identity()?;
    let Some(label) = &mut identity.label else { return Ok(()) };
    let second = frozen_path(path, label.layer);
    if second != path && same_file(&second, path) {
        remove(&second)?;
        sync_directory(path)?;
    }
    label.role = Role::Head;
    label.time = 0;
    label.name.clear();
    label.description.clear();
    (label.kept, label.clones) = (None, None);
    identity.vouched = false;
    head.image.set_identity(&identity).map_err(|e| e.at_path(path))
}

/// Replaces the head by an empty delta on the frozen layer `parent`, with such bitmaps; returns what that
/// says of itself.
pub(super) fn put_head_on(path: &Path, parent: &Layer, bitmaps: &[Bitmap]) -> Result<Identity> {
    let (draft, identity) = delta_on(path, parent, bitmaps)?;
    draft.replace()?;
    Ok(identity)
}

/// An empty delta on the frozen layer `parent`, with such bitmaps, that is to take the head's name; and what it says of
/// itself.
pub(crate) fn delta_on(
    path: &Path,
    parent: &Layer,
    bitmaps: &[Bitmap],
) -> Result<(Draft, Identity)> {
    let identity = parent.image.identity()?;
    let label = identity.label.unwrap_or_default();
    // The head has just got its second name; any other layer keeps the one that it has.
    let is_head = parent.path == path;
    let frozen = if is_head { frozen_path(path, label.layer) } else { parent.path.clone() };
    let name = gate::record(Path::new(frozen.file_name().unwrap_or_default()))?;
    // Version 2 images have no bit that vouches for their contents.
    let content = if identity.vouched { label.content } else { Id::nil() };
    let delta = Label {
        disk: label.disk,
        parent: Some(Parent { layer: label.layer, content, stamp: None }),
        config: label.config,
        ..Label::new()
    };
    let backing = Backing { name, format: Some(parent.format.name().to_owned()) };
    let draft = Draft::replacing(path)?;
    let options = delta_options(&*parent.image, backing.clone(), &delta)?;
    let made = qcow2::create(draft.storage(), &options);
    made.and_then(|image| image.add_to_bitmaps(bitmaps)).map_err(|e| e.at_path(path))?;
    Ok((draft, Identity { label: Some(delta), backing: Some(backing), vouched: false }))
}
