//! Snapshots of an idle disk: take one, go back to one, drop one, rename one, open one.
//!
//! Every change writes new files, makes them durable, and takes effect with one rename over the
//! head's name. A crash leaves the old tree or the new one; what it leaves besides, the next open
//! for writing puts right (see `crate::change::heal`).

use std::path::{Path, PathBuf};

use crate::chain::Chain;
use crate::change::names;
use crate::change::open::take_head;
use crate::change::plan::Keeping;
use crate::change::run::Run;
use crate::change::run::context::Context;
use crate::change::run::layer::refuse_encrypted;
use crate::change::run::step::{Demote, Step};
use crate::error::{Error, Result};
use crate::family::frozen_path;
use crate::family::tree::Family;
use crate::image::Role;
use crate::open::disk::Peek;
use crate::open::{Format, OpenOptions, open_layers};
use crate::storage::{Storage as _, Turn, follow, refuse_fixed};

pub use super::delete::{plan_delete, plan_delete_as, plan_revert};
pub use super::forget::{plan_forget, plan_forget_as};
pub use super::undo::plan_undo;
pub use crate::family::cost::data_bytes;
pub use crate::family::dropped::{KeptAside, kept_aside};

/// Freezes the disk as it is under `name`; the head goes on in a new, empty delta.
///
/// The work does not depend on the disk's size.
///
/// # Errors
/// [`ErrorKind::Exists`](crate::ErrorKind::Exists) where the disk has a snapshot of that name;
/// [`ErrorKind::InUse`](crate::ErrorKind::InUse) names who holds the disk.
pub fn create(path: &Path, name: &str, description: &str) -> Result<()> {
    let path = &follow(path)?;
    let _turn = Turn::take(path)?;
    let head = take_head(path)?;
    refuse_encrypted(&*head.image).map_err(|e| e.at_path(path))?;
    let identity = head.image.identity()?;
    let label = identity.label.clone().unwrap_or_default();
    let on = label.layer;
    refuse_fixed(path, &frozen_path(path, on))?;
    let family = match identity.label {
        Some(_) => Family::of(path)?,
        None => {
            let allocated = head.file.allocated()?;
            Family::of_one(path, label, Peek { identity, size: head.image.size(), allocated })
        }
    };
    names::check_new(&family, name)?;
    let (name, description) = (name.to_owned(), description.to_owned());
    let (role, kept) = (Role::Snapshot, None);
    let steps = [
        // They go on recording in the new head, and say there all that they said.
        Step::ReadBitmaps,
        Step::Demote(Demote { role, name, description, kept, durably: false }),
        Step::NewHead { on, bitmaps: true },
    ];
    Run::new(Context::Idle, family).holding(head).quietly(&steps)
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
    let path = follow(path)?;
    let _turn = Turn::take(&path)?;
    let head = take_head(&path)?;
    let family = Family::of(&path)?;
    let steps = rename(&family, old, new)?;
    Run::new(Context::Idle, family).holding(head).quietly(&steps)
}

/// The steps that give the snapshot `old` the name `new`.
pub(crate) fn rename(family: &Family, old: &str, new: &str) -> Result<Vec<Step>> {
    let layer = family.snapshot(old)?.label.layer;
    names::check_new(family, new)?;
    Ok(vec![Step::Rename { layer, name: new.to_owned() }])
}

/// Opens the disk as it was at the snapshot `name`, for reading.
pub fn open_at(path: &Path, name: &str, options: &OpenOptions) -> Result<Chain> {
    let layer = layer_of(path, name, options.format)?;
    let format = Some(Format::Qcow2);
    open_layers(&layer, &OpenOptions { read_only: true, format, ..options.clone() })
}

/// The file of the snapshot `name`, of a disk of the format that the user says, if he says one.
///
/// # Errors
/// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) tells which snapshots there are;
/// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) for a format that has none.
pub fn layer_of(path: &Path, name: &str, format: Option<Format>) -> Result<PathBuf> {
    if let Some(format) = format.filter(|format| *format != Format::Qcow2) {
        return Err(Error::invalid(format!("a {format} disk has no snapshots")).at_path(path));
    }
    Ok(Family::of(path)?.snapshot(name)?.path.clone())
}
