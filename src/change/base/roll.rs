//! Putting a disk anew on another base: its head is an empty delta on that, and what it was is kept aside.
//!
//! It is what going back to a snapshot is, but that the new head stands on a layer of another disk: the
//! old one comes back as after that ([`plan_undo`]), with all that was written to it, and
//! one rename decides either way. A change that is interrupted leaves the disk on its old base or on the
//! new one, whole.

use std::path::{Path, PathBuf};
use std::slice::from_ref;

use crate::change::base::clone::Base;
use crate::change::base::marks::Bases;
use crate::change::open::take_head;
use crate::change::plan::{Fate, Forgotten, Keeping, Operation, Plan, Touched, Undoable};
use crate::change::release::Retention;
use crate::change::run::context::Context;
use crate::change::run::step::{Demote, Step};
use crate::change::run::{Ready, Run, bitmaps};
use crate::change::undo::plan_undo;
use crate::change::{heal, names};
use crate::error::{Error, Result};
use crate::family::beside::Beside;
use crate::family::dropped::{events, is_roll, kept_aside, last};
use crate::family::standing::disk_stands_on;
use crate::family::tree::{Family, Member};
use crate::family::{cost, frozen_path};
use crate::image::{Role, Was};
use crate::open::gate::same_file;
use crate::open::{OpenOptions, gate};
use crate::storage::{Draft, Turn, follow, refuse_fixed};

/// How a disk is put on another base.
#[derive(Debug, Clone, Default)]
pub struct Wishes<'a> {
    /// What was written to it stays as a snapshot of this name.
    pub keep: Option<&'a str>,
    /// How long what it was is kept aside.
    pub keeping: Keeping,
    /// What is run in it from now on; without, what the base says of itself.
    pub config: Option<Vec<u8>>,
}

/// A change that puts a disk on another base.
#[derive(Debug, Clone)]
pub struct Roll {
    /// What it does.
    pub plan: Plan,
    base: PathBuf,
    config: Option<Vec<u8>>,
}

/// What putting the disk at `path` on `base` will do; `None` where it stands on that.
///
/// # Errors
/// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) for a disk that stands on no other: there is nothing
/// that `base` could take the place of.
pub fn plan_roll(path: &Path, base: &Path, wishes: &Wishes<'_>) -> Result<Option<Roll>> {
    let path = &follow(path)?;
    let family = healed(path)?.ok_or_else(|| no_clone(path))?;
    if is_on(&family, base)? {
        return Ok(None);
    }
    Beside::read(&family)?.refuse_head(&family)?;
    refuse_fixed(path, &frozen_path(path, family.head.label.layer))?;
    let mut plan = Plan::new(Operation::Roll, &family);
    plan.why = format!("an empty delta on '{}' takes the head's place", base.display());
    let retention = Retention::new(&family, wishes.keeping);
    let bare = cost::is_bare(&*cost::look(&family.head)?.image)?;
    match wishes.keep {
        // One that was interrupted has taken the snapshot.
        Some(name) if bare && is_kept_as(&family, name) => {
            plan.layers.push(Touched::new(&family.head, Fate::KeptAside));
        }
        Some(name) => {
            names::check_new(&family, name)?;
            plan.layers.push(Touched::new(&family.head, Fate::Frozen));
            plan.steps.extend(freeze(&family, name));
        }
        None => note_dropped(&mut plan, &family, wishes.keeping)?,
    }
    plan.undo = match wishes.keeping.is_nothing() {
        true => Undoable::No("nothing is kept aside"),
        false => Undoable::Until(retention.until),
    };
    plan.forgets = kept_aside(&family)?.map(Forgotten::from);
    plan.bitmaps = bitmaps::names_of(&family.head)?;
    let (role, kept) = (Role::Dropped, Some(retention.kept(Was::Head, 1, Vec::new())));
    let (name, description) = (String::new(), String::new());
    plan.steps.push(Step::Demote(Demote { role, name, description, kept, durably: false }));
    plan.steps.push(Step::PutHead);
    plan.steps.extend(retention.afterwards());
    plan.layers.push(Touched { path: path.to_path_buf(), name: None, fate: Fate::Created });
    Ok(Some(Roll { plan, base: base.to_owned(), config: wishes.config.clone() }))
}

impl Roll {
    /// Does it.
    ///
    /// # Errors
    /// As [`Plan::execute`]; [`ErrorKind::Sealed`](crate::ErrorKind::Sealed) for a base that will not stay.
    pub fn execute(&self) -> Result<()> {
        let path = &self.plan.disk;
        let _turn = Turn::take(path)?;
        // Before the family is read: then nobody else changes it any more.
        let head = take_head(path)?;
        let family = Family::of(path)?;
        self.plan.check_family(&family)?;
        let base = Base::seal_with(&self.base, &OpenOptions::default(), from_ref(path))?;
        base.refuse_below(path)?;
        let base = base.with_config(self.config.clone());
        let (disk, bases) = (family.head.label.disk, Bases::several(&family));
        let done = base.mark(disk, path).and_then(|parent| {
            let draft = Draft::replacing(path)?;
            let identity = base.fill(&draft, disk, path, parent)?;
            let ready = Ready { draft, identity, size: base.size() };
            let mut run = Run::new(Context::Idle, family).holding(head).with_head(ready);
            run.quietly(&self.plan.steps)
        });
        // What failed after the rename took effect.
        match disk_stands_on(path, base.path()) {
            true => base.used(),
            false => base.unmark(disk, path),
        }
        // That of a roll before this one, which is kept aside no more.
        bases.leave(path);
        done
    }
}

/// What bringing the disk at `path` back to what it was before it was last put on another base will do;
/// `None` where nothing of that is kept. What was written to it since is dropped, or kept as a snapshot of
/// the name `keep`.
pub fn plan_back(path: &Path, keep: Option<&str>) -> Result<Option<Plan>> {
    let path = &follow(path)?;
    if has_rolled(path)? { plan_undo(path, keep).map(Some) } else { Ok(None) }
}

/// Whether the disk at `path` stands on `base`: then [`plan_roll`] has nothing to do.
///
/// # Errors
/// As [`plan_roll`].
pub fn has_base(path: &Path, base: &Path) -> Result<bool> {
    let path = &follow(path)?;
    let family = healed(path)?.ok_or_else(|| no_clone(path))?;
    is_on(&family, base)
}

/// Whether what the disk at `path` was before it was last put on another base is kept: then [`plan_back`] brings it
/// back.
pub fn has_rolled(path: &Path) -> Result<bool> {
    let family = healed(&follow(path)?)?;
    Ok(family.is_some_and(|family| last(&family).is_some_and(|event| is_roll(&family, &event))))
}

fn healed(path: &Path) -> Result<Option<Family>> {
    match Family::read(path)? {
        Some(family) => heal::healed(path, Some(family)).map(Some),
        None => Ok(None),
    }
}

fn is_on(family: &Family, base: &Path) -> Result<bool> {
    let below = below(family).ok_or_else(|| no_clone(&family.head.path))?;
    Ok(same_file(&below, base))
}

/// The file that the disk at `path` stands on, below its own snapshots; `None` where it stands on none, or
/// carries no label.
pub fn stands_on(path: &Path) -> Result<Option<PathBuf>> {
    Ok(Family::read(path)?.and_then(|family| below(&family)))
}

/// The size of the disk at `path`, in bytes, before it was put on another base; `None` where nothing of
/// that is kept.
pub fn size_before(path: &Path) -> Result<Option<u64>> {
    let Some(family) = Family::read(path)? else { return Ok(None) };
    let all = events(&family);
    let event = all.iter().find(|event| event.is_whole() && is_roll(&family, event));
    Ok(event.and_then(|event| event.was(Was::Head)).map(|head| head.peek.size))
}

fn no_clone(path: &Path) -> Error {
    let text = "is no clone: it stands on no base that another could take the place of";
    Error::invalid(text).at_path(path)
}

fn below(family: &Family) -> Option<PathBuf> {
    let root = family.root_of(&family.head);
    let backing = root.peek.identity.backing.as_ref()?;
    gate::resolve(&root.path, &backing.name).ok()
}

/// Whether the head stands right on the snapshot of that name.
fn is_kept_as(family: &Family, name: &str) -> bool {
    let below = family.head.parent().and_then(|id| family.member(id));
    below.is_some_and(|m: &Member| m.is_snapshot() && m.label.name == name)
}

/// The head's file as a snapshot, and an empty head on it.
fn freeze(family: &Family, name: &str) -> [Step; 4] {
    let (name, description) = (name.to_owned(), String::new());
    let (role, kept) = (Role::Snapshot, None);
    let on = family.head.label.layer;
    [
        Step::ReadBitmaps,
        Step::Demote(Demote { role, name, description, kept, durably: false }),
        Step::NewHead { on, bitmaps: true },
        Step::HoldHead,
    ]
}

/// Notes that what the head holds is shown no more.
fn note_dropped(plan: &mut Plan, family: &Family, keeping: Keeping) -> Result<()> {
    plan.dropped = cost::data_bytes(&*cost::look(&family.head)?.image)?;
    let fate = if keeping.is_nothing() { Fate::Removed } else { Fate::KeptAside };
    plan.layers.push(Touched::new(&family.head, fate));
    match keeping.is_nothing() {
        true => plan.freed = plan.dropped,
        false => plan.kept = plan.dropped,
    }
    Ok(())
}
