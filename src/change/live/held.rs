//! A disk that this process has open for its user, as those see it who change its files: its layers by
//! their names, and keeping the layers in memory those that the files name.
//!
//! A change of the tree is made in files; then the chain is put on the layers that they name by then,
//! opened anew. It shows the same before and after. Who asked for the change is not known here.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::chain::{Chain, Layer};
use crate::change::live::handle::{OpenLayer, WriteHandle, reopen};
use crate::error::{Error, Result};
use crate::image::Id;
use crate::open::gate::file_key;
use crate::open::{Format, MAX_DEPTH, OpenOptions, open_image, resolve};

/// A disk in use.
pub(crate) struct Held {
    chain: Arc<Chain>,
    /// The head's file, no link.
    path: PathBuf,
    /// Whether files of its layers were changed, or may have been, through other handles.
    touched: AtomicBool,
}

impl Held {
    pub fn new(chain: Arc<Chain>, path: PathBuf) -> Held {
        Held { chain, path, touched: AtomicBool::new(false) }
    }

    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The place among the chain's layers of the one in the file at `path`.
    pub(crate) fn number_of(&self, path: &Path) -> Option<usize> {
        let named = file_key(path)?;
        let layers = self.chain.all_layers();
        layers.iter().position(|l| l.file.identity().is_ok_and(|own| own == named))
    }

    /// Whether the disk stands on the layer in the file at `path`, or that is its head.
    pub(crate) fn stands_on(&self, path: &Path) -> bool {
        self.number_of(path).is_some()
    }

    /// Opens one of the disk's own layers for changing it; see [`WriteHandle`]. The head is what it is.
    pub(crate) fn open(&self, path: &Path) -> Result<OpenLayer> {
        let number = self.number_of(path);
        let layer = number.and_then(|number| self.chain.all_layers().into_iter().nth(number));
        let gone = || Error::corrupt("is not the layer that is in use any more").at_path(path);
        let layer = layer.ok_or_else(gone)?;
        // What the head stands on may change, too.
        self.touch();
        if number == Some(0) {
            return Ok(OpenLayer::Layer(layer));
        }
        // By the name that it has now.
        let layer = Layer { path: path.to_path_buf(), ..layer };
        WriteHandle::open(&layer, false).map(OpenLayer::Handle)
    }

    /// Notes that the layers' files are changed through other handles.
    pub(crate) fn touch(&self) {
        self.touched.store(true, Ordering::SeqCst);
    }

    /// Puts the head on the layers that the files name, where that may have changed.
    ///
    /// # Errors
    /// Where one cannot be opened. The layers in memory stay, and show the same.
    pub(crate) fn reload(&self) -> Result<()> {
        if !self.touched.load(Ordering::SeqCst) {
            return Ok(());
        }
        let now = self.chain.all_layers();
        if let Some(disk) = disk_of(&now[0]) {
            self.chain.replace_lower(named(&now, disk)?);
        }
        self.touched.store(false, Ordering::SeqCst);
        Ok(())
    }
}

/// The layers below the head that the files name. Those of other disks stay as they are: nobody
/// changes them, and they may have been found elsewhere than they are named.
fn named(now: &[Layer], disk: Id) -> Result<Vec<Layer>> {
    let foreign = |l: &Layer| disk_of(l) != Some(disk);
    let tail = now.iter().position(foreign).unwrap_or(now.len());
    let is_tail =
        |path: &Path| now.get(tail).is_some_and(|l| l.file.identity().ok() == file_key(path));
    let mut found: Vec<Layer> = Vec::new();
    let mut backing = now[0].image.backing();
    while let Some(name) = backing.take() {
        let child = found.last().unwrap_or(&now[0]);
        let path = resolve(&child.path, &name.name)?;
        if is_tail(&path) {
            break;
        }
        let at = file_key(&path);
        let known = now[1..tail].iter().find(|l| at.is_some() && l.file.identity().ok() == at);
        let layer = match known {
            Some(layer) => reopen(&Layer { path: path.clone(), ..layer.clone() })?,
            None if tail < now.len() && at.is_none() => break,
            None => {
                let format = Some(Format::Qcow2);
                let options = OpenOptions { unprotected: true, format, ..OpenOptions::default() };
                let layer = open_image(&path, &options)?;
                if foreign(&layer) && tail < now.len() {
                    break;
                }
                layer
            }
        };
        if found.len() >= MAX_DEPTH || found.iter().any(|l| l.path == layer.path) {
            return Err(Error::corrupt("stands on itself").at_path(&path));
        }
        backing = layer.image.backing();
        found.push(layer);
    }
    found.extend_from_slice(&now[tail..]);
    Ok(found)
}

fn disk_of(layer: &Layer) -> Option<Id> {
    layer.image.identity().ok()?.label.map(|label| label.disk)
}
