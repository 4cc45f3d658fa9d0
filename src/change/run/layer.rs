//! Changing what an open layer says of itself.
//!
//! It knows labels, and no tree.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::chain::Layer;
use crate::error::{Error, Result};
use crate::family::standing::Standing;
use crate::image::{Backing, Identity, Image, Label, Role};
use crate::open::{OpenOptions, fingerprint, open_image};
use crate::qcow2::{CreateOptions, Extension};

/// For a layer that is opened alone by whoever changes the tree.
pub(crate) fn unprotected() -> OpenOptions {
    OpenOptions { unprotected: true, ..OpenOptions::writable() }
}

/// As [`unprotected`], for changes after which the layer shows what it showed.
pub(crate) fn same_contents() -> OpenOptions {
    OpenOptions { same_contents: true, ..unprotected() }
}

/// Opens a frozen layer for reading.
pub(crate) fn open_frozen(path: &Path) -> Result<Layer> {
    open_image(path, &OpenOptions { unprotected: true, ..OpenOptions::default() })
}

/// Changes what an open layer says of itself; returns what it says then. Its contents stay vouched for if
/// they were, and its clones go on knowing it again.
pub(crate) fn reidentify(layer: &Layer, change: impl FnOnce(&mut Identity)) -> Result<Identity> {
    let mut identity = layer.image.identity()?;
    let is_head = identity.label.as_ref().is_none_or(|label| label.role == Role::Head);
    change(&mut identity);
    let work = || layer.image.set_identity(&identity).map_err(|e| e.at_path(&layer.path));
    // Nobody stands on a head, and its user may be writing it.
    if is_head {
        work()?
    } else {
        fingerprint::keeping_time(&layer.path, work)?
    }
    Ok(identity)
}

/// As [`reidentify`], for its label alone.
pub(crate) fn relabel(layer: &Layer, change: impl FnOnce(&mut Label)) -> Result<Identity> {
    reidentify(layer, |identity| {
        if let Some(label) = &mut identity.label {
            change(label);
        }
    })
}

/// Refuses to go on with a layer that clones stand on by now: whoever made them had it open, and has
/// let go of it.
pub(crate) fn refuse_cloned(layer: &Layer) -> Result<()> {
    let identity = layer.image.identity()?;
    let Some(label) = &identity.label else { return Ok(()) };
    let what = format!("the layer of snapshot '{}'", label.name);
    Standing::by_label(&layer.path, label, None).refuse(&layer.path, &what)
}

/// Whether the name `path` still means the file that is open as `layer`.
pub(crate) fn same_open_file(path: &Path, layer: &Layer) -> Result<bool> {
    let meta =
        std::fs::metadata(path).map_err(|e| Error::io("could not be examined", e).at_path(path))?;
    Ok((meta.dev(), meta.ino()) == layer.file.identity()?)
}

/// Refuses to make an ordinary delta on an encrypted layer.
pub(crate) fn refuse_encrypted(parent: &dyn Image) -> Result<()> {
    if !parent.encrypted() {
        return Ok(());
    }
    Err(Error::unsupported(
        "is encrypted, and what is written to the new layer of a snapshot or a clone would not be: \
         make a full copy instead",
    ))
}

/// The properties of a delta on `parent`.
pub(crate) fn delta_options(
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
