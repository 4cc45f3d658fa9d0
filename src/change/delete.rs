//! Dropping changes: deleting a snapshot with what was changed since it, and going back to one.
//!
//! What is dropped is kept aside: its layers stay as they are, and their labels say what they were.
//! So nothing is copied or removed. The head leaves first, with the one rename that puts an empty
//! delta at its name; its old file says from then on which other layers are to be marked. Whoever
//! opens the disk next finishes that (see [`Step::DropRest`]).

use std::path::Path;

use crate::change::plan::{Fate, Forgotten, Keeping, Operation, Plan, Touched, Undoable};
use crate::change::release::Retention;
use crate::change::run::bitmaps;
use crate::change::run::step::{Demote, Step};
use crate::change::{heal, names};
use crate::error::{Error, ErrorKind, Result};
use crate::family::beside::Beside;
use crate::family::dropped::kept_aside;
use crate::family::tree::{Family, Member};
use crate::family::{cost, frozen_path};
use crate::image::{Kept, Role, Was};
use crate::storage::{follow, refuse_fixed};

/// How a snapshot is to be deleted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wishes {
    /// Snapshots that stand on the changes made since it go too.
    pub tree: bool,
    /// How long what is dropped is kept.
    pub keeping: Keeping,
    /// Also where clones stand on what goes.
    pub even_if_cloned: bool,
}

/// What deleting the snapshot `name` of the disk at `path` will do: the disk returns to the moment
/// it was taken. A snapshot beside the disk's own line goes alone. With `tree`, snapshots that
/// stand on the changes made since go too.
///
/// # Errors
/// [`ErrorKind::Sealed`] where clones stand on it or, unless `tree`, other snapshots: the text
/// lists them.
pub fn plan_delete(path: &Path, name: &str, tree: bool, keeping: Keeping) -> Result<Plan> {
    plan_delete_as(path, name, Wishes { tree, keeping, even_if_cloned: false })
}

/// As [`plan_delete`], as `wishes` say.
///
/// # Errors
/// As that; with [`Wishes::even_if_cloned`] no clones are in the way.
pub fn plan_delete_as(path: &Path, name: &str, wishes: Wishes) -> Result<Plan> {
    let path = &follow(path)?;
    let Wishes { tree, keeping, even_if_cloned } = wishes;
    let family = heal::healed(path, Family::read(path)?)?;
    let target = family.snapshot(name)?;
    let above = family.descendants(target.label.layer);
    let others: Vec<&Member> = above.iter().copied().filter(|m| m.is_snapshot()).collect();
    let names: Vec<String> = others.iter().map(|m| m.label.name.clone()).collect();
    if !others.is_empty() && !tree {
        return Err(stood_on(name, &names).at_path(path));
    }
    let beside = Beside::read(&family)?;
    if !even_if_cloned {
        let all = above.iter().copied().chain([target]);
        let layers = all.filter(|m| m.label.layer != family.head.label.layer);
        layers.into_iter().try_for_each(|m: &Member| beside.refuse_clones(m, &family))?;
    }
    let moves_head = above.iter().any(|m| m.label.layer == family.head.label.layer);
    if moves_head {
        beside.refuse_head(&family)?;
        refuse_fixed(path, &frozen_path(path, family.head.label.layer))?;
    }
    let retention = Retention::new(&family, keeping);
    let mut plan = Plan::new(Operation::Delete, &family);
    if even_if_cloned {
        let frozen = above.iter().copied().chain([target]);
        let frozen = frozen.filter(|m| m.label.layer != family.head.label.layer);
        plan.steps.extend(frozen.map(|m| Step::ForgetClones(m.label.layer)));
    }
    plan.steps.extend(match moves_head {
        true => drop_with_head(&family, target, others.len() + 2, &retention),
        false => drop_beside(&family, target, others.len() + 1, &retention),
    });
    plan.steps.extend(retention.afterwards());
    let meant = others.iter().copied().chain([target]).map(|m| m.label.layer);
    plan.steps.push(Step::RefuseLeft(meant.collect()));
    let mut dropped = others;
    dropped.extend(moves_head.then_some(&family.head));
    // Where the disk goes back to the snapshot, it goes on showing what the snapshot's layer holds.
    dropped.extend((!moves_head).then_some(target));
    note_dropped(&mut plan, &dropped, keeping, &retention)?;
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
        // They cannot tell what the disk shows then from what it showed at the last backup.
        plan.bitmaps = bitmaps::names_of(&family.head)?;
    } else {
        plan.why = format!("the disk does not stand on '{name}'");
    }
    plan.snapshot = Some(name.to_owned());
    plan.snapshots = names;
    plan.share = cost::share_of(target, &family.children(target.label.layer))?;
    plan.forgets = kept_aside(&family)?.map(Forgotten::from);
    Ok(plan)
}

fn stood_on(name: &str, others: &[String]) -> Error {
    let message = format!(
        "snapshot '{name}' is not deleted: {} stand on the changes made since it. Delete or \
         merge them first, or drop them too with --tree",
        others.join(", ")
    );
    Error::new(ErrorKind::Sealed, message)
}

/// What going back to the snapshot `name` of the disk at `path` will do: what changed since is
/// dropped, or kept as a snapshot of the name `keep`.
pub fn plan_revert(path: &Path, name: &str, keep: Option<&str>, keeping: Keeping) -> Result<Plan> {
    let path = &follow(path)?;
    let family = heal::healed(path, Family::read(path)?)?;
    let target = family.snapshot(name)?;
    Beside::read(&family)?.refuse_head(&family)?;
    refuse_fixed(path, &frozen_path(path, family.head.label.layer))?;
    keep.map_or(Ok(()), |keep| names::check_new(&family, keep))?;
    let on = target.label.layer;
    let mut plan = Plan::new(Operation::Revert, &family);
    plan.why = format!("an empty delta on '{name}' takes the head's place");
    plan.snapshot = Some(name.to_owned());
    plan.share = cost::share_of(target, &family.children(on))?;
    plan.steps.push(Step::Hold(on));
    if let Some(keep) = keep {
        plan.layers.push(Touched::new(&family.head, Fate::Frozen));
        plan.bitmaps = bitmaps::names_of(&family.head)?;
        let name = keep.to_owned();
        let (role, description, kept) = (Role::Snapshot, String::new(), None);
        plan.steps.push(Step::Demote(Demote { role, name, description, kept, durably: false }));
        plan.steps.push(Step::NewHead { on, bitmaps: false });
    } else {
        let retention = Retention::new(&family, keeping);
        note_dropped(&mut plan, &[&family.head], keeping, &retention)?;
        let here = family.head.parent() == Some(on);
        let same = family.head.peek.size == target.peek.size;
        if here && same && cost::is_bare(&*cost::look(&family.head)?.image)? {
            (plan.undo, plan.layers[0].fate) = (Undoable::NotNeeded, Fate::Removed);
            // It shows what it showed.
            plan.steps.extend([Step::ReadBitmaps, Step::NewHead { on, bitmaps: true }]);
        } else {
            plan.bitmaps = bitmaps::names_of(&family.head)?;
            plan.forgets = kept_aside(&family)?.map(Forgotten::from);
            let kept = retention.kept(Was::Head, 1, Vec::new());
            plan.steps.push(head_dropped(Role::Dropped, kept));
            plan.steps.push(Step::NewHead { on, bitmaps: false });
            plan.steps.extend(retention.afterwards());
        }
    }
    plan.layers.push(Touched { path: path.to_path_buf(), name: None, fate: Fate::Created });
    Ok(plan)
}

/// Notes in `plan` that the layers are dropped.
fn note_dropped(
    plan: &mut Plan,
    layers: &[&Member],
    keeping: Keeping,
    retention: &Retention,
) -> Result<()> {
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
        plan.undo = Undoable::Until(retention.until);
    }
    Ok(())
}

/// The head's file as a dropped layer.
fn head_dropped(role: Role, kept: Kept) -> Step {
    let (name, description, kept) = (String::new(), String::new(), Some(kept));
    Step::Demote(Demote { role, name, description, kept, durably: false })
}

/// Drops the head with the `target` that it stands on: `layers` in all.
fn drop_with_head(
    family: &Family,
    target: &Member,
    layers: usize,
    retention: &Retention,
) -> Vec<Step> {
    let on = target.label.layer;
    let mut steps = claim(family, target);
    let kept = retention.kept(Was::Head, layers, vec![Kept::short(on)]);
    steps.push(Step::Hold(on));
    steps.push(head_dropped(Role::Dropping, kept));
    steps.push(Step::NewHead { on, bitmaps: false });
    steps.push(Step::DropRest(family.head.label.layer));
    steps
}

/// Drops `target`, which the disk does not stand on, with what stands on it: `layers` in all.
fn drop_beside(
    family: &Family,
    target: &Member,
    layers: usize,
    retention: &Retention,
) -> Vec<Step> {
    let mut steps = claim(family, target);
    let id = target.label.layer;
    let kept = retention.kept(Was::Snapshot, layers, Vec::new());
    if layers == 1 {
        steps.push(Step::mark(id, Role::Dropped, Some(kept)));
    } else {
        steps.push(Step::mark(id, Role::Dropping, Some(kept)));
        steps.push(Step::DropRest(id));
    }
    steps
}

/// Whoever looks at a layer that is to be marked, or has made a clone of it since this was planned, is
/// named before anything changes.
fn claim(family: &Family, target: &Member) -> Vec<Step> {
    let above = family.descendants(target.label.layer);
    let snapshots = above.into_iter().chain([target]).filter(|m| m.is_snapshot());
    let claim = |m: &Member| Step::Claim { layer: m.label.layer, unless_cloned: true };
    snapshots.map(claim).collect()
}
