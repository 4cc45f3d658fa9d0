//! Merging a snapshot: its name goes, its changes are folded into a neighbour.
//!
//! Up: what the layer holds is copied into each of its children, which do not show anything else
//! for it; then they are moved to its parent, and it goes. Until that moment the old tree stands.
//!
//! Down: what its only child holds is written into the layer, which then takes the child's place
//! and name. The child shows its own contents at every moment, so the disk is right throughout; but
//! the snapshot is no restore point from the first write on, and so is marked before it. A merge
//! that is interrupted then is finished by the next open for writing.
//!
//! In batches, either way: what was copied and is durable is given back where it came from. Then
//! neither neighbour can do without the other until the merge is finished.

use std::path::Path;

use super::cost::{data_bytes, look, share_of};
use super::delete::Aside;
use super::descent::Descent;
use super::fold::{self, Meter, Source};
use super::open::{OpenOptions, open, open_image};
use super::plan::{
    Direction, Fate, Forgotten, Keeping, Method, Operation, Plan, Touched, Undoable, Work,
    free_space,
};
use super::reach::Reach;
use super::snapshot::{relabel, unprotected};
use super::tree::{Family, Member, clones_of, refuse_clones, same_file};
use super::way::{Way, check_space, choose};
use super::{Chain, Layer, aside, heal};
use crate::block::BlockDevice;
use crate::error::{Error, Result};
use crate::image::{Id, Image, Kept, Role, Was};
use crate::storage::draft::{directory, remove, rename, sync_directory};
use crate::storage::shares_space;

/// What an interrupted merge leaves where one side lost what the other has.
pub(super) const UNFINISHED: &str =
    "the disk is as it was; the merge is finished by running it again, or by the next writer";
/// Told the bytes done and to be done, and now and then nothing new; `false` asks to stop.
pub type Progress<'a> = dyn FnMut(u64, u64) -> bool + Send + 'a;

/// How a merge is to be done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wishes {
    /// How long a merged snapshot is kept where that is free.
    pub keeping: Keeping,
    /// Copy and give back in batches, whatever space there is.
    pub in_batches: bool,
    /// Whether the disk is in use meanwhile: some ways are not open then.
    pub in_use: bool,
}

/// A merge to be done.
#[derive(Debug, Clone)]
pub(super) struct Merge {
    layer: Id,
    way: Way,
    /// How the merged layer is kept.
    aside: Option<Aside>,
    /// Whether what is kept aside goes first.
    forget: bool,
    /// Whether it was begun before.
    resume: bool,
}

/// What merging the snapshot `name` of the disk at `path` will do.
///
/// # Errors
/// [`ErrorKind::Sealed`] where clones stand on it; [`ErrorKind::Invalid`] where nothing stands on
/// it, so that there is nothing to fold it into; [`ErrorKind::NoSpace`] where the host has no room.
pub fn plan_merge(path: &Path, name: &str, wishes: Wishes) -> Result<Plan> {
    if let Some(family) = Family::read(path)?
        && let Some(layer) = unfinished(&family, name)
    {
        return plan_resume(&family, layer, wishes.in_use);
    }
    heal::heal(path)?;
    let family = Family::of(path)?;
    let layer = family.snapshot(name)?;
    refuse_clones(layer)?;
    let children = family.children(layer.label.layer);
    let share = !wishes.in_batches && shares_space(directory(path));
    // Without sharing, what is only kept aside would have to take a copy of its own.
    let stays = |m: &&Member| share || aside::is_shown(&family, m);
    let on: Vec<&Member> = children.iter().copied().filter(stays).collect();
    if on.is_empty() {
        let message = format!(
            "nothing stands on snapshot '{name}', so there is nothing to merge it with: delete it"
        );
        return Err(Error::invalid(message).at_path(path));
    }
    let kept = aside::kept_aside(&family)?;
    let mut forget = on.len() < children.len();
    let mut way = choose(layer, &on, share, wishes.in_use)?;
    let free = free_space(path)? + if forget { kept.as_ref().map_or(0, |k| k.bytes) } else { 0 };
    if wishes.in_batches {
        way.in_batches(path)?;
    } else if way.space > free {
        way.in_batches(path)?;
        if way.space > free && !forget {
            forget = kept.is_some();
        }
        check_space(path, &way, free + kept.as_ref().map_or(0, |k| k.bytes))?;
    }
    let keepable = way.method == Method::Share
        && way.direction == Direction::Up
        && on.len() <= Kept::MAX_CHILDREN
        && !wishes.keeping.is_nothing();
    let aside = keepable.then(|| Aside::new(wishes.keeping));
    let work = Merge { layer: layer.label.layer, way: way.clone(), aside, forget, resume: false };
    let mut plan = describe(Plan::new(Operation::Merge, &family, Work::Merge(work)), &way);
    touch(&mut plan, layer, &on, aside.is_some());
    plan.snapshot = Some(name.to_owned());
    plan.share = share_of(layer, &on)?;
    plan.undo = match aside {
        Some(aside) => Undoable::Until(aside.until()),
        None => Undoable::No("the host shares no bytes between files, so keeping it is not free"),
    };
    if aside.is_some() {
        (plan.kept, plan.freed) = (data_bytes(&*look(layer)?.image)?, 0);
    }
    plan.forgets = kept.filter(|_| forget || aside.is_some()).map(Forgotten::from);
    Ok(plan)
}

fn describe(plan: Plan, way: &Way) -> Plan {
    Plan {
        direction: Some(way.direction),
        method: Some(way.method),
        why: way.why.to_owned(),
        moved: way.moved,
        linked: way.linked,
        space: way.space,
        freed: way.freed,
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
    let way = Way {
        direction: if down { Direction::Down } else { Direction::Up },
        method: Method::Copy,
        moved,
        linked: 0,
        space: 0,
        freed: 0,
        why: "it was begun this way before",
    };
    let work = Merge {
        layer: layer.label.layer,
        way: way.clone(),
        aside: None,
        forget: false,
        resume: true,
    };
    let mut plan = describe(Plan::new(Operation::Merge, family, Work::Merge(work)), &way);
    touch(&mut plan, layer, &on, false);
    plan.snapshot = Some(layer.label.name.clone());
    plan.undo = Undoable::No("it was begun before");
    Ok(plan)
}

/// Merges the snapshot `name` of the disk at `path`, in the way that is the cheapest.
///
/// # Errors
/// As [`plan_merge`] and [`Plan::execute`].
pub fn merge(path: &Path, name: &str, progress: &mut Progress<'_>) -> Result<()> {
    plan_merge(path, name, Wishes::default())?.execute(progress)
}

/// Executes a merge.
pub(super) fn execute(
    plan: &Plan,
    work: &Merge,
    reach: &Reach<'_>,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let path = &plan.disk;
    if work.resume {
        return resume(reach, path, work.layer, progress);
    }
    let (head, mut family) = plan.begin(reach)?;
    if work.forget {
        aside::let_go_all(reach, path)?;
        family = Family::of(path)?;
    }
    let layer = family.layer(work.layer)?;
    // The head is held throughout, by whoever works on it.
    let takes_part = family.head.parent() == Some(layer.label.layer);
    let held = (!takes_part).then_some(head);
    go(reach, &family, layer, work, progress)?;
    drop(held);
    heal::bearing(match work.aside {
        Some(aside) => aside::forget_others(reach, path, aside.event(), progress),
        None => aside::collect(reach, path, Some(progress)),
    })
}

fn go(
    reach: &Reach<'_>,
    family: &Family,
    layer: &Member,
    work: &Merge,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let path = &family.head.path;
    let on = family.children(layer.label.layer);
    match (work.way.direction, work.way.method) {
        (Direction::Down, method) => {
            mark(reach, layer, Role::Merging, None)?;
            fold_down(reach, path, layer.label.layer, method == Method::Batches, progress)?;
        }
        (Direction::Up, Method::Batches) => {
            mark(reach, layer, Role::Rising, None)?;
            rise(reach, path, layer.label.layer, progress)?;
        }
        (Direction::Up, method) => {
            let share = method == Method::Share;
            match reach.held_on(&layer.path) {
                Some(live) => live.fold_up(layer, &on, share, progress)?,
                None => on.iter().try_for_each(|child| fold_up(child, layer, share, progress))?,
            }
            let children = on.iter().map(|m| Kept::short(m.label.layer)).collect();
            let kept = work.aside.map(|aside| aside.kept(Was::Merged, 1, children));
            mark(reach, layer, Role::Leaving, kept)?;
            leave(reach, path, layer.label.layer)?;
        }
    }
    reach.settle()
}

/// Whether the head stands right on the layer.
fn stands_on(family: &Family, layer: &Member) -> bool {
    family.head.parent() == Some(layer.label.layer)
}

/// What folding a layer without a name into the one that will be left on it costs; `None` where
/// several will be.
pub(super) fn plan_fold(family: &Family, layer: &Member, in_use: bool) -> Result<Option<Way>> {
    let on = family.children(layer.label.layer);
    let on: Vec<&Member> = on.into_iter().filter(|m| aside::is_shown(family, m)).collect();
    let clones = clones_of(&layer.path, Some(layer.label.disk))?;
    if on.len() != 1 || !clones.is_empty() {
        return Ok(None);
    }
    choose(layer, &on, shares_space(directory(&layer.path)), in_use).map(Some)
}

/// Folds a layer without a name, on which one layer stands; `false` where it cannot be, or need
/// not, since nothing that is shown stands on it.
pub(super) fn fold_unnamed(
    reach: &Reach<'_>,
    family: &Family,
    layer: &Member,
    progress: &mut Progress<'_>,
) -> Result<bool> {
    let path = &family.head.path;
    if family.children(layer.label.layer).len() != 1 || !aside::is_shown(family, layer) {
        return Ok(false);
    }
    let in_use = reach.held().is_some();
    let Some(mut way) = plan_fold(family, layer, in_use)? else { return Ok(false) };
    let free = free_space(path)?;
    if way.space > free {
        way.in_batches(path)?;
        check_space(path, &way, free)?;
    }
    let work = Merge { layer: layer.label.layer, way, aside: None, forget: false, resume: false };
    go(reach, family, layer, &work, progress)?;
    Ok(true)
}

fn mark(reach: &Reach<'_>, layer: &Member, role: Role, kept: Option<Kept>) -> Result<()> {
    let open = reach.open(&layer.path)?;
    relabel(&open, |label| (label.role, label.kept) = (role, kept))
}

/// Copies into `child` what only `layer` holds.
fn fold_up(child: &Member, layer: &Member, share: bool, progress: &mut Progress<'_>) -> Result<()> {
    let options = OpenOptions { same_contents: true, ..unprotected() };
    let chain = open(&child.path, &options)?;
    let below = chain.all_layers().get(1).cloned();
    let below = below.filter(|l| same_file(&l.path, &layer.path)).ok_or_else(|| {
        Error::corrupt("does not stand on the layer that its label names").at_path(&child.path)
    })?;
    fold::up(&chain, &Source::below(&below, share), progress)?;
    chain.flush()
}

/// Moves what a rising layer holds into those on it, batch by batch, and then them to its parent.
fn rise(reach: &Reach<'_>, path: &Path, layer: Id, progress: &mut Progress<'_>) -> Result<()> {
    let family = Family::of(path)?;
    let Some(layer) = family.layers.iter().find(|m| m.label.layer == layer) else { return Ok(()) };
    let children = family.children(layer.label.layer);
    match reach.held_on(&layer.path) {
        Some(live) => live.rise(layer, &children, progress)?,
        None => {
            let lower = open_image(&layer.path, &unprotected())?;
            let chains: Vec<Chain> =
                children.iter().map(|child| on_open(child, &lower)).collect::<Result<_>>()?;
            let total = data_bytes(&*lower.image)?.saturating_mul(chains.len() as u64);
            let mut meter = Meter::new(progress, total, UNFINISHED);
            let chains: Vec<&Chain> = chains.iter().collect();
            fold::up_in_batches(&chains, &lower, &mut meter, &mut |_| Ok(()))?;
        }
    }
    mark(reach, layer, Role::Leaving, None)?;
    leave(reach, path, layer.label.layer)
}

/// Opens `child`, for taking over what `lower` below it holds, which is open.
pub(super) fn on_open(child: &Member, lower: &Layer) -> Result<Chain> {
    let options = OpenOptions { same_contents: true, ..unprotected() };
    let mut descent = Descent::from_head(open_image(&child.path, &options)?, &options)?;
    descent.put(lower.clone())?;
    while descent.step()? {}
    Ok(descent.finish())
}

/// Moves the children of a layer that is leaving to its parent. Then it goes, or is kept aside.
pub(super) fn leave(reach: &Reach<'_>, path: &Path, layer: Id) -> Result<()> {
    let family = Family::of(path)?;
    let Some(layer) = family.layers.iter().find(|m| m.label.layer == layer) else { return Ok(()) };
    for child in family.children(layer.label.layer) {
        let open = reach.open_same(&child.path)?;
        let mut identity = open.image.identity()?;
        identity.backing = layer.peek.identity.backing.clone();
        if let Some(label) = &mut identity.label {
            label.parent = layer.label.parent;
        }
        open.image.set_identity(&identity).map_err(|e| e.at_path(&child.path))?;
    }
    if layer.label.kept.is_some() {
        return mark(reach, layer, Role::Dropped, layer.label.kept.clone());
    }
    remove(&layer.path)?;
    sync_directory(path)
}

/// Goes on with a merge that was interrupted.
pub(super) fn resume(
    reach: &Reach<'_>,
    path: &Path,
    layer: Id,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let family = Family::of(path)?;
    let Some(member) = family.layers.iter().find(|m| m.label.layer == layer) else { return Ok(()) };
    match member.label.role {
        Role::Rising => rise(reach, path, layer, progress)?,
        // Under its user the head stays what it is. Either way holds all that the disk shows.
        Role::Merging if reach.held().is_some() && stands_on(&family, member) => {
            mark(reach, member, Role::Rising, None)?;
            rise(reach, path, layer, progress)?;
        }
        Role::Merging => {
            let mut held = 0;
            for child in family.children(layer) {
                held += data_bytes(&*look(child)?.image)?;
            }
            fold_down(reach, path, layer, held > free_space(path)?, progress)?;
        }
        _ => {}
    }
    reach.settle()
}

/// Writes what the only child of a merging layer holds into it; then it takes the child's place.
fn fold_down(
    reach: &Reach<'_>,
    path: &Path,
    layer: Id,
    in_batches: bool,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let family = Family::of(path)?;
    let Some(layer) = family.layers.iter().find(|m| m.label.layer == layer) else { return Ok(()) };
    let children = family.children(layer.label.layer);
    let [child] = &children[..] else {
        let message = "is being merged, but not exactly one layer stands on it";
        return Err(Error::corrupt(message).at_path(&layer.path));
    };
    if let Some(live) = reach.held_on(&layer.path) {
        return live.fold_down(layer, child, in_batches, progress);
    }
    // Held for writing also where it is only read: nobody may change it meanwhile.
    let options = OpenOptions { same_contents: true, ..unprotected() };
    let upper = open_image(&child.path, &options)?;
    let chain = open(&layer.path, &unprotected())?;
    let mut meter = Meter::new(progress, data_bytes(&*upper.image)?, UNFINISHED);
    fold::down((&upper, in_batches), &chain, &mut meter, &mut |_| Ok(()))?;
    chain.flush()?;
    let image = chain.head().image;
    take_place(&*upper.image, layer, &*image)?;
    drop((upper, image, chain));
    rename(&layer.path, &child.path)?;
    sync_directory(path)
}

/// Makes `image`, the layer `layer`, say of itself what `upper` says, which it took in.
pub(super) fn take_place(upper: &dyn Image, layer: &Member, image: &dyn Image) -> Result<()> {
    let mut identity = upper.identity()?;
    identity.backing = image.backing();
    if let Some(label) = &mut identity.label {
        label.parent = layer.label.parent;
    }
    image.set_identity(&identity).map_err(|e| e.at_path(&layer.path))
}
