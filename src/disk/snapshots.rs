//! The snapshots of a disk that nobody has open.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::change::merge::{self, Wishes};
use crate::change::plan::{self, Keeping};
use crate::change::snapshot;
use crate::error::Result;
use crate::family::tree::Family;

/// The snapshots of the disk at a path, which nobody has open: each call opens it for its own time. A
/// disk in use takes its own: [`Disk::take_snapshot`](crate::Disk::take_snapshot).
///
/// What drops data is a [`Plan`] first.
#[derive(Debug, Clone)]
pub struct Snapshots {
    path: PathBuf,
}

/// One snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// Its name, which no other snapshot of the disk has.
    pub name: String,
    /// What its maker wrote about it.
    pub description: String,
    /// When it was taken.
    pub time: SystemTime,
    /// The snapshot that it stands on.
    pub parent: Option<String>,
    /// Whether the disk as it is now stands on it.
    pub is_current: bool,
    /// Bytes of the host that its layer takes.
    pub allocated: u64,
}

impl Snapshots {
    /// Those of the disk at `path`.
    pub fn of(path: impl AsRef<Path>) -> Snapshots {
        Snapshots { path: path.as_ref().to_path_buf() }
    }

    /// All of them, oldest first. Works while somebody has the disk.
    pub fn list(&self) -> Result<Vec<Snapshot>> {
        let Some(family) = Family::read(&self.path)? else { return Ok(Vec::new()) };
        let current = family.current().map(|m| m.label.layer);
        let row = |member: &crate::family::tree::Member| Snapshot {
            name: member.label.name.clone(),
            description: member.label.description.clone(),
            time: UNIX_EPOCH + Duration::from_millis(member.label.time),
            parent: family.snapshot_below(member).map(|m| m.label.name.clone()),
            is_current: current == Some(member.label.layer),
            allocated: member.peek.allocated,
        };
        Ok(family.snapshots().map(row).collect())
    }

    /// Keeps the disk as it is under `name`. The work does not depend on the disk's size.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`](crate::ErrorKind::Exists) where it has a snapshot of that name;
    /// [`ErrorKind::InUse`](crate::ErrorKind::InUse) names who has the disk.
    pub fn create(&self, name: &str, description: &str) -> Result<()> {
        snapshot::create(&self.path, name, description)
    }

    /// Gives the snapshot `old` the name `new`.
    pub fn rename(&self, old: &str, new: &str) -> Result<()> {
        snapshot::rename_snapshot(&self.path, old, new)
    }

    /// Takes the disk back to `name`. Today's changes are kept as the snapshot `keep`, or dropped.
    pub fn revert(&self, name: &str, keep: Option<&str>) -> Result<Plan> {
        snapshot::plan_revert(&self.path, name, keep, Keeping::default()).map(Plan)
    }

    /// Removes `name` and the changes made since it; with `tree`, the snapshots that stand on those too.
    pub fn delete(&self, name: &str, tree: bool) -> Result<Plan> {
        snapshot::plan_delete(&self.path, name, tree, Keeping::default()).map(Plan)
    }

    /// Removes the name `name`; no change is lost: what its layer holds goes to a neighbour, in the
    /// cheaper direction.
    pub fn merge(&self, name: &str) -> Result<Plan> {
        merge::plan_merge(&self.path, name, Wishes::default()).map(Plan)
    }

    /// Brings back what the last delete, merge or revert dropped, while it is kept aside. Today's state
    /// is kept as the snapshot `keep`, if one is named.
    pub fn undo(&self, keep: Option<&str>) -> Result<Plan> {
        snapshot::plan_undo(&self.path, keep).map(Plan)
    }
}

/// What a change of a disk's snapshots will do. Nothing happens before it is
/// [executed](Plan::execute).
#[derive(Debug, Clone)]
#[must_use = "a plan does nothing until it is executed"]
pub struct Plan(plan::Plan);

impl Plan {
    /// Bytes of changes that neither the disk nor any snapshot shows afterwards. They are kept aside for
    /// a week where there is room: [`Snapshots::undo`] brings them back.
    pub fn dropped(&self) -> u64 {
        self.0.dropped
    }

    /// Snapshots besides the named one that go too.
    pub fn also_dropped(&self) -> &[String] {
        &self.0.snapshots
    }

    /// Bytes that are copied.
    pub fn copied(&self) -> u64 {
        self.0.moved
    }

    /// Bytes of the host that are taken meanwhile.
    pub fn space_needed(&self) -> u64 {
        self.0.space
    }

    /// Bytes of the host that are free afterwards and were not before.
    pub fn freed(&self) -> u64 {
        self.0.freed
    }

    /// Why it is done so and not another way, for people.
    pub fn reason(&self) -> &str {
        &self.0.why
    }

    /// Does it: afterwards the tree is the new one, or the old one after an error. A crash leaves one of
    /// the two, and what it left lying about is cleaned up by the next open for writing.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`](crate::ErrorKind::Busy) where the tree is another by now;
    /// [`ErrorKind::InUse`](crate::ErrorKind::InUse) names who has the disk.
    pub fn execute(&self) -> Result<()> {
        self.execute_with(&mut |_, _| true)
    }

    /// The same; `progress` is told the bytes done and to be done, and says whether to go on.
    ///
    /// # Errors
    /// As [`execute`](Plan::execute); [`ErrorKind::Interrupted`](crate::ErrorKind::Interrupted) where
    /// `progress` said no.
    pub fn execute_with(
        &self,
        progress: &mut (dyn FnMut(u64, u64) -> bool + Send + '_),
    ) -> Result<()> {
        self.0.execute(progress)
    }
}
