//! Letting go of what was dropped from a disk: which steps that takes, as the family is.
//!
//! A layer on which something stands cannot go with the rest: it loses its name, and is folded into what
//! stands on it.

use std::collections::{HashMap, HashSet};

use crate::change::run::step::{Fold, Relabel, Step, Which};
use crate::change::strategy;
use crate::error::Result;
use crate::family::beside::Beside;
use crate::family::dropped::{events, is_shown, now, uptime};
use crate::family::tree::{Family, Member};
use crate::image::{Id, Kept, Role, Uptime, Was};

use super::plan::Keeping;

/// Under what dropped layers are kept: which event, and how long.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Retention {
    pub event: u64,
    since: u64,
    /// In milliseconds since 1970.
    pub until: u64,
    uptime: Option<Uptime>,
    /// Whether nothing is kept in the end: it only lasts until the change is done.
    nothing: bool,
}

impl Retention {
    /// What is dropped of the disk now comes after all that was dropped of it before, whatever the clock
    /// says: the last of it is what would come back.
    pub fn new(family: &Family, keeping: Keeping) -> Retention {
        let before = events(family).first().map_or(0, |e| e.kept.since.saturating_add(1));
        let since = now().max(before);
        let age = u64::try_from(keeping.0.as_millis()).unwrap_or(u64::MAX);
        let until = since.saturating_add(age);
        let event = Kept::short(Id::new_v4());
        Retention { event, since, until, uptime: uptime(), nothing: keeping.is_nothing() }
    }

    /// What a layer says that is dropped with `layers` in all.
    pub fn kept(&self, was: Was, layers: usize, children: Vec<u64>) -> Kept {
        let layers = u16::try_from(layers).unwrap_or(u16::MAX);
        Kept {
            event: self.event,
            layers,
            was,
            since: self.since,
            until: self.until,
            uptime: self.uptime,
            children,
        }
    }

    /// What is let go of once the layers are dropped: what went before, or all.
    pub fn afterwards(&self) -> Vec<Step> {
        if self.nothing {
            return vec![Step::LetGo(Which::All), Step::Collect { fold: true }];
        }
        // What went before may be looked at by somebody: then it goes later.
        let others = Step::LetGo(Which::AllBut(self.event));
        vec![Step::IfPossible(vec![others, Step::Collect { fold: true }])]
    }
}

/// Lets go of an event: its layers on which nothing stands are removed; the others stay without a name.
pub(crate) fn let_go(family: &Family, event: u64) -> Result<Vec<Step>> {
    let is_ours = |m: &&Member| {
        m.label.role == Role::Dropped && m.label.kept.as_ref().is_some_and(|k| k.event == event)
    };
    let layers: Vec<&Member> = family.children_first().into_iter().filter(is_ours).collect();
    if layers.is_empty() {
        return Ok(Vec::new());
    }
    let mut on = OnEach::read(family)?;
    let mut steps = Vec::new();
    for member in layers {
        let layer = member.label.layer;
        if on.is_bare(member) {
            steps.push(Step::Discard(layer));
            on.took(member);
        } else {
            let (role, kept, unless_cloned) = (Role::Unnamed, None, false);
            steps.push(Step::Label(Relabel { layer, role, kept, unless_cloned }));
        }
    }
    steps.push(Step::SyncNames);
    Ok(steps)
}

/// What is kept aside and has nothing on it: removing it makes space at once.
pub(crate) fn bare(family: &Family) -> Result<Vec<Id>> {
    let dropped = |m: &&Member| matches!(m.label.role, Role::Dropped | Role::Unnamed);
    let layers: Vec<&Member> = family.children_first().into_iter().filter(dropped).collect();
    if layers.is_empty() {
        return Ok(Vec::new());
    }
    let mut on = OnEach::read(family)?;
    let mut bare = Vec::new();
    for member in layers {
        if on.is_bare(member) {
            bare.push(member.label.layer);
            on.took(member);
        }
    }
    Ok(bare)
}

/// What is next to do with the layers without a name.
pub(crate) enum Next {
    Gone(Vec<Step>),
    /// On it one layer stands, or several.
    Fold(Id),
    Nothing,
}

/// The layers without a name that were dealt with, as far as they could be.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    discarded: HashSet<Id>,
    folded: HashSet<Id>,
}

/// What is next to do with the layers without a name: those on which nothing stands go; with `fold`,
/// others are folded. Each is tried once, and noted in `seen`.
pub(crate) fn next_unnamed(family: &Family, seen: &mut Seen, fold: bool) -> Result<Next> {
    let unnamed = |m: &&Member| m.label.role == Role::Unnamed;
    let layers: Vec<&Member> = family.children_first().into_iter().filter(unnamed).collect();
    if layers.iter().all(|m| seen.discarded.contains(&m.label.layer)) {
        return Ok(Next::Nothing);
    }
    let mut on = OnEach::read(family)?;
    let (mut steps, mut stays) = (Vec::new(), None);
    for member in layers {
        let layer = member.label.layer;
        if on.is_bare(member) && seen.discarded.insert(layer) {
            steps.push(Step::Discard(layer));
            on.took(member);
        } else if stays.is_none() && !seen.folded.contains(&layer) {
            stays = Some(layer);
        }
    }
    if !steps.is_empty() {
        steps.push(Step::SyncNames);
        return Ok(Next::Gone(steps));
    }
    Ok(match stays.filter(|layer| fold && seen.folded.insert(*layer)) {
        Some(layer) => Next::Fold(layer),
        None => Next::Nothing,
    })
}

/// Folds a layer without a name, on which one layer stands; no step where it cannot be, or need not,
/// since nothing that is shown stands on it.
pub(crate) fn fold(family: &Family, layer: Id, in_use: bool) -> Result<Vec<Step>> {
    let member = family.layer(layer)?;
    if family.children(layer).len() != 1 || !is_shown(family, member) {
        return Ok(Vec::new());
    }
    let Some(strategy) = strategy::for_unnamed(family, member, in_use)? else {
        return Ok(Vec::new());
    };
    let strategy = strategy::within_space(strategy, &family.head.path)?;
    Ok(vec![Step::Fold(Fold { layer, strategy, kept: None })])
}

/// What stands on the layers of a disk, while they go.
struct OnEach {
    /// How many layers of the disk stand on each.
    own: HashMap<Id, usize>,
    beside: Beside,
}

impl OnEach {
    fn read(family: &Family) -> Result<OnEach> {
        let mut own = HashMap::new();
        for parent in family.members().filter_map(Member::parent) {
            *own.entry(parent).or_default() += 1;
        }
        Ok(OnEach { own, beside: Beside::read(family)? })
    }

    fn is_bare(&self, member: &Member) -> bool {
        let own = self.own.get(&member.label.layer).copied().unwrap_or(0);
        own == 0 && self.beside.is_own(member)
    }

    fn took(&mut self, member: &Member) {
        if let Some(on) = member.parent().and_then(|id| self.own.get_mut(&id)) {
            *on = on.saturating_sub(1);
        }
    }
}
