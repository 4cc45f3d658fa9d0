//! A second way into a frozen layer that the chain in use reads: for writing, with all others kept
//! out.
//!
//! The chain reads on through the first way, and with the tables that it has in memory. So whoever
//! writes here changes nothing that the chain reads of the layer, or exchanges the layer first.

use std::fs::FileTimes;
use std::sync::Arc;
use std::time::SystemTime;

use crate::chain::Layer;
use crate::chain::open::{OpenOptions, open_file};
use crate::chain::snapshot::unprotected;
use crate::error::{Error, Result};
use crate::storage::{Access, FileOptions, FileStorage};

/// A file of the chain that nobody else may have open meanwhile.
pub(super) struct Alone(Arc<FileStorage>);

impl Alone {
    /// # Errors
    /// [`ErrorKind::InUse`](crate::ErrorKind::InUse) names who has it.
    pub fn with(layer: &Layer) -> Result<Alone> {
        layer.file.relock(Access::Write)?;
        Ok(Alone(layer.file.clone()))
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        // What fails here is a lock that lasts too long: it keeps readers out.
        let _ = self.0.relock(Access::Read);
    }
}

/// Gives a file that shows what it showed the time of its last write back: clones that stand on it
/// go on taking it for what it is.
struct KeptTime(Arc<FileStorage>, SystemTime);

impl KeptTime {
    fn of(layer: &Layer) -> Option<KeptTime> {
        let modified = layer.file.file().metadata().and_then(|meta| meta.modified()).ok()?;
        Some(KeptTime(layer.file.clone(), modified))
    }
}

impl Drop for KeptTime {
    fn drop(&mut self) {
        // Where that fails, the clones ask the user what to make of it.
        let _ = self.0.file().set_times(FileTimes::new().set_modified(self.1));
    }
}

/// A frozen layer of the chain, open for writing.
pub(in crate::chain) struct Second {
    // Dropped in this order: it writes what is left to be written, then others may have it.
    layer: Layer,
    _time: Option<KeptTime>,
    _alone: Alone,
}

impl Second {
    /// Opens `layer`, which is open for reading, once more. With `same_contents`, it shows the same
    /// when it is closed.
    pub(super) fn open(layer: &Layer, same_contents: bool) -> Result<Second> {
        let alone = Alone::with(layer)?;
        let time = if same_contents { KeptTime::of(layer) } else { None };
        let options = FileOptions { access: None, write: true };
        let file = Arc::new(FileStorage::open(&layer.path, options)?);
        if file.identity()? != layer.file.identity()? {
            let message = "is not the file that is in use: it was replaced";
            return Err(Error::invalid(message).at_path(&layer.path));
        }
        let format = Some(layer.format);
        let options = OpenOptions { same_contents, format, locked: true, ..unprotected() };
        Ok(Second { layer: open_file(&layer.path, file, &options)?, _time: time, _alone: alone })
    }

    pub(in crate::chain) fn layer(&self) -> &Layer {
        &self.layer
    }
}

/// Opens a layer that is open already anew, for reading, by the same file and under its lock: its
/// tables are read again.
pub(super) fn reopen(layer: &Layer) -> Result<Layer> {
    let format = Some(layer.format);
    let options = OpenOptions { unprotected: true, format, ..OpenOptions::default() };
    open_file(&layer.path, layer.file.clone(), &options)
}
