//! What a change of the tree will do, as a value: computed, shown, and then executed as it is.
//!
//! A plan is a description for people and a list of steps. It remembers the tree that it was made for. Where the tree is another by the time it is
//! executed, it refuses: nothing is done that was not shown.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::change::run::step::Step;
use crate::error::{Error, ErrorKind, Result};
use crate::family::tree::{Family, Member};
use crate::family::{cost, dropped};
use crate::image::{Id, Role};

pub use crate::change::run::step::{Direction, Method};

/// Which change of the tree it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// A snapshot goes, and the changes made since it.
    Delete,
    /// The disk goes back to a snapshot.
    Revert,
    /// A snapshot goes; its changes are folded into a neighbour.
    Merge,
    /// What was dropped last comes back.
    Undo,
    /// What is kept aside goes for good.
    Forget,
    /// The disk is put anew on another base.
    Roll,
}

impl Operation {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Delete => "delete",
            Operation::Revert => "revert",
            Operation::Merge => "merge",
            Operation::Undo => "undo",
            Operation::Forget => "forget",
            Operation::Roll => "roll",
        }
    }
}

/// What becomes of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Its file goes.
    Removed,
    /// It is no part of the disk any more, but can come back.
    KeptAside,
    /// It is made, empty.
    Created,
    /// Data is written into it.
    Filled,
    /// It is put on another layer; its contents stay.
    Moved,
    /// It gets the head's name.
    BecomesHead,
    /// It is frozen as a snapshot.
    Frozen,
    /// It is a snapshot again.
    Restored,
}

impl Fate {
    /// What becomes of it, in a few words.
    pub fn words(self) -> &'static str {
        match self {
            Fate::Removed => "removed",
            Fate::KeptAside => "kept aside",
            Fate::Created => "created",
            Fate::Filled => "filled",
            Fate::Moved => "moved",
            Fate::BecomesHead => "becomes the head",
            Fate::Frozen => "frozen",
            Fate::Restored => "restored",
        }
    }
}

/// A layer that a plan touches.
#[derive(Debug, Clone)]
pub struct Touched {
    /// Its file, as it is named before.
    pub path: PathBuf,
    /// The snapshot's name; `None` for the head, and for a layer without a name.
    pub name: Option<String>,
    /// What becomes of it.
    pub fate: Fate,
}

impl Touched {
    pub(crate) fn new(member: &Member, fate: Fate) -> Touched {
        let name = Some(member.label.name.clone()).filter(|n| !n.is_empty());
        Touched { path: member.path.clone(), name, fate }
    }
}

/// Whether a change can be taken back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Undoable {
    /// Until then, in milliseconds since 1970, unless the space is wanted before.
    Until(u64),
    /// Nothing is lost that would have to come back.
    NotNeeded,
    /// It cannot, for this reason.
    No(&'static str),
}

/// What was kept aside before and goes to make room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forgotten {
    /// What had dropped it.
    pub what: String,
    /// Bytes of data that it holds.
    pub bytes: u64,
}

impl From<dropped::KeptAside> for Forgotten {
    fn from(kept: dropped::KeptAside) -> Forgotten {
        Forgotten { what: kept.what, bytes: kept.bytes }
    }
}

/// How long what is dropped is kept aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keeping(pub Duration);

impl Keeping {
    /// Nothing is kept aside.
    pub const NOTHING: Keeping = Keeping(Duration::ZERO);

    pub(crate) fn is_nothing(self) -> bool {
        self.0.is_zero()
    }
}

impl Default for Keeping {
    /// Seven days.
    fn default() -> Keeping {
        Keeping(Duration::from_secs(7 * 24 * 3600))
    }
}

/// What a change of the tree will do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Which change it is.
    pub operation: Operation,
    /// The disk, by its head's name.
    pub disk: PathBuf,
    /// The snapshot that the user named.
    pub snapshot: Option<String>,
    /// The layers that it touches.
    pub layers: Vec<Touched>,
    /// Other snapshots that go too, or, for an undo, all that come back.
    pub snapshots: Vec<String>,
    /// Bytes of changes that the disk does not show afterwards, nor any snapshot.
    pub dropped: u64,
    /// For a merge, where it goes.
    pub direction: Option<Direction>,
    /// For a merge, how.
    pub method: Option<Method>,
    /// Why this way and not another.
    pub why: String,
    /// Bytes that are copied.
    pub moved: u64,
    /// Bytes that are shared instead of copied.
    pub linked: u64,
    /// Bytes of the host that are taken meanwhile.
    pub space: u64,
    /// Bytes of the host that are free afterwards and were not before.
    pub freed: u64,
    /// Bytes that are kept aside.
    pub kept: u64,
    /// What the named snapshot's layer holds, as those on it see it.
    pub share: cost::Share,
    /// Whether it can be taken back.
    pub undo: Undoable,
    /// Bitmaps of the disk that its head does not have afterwards: backups begin anew.
    pub bitmaps: Vec<String>,
    /// What is kept aside now and goes with it.
    pub forgets: Option<Forgotten>,
    /// The tree that it was made for.
    pub(crate) seen: Vec<Seen>,
    /// What is done.
    pub(crate) steps: Vec<Step>,
}

impl Plan {
    /// A plan that touches nothing yet.
    pub(crate) fn new(operation: Operation, family: &Family) -> Plan {
        Plan {
            operation,
            disk: family.head.path.clone(),
            snapshot: None,
            layers: Vec::new(),
            snapshots: Vec::new(),
            dropped: 0,
            direction: None,
            method: None,
            why: String::new(),
            moved: 0,
            linked: 0,
            space: 0,
            freed: 0,
            kept: 0,
            share: cost::Share::default(),
            undo: Undoable::NotNeeded,
            bitmaps: Vec::new(),
            forgets: None,
            seen: seen(family),
            steps: Vec::new(),
        }
    }

    /// A number for the tree that it was made for: whoever asks another process to execute what he
    /// was shown says it.
    pub fn tree(&self) -> u64 {
        number(&self.seen)
    }

    /// Refuses where the plan was not made for the tree that `tree` stands for.
    pub(crate) fn check_tree(&self, tree: Option<u64>) -> Result<()> {
        if tree.is_none_or(|tree| tree == self.tree()) { Ok(()) } else { Err(self.outdated()) }
    }

    /// Whether the disk shows something else afterwards.
    pub fn moves_head(&self) -> bool {
        let moves = |step: &Step| match step {
            Step::NewHead { .. } | Step::PutHead => true,
            Step::TakeName { over, .. } => *over == self.disk,
            _ => false,
        };
        self.steps.iter().any(moves)
    }

    /// Refuses where the plan was not made for that family. What is kept aside may have gone meanwhile,
    /// since its time was over or a write wanted its room: only who brings it back is not served without
    /// it.
    pub(crate) fn check_family(&self, family: &Family) -> Result<()> {
        let now = seen(family);
        let brings_back = self.operation == Operation::Undo;
        if now == self.seen || !brings_back && is_but_for_dropped(&self.seen, &now) {
            return Ok(());
        }
        Err(self.outdated())
    }

    fn outdated(&self) -> Error {
        let message = "the disk's snapshots have changed since this was planned: look again";
        Error::new(ErrorKind::Busy, message).at_path(&self.disk)
    }
}

/// A number for the tree of the disk at `path`, as [`Plan::tree`] gives one; `None` where there is none
/// that could be read.
pub fn tree(path: &Path) -> Option<u64> {
    Family::read(path).ok().flatten().map(|family| number(&seen(&family)))
}

fn number(seen: &[Seen]) -> u64 {
    let text = format!("{seen:?}");
    // FNV-1a: two programs agree on it.
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A layer of a tree: its id, what it stands on, and what it is.
type Seen = (Id, Option<Id>, Role);

fn seen(family: &Family) -> Vec<Seen> {
    family.members().map(|m| (m.label.layer, m.parent(), m.label.role)).collect()
}

/// Whether a tree is what it was, but for what was kept aside, of which some has gone by now.
fn is_but_for_dropped(before: &[Seen], now: &[Seen]) -> bool {
    let dropped = |role: Role| matches!(role, Role::Dropped | Role::Unnamed);
    let was = |&(id, parent, role): &Seen| {
        before.contains(&(id, parent, role))
            || role == Role::Unnamed && before.contains(&(id, parent, Role::Dropped))
    };
    let is = |seen: &Seen| dropped(seen.2) || now.contains(seen);
    now.iter().all(was) && before.iter().all(is)
}
