//! Changing the tree of a disk that is open for writing and in use.
//!
//! The guest goes on reading and writing; only while layers are exchanged in memory does it wait.
//! Knows who else may hold a file only by the locks.

mod merge;
mod snapshot;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use super::compact::Compacted;
use super::delete::delete_beside;
use super::diff::{Between, Change};
use super::merge::Progress;
use super::plan::Keeping;
use super::snapshot::plan_delete;
use super::tree::Family;
use super::{Chain, Layer};
use crate::block::BlockDevice;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Id, Role};

pub use snapshot::Quiesce;

/// A disk in use, as those see it who change its tree. One change is made at a time.
pub struct Live {
    chain: Arc<Chain>,
    path: PathBuf,
    running: Mutex<Option<Running>>,
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
    /// The disk `chain`, whose head is the file at `path`, an absolute path.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`] where it is open for reading only; [`ErrorKind::Invalid`] where its
    /// head is another file, such as a throw-away delta.
    pub fn new(chain: Arc<Chain>, path: &Path) -> Result<Live> {
        let live = Live { chain, path: path.to_path_buf(), running: Mutex::default() };
        if live.chain.read_only() {
            let message = "is open for reading only";
            return Err(Error::new(ErrorKind::ReadOnly, message).at_path(path));
        }
        live.check_name()?;
        Ok(live)
    }

    /// The head's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The disk.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// Its size, its layers, and what is being done to it.
    pub fn info(&self) -> Info {
        let layers = self.chain.all_layers();
        Info {
            size: self.chain.size(),
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
        if size < self.chain.size() {
            let message = "is in use and cannot get smaller: its user may use what would be cut. Stop \
                           it first";
            return Err(Error::new(ErrorKind::InUse, message).at_path(&self.path));
        }
        self.chain.resize(size).map_err(|e| e.at_path(&self.path))
    }

    /// Gives unused space of the head back to the host.
    ///
    /// # Errors
    /// As [`Chain::compact`].
    pub fn compact(&self, progress: &mut Progress<'_>) -> Result<Compacted> {
        let turn = self.begin("compaction".to_owned())?;
        self.chain.compact(&mut |done, total| {
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
        let family = Family::of(&self.path)?;
        let layers = self.chain.all_layers();
        let held: Vec<(Id, Layer)> = layers
            .into_iter()
            .filter_map(|layer| Some((layer.image.identity().ok()?.label?.layer, layer)))
            .collect();
        Between::moments(&family, from, to)?.changes(&family, &held)
    }

    /// Deletes the snapshot `name`, which the disk as it is now does not stand on; with `tree`,
    /// snapshots on it too. They are kept aside for a time.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where the disk would have to go back to an earlier moment;
    /// [`ErrorKind::Sealed`] as for an idle disk.
    pub fn delete(&self, name: &str, tree: bool) -> Result<()> {
        let _turn = self.begin(format!("deletion of snapshot '{name}'"))?;
        let plan = plan_delete(&self.path, name, tree, Keeping::default())?;
        if plan.moves_head() {
            return Err(self.stop_first(&format!(
                "deleting snapshot '{name}' takes the disk back to the moment when it was taken"
            )));
        }
        delete_beside(&plan)
    }

    /// Refuses to go back to a snapshot: what the user of the disk has in memory would not fit it.
    pub fn revert(&self, name: &str) -> Error {
        self.stop_first(&format!(
            "going back to snapshot '{name}' changes everything under its user"
        ))
    }

    fn stop_first(&self, why: &str) -> Error {
        let message = format!(
            "is in use, and {why}: stop it first (`vdisk umount`, or the end of the container, the \
             guest or the server)"
        );
        Error::new(ErrorKind::InUse, message).at_path(&self.path)
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
            return Err(Error::new(ErrorKind::InUse, message).at_path(&self.path));
        }
        *running = Some(Running { what, since: Instant::now(), done: 0, total: 0 });
        drop(running);
        let turn = Turn(self);
        self.check_name()?;
        self.finish_leaving()?;
        Ok(turn)
    }

    /// The name still means the file that is open: nobody has put another there.
    fn check_name(&self) -> Result<()> {
        let head = self.chain.head();
        let options = crate::storage::FileOptions { access: None, write: false };
        let named = crate::storage::FileStorage::open(&self.path, options)?;
        if named.identity()? == head.file.identity()? {
            return Ok(());
        }
        let message = "is not the file that is in use: its changes go to another one, as with \
                       --ephemeral, or the file was replaced";
        Err(Error::invalid(message).at_path(&self.path))
    }

    /// Goes on with a merge that was interrupted when all that was left was to take a layer away.
    fn finish_leaving(&self) -> Result<()> {
        let Some(family) = Family::read(&self.path)? else { return Ok(()) };
        let leaving = family.layers.iter().find(|m| m.label.role == Role::Leaving);
        leaving.map_or(Ok(()), |layer| self.leave(&family, layer))
    }
}
