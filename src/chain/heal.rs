//! Finishing or rolling back what an interrupted change of the tree left.
//!
//! Every step of a change leaves one of these, each of which says itself what to do:
//!
//! * the head's file is marked as a frozen layer: a snapshot was not finished, or a delete was not:
//!   it is the head, and its second name, if any, goes;
//! * a layer is *leaving*: its children hold all of it; those still on it are moved to its parent;
//! * a layer is *merging*: its child is folded into it, again if need be, once there is room;
//! * a layer is *rising*: so is it into its children;
//! * a layer is *dropping*, or *returning*: the others that go with it follow it;
//! * what is kept aside has no right to stay any more: its time is over, or a part of it is gone;
//! * a layer carries the label of another file, which stands on it: it takes that file's name;
//! * a hidden draft of a process that is gone: it goes.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::live::Live;
use super::open::peek;
use super::reach::Reach;
use super::tree::{Family, Member, frozen_path, names_beside, same_file};
use super::{Layer, aside, delete, gate, merge, undo};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Id, Role};
use crate::storage::draft::{remove, rename, sync_directory};
use crate::storage::{Access, FileOptions, FileStorage};

/// Puts right what an interrupted command left of the disk at `path`. Does nothing, and takes no
/// lock, where nothing was left.
pub(super) fn heal(path: &Path) -> Result<()> {
    remove_drafts(path)?;
    match Family::read(path)? {
        // Whoever has the disk may be in the midst of what looks interrupted, and puts it right.
        Some(family) if is_left(path, &family) && !is_held(path)? => {
            mend(&Reach::Idle, path, family)
        }
        _ => Ok(()),
    }
}

/// As [`heal`], for a disk in use. A merge that was interrupted waits until it is asked for.
pub(super) fn heal_held(live: &Live) -> Result<()> {
    match Family::read(live.path())? {
        Some(family) if is_left(live.path(), &family) => {
            mend(&Reach::Held(live), live.path(), family)?;
            live.settle()
        }
        _ => Ok(()),
    }
}

/// Whether something was left that is to be put right.
fn is_left(path: &Path, family: &Family) -> bool {
    // Another disk's layer is put right by that disk's name.
    if is_frozen_name(path, family.head.label.layer) {
        return false;
    }
    let marked = |m: &Member| match m.label.role {
        Role::Returning | Role::Dropping | Role::Leaving | Role::Merging | Role::Rising => true,
        _ => frozen_path(path, m.label.layer) != m.path,
    };
    matches!(family.head.label.role, Role::Snapshot | Role::Dropped)
        || matches!(family.head.label.role, Role::Dropping | Role::Returning)
        || family.layers.iter().any(marked)
        || !aside::is_tidy(family)
}

/// Whether somebody has the disk, so that it cannot be written now.
fn is_held(path: &Path) -> Result<bool> {
    let options = FileOptions { access: Some(Access::Write), write: false };
    match FileStorage::open(path, options) {
        Err(e) if e.kind() == ErrorKind::InUse => Ok(true),
        other => other.map(|_| false),
    }
}

fn mend(reach: &Reach<'_>, path: &Path, mut family: Family) -> Result<()> {
    if family.members().any(|m| m.label.role == Role::Returning) {
        // Before the head's file is looked at: it may be frozen, and about to be replaced.
        bearing(undo::finish(reach, path))?;
        family = Family::of(path)?;
    }
    if finish(reach, path, &family)? {
        family = Family::of(path)?;
    }
    bearing(aside::tidy(reach, path, &family))
}

/// Finishes or takes back what was interrupted; whether there was anything.
fn finish(reach: &Reach<'_>, path: &Path, family: &Family) -> Result<bool> {
    let mut found = false;
    let frozen = matches!(family.head.label.role, Role::Snapshot | Role::Dropped | Role::Dropping);
    if frozen {
        found = true;
        thaw(path, &*reach.open(path)?)?;
    }
    for layer in &family.layers {
        if frozen_path(path, layer.label.layer) != layer.path {
            found = true;
            finish_rename(path, &layer.path)?;
            reach.touch();
        }
    }
    for layer in &family.layers {
        match layer.label.role {
            Role::Dropping => bearing(delete::finish(reach, path))?,
            Role::Leaving => merge::leave(reach, path, layer.label.layer)?,
            Role::Merging | Role::Rising if reach.held().is_none() => {
                bearing(merge::resume(reach, path, layer.label.layer, &mut |_, _| true))?;
            }
            _ => continue,
        }
        found = true;
    }
    Ok(found)
}

/// Where there is no room to finish, or somebody looks at a layer, the disk is right as it is.
pub(super) fn bearing(done: Result<()>) -> Result<()> {
    match done {
        Err(e) if matches!(e.kind(), ErrorKind::NoSpace | ErrorKind::InUse) => Ok(()),
        done => done,
    }
}

/// Whether the file has the name of the frozen layer that it is: then it is no head.
fn is_frozen_name(path: &Path, layer: Id) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.rsplit_once('.').map_or(&*name, |(stem, _)| stem);
    let id = stem.rsplit_once('@').map(|(_, id)| id);
    id.is_some_and(|id| id.len() == 12 && layer.simple().to_string().starts_with(id))
}

/// Makes a file at the head's name that is marked frozen the head again. Where another file has
/// the name by now, the change took effect, though it failed later: nothing is taken back.
pub(super) fn thaw(path: &Path, head: &Layer) -> Result<()> {
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
    label.kept = None;
    identity.vouched = false;
    head.image.set_identity(&identity).map_err(|e| e.at_path(path))
}

pub(super) fn same_open_file(path: &Path, layer: &Layer) -> Result<bool> {
    let meta =
        std::fs::metadata(path).map_err(|e| Error::io("could not be examined", e).at_path(path))?;
    Ok((meta.dev(), meta.ino()) == layer.file.identity()?)
}

/// A layer that took over the label of the layer above it takes its name too.
fn finish_rename(head: &Path, layer: &Path) -> Result<()> {
    let Some(label) = peek(layer)?.and_then(|p| p.identity.label) else { return Ok(()) };
    let target = match label.role {
        Role::Head => head.to_path_buf(),
        _ => frozen_path(head, label.layer),
    };
    let Ok(Some(above)) = peek(&target) else { return Ok(()) };
    let same_layer = above.identity.label.is_some_and(|l| l.layer == label.layer);
    let below = above.identity.backing.and_then(|b| gate::resolve(&target, &b.name).ok());
    if same_layer && below.is_some_and(|below| same_file(&below, layer)) {
        rename(layer, &target)?;
        sync_directory(&target)?;
    }
    Ok(())
}

fn remove_drafts(path: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let prefix = format!(".{name}.");
    let owner = |name: &str| -> Option<u32> {
        let middle = name.strip_prefix(&prefix)?.strip_suffix(".draft")?;
        middle.split_once('-')?.0.parse().ok()
    };
    let drafts = names_beside(path, |name| {
        owner(name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    })?;
    drafts.iter().try_for_each(|draft| remove(draft))
}
