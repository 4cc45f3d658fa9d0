//! A second handle of a frozen layer that the chain in use reads: for writing, with all others kept
//! out.
//!
//! The chain reads on through its own, and with the tables that it has in memory. So whoever
//! writes here changes nothing that the chain reads of the layer, or exchanges the layer first.

use std::fs::FileTimes;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use crate::chain::Layer;
use crate::change::run::layer::unprotected;
use crate::error::{Error, Result};
use crate::open::{OpenOptions, open_file, sameness};
use crate::storage::{Access, FileOptions, FileStorage};

/// A file of the chain that nobody else may have open meanwhile.
pub(crate) struct Alone(Arc<FileStorage>);

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

/// Lets the layer's label say again what its files look like, once they are closed.
struct StampOnClose(PathBuf, Arc<FileStorage>);

impl Drop for StampOnClose {
    fn drop(&mut self) {
        // Where that fails, the content id alone speaks until the disk is healed.
        let _ = sameness::note_stamp_in(&self.0, &self.1);
    }
}

/// A frozen layer of the chain, open for writing.
pub(crate) struct WriteHandle {
    // Dropped in this order: it writes what is left to be written, then others may have it.
    layer: Layer,
    _time: Option<KeptTime>,
    _stamp: StampOnClose,
    _alone: Alone,
}

impl WriteHandle {
    /// Opens `layer`, which is open for reading, once more. With `same_contents`, it shows the same
    /// when it is closed.
    pub(crate) fn open(layer: &Layer, same_contents: bool) -> Result<WriteHandle> {
        let alone = Alone::with(layer)?;
        let time = if same_contents { KeptTime::of(layer) } else { None };
        let options = FileOptions { access: None, write: true };
        let file = Arc::new(FileStorage::open(&layer.path, options)?);
        if file.identity()? != layer.file.identity()? {
            let message = "is not the file that is in use: it was replaced";
            return Err(Error::invalid(message).at_path(&layer.path));
        }
        let format = Some(layer.format);
        let options = OpenOptions {
            same_contents,
            format,
            locked: true,
            unrecorded: true,
            // What it names was let through when it was opened first.
            follow: true,
            ..unprotected()
        };
        let stamp = StampOnClose(layer.path.clone(), file.clone());
        let layer = open_file(&layer.path, file, &options)?;
        if same_contents {
            sameness::begin_rewrite(&layer)?;
        }
        Ok(WriteHandle { layer, _time: time, _stamp: stamp, _alone: alone })
    }

    pub(crate) fn layer(&self) -> &Layer {
        &self.layer
    }
}

/// A layer that may be changed, and nobody else has meanwhile.
pub(crate) enum OpenLayer {
    /// Opened for this; or the head in use, which its user goes on writing.
    Layer(Layer),
    /// A frozen layer that the disk in use stands on.
    Handle(WriteHandle),
}

impl Deref for OpenLayer {
    type Target = Layer;

    fn deref(&self) -> &Layer {
        match self {
            OpenLayer::Layer(layer) => layer,
            OpenLayer::Handle(handle) => handle.layer(),
        }
    }
}

/// Opens a layer that is open already anew, for reading, by the same file and under its lock: its
/// tables are read again.
pub(crate) fn reopen(layer: &Layer) -> Result<Layer> {
    let format = Some(layer.format);
    let options = OpenOptions { unprotected: true, format, follow: true, ..OpenOptions::default() };
    open_file(&layer.path, layer.file.clone(), &options)
}
