//! Changing the tree of a disk that is open for writing and in use.
//!
//! The guest goes on reading and writing; only while layers are exchanged in memory does it wait.
//! Knows who else may hold a file only by the locks.

mod check;
pub(crate) mod fold;
pub(crate) mod handle;
pub(crate) mod held;
mod merge;
mod snapshot;
mod tail;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Instant;

use crate::block::BlockDevice;
use crate::chain::compact::Compacted;
use crate::chain::{Chain, Layer};
use crate::change::delete::{Wishes as DeleteWishes, plan_delete_as};
use crate::change::forget::plan_forget_as;
use crate::change::heal;
use crate::change::plan::{Fate, Plan};
use crate::change::run::Run;
use crate::change::run::context::Context;
use crate::change::snapshot::rename;
use crate::change::undo::plan_undo;
use crate::copy::diff::{Between, Change};
use crate::error::{Error, ErrorKind, Result};
use crate::family::tree::Family;
use crate::image::Id;
use crate::progress::Progress;
use crate::storage::follow;

use held::Held;

pub use snapshot::Quiesce;

/// A disk in use, as those see it who change its tree. One change is made at a time.
pub struct Live {
    held: Held,
    running: Mutex<Option<Running>>,
    /// What its user does with it.
    doing: OnceLock<String>,
}

/// What is being done to the disk.
#[derive(Debug, Clone)]
pub struct Running {
    /// Such as `merge of snapshot 'monday'`.
    pub what: String,
    /// When it began.
    pub since: Instant,
    /// Bytes done.
    pub done: u64,
    /// Bytes to be done; 0 where that is not known.
    pub total: u64,
}

/// What there is to know of a disk in use.
#[derive(Debug, Clone)]
pub struct Info {
    /// The size in bytes.
    pub size: u64,
    /// The layers from the head down.
    pub layers: Vec<PathBuf>,
    /// What is being done to it.
    pub running: Option<Running>,
}

/// The right to change the tree, given back when dropped.
struct Turn<'a>(&'a Live);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.running() = None;
    }
}

impl Turn<'_> {
    fn at(&self, done: u64, total: u64) {
        if let Some(running) = self.0.running().as_mut() {
            (running.done, running.total) = (done, total);
        }
    }
}

impl Live {
    /// The disk `chain`, whose head is the file at `path`, an absolute path, or the one that a link
    /// there leads to.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`] where it is open for reading only; [`ErrorKind::Invalid`] where its
    /// head is another file, such as a throw-away delta.
    pub fn new(chain: Arc<Chain>, path: &Path) -> Result<Live> {
        let live = Live {
            held: Held::new(chain, follow(path)?),
            running: Mutex::default(),
            doing: OnceLock::new(),
        };
        if live.chain().read_only() {
            let message = "is open for reading only";
            return Err(Error::new(ErrorKind::ReadOnly, message).at_path(path));
        }
        live.check_name()?;
        Ok(live)
    }

    /// Says what its user does with it, such as `mounted at /mnt`: errors tell it.
    pub fn held_for(&self, doing: String) {
        let _ = self.doing.set(doing);
    }

    /// The head's path.
    pub fn path(&self) -> &Path {
        self.held.path()
    }

    /// The disk.
    pub fn chain(&self) -> &Arc<Chain> {
        self.held.chain()
    }

    /// Its size, its layers, and what is being done to it.
    pub fn info(&self) -> Info {
        let layers = self.chain().all_layers();
        Info {
            size: self.chain().size(),
            layers: layers.into_iter().map(|l| l.path).collect(),
            running: self.running().clone(),
        }
    }

    /// Makes the disk `size` bytes long. New bytes read as zeroes.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] for a smaller size: the guest may use what would be cut.
    pub fn resize(&self, size: u64) -> Result<()> {
        let _turn = self.begin("change of the size".to_owned())?;
        if size < self.chain().size() {
            let message = "is in use and cannot get smaller: its user may use what would be cut. Stop \
                           it first";
            return Err(Error::new(ErrorKind::InUse, message).at_path(self.path()));
        }
        self.chain().resize(size).map_err(|e| e.at_path(self.path()))
    }

    /// Gives unused space of the head back to the host.
    ///
    /// # Errors
    /// As [`Chain::compact`].
    pub fn compact(&self, progress: &mut Progress<'_>) -> Result<Compacted> {
        let turn = self.begin("compaction".to_owned())?;
        self.chain().compact(&mut |done, total| {
            turn.at(done, total);
            progress(done, total)
        })
    }

    /// What was written between the snapshot `from` and the snapshot `to`, or until now.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for a snapshot that the disk does not have.
    pub fn diff(&self, from: &str, to: Option<&str>) -> Result<Vec<Change>> {
        let _turn = self.begin("comparison".to_owned())?;
        let family = Family::of(self.path())?;
        let layers = self.chain().all_layers();
        let held: Vec<(Id, Layer)> = layers
            .into_iter()
            .filter_map(|layer| Some((layer.image.identity().ok()?.label?.layer, layer)))
            .collect();
        Between::moments(&family, from, to)?.changes(&family, &held)
    }

    /// Deletes the snapshot `name`, which the disk as it is now does not stand on, as `wishes` say.
    /// `seen` is the tree of the plan that was shown.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where the disk would have to go back to an earlier moment;
    /// [`ErrorKind::Sealed`] as for an idle disk.
    pub fn delete(
        &self,
        name: &str,
        wishes: DeleteWishes,
        seen: Option<u64>,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        self.carry_out(format!("deletion of snapshot '{name}'"), seen, progress, || {
            let plan = plan_delete_as(self.path(), name, wishes)?;
            let why =
                format!("deleting snapshot '{name}' takes the disk back to when it was taken");
            if plan.moves_head() { Err(self.stop_first(&why)) } else { Ok(plan) }
        })
    }

    /// Takes back the last change that dropped something, where its user does not see that.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where the disk would show something else afterwards.
    pub fn undo(
        &self,
        keep: Option<&str>,
        seen: Option<u64>,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        self.carry_out("undo".to_owned(), seen, progress, || {
            // What it would do tells why it cannot, before what else may be wrong with it.
            let plan = plan_undo(self.path(), None)?;
            if plan.moves_head() {
                let why = format!("an undo that {} changes everything under its user", plan.why);
                return Err(self.stop_first(&why));
            }
            let head = self.chain().head();
            let old = head.image.details().and_then(|d| d.version) == Some(2);
            if old && plan.layers.iter().any(|l| l.fate == Fate::Moved && l.path == self.path()) {
                // What its user gives up meanwhile would show what comes back below.
                let why = "its format cannot say what is to be zero";
                return Err(self.stop_first(why));
            }
            keep.map_or(Ok(plan), |keep| plan_undo(self.path(), Some(keep)))
        })
    }

    /// Lets go of what is kept aside; with `even_if_cloned`, also of what clones elsewhere stand on.
    pub fn forget(
        &self,
        even_if_cloned: bool,
        seen: Option<u64>,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        self.carry_out("removal of what is kept aside".to_owned(), seen, progress, || {
            plan_forget_as(self.path(), even_if_cloned)
        })
    }

    /// Gives the snapshot `old` the name `new`.
    ///
    /// # Errors
    /// As for an idle disk.
    pub fn rename(&self, old: &str, new: &str) -> Result<()> {
        self.change(format!("renaming of snapshot '{old}'"), |_| {
            let family = Family::of(self.path())?;
            let steps = rename(&family, old, new)?;
            Run::new(Context::Held(&self.held), family).quietly(&steps)
        })
    }

    /// Refuses to go back to a snapshot: what the user of the disk has in memory would not fit it.
    pub fn revert(&self, name: &str) -> Error {
        self.stop_first(&format!(
            "going back to snapshot '{name}' changes everything under its user"
        ))
    }

    fn stop_first(&self, why: &str) -> Error {
        let command = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
        let doing = self.doing.get().map(|doing| format!(", {doing}")).unwrap_or_default();
        let message = format!(
            "is in use by {} (pid {}{doing}), and {why}: stop it first (`vdisk umount`, or \
             the end of the container, the guest or the server)",
            command.trim_end(),
            std::process::id()
        );
        Error::new(ErrorKind::InUse, message).at_path(self.path())
    }

    /// Executes what `plan` plans, if it is what was shown.
    fn carry_out(
        &self,
        what: String,
        seen: Option<u64>,
        progress: &mut Progress<'_>,
        plan: impl FnOnce() -> Result<Plan>,
    ) -> Result<()> {
        self.change(what, |turn| {
            let plan = plan()?;
            plan.check_tree(seen)?;
            plan.execute_in(Context::Held(&self.held), &mut |done, total| {
                turn.at(done, total);
                progress(done, total)
            })
        })
    }

    /// Changes the tree in files, and then in memory.
    fn change<T>(&self, what: String, work: impl FnOnce(&Turn<'_>) -> Result<T>) -> Result<T> {
        let turn = self.begin(what)?;
        let done = work(&turn);
        // Where that fails, the layers in memory show the same; the next change tries it again.
        let _ = self.held.reload();
        done
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Begins a change, unless another one is under way, once what an interrupted one left is
    /// finished.
    fn begin(&self, what: String) -> Result<Turn<'_>> {
        let mut running = self.running();
        if let Some(other) = running.as_ref() {
            let message =
                format!("a {} is under way: wait until it is done, or cancel it", other.what);
            return Err(Error::new(ErrorKind::Busy, message).at_path(self.path()));
        }
        *running = Some(Running { what, since: Instant::now(), done: 0, total: 0 });
        drop(running);
        let turn = Turn(self);
        self.chain().check_not_lost().map_err(|e| e.at_path(self.path()))?;
        self.check_name()?;
        self.held.reload()?;
        heal::heal_held(&self.held)?;
        Ok(turn)
    }

    /// The name still means the file that is open: nobody has put another there.
    fn check_name(&self) -> Result<()> {
        let head = self.chain().head();
        let options = crate::storage::FileOptions { access: None, write: false };
        let named = crate::storage::FileStorage::open(self.path(), options)?;
        if named.identity()? == head.file.identity()? {
            return Ok(());
        }
        let message = "is not the file that is in use: its changes go to another one, as with \
                       --ephemeral, or the file was replaced";
        Err(Error::invalid(message).at_path(self.path()))
    }
}
