//! Letting go of what is kept aside, because the user wants its space.

use std::path::Path;

use crate::change::heal;
use crate::change::plan::{Fate, Forgotten, Operation, Plan, Touched};
use crate::change::run::step::{Step, Which};
use crate::change::strategy;
use crate::error::Result;
use crate::family::beside::Beside;
use crate::family::cost;
use crate::family::dropped::{events, is_shown, kept_aside};
use crate::family::tree::{Family, Member};
use crate::image::Role;
use crate::storage::follow;

/// What letting go of all that is kept aside of the disk at `path` will do.
pub fn plan_forget(path: &Path) -> Result<Plan> {
    plan_forget_as(path, false)
}

/// As [`plan_forget`]; with `even_if_cloned`, also of what clones elsewhere stand on.
pub fn plan_forget_as(path: &Path, even_if_cloned: bool) -> Result<Plan> {
    let path = &follow(path)?;
    let family = heal::healed(path, Family::read(path)?)?;
    let all = events(&family);
    let mut plan = Plan::new(Operation::Forget, &family);
    plan.forgets = kept_aside(&family)?.map(Forgotten::from);
    let unnamed = family.layers.iter().filter(|m| m.label.role == Role::Unnamed);
    let beside = Beside::read(&family)?;
    for member in all.iter().flat_map(|e| e.layers.iter().copied()).chain(unnamed) {
        if !even_if_cloned && !beside.is_own(member) {
            continue;
        }
        if !is_shown(&family, member) {
            plan.layers.push(Touched::new(member, Fate::Removed));
            plan.freed += cost::data_bytes(&*cost::look(member)?.image)?;
        } else if let Some(fold) = strategy::for_unnamed(&family, member, false)? {
            plan.layers.push(Touched::new(member, Fate::Moved));
            plan.moved += fold.moved;
            plan.freed += fold.freed;
        }
    }
    plan.why = "what is kept aside cannot be brought back afterwards".to_owned();
    if even_if_cloned {
        let dropped = |m: &&Member| matches!(m.label.role, Role::Dropped | Role::Unnamed);
        let layers = family.layers.iter().filter(dropped);
        plan.steps.extend(layers.map(|m| Step::ForgetClones(m.label.layer)));
    }
    let events = all.iter().map(|e| e.kept.event).collect();
    plan.steps.push(Step::LetGo(Which::Events(events)));
    plan.steps.push(Step::Collect { fold: true });
    Ok(plan)
}
