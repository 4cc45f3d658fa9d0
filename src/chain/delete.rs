//! Dropping changes: deleting a snapshot with what was changed since it, and going back to one.
//!
//! What is dropped is kept aside: its layers stay as they are, and their labels say what they were.
//! So nothing is copied or removed. The head leaves first, with the one rename that puts an empty
//! delta at its name; its old file says from then on which other layers are to be marked. Whoever
//! opens the disk next finishes that (see [`finish`]).

use std::path::Path;

use super::aside::{self, forget_others};
use super::heal;
use super::merge::Progress;
use super::open::{OpenOptions, open_image};
use super::plan::{Fate, Forgotten, Keeping, Operation, Plan, Touched, Undoable, Work, now};
use super::reach::Reach;
use super::snapshot::{check_new_name, freeze, head_label, put_head_on, relabel, thaw};
use super::tree::{Beside, Family, Member};
use super::{Layer, cost};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Id, Kept, Label, Role, Was};

/// Under what the dropped layers are kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Aside {
    event: u64,
    since: u64,
    until: u64,
}

impl Aside {
    pub fn new(keeping: Keeping) -> Aside {
        let since = now();
        let age = u64::try_from(keeping.0.as_millis()).unwrap_or(u64::MAX);
        let until = since.saturating_add(age);
        Aside { event: Kept::short(Id::new_v4()), since, until }
    }

    pub fn event(&self) -> u64 {
        self.event
    }

    pub fn until(&self) -> u64 {
        self.until
    }

    pub fn kept(&self, was: Was, layers: usize, children: Vec<u64>) -> Kept {
        let layers = u16::try_from(layers).unwrap_or(u16::MAX);
        Kept { event: self.event, layers, was, since: self.since, until: self.until, children }
    }
}

/// A deletion to be done.
#[derive(Debug, Clone)]
pub(super) struct Delete {
    target: Id,
    moves_head: bool,
    /// How many layers are dropped.
    layers: usize,
    aside: Aside,
    keeping: Keeping,
}

/// A way back to be gone.
#[derive(Debug, Clone)]
pub(super) struct Revert {
    target: Id,
    keep: Option<String>,
    /// Where today's changes stay; `None` where there are none.
    aside: Option<Aside>,
    keeping: Keeping,
}

/// What deleting the snapshot `name` of the disk at `path` will do: the disk returns to the moment
/// it was taken. A snapshot beside the disk's own line goes alone. With `tree`, snapshots that
/// stand on the changes made since go too.
///
/// # Errors
/// [`ErrorKind::Sealed`] where clones stand on it or, unless `tree`, other snapshots: the text
/// lists them.
pub fn plan_delete(path: &Path, name: &str, tree: bool, keeping: Keeping) -> Result<Plan> {
    heal::heal(path)?;
    let family = Family::of(path)?;
    let target = family.snapshot(name)?;
    let above = family.descendants(target.label.layer);
    let others: Vec<&Member> = above.iter().copied().filter(|m| m.is_snapshot()).collect();
    let names: Vec<String> = others.iter().map(|m| m.label.name.clone()).collect();
    if !others.is_empty() && !tree {
        let message = format!(
            "snapshot '{name}' is not deleted: {} stand on the changes made since it. Delete or \
             merge them first, or drop them too with --tree",
            names.join(", ")
        );
        return Err(Error::new(ErrorKind::Sealed, message).at_path(path));
    }
    let beside = Beside::read(path)?;
    above.iter().copied().chain([target]).try_for_each(|m| beside.refuse_clones(m))?;
    let moves_head = above.iter().any(|m| m.label.layer == family.head.label.layer);
    if moves_head {
        beside.refuse_head(&family)?;
    }
    let aside = Aside::new(keeping);
    let layers = others.len() + 1 + usize::from(moves_head);
    let work = Delete { target: target.label.layer, moves_head, layers, aside, keeping };
    let mut plan = Plan::new(Operation::Delete, &family, Work::Delete(work));
    let mut dropped = others;
    dropped.extend(moves_head.then_some(&family.head));
    // Where the disk goes back to the snapshot, it goes on showing what the snapshot's layer holds.
    dropped.extend((!moves_head).then_some(target));
    set_aside(&mut plan, &dropped, keeping)?;
    if moves_head {
        plan.layers.push(Touched::new(
            target,
            if keeping.is_nothing() { Fate::BecomesHead } else { Fate::KeptAside },
        ));
        plan.layers.extend((!keeping.is_nothing()).then(|| Touched {
            path: path.to_path_buf(),
            name: None,
            fate: Fate::Created,
        }));
        plan.why = format!("the disk returns to the moment '{name}' was taken");
    } else {
        plan.why = format!("the disk does not stand on '{name}'");
    }
    plan.snapshot = Some(name.to_owned());
    plan.snapshots = names;
    plan.share = cost::share_of(target, &family.children(target.label.layer))?;
    plan.forgets = aside::kept_aside(&family)?.map(Forgotten::from);
    Ok(plan)
}

/// What going back to the snapshot `name` of the disk at `path` will do: what changed since is
/// dropped, or kept as a snapshot of the name `keep`.
pub fn plan_revert(path: &Path, name: &str, keep: Option<&str>, keeping: Keeping) -> Result<Plan> {
    heal::heal(path)?;
    let family = Family::of(path)?;
    let target = family.snapshot(name)?;
    Beside::read(path)?.refuse_head(&family)?;
    keep.map_or(Ok(()), |keep| check_new_name(path, keep))?;
    let work =
        Revert { target: target.label.layer, keep: keep.map(str::to_owned), aside: None, keeping };
    let mut plan = Plan::new(Operation::Revert, &family, Work::Revert(work.clone()));
    plan.why = format!("an empty delta on '{name}' takes the head's place");
    plan.snapshot = Some(name.to_owned());
    plan.share = cost::share_of(target, &family.children(target.label.layer))?;
    if keep.is_some() {
        plan.layers.push(Touched::new(&family.head, Fate::Frozen));
    } else {
        set_aside(&mut plan, &[&family.head], keeping)?;
        let here = family.head.parent() == Some(work.target);
        let same = family.head.peek.size == target.peek.size;
        if here && same && cost::is_bare(&*cost::look(&family.head)?.image)? {
            (plan.undo, plan.layers[0].fate) = (Undoable::NotNeeded, Fate::Removed);
        } else {
            let aside = Some(Aside::new(keeping));
            plan.forgets = aside::kept_aside(&family)?.map(Forgotten::from);
            plan.work = Work::Revert(Revert { aside, ..work });
        }
    }
    plan.layers.push(Touched { path: path.to_path_buf(), name: None, fate: Fate::Created });
    Ok(plan)
}

/// Notes in `plan` that the layers are dropped.
fn set_aside(plan: &mut Plan, layers: &[&Member], keeping: Keeping) -> Result<()> {
    for member in layers {
        plan.dropped += cost::data_bytes(&*cost::look(member)?.image)?;
        let fate = if keeping.is_nothing() { Fate::Removed } else { Fate::KeptAside };
        plan.layers.push(Touched::new(member, fate));
    }
    if keeping.is_nothing() {
        plan.freed = plan.dropped;
        plan.undo = Undoable::No("nothing is kept aside");
    } else {
        plan.kept = plan.dropped;
        plan.undo = Undoable::Until(Aside::new(keeping).until);
    }
    Ok(())
}

impl Delete {
    pub fn moves_head(&self) -> bool {
        self.moves_head
    }
}

/// Executes a deletion.
pub(super) fn delete(
    plan: &Plan,
    work: &Delete,
    reach: &Reach<'_>,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let (head, family) = plan.begin(reach)?;
    if work.moves_head {
        let target = family.layer(work.target)?;
        check_free(reach, &family, target)?;
        let parent = open_frozen(&target.path)?;
        let children = vec![Kept::short(work.target)];
        set_head_aside(&head, &work.aside, work.layers, (Role::Dropping, children), &parent)?;
    } else {
        drop_beside(reach, &family, work)?;
    }
    drop(head);
    finish(reach, &plan.disk)?;
    done(reach, &plan.disk, (work.aside, work.keeping), progress)
}

fn drop_beside(reach: &Reach<'_>, family: &Family, work: &Delete) -> Result<()> {
    let target = family.layer(work.target)?;
    check_free(reach, family, target)?;
    let role = if work.layers > 1 { Role::Dropping } else { Role::Dropped };
    mark(reach, target, role, work.aside.kept(Was::Snapshot, work.layers, Vec::new()))
}

/// Whoever looks at a layer that is to be marked is named before anything changes.
fn check_free(reach: &Reach<'_>, family: &Family, target: &Member) -> Result<()> {
    let above = family.descendants(target.label.layer);
    for member in above.into_iter().chain([target]).filter(|m| m.is_snapshot()) {
        drop(reach.open(&member.path)?);
    }
    Ok(())
}

/// Executes a way back.
pub(super) fn revert(plan: &Plan, work: &Revert, progress: &mut Progress<'_>) -> Result<()> {
    let path = &plan.disk;
    let (head, family) = plan.begin(&Reach::Idle)?;
    let parent = open_frozen(&family.layer(work.target)?.path)?;
    if let Some(keep) = &work.keep {
        let label = Label { role: Role::Snapshot, name: keep.clone(), ..head_label(&head)? };
        freeze(&head, label)?;
        return put_head_on(path, &parent).inspect_err(|_| thaw(path, &head));
    }
    let Some(aside) = work.aside else { return put_head_on(path, &parent) };
    set_head_aside(&head, &aside, 1, (Role::Dropped, Vec::new()), &parent)?;
    drop((head, parent));
    done(&Reach::Idle, path, (aside, work.keeping), progress)
}

/// Keeps the head's file as a dropped layer, and puts an empty delta on `parent` in its place.
fn set_head_aside(
    head: &Layer,
    aside: &Aside,
    layers: usize,
    (role, children): (Role, Vec<u64>),
    parent: &Layer,
) -> Result<()> {
    let kept = Some(aside.kept(Was::Head, layers, children));
    freeze(head, Label { role, kept, ..head_label(head)? })?;
    put_head_on(&head.path, parent).inspect_err(|_| thaw(&head.path, head))
}

fn done(
    reach: &Reach<'_>,
    path: &Path,
    (aside, keeping): (Aside, Keeping),
    progress: &mut Progress<'_>,
) -> Result<()> {
    if keeping.is_nothing() {
        return aside::forget_all(reach, path, progress);
    }
    // What went before may be looked at by somebody: then it goes later.
    heal::bearing(forget_others(reach, path, aside.event, progress))
}

/// Marks the layers that go with one that is [`Role::Dropping`], and then that one.
pub(super) fn finish(reach: &Reach<'_>, path: &Path) -> Result<()> {
    let family = Family::of(path)?;
    let Some(first) = family.layers.iter().find(|m| m.label.role == Role::Dropping) else {
        return Ok(());
    };
    let Some(kept) = first.label.kept.clone() else { return Ok(()) };
    let target = match kept.was {
        Was::Head => family
            .layers
            .iter()
            .find(|m| kept.children.first() == Some(&Kept::short(m.label.layer))),
        _ => Some(first),
    };
    let Some(target) = target else { return mark(reach, first, Role::Dropped, kept) };
    for member in family.descendants(target.label.layer).into_iter().chain([target]) {
        if member.is_snapshot() {
            let kept = Kept { was: Was::Snapshot, children: Vec::new(), ..kept.clone() };
            mark(reach, member, Role::Dropped, kept)?;
        }
    }
    mark(reach, first, Role::Dropped, kept)
}

fn mark(reach: &Reach<'_>, member: &Member, role: Role, kept: Kept) -> Result<()> {
    let layer = reach.open(&member.path)?;
    relabel(&layer, |label| (label.role, label.kept) = (role, Some(kept)))
}

pub(super) fn open_frozen(path: &Path) -> Result<Layer> {
    open_image(path, &OpenOptions { unprotected: true, ..OpenOptions::default() })
}
