//! Merging a snapshot: its name goes, its changes are folded into a neighbour. Which way, and the steps of
//! that, `strategy` knows.

use std::path::Path;

use crate::change::heal;
use crate::change::plan::{Fate, Forgotten, Keeping, Operation, Plan, Touched, Undoable};
use crate::change::release::Retention;
use crate::change::run::bitmaps;
use crate::change::run::fold::free_space;
use crate::change::run::step::{Direction, Fold, Method, Step, Strategy, Which};
use crate::change::strategy::{check_space, choose, stands_on};
use crate::error::{Error, Result};
use crate::family::beside::Beside;
use crate::family::cost::{data_bytes, look, share_of};
use crate::family::dropped::{KeptAside, is_shown, kept_aside};
use crate::family::frozen_path;
use crate::family::tree::{Family, Member};
use crate::image::{Kept, Role, Was};
use crate::storage::name::directory;
use crate::storage::{follow, refuse_fixed, shares_space};

pub use crate::progress::Progress;

/// How a merge is to be done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wishes {
    /// How long a merged snapshot is kept where that is free.
    pub keeping: Keeping,
    /// Copy and give back in batches, whatever space there is.
    pub in_batches: bool,
    /// Whether the disk is in use meanwhile: some ways are not open then.
    pub in_use: bool,
    /// Also where clones stand on the snapshot, which can be read no more then.
    pub even_if_cloned: bool,
}

/// What merging the snapshot `name` of the disk at `path` will do.
///
/// # Errors
/// [`Sealed`](crate::ErrorKind::Sealed) where clones stand on it;
/// [`Invalid`](crate::ErrorKind::Invalid) where nothing stands on it, so that there is nothing to fold it
/// into; [`NoSpace`](crate::ErrorKind::NoSpace) where the host has no room.
pub fn plan_merge(path: &Path, name: &str, wishes: Wishes) -> Result<Plan> {
    let path = &follow(path)?;
    let family = Family::read(path)?;
    if let Some(family) = &family
        && let Some(layer) = unfinished(family, name)
    {
        return plan_resume(family, layer, wishes.in_use);
    }
    let family = heal::healed(path, family)?;
    let layer = family.snapshot(name)?;
    if !wishes.even_if_cloned {
        Beside::read(&family)?.refuse_clones(layer, &family)?;
    }
    let children = family.children(layer.label.layer);
    let share = !wishes.in_batches && shares_space(directory(path));
    // Without sharing, what is only kept aside would have to take a copy of its own.
    let stays = |m: &&Member| share || is_shown(&family, m);
    let on: Vec<&Member> = children.iter().copied().filter(stays).collect();
    if on.is_empty() {
        return Err(nothing_on(name).at_path(path));
    }
    let kept = kept_aside(&family)?;
    let mut forget = on.len() < children.len();
    let strategy = choose(layer, &on, share, wishes.in_use)?;
    let strategy = with_room(strategy, path, wishes.in_batches, kept.as_ref(), &mut forget)?;
    refuse_other_names(path, layer, &on, &strategy)?;
    let keepable = strategy.method == Method::Share
        && strategy.direction == Direction::Up
        && on.len() <= Kept::MAX_CHILDREN
        && !wishes.keeping.is_nothing();
    let retention = keepable.then(|| Retention::new(&family, wishes.keeping));
    let mut plan = describe(Plan::new(Operation::Merge, &family), &strategy);
    touch(&mut plan, layer, &on, retention.is_some());
    plan.snapshot = Some(name.to_owned());
    plan.share = share_of(layer, &on)?;
    plan.undo = match retention {
        Some(retention) => Undoable::Until(retention.until),
        None => Undoable::No("the host shares no bytes between files, so keeping it is not free"),
    };
    if retention.is_some() {
        (plan.kept, plan.freed) = (data_bytes(&*look(layer)?.image)?, 0);
    }
    // Only the last change is taken back.
    plan.forgets = kept.map(Forgotten::from);
    plan.bitmaps = match strategy.direction {
        Direction::Up => bitmaps::lost(&[layer], &on)?,
        Direction::Down => bitmaps::lost(&on, &[layer])?,
    };
    if forget {
        plan.steps = vec![Step::LetGo(Which::All), Step::Collect { fold: false }];
    }
    if wishes.even_if_cloned {
        plan.steps.push(Step::ForgetClones(layer.label.layer));
    }
    plan.steps.extend(steps(layer, strategy, retention));
    Ok(plan)
}

/// The fold, and what went before.
fn steps(layer: &Member, strategy: Strategy, retention: Option<Retention>) -> [Step; 2] {
    let layer = layer.label.layer;
    let kept = retention.map(|retention| retention.kept(Was::Merged, 1, Vec::new()));
    // Of a merge that cannot be undone: what went before is not what an undo would be asked for.
    let gone = retention.map_or(Which::All, |retention| Which::AllBut(retention.event));
    let gone = vec![Step::LetGo(gone), Step::Collect { fold: true }];
    [Step::Fold(Fold { layer, strategy, kept }), Step::IfPossible(gone)]
}

fn nothing_on(name: &str) -> Error {
    Error::invalid(format!(
        "nothing stands on snapshot '{name}', so there is nothing to merge it with: delete it"
    ))
}

/// The same way, in batches where that is wished or the host has no room otherwise; `forget` where what
/// is kept aside has to go for it.
fn with_room(
    mut strategy: Strategy,
    path: &Path,
    in_batches: bool,
    kept: Option<&KeptAside>,
    forget: &mut bool,
) -> Result<Strategy> {
    let kept_bytes = kept.map_or(0, |k| k.bytes);
    let free = free_space(path)? + if *forget { kept_bytes } else { 0 };
    if in_batches {
        strategy.in_batches(path)?;
    } else if strategy.space > free {
        strategy.in_batches(path)?;
        if strategy.space > free && !*forget {
            *forget = kept.is_some();
        }
        check_space(path, &strategy, free + kept_bytes)?;
    }
    Ok(strategy)
}

/// Refuses a merge that would change what further names of its files show: a layer that is written
/// or gives back what it holds, a file that loses its place to another.
fn refuse_other_names(
    head: &Path,
    layer: &Member,
    on: &[&Member],
    strategy: &Strategy,
) -> Result<()> {
    let down = strategy.direction == Direction::Down;
    if down || strategy.method == Method::Batches {
        refuse_fixed(&layer.path, head)?;
    }
    on.iter().filter(|_| down).try_for_each(|child| {
        let second =
            if child.path == head { frozen_path(head, child.label.layer) } else { head.into() };
        refuse_fixed(&child.path, &second)
    })
}

fn describe(plan: Plan, strategy: &Strategy) -> Plan {
    Plan {
        direction: Some(strategy.direction),
        method: Some(strategy.method),
        why: strategy.why.to_owned(),
        moved: strategy.moved,
        linked: strategy.linked,
        space: strategy.space,
        freed: strategy.freed,
        ..plan
    }
}

fn touch(plan: &mut Plan, layer: &Member, on: &[&Member], kept: bool) {
    let (own, theirs) = match plan.direction {
        Some(Direction::Down) => (Fate::Filled, Fate::Removed),
        _ if kept => (Fate::KeptAside, Fate::Filled),
        _ => (Fate::Removed, Fate::Filled),
    };
    plan.layers.push(Touched::new(layer, own));
    plan.layers.extend(on.iter().map(|m| Touched::new(m, theirs)));
}

/// The layer of a snapshot `name` whose merge was interrupted.
fn unfinished<'a>(family: &'a Family, name: &str) -> Option<&'a Member> {
    let merging = |m: &&Member| matches!(m.label.role, Role::Merging | Role::Rising);
    family.layers.iter().find(|m| merging(m) && m.label.name == name)
}

fn plan_resume(family: &Family, layer: &Member, in_use: bool) -> Result<Plan> {
    let on = family.children(layer.label.layer);
    let down = layer.label.role == Role::Merging && !(in_use && stands_on(family, layer));
    let sources = if down { on.clone() } else { vec![layer] };
    let mut moved = 0;
    for source in sources {
        moved += data_bytes(&*look(source)?.image)?;
    }
    let strategy = Strategy {
        direction: if down { Direction::Down } else { Direction::Up },
        method: Method::Copy,
        moved,
        linked: 0,
        space: 0,
        freed: 0,
        why: "it was begun this way before",
    };
    let mut plan = describe(Plan::new(Operation::Merge, family), &strategy);
    touch(&mut plan, layer, &on, false);
    plan.snapshot = Some(layer.label.name.clone());
    plan.undo = Undoable::No("it was begun before");
    plan.steps = vec![Step::Resume(layer.label.layer)];
    Ok(plan)
}

/// Merges the snapshot `name` of the disk at `path`, in the way that is the cheapest.
///
/// # Errors
/// As [`plan_merge`] and [`Plan::execute`].
pub fn merge(path: &Path, name: &str, progress: &mut Progress<'_>) -> Result<()> {
    plan_merge(path, name, Wishes::default())?.execute(progress)
}
