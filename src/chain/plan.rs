//! What a change of the tree will do, as a value: computed, shown, and then executed as it is.
//!
//! A plan remembers the tree that it was made for. Where the tree is another by the time it is
//! executed, it refuses: nothing is done that was not shown.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::merge::{self, Progress};
use super::reach::Reach;
use super::snapshot::open_head;
use super::tree::{Family, Member};
use super::{Layer, aside, cost, delete, undo};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Id, Role};

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
    pub(super) fn new(member: &Member, fate: Fate) -> Touched {
        let name = Some(member.label.name.clone()).filter(|n| !n.is_empty());
        Touched { path: member.path.clone(), name, fate }
    }
}

/// The neighbour into which a merge folds a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// What the layer holds goes into the layers on it.
    Up,
    /// What the layer on it holds goes into the layer.
    Down,
}

/// How bytes get from one layer into another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// All are copied, and then what was copied goes.
    Copy,
    /// The host lets both layers refer to the same bytes; only what it cannot share is copied.
    Share,
    /// Some are copied and given back where they came from, then the next: little space is taken.
    Batches,
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

/// How long what is dropped is kept aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keeping(pub Duration);

impl Keeping {
    /// Nothing is kept aside.
    pub const NOTHING: Keeping = Keeping(Duration::ZERO);

    pub(super) fn is_nothing(self) -> bool {
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
    /// What is kept aside now and goes with it.
    pub forgets: Option<Forgotten>,
    /// The tree that it was made for.
    pub(super) seen: Vec<(Id, Option<Id>, Role)>,
    pub(super) work: Work,
}

/// What is executed.
#[derive(Debug, Clone)]
pub(super) enum Work {
    Delete(delete::Delete),
    Revert(delete::Revert),
    Merge(merge::Merge),
    Undo(undo::Undo),
    Forget(Vec<u64>),
}

impl Plan {
    /// A plan that touches nothing yet.
    pub(super) fn new(operation: Operation, family: &Family, work: Work) -> Plan {
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
            forgets: None,
            seen: seen(family),
            work,
        }
    }

    /// Does it. `progress` is told the bytes that are moved.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where the tree is another than the plan was made for;
    /// [`ErrorKind::InUse`] names who holds the disk; [`ErrorKind::Interrupted`] where `progress`
    /// asked to stop: the tree is then as it was, or is finished by the next open for writing.
    pub fn execute(&self, progress: &mut Progress<'_>) -> Result<()> {
        self.execute_in(&Reach::Idle, progress)
    }

    /// As [`execute`](Plan::execute). What moves the head is not for a disk in use.
    pub(super) fn execute_in(&self, reach: &Reach<'_>, progress: &mut Progress<'_>) -> Result<()> {
        match &self.work {
            Work::Delete(work) => delete::delete(self, work, reach, progress),
            Work::Revert(work) => delete::revert(self, work, progress),
            Work::Merge(work) => merge::execute(self, work, reach, progress),
            Work::Undo(work) => undo::undo(self, work, reach, progress),
            Work::Forget(events) => aside::forget(self, events, reach, progress),
        }
    }

    /// A number for the tree that it was made for: whoever asks another process to execute what he
    /// was shown says it.
    pub fn tree(&self) -> u64 {
        let text = format!("{:?}", self.seen);
        // FNV-1a: two programs agree on it.
        text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
    }

    /// Refuses where the plan was not made for the tree that `tree` stands for.
    pub(super) fn check_tree(&self, tree: Option<u64>) -> Result<()> {
        if tree.is_none_or(|tree| tree == self.tree()) { Ok(()) } else { Err(self.outdated()) }
    }

    /// Whether the disk shows something else afterwards.
    pub fn moves_head(&self) -> bool {
        match &self.work {
            Work::Delete(work) => work.moves_head(),
            Work::Revert(_) => true,
            Work::Undo(_) => self.layers.iter().any(|l| l.fate == Fate::BecomesHead),
            Work::Merge(_) | Work::Forget(_) => false,
        }
    }

    /// Takes the disk for writing, and reads its family again.
    pub(super) fn begin(&self, reach: &Reach<'_>) -> Result<(Layer, Family)> {
        let head = match reach.held() {
            Some(live) => live.chain().head(),
            None => open_head(&self.disk)?,
        };
        Ok((head, self.family()?))
    }

    /// Reads the family again.
    fn family(&self) -> Result<Family> {
        let family = Family::of(&self.disk)?;
        if seen(&family) == self.seen {
            return Ok(family);
        }
        Err(self.outdated())
    }

    fn outdated(&self) -> Error {
        let message = "the disk's snapshots have changed since this was planned: look again";
        Error::new(ErrorKind::Invalid, message).at_path(&self.disk)
    }
}

fn seen(family: &Family) -> Vec<(Id, Option<Id>, Role)> {
    family.members().map(|m| (m.label.layer, m.parent(), m.label.role)).collect()
}

/// Now, in milliseconds since 1970.
pub(super) fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// The bytes of the host that are free in the directory of `path`.
pub(super) fn free_space(path: &Path) -> Result<u64> {
    let stat = nix::sys::statvfs::statvfs(crate::storage::draft::directory(path))
        .map_err(|e| Error::io("the free space could not be told", e.into()).at_path(path))?;
    Ok((stat.blocks_available() as u64).saturating_mul(stat.fragment_size() as u64))
}
