//! What is kept aside of a disk: which events dropped it, and letting go of it.
//!
//! What was dropped together carries one event in its labels. Only the last event is kept, and for
//! a set time. An event of which a layer is missing does not come back: what is left of it goes.
//! A layer on which something stands cannot go with the rest: it loses its name, and is folded into
//! what stands on it.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::merge::{self, Progress};
use super::plan::{Fate, Forgotten, Operation, Plan, Touched, Work, now};
use super::reach::Reach;
use super::snapshot::relabel;
use super::tree::{Beside, Family, Member};
use super::{Chain, cost, heal};
use crate::error::{ErrorKind, Result};
use crate::image::{Id, Kept, Role, Was};
use crate::storage::draft::{remove, sync_directory};

/// What is kept aside of a disk, and would come back.
#[derive(Debug, Clone)]
pub struct KeptAside {
    /// What dropped it, in words: "delete of 'monday'".
    pub what: String,
    /// When, in milliseconds since 1970.
    pub since: u64,
    /// Until when it is kept, in milliseconds since 1970.
    pub until: u64,
    /// Bytes of data that only it holds.
    pub bytes: u64,
    /// The snapshots that would come back.
    pub snapshots: Vec<String>,
    /// The files of its layers.
    pub files: Vec<PathBuf>,
}

impl From<KeptAside> for Forgotten {
    fn from(kept: KeptAside) -> Forgotten {
        Forgotten { what: kept.what, bytes: kept.bytes }
    }
}

/// The layers that one event dropped.
pub(super) struct Event<'a> {
    pub kept: &'a Kept,
    pub layers: Vec<&'a Member>,
}

impl Event<'_> {
    fn is_whole(&self) -> bool {
        self.layers.len() == usize::from(self.kept.layers)
    }

    pub fn was(&self, was: Was) -> Option<&Member> {
        self.layers.iter().copied().find(|m| was_of(m) == Some(was))
    }

    /// The layer on which all others of the event stand, head aside.
    pub fn lowest(&self) -> Option<&Member> {
        let own = |id: Option<Id>| self.layers.iter().any(|m| Some(m.label.layer) == id);
        self.layers.iter().copied().find(|m| was_of(m) != Some(Was::Head) && !own(m.parent()))
    }

    pub fn what(&self) -> String {
        match self.lowest() {
            Some(m) if was_of(m) == Some(Was::Merged) => format!("merge of '{}'", m.label.name),
            Some(m) => format!("delete of '{}'", m.label.name),
            None => "revert".to_owned(),
        }
    }
}

pub(super) fn was_of(member: &Member) -> Option<Was> {
    member.label.kept.as_ref().map(|k| k.was)
}

/// The events of which something is kept, the last one first.
pub(super) fn events(family: &Family) -> Vec<Event<'_>> {
    let mut events: Vec<Event<'_>> = Vec::new();
    for member in family.layers.iter().filter(|m| m.label.role == Role::Dropped) {
        let Some(kept) = &member.label.kept else { continue };
        match events.iter_mut().find(|e| e.kept.event == kept.event) {
            Some(event) => event.layers.push(member),
            None => events.push(Event { kept, layers: vec![member] }),
        }
    }
    events.sort_by_key(|e| std::cmp::Reverse(e.kept.since));
    events
}

/// The event that would come back.
pub(super) fn last(family: &Family) -> Option<Event<'_>> {
    events(family).into_iter().find(Event::is_whole)
}

/// What is kept aside of the disk whose family this is.
pub fn kept_aside(family: &Family) -> Result<Option<KeptAside>> {
    let Some(event) = last(family) else { return Ok(None) };
    let mut bytes = 0;
    let shown = shown(family);
    for member in event.layers.iter().filter(|m| !shown.contains(&m.label.layer)) {
        match cost::look(member) {
            // Whoever holds the disk has just let go of it.
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            layer => bytes += cost::data_bytes(&*layer?.image)?,
        }
    }
    let names = event.layers.iter().filter(|m| was_of(m) != Some(Was::Head));
    Ok(Some(KeptAside {
        what: event.what(),
        since: event.kept.since,
        until: event.kept.until,
        bytes,
        snapshots: names.map(|m| m.label.name.clone()).collect(),
        files: event.layers.iter().map(|m| m.path.clone()).collect(),
    }))
}

/// Whether the layer is the head or a snapshot, or one of them stands on it.
pub(super) fn is_shown(family: &Family, member: &Member) -> bool {
    shown(family).contains(&member.label.layer)
}

/// The layers that the head or a snapshot is, or stands on.
fn shown(family: &Family) -> HashSet<Id> {
    let below: HashMap<Id, Option<Id>> =
        family.members().map(|m| (m.label.layer, m.parent())).collect();
    let mut shown = HashSet::new();
    let aside = |m: &&Member| matches!(m.label.role, Role::Dropped | Role::Unnamed);
    for member in family.members().filter(|m| !aside(m)) {
        let mut at = Some(member.label.layer);
        while let Some(id) = at.filter(|id| below.contains_key(id) && shown.insert(*id)) {
            at = below.get(&id).copied().flatten();
        }
    }
    shown
}

/// What letting go of all that is kept aside of the disk at `path` will do.
pub fn plan_forget(path: &Path) -> Result<Plan> {
    heal::heal(path)?;
    let family = Family::of(path)?;
    let all = events(&family);
    let numbers = all.iter().map(|e| e.kept.event).collect();
    let mut plan = Plan::new(Operation::Forget, &family, Work::Forget(numbers));
    plan.forgets = kept_aside(&family)?.map(Forgotten::from);
    let unnamed = family.layers.iter().filter(|m| m.label.role == Role::Unnamed);
    let shown = shown(&family);
    for member in all.iter().flat_map(|e| e.layers.iter().copied()).chain(unnamed) {
        if !shown.contains(&member.label.layer) {
            plan.layers.push(Touched::new(member, Fate::Removed));
            plan.freed += cost::data_bytes(&*cost::look(member)?.image)?;
        } else if let Some(fold) = merge::plan_fold(&family, member, false)? {
            plan.layers.push(Touched::new(member, Fate::Moved));
            plan.moved += fold.moved;
            plan.freed += fold.freed;
        }
    }
    plan.why = "what is kept aside cannot be brought back afterwards".to_owned();
    Ok(plan)
}

/// Executes a plan to forget.
pub(super) fn forget(
    plan: &Plan,
    gone: &[u64],
    reach: &Reach<'_>,
    progress: &mut Progress<'_>,
) -> Result<()> {
    drop(plan.begin(reach)?);
    gone.iter().try_for_each(|event| let_go(reach, &plan.disk, *event))?;
    collect(reach, &plan.disk, Some(progress))
}

/// Lets go of all that is kept aside.
pub(super) fn forget_all(
    reach: &Reach<'_>,
    path: &Path,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let_go_all(reach, path)?;
    collect(reach, path, Some(progress))
}

/// Lets go of all that is kept aside, and folds nothing.
pub(super) fn let_go_all(reach: &Reach<'_>, path: &Path) -> Result<()> {
    let family = Family::of(path)?;
    let gone: Vec<u64> = events(&family).iter().map(|e| e.kept.event).collect();
    gone.into_iter().try_for_each(|event| let_go(reach, path, event))?;
    collect(reach, path, None)
}

/// When room was last made for what is written to a disk.
#[derive(Debug, Default)]
pub(super) struct Room(Option<Instant>);

impl Chain {
    /// Lets go of what is kept aside of the disk, because the host has no space for what is written
    /// to it; whether there is more space than before.
    pub(super) fn make_room(&self) -> bool {
        /// Who failed while another made room had better try again.
        const RECENT: Duration = Duration::from_secs(1);
        let mut room = self.room.lock().unwrap_or_else(|e| e.into_inner());
        if room.0.is_some_and(|then| then.elapsed() < RECENT) {
            return true;
        }
        let head = self.head();
        // A throw-away delta is not the disk.
        let own =
            !head.image.read_only() && heal::same_open_file(&head.path, &head).is_ok_and(|o| o);
        let made = own && discard_bare(&head.path).unwrap_or(false);
        room.0 = made.then(Instant::now);
        made
    }
}

/// Removes what is kept aside and has nothing on it, whoever looks at the rest; whether there was
/// anything. What is left of it the next open puts right.
fn discard_bare(path: &Path) -> Result<bool> {
    let Some(family) = Family::read(path)? else { return Ok(false) };
    let aside = |m: &&Member| matches!(m.label.role, Role::Dropped | Role::Unnamed);
    let layers: Vec<&Member> = family.children_first().into_iter().filter(aside).collect();
    if layers.is_empty() {
        return Ok(false);
    }
    let mut on = Standing::read(path, &family)?;
    let mut any = false;
    for member in layers {
        if on.is_bare(member) && discard(&Reach::Idle, member).is_ok() {
            on.took(member);
            any = true;
        }
    }
    sync_directory(path)?;
    Ok(any)
}

/// Lets go of what older events than `event` dropped: only the last one is kept.
pub(super) fn forget_others(
    reach: &Reach<'_>,
    path: &Path,
    event: u64,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let Some(family) = Family::read(path)? else { return Ok(()) };
    let all = events(&family);
    let older = all.iter().map(|e| e.kept.event).filter(|e| *e != event);
    older.collect::<Vec<_>>().into_iter().try_for_each(|event| let_go(reach, path, event))?;
    collect(reach, path, Some(progress))
}

/// Lets go of events that have no right to stay: those whose time is over, those that are not
/// whole, and all but the last. Only what costs nothing is done.
pub(super) fn tidy(reach: &Reach<'_>, path: &Path, family: &Family) -> Result<()> {
    if is_tidy(family) {
        return Ok(());
    }
    overdue(family).into_iter().try_for_each(|event| let_go(reach, path, event))?;
    collect(reach, path, None)
}

/// Whether [`tidy`] has nothing to do.
pub(super) fn is_tidy(family: &Family) -> bool {
    let unnamed = |m: &Member| m.label.role == Role::Unnamed;
    let idle = || {
        let shown = shown(family);
        family.layers.iter().any(|m| unnamed(m) && !shown.contains(&m.label.layer))
    };
    overdue(family).is_empty() && !(family.layers.iter().any(unnamed) && idle())
}

fn overdue(family: &Family) -> Vec<u64> {
    let last = last(family).map(|e| e.kept.event);
    let stays = |e: &Event<'_>| Some(e.kept.event) == last && e.kept.until > now();
    events(family).iter().filter(|e| !stays(e)).map(|e| e.kept.event).collect()
}

/// Removes the layers of an event on which nothing stands; the others stay without a name.
fn let_go(reach: &Reach<'_>, path: &Path, event: u64) -> Result<()> {
    let family = Family::of(path)?;
    let is_ours = |m: &&Member| {
        m.label.role == Role::Dropped && m.label.kept.as_ref().is_some_and(|k| k.event == event)
    };
    let layers: Vec<&Member> = family.children_first().into_iter().filter(is_ours).collect();
    if layers.is_empty() {
        return Ok(());
    }
    let mut on = Standing::read(path, &family)?;
    for member in layers {
        if on.is_bare(member) {
            discard(reach, member)?;
            on.took(member);
        } else {
            let layer = reach.open(&member.path)?;
            relabel(&layer, |label| (label.role, label.kept) = (Role::Unnamed, None))?;
        }
    }
    sync_directory(path)
}

/// What stands on the layers of a disk, while they go.
struct Standing {
    /// How many layers of the disk stand on each.
    own: HashMap<Id, usize>,
    beside: Beside,
}

impl Standing {
    fn read(path: &Path, family: &Family) -> Result<Standing> {
        let mut own = HashMap::new();
        for parent in family.members().filter_map(Member::parent) {
            *own.entry(parent).or_default() += 1;
        }
        Ok(Standing { own, beside: Beside::read(path)? })
    }

    fn is_bare(&self, member: &Member) -> bool {
        let own = self.own.get(&member.label.layer).copied().unwrap_or(0);
        own == 0 && self.beside.clones_of(member).is_empty()
    }

    fn took(&mut self, member: &Member) {
        if let Some(on) = member.parent().and_then(|id| self.own.get_mut(&id)) {
            *on = on.saturating_sub(1);
        }
    }
}

/// Removes the file of a layer that is still none of the disk's once nobody else can change that.
fn discard(reach: &Reach<'_>, member: &Member) -> Result<()> {
    let layer = match reach.open(&member.path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let role = layer.image.identity()?.label.map(|l| l.role);
    match role {
        Some(Role::Dropped | Role::Unnamed) => remove(&member.path),
        _ => Ok(()),
    }
}

/// Removes layers without a name on which nothing stands, and, with `progress`, folds those on
/// which one layer stands into it.
pub(super) fn collect(
    reach: &Reach<'_>,
    path: &Path,
    mut progress: Option<&mut Progress<'_>>,
) -> Result<()> {
    let mut left = HashSet::new();
    // Whatever goes or is folded makes the tree another one.
    while let Some(family) = Family::read(path)? {
        let unnamed = |m: &&Member| m.label.role == Role::Unnamed;
        let layers: Vec<&Member> = family.children_first().into_iter().filter(unnamed).collect();
        if layers.iter().all(|m| left.contains(&m.label.layer)) {
            break;
        }
        let mut on = Standing::read(path, &family)?;
        let (mut stays, mut gone) = (None, false);
        for member in layers {
            if on.is_bare(member) {
                discard(reach, member)?;
                on.took(member);
                gone = true;
            } else if !left.contains(&member.label.layer) {
                if progress.is_some() {
                    stays = Some(member);
                    break;
                }
                left.insert(member.label.layer);
            }
        }
        if gone {
            sync_directory(path)?;
            continue;
        }
        let (Some(member), Some(progress)) = (stays, progress.as_deref_mut()) else { break };
        match merge::fold_unnamed(reach, &family, member, progress) {
            Ok(true) => {}
            // It stays as it is: the disk is right with it.
            Ok(false) => _ = left.insert(member.label.layer),
            Err(e) if matches!(e.kind(), ErrorKind::NoSpace | ErrorKind::InUse) => {
                left.insert(member.label.layer);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
