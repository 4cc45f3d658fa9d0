//! Taking back the last change that dropped something.
//!
//! Bringing an event back is marking its layers so. The first mark, [`Role::Returning`], decides,
//! and whoever opens the disk next finishes the rest.

use std::path::Path;

use crate::change::event::{bring_back, moved_off};
use crate::change::plan::{Fate, Operation, Plan, Touched, Undoable};
use crate::change::run::step::{Demote, Relabel, Step};
use crate::change::{heal, names};
use crate::error::{Error, ErrorKind, Result};
use crate::family::beside::Beside;
use crate::family::dropped::{Event, last, was_of};
use crate::family::tree::{Family, Member};
use crate::family::{cost, frozen_path};
use crate::image::{Role, Was};
use crate::storage::{follow, refuse_fixed};

/// What taking back the last change of the disk at `path` will do. The changes made since are
/// dropped, or kept as a snapshot of the name `keep`.
///
/// # Errors
/// [`ErrorKind::NotFound`] where nothing is kept; [`ErrorKind::Exists`] where a snapshot that would
/// come back has lost its name to another.
pub fn plan_undo(path: &Path, keep: Option<&str>) -> Result<Plan> {
    let path = &follow(path)?;
    let nothing = || {
        let message = "nothing is kept aside that could be brought back";
        Error::new(ErrorKind::NotFound, message).at_path(path)
    };
    let family = Family::read(path)?.ok_or_else(nothing)?;
    let family = heal::healed(path, Some(family))?;
    let event = last(&family).ok_or_else(nothing)?;
    if let Some(returning) = event.was(Was::Head) {
        refuse_fixed(&returning.path, path)?;
        Beside::read(&family)?.refuse_head(&family)?;
        refuse_fixed(path, &frozen_path(path, family.head.label.layer))?;
    }
    let mut plan = Plan::new(Operation::Undo, &family);
    keep.map_or(Ok(()), |keep| names::check_new(&family, keep))?;
    for member in event.layers.iter().filter(|m| was_of(m) != Some(Was::Head)) {
        let name = &member.label.name;
        if family.snapshots().any(|m| m.label.name == *name) || keep == Some(name) {
            let message = format!(
                "the snapshot '{name}' would come back, and another has its name by now: rename that first"
            );
            return Err(Error::new(ErrorKind::Exists, message).at_path(path));
        }
        plan.snapshots.push(name.clone());
        plan.layers.push(Touched::new(member, Fate::Restored));
    }
    if let Some(head) = event.was(Was::Head) {
        plan.layers.push(Touched::new(head, Fate::BecomesHead));
        let fate = if keep.is_some() { Fate::Frozen } else { Fate::Removed };
        plan.layers.push(Touched::new(&family.head, fate));
        if keep.is_none() {
            plan.dropped = cost::data_bytes(&*cost::look(&family.head)?.image)?;
            plan.freed = plan.dropped;
            plan.undo = Undoable::No("the changes made since are not kept");
        }
    } else if keep.is_some() {
        let message = "what comes back takes nothing's place: there is nothing to keep";
        return Err(Error::invalid(message).at_path(path));
    }
    if let Some(merged) = event.was(Was::Merged) {
        let moved = moved_off(&family, merged);
        if moved.is_empty() {
            let message = "what stood on the merged snapshot is gone: it cannot be brought back";
            return Err(Error::invalid(message).at_path(path));
        }
        plan.layers.extend(moved.iter().map(|m| Touched::new(m, Fate::Moved)));
    }
    plan.why = format!("takes back the {}", event.what(&family));
    plan.steps = steps(&family, &event, keep);
    Ok(plan)
}

fn steps(family: &Family, event: &Event<'_>, keep: Option<&str>) -> Vec<Step> {
    let mut steps: Vec<Step> = event
        .layers
        .iter()
        .map(|m| Step::Claim { layer: m.label.layer, unless_cloned: false })
        .collect();
    let Some(first) = event.was(Was::Head).or_else(|| event.lowest()) else { return Vec::new() };
    if let Some(keep) = keep {
        let (name, description) = (keep.to_owned(), String::new());
        let (role, kept) = (Role::Snapshot, None);
        // Its second name must be there before another file takes the first one.
        steps.push(Step::Demote(Demote { role, name, description, kept, durably: true }));
    }
    // Where this fails, the mark may stand all the same: whoever opens the disk next finds out.
    let (layer, kept) = (first.label.layer, first.label.kept.clone());
    steps.push(Step::Label(Relabel { layer, role: Role::Returning, kept, unless_cloned: false }));
    let others: Vec<&Member> =
        event.layers.iter().copied().filter(|m| m.label.layer != layer).collect();
    steps.extend(bring_back(family, first, &others));
    steps.push(Step::IfPossible(vec![Step::Collect { fold: true }]));
    steps
}
