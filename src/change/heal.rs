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
//! * a layer was being changed under its clones: its label says again what its files look like;
//! * the head says that it is a layer that is frozen already: it is an old copy that was put back, and
//!   gets an id of its own;
//! * a layer carries the label of another file, which stands on it: it takes that file's name;
//! * a hidden draft of a process that is gone: it goes.
//!
//! And a disk that was copied or moved tells the layer that it stands on where it is by now.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::change::base::marks;
use crate::change::event::finish;
use crate::change::live::held::Held;
use crate::change::run::context::Context;
use crate::change::run::step::{Step, Which};
use crate::change::run::{Run, is_for_later};
use crate::change::strategy;
use crate::error::{Error, ErrorKind, Result};
use crate::family::names::{has_frozen_name, names_beside};
use crate::family::tree::{Family, Member};
use crate::family::{dropped, frozen_path};
use crate::image::{Id, Role, Seen};
use crate::open::gate::same_file;
use crate::open::{Format, gate, peek};
use crate::storage::draft::draft_form;
use crate::storage::name::remove;
use crate::storage::{Access, FileOptions, FileStorage, Turn, other_names};

/// Puts right what an interrupted command left of the disk at `path`. Does nothing to it, and takes no
/// lock on it, where nothing was left.
pub(crate) fn heal(path: &Path) -> Result<()> {
    remove_drafts(path)?;
    let Some(family) = Family::read(path)? else { return Ok(()) };
    marks::note_places(&family);
    put_right(path, &family).map(drop)
}

/// As [`heal`], for a disk whose family was just read; returns the family as it is then.
///
/// # Errors
/// [`ErrorKind::NotFound`] where it has none, and so no snapshots.
pub(crate) fn healed(path: &Path, family: Option<Family>) -> Result<Family> {
    remove_drafts(path)?;
    let Some(family) = family else { return Family::of(path) };
    marks::note_places(&family);
    if put_right(path, &family)? { Family::of(path) } else { Ok(family) }
}

/// As [`heal`], for a disk in use. A merge that was interrupted waits until it is asked for.
pub(crate) fn heal_held(held: &Held) -> Result<()> {
    if held.chain().head().format != Format::Qcow2 {
        // What its guest wrote is no label.
        return Ok(());
    }
    match Family::read(held.path())? {
        Some(family) if is_left(held.path(), &family) => {
            mend(Context::Held(held), held.path(), family)?;
            held.reload()
        }
        _ => Ok(()),
    }
}

/// Whether anything was left that was put right.
fn put_right(path: &Path, family: &Family) -> Result<bool> {
    // Whoever has the disk may be in the midst of what looks interrupted, and puts it right.
    if !is_left(path, family) || is_held(path)? {
        return Ok(false);
    }
    let _turn = Turn::take(path)?;
    match Family::read(path)? {
        // Whoever had his turn may have put it right, and whoever has the disk now does so.
        Some(family) if is_left(path, &family) && !is_held(path)? => {
            refuse_layer_of_other(path, &family)?;
            let bases = marks::Bases::several(&family);
            mend(Context::Idle, path, family)?;
            bases.leave(path);
        }
        _ => {}
    }
    Ok(true)
}

/// Whether something was left that is to be put right.
fn is_left(path: &Path, family: &Family) -> bool {
    // Another disk's layer is put right by that disk's name.
    if has_frozen_name(path, family.head.label.layer) {
        return false;
    }
    let marked = |m: &Member| match m.label.role {
        Role::Returning | Role::Dropping | Role::Leaving | Role::Merging | Role::Rising => true,
        _ => is_changing(m) || !has_frozen_name(&m.path, m.label.layer),
    };
    is_frozen(family.head.label.role)
        || family.head.label.role == Role::Returning
        || is_copy(family)
        || family.layers.iter().any(marked)
        || !dropped::is_tidy(family)
}

/// Whether the head's file is to be its disk's head no more.
fn is_frozen(role: Role) -> bool {
    matches!(role, Role::Snapshot | Role::Dropped | Role::Dropping)
}

/// Refuses a file that is marked as a frozen layer and has names that no interrupted change gives it:
/// it may be the layer of a disk of another name, and that disk's contents would change with it.
fn refuse_layer_of_other(path: &Path, family: &Family) -> Result<()> {
    if !is_frozen(family.head.label.role) {
        return Ok(());
    }
    let others = other_names(path, &frozen_path(path, family.head.label.layer))?;
    if others == 0 {
        return Ok(());
    }
    let message = format!(
        "is a frozen layer, '{}', and has {} names more (hard links): under one of them it belongs to \
         another disk, and stays as it is. Where that is not so, and a command on this disk was \
         interrupted, remove them (`find DIRECTORY -samefile` lists them)",
        family.head.label.name, others
    );
    Err(Error::new(ErrorKind::Sealed, message).at_path(path))
}

/// Whether the head says that it is a layer that the disk has frozen already. A head that another layer
/// is just taking the place of, or that is just being frozen, is none.
fn is_copy(family: &Family) -> bool {
    let head = &family.head;
    let same = |m: &Member| {
        let frozen = m.label.layer == head.label.layer && has_frozen_name(&m.path, m.label.layer);
        frozen && !same_file(&m.path, &head.path)
    };
    head.label.role == Role::Head && family.layers.iter().any(same)
}

/// Whether it was being changed under its clones.
fn is_changing(member: &Member) -> bool {
    member.label.clones.as_ref().is_some_and(|clones| clones.seen == Seen::Changing)
}

/// Whether somebody has the disk, so that it cannot be written now.
fn is_held(path: &Path) -> Result<bool> {
    let options = FileOptions { access: Some(Access::Write), write: false };
    match FileStorage::open_within(path, options, Duration::ZERO) {
        Err(e) if e.kind() == ErrorKind::InUse => Ok(true),
        other => other.map(|_| false),
    }
}

fn mend(context: Context<'_>, path: &Path, family: Family) -> Result<()> {
    let in_use = context.in_use();
    let mut run = Run::new(context, family);
    if run.family().members().any(|m| m.label.role == Role::Returning) {
        // Before the head's file is looked at: it may be frozen, and about to be replaced.
        let steps = finish(run.family(), in_use);
        run = as_far_as_possible(context, path, run, &steps)?;
    }
    if is_frozen(run.family().head.label.role) {
        run.quietly(&[Step::Promote])?;
    }
    if is_copy(run.family()) {
        run.quietly(&[Step::NewId])?;
    }
    let misnamed = |m: &&Member| !has_frozen_name(&m.path, m.label.layer);
    let files: Vec<PathBuf> =
        run.family().layers.iter().filter(misnamed).map(|m| m.path.clone()).collect();
    for file in files {
        if let Some(over) = name_of(run.family(), &file)? {
            run.quietly(&[Step::TakeName { file, over }])?;
        }
    }
    let layers: Vec<Id> = run.family().layers.iter().map(|m| m.label.layer).collect();
    for layer in layers {
        let steps = remaining(run.family(), layer, in_use)?;
        run = match is_leaving(run.family(), layer) {
            true => run.quietly(&steps).map(|()| run)?,
            false => as_far_as_possible(context, path, run, &steps)?,
        };
    }
    if !in_use {
        let changing = run.family().layers.iter().filter(|m| is_changing(m));
        let steps: Vec<Step> = changing.map(|m| Step::Stamp(m.label.layer)).collect();
        run.quietly(&steps)?;
    }
    if dropped::is_tidy(run.family()) {
        return Ok(());
    }
    let tidy = vec![Step::LetGo(Which::Overdue), Step::Collect { fold: false }];
    run.quietly(&[Step::IfPossible(tidy)])
}

/// What is left of the change of which a layer's label tells.
fn remaining(family: &Family, layer: Id, in_use: bool) -> Result<Vec<Step>> {
    let Some(member) = family.layers.iter().find(|m| m.label.layer == layer) else {
        return Ok(Vec::new());
    };
    Ok(match (member.label.role, &member.label.kept) {
        (Role::Dropping, Some(_)) => vec![Step::DropRest(layer)],
        (Role::Leaving, _) => strategy::resume(family, layer, in_use)?,
        (Role::Merging | Role::Rising, _) if !in_use => vec![Step::Resume(layer)],
        _ => Vec::new(),
    })
}

fn is_leaving(family: &Family, layer: Id) -> bool {
    family.layers.iter().any(|m| m.label.layer == layer && m.label.role == Role::Leaving)
}

/// Does the steps; where there is no room to finish, or somebody looks at a layer, the disk is right as it
/// is, and looked at anew.
fn as_far_as_possible<'a>(
    context: Context<'a>,
    path: &Path,
    mut run: Run<'a>,
    steps: &[Step],
) -> Result<Run<'a>> {
    match run.quietly(steps) {
        Err(e) if is_for_later(&e) => Ok(Run::new(context, Family::of(path)?)),
        done => done.map(|()| run),
    }
}

/// The name that the layer in `file` takes: it took over the label of the layer above it.
fn name_of(family: &Family, file: &Path) -> Result<Option<PathBuf>> {
    let Some(label) = peek(file)?.and_then(|p| p.identity.label) else { return Ok(None) };
    let head = &family.head.path;
    let is_above =
        |m: &&Member| m.label.layer == label.layer && has_frozen_name(&m.path, label.layer);
    let target = match label.role {
        Role::Head => head.clone(),
        _ => family
            .layers
            .iter()
            .find(is_above)
            .map_or_else(|| frozen_path(head, label.layer), |above| above.path.clone()),
    };
    let Ok(Some(above)) = peek(&target) else { return Ok(None) };
    let same_layer = above.identity.label.is_some_and(|l| l.layer == label.layer);
    let below = above.identity.backing.and_then(|b| gate::resolve(&target, &b.name).ok());
    let takes = same_layer && below.is_some_and(|below| same_file(&below, file));
    Ok(takes.then_some(target))
}

fn remove_drafts(path: &Path) -> Result<()> {
    let form = draft_form(path);
    let owner = |name: &[u8]| -> Option<u32> { form.middle(name)?.split_once('-')?.0.parse().ok() };
    let drafts = names_beside(path, |name| {
        owner(name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    })?;
    drafts.iter().try_for_each(|draft| {
        // A process that cannot be seen from here (another host's, or in another namespace) has it
        // locked.
        let options = FileOptions { access: Some(Access::Write), write: false };
        match FileStorage::open_within(draft, options, Duration::ZERO) {
            Ok(_alone) => remove(draft),
            Err(_) => Ok(()),
        }
    })
}
