//! What was dropped from a disk and is kept aside, so that it can come back.
//!
//! What was dropped together carries one event in its labels. Only the last event would come back, and
//! for a set time. An event of which a layer is missing does not come back.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::PathBuf;
use std::time::SystemTime;

use rustix::time::{ClockId, clock_gettime};

use crate::error::{ErrorKind, Result};
use crate::family::cost;
use crate::family::tree::{Family, Member};
use crate::image::{Id, Kept, Role, Uptime, Was};

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

/// The layers that one event dropped.
pub(crate) struct Event<'a> {
    pub kept: &'a Kept,
    pub layers: Vec<&'a Member>,
}

impl Event<'_> {
    pub fn is_whole(&self) -> bool {
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

    pub fn what(&self, family: &Family) -> String {
        match self.lowest() {
            Some(m) if was_of(m) == Some(Was::Merged) => format!("merge of '{}'", m.label.name),
            Some(m) => format!("delete of '{}'", m.label.name),
            None if is_roll(family, self) => "roll to another base".to_owned(),
            None => "revert".to_owned(),
        }
    }
}

pub(crate) fn was_of(member: &Member) -> Option<Was> {
    member.label.kept.as_ref().map(|k| k.was)
}

/// Whether the event put the disk on another base: what it stood on is not what the head stands on.
pub(crate) fn is_roll(family: &Family, event: &Event<'_>) -> bool {
    let base = |member: &Member| {
        let root = family.root_of(member);
        let name = root.peek.identity.backing.as_ref().map(|backing| backing.name.clone());
        (root.parent(), name)
    };
    event.was(Was::Head).is_some_and(|head| base(head) != base(&family.head))
}

/// The events of which something is kept, the last one first.
pub(crate) fn events(family: &Family) -> Vec<Event<'_>> {
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
pub(crate) fn last(family: &Family) -> Option<Event<'_>> {
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
        what: event.what(family),
        since: event.kept.since,
        until: event.kept.until,
        bytes,
        snapshots: names.map(|m| m.label.name.clone()).collect(),
        files: event.layers.iter().map(|m| m.path.clone()).collect(),
    }))
}

/// Whether the layer is the head or a snapshot, or one of them stands on it.
pub(crate) fn is_shown(family: &Family, member: &Member) -> bool {
    shown(family).contains(&member.label.layer)
}

/// The layers that the head or a snapshot is, or stands on.
fn shown(family: &Family) -> HashSet<Id> {
    let below: HashMap<Id, Option<Id>> =
        family.members().map(|m| (m.label.layer, m.parent())).collect();
    let mut shown = HashSet::new();
    let dropped = |m: &&Member| matches!(m.label.role, Role::Dropped | Role::Unnamed);
    for member in family.members().filter(|m| !dropped(m)) {
        let mut at = Some(member.label.layer);
        while let Some(id) = at.filter(|id| below.contains_key(id) && shown.insert(*id)) {
            at = below.get(&id).copied().flatten();
        }
    }
    shown
}

/// Whether nothing has to be let go of: no event that has no right to stay, and no layer without a name
/// on which nothing stands that is shown.
pub(crate) fn is_tidy(family: &Family) -> bool {
    let unnamed = |m: &&Member| m.label.role == Role::Unnamed;
    if !overdue(family).is_empty() {
        return false;
    }
    let mut unnamed = family.layers.iter().filter(unnamed).peekable();
    if unnamed.peek().is_none() {
        return true;
    }
    let shown = shown(family);
    unnamed.all(|m| shown.contains(&m.label.layer))
}

/// The events that have no right to stay: those whose time is over, those that are not whole, and all
/// but the last.
pub(crate) fn overdue(family: &Family) -> Vec<u64> {
    let last = last(family).map(|e| e.kept.event);
    let stays = |e: &Event<'_>| Some(e.kept.event) == last && !is_over(e.kept);
    events(family).iter().filter(|e| !stays(e)).map(|e| e.kept.event).collect()
}

/// Whether the time is over for which it was to be kept. Somebody may have set the clock forth: as long
/// as the host runs that it was dropped on, its count has to say so, too.
fn is_over(kept: &Kept) -> bool {
    let here = |then: Uptime| uptime().filter(|now| now.boot == then.boot).zip(Some(then));
    let passed = |(now, then): (Uptime, Uptime)| {
        now.ms.saturating_sub(then.ms) >= kept.until.saturating_sub(kept.since)
    };
    kept.until <= now() && kept.uptime.and_then(here).is_none_or(passed)
}

/// Now, by the host's count.
pub(crate) fn uptime() -> Option<Uptime> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let boot = Kept::short(boot.trim().parse().ok()?);
    let count = clock_gettime(ClockId::Boottime);
    let ms =
        u64::try_from(count.tv_sec).ok()? * 1000 + u64::try_from(count.tv_nsec).ok()? / 1_000_000;
    Some(Uptime { boot, ms })
}

/// Now, in milliseconds since 1970.
pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}
