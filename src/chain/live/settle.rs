//! Keeping the layers in memory those that the files name.
//!
//! A change of the tree is made in files; then the chain is put on the layers that they name by then,
//! opened anew. It shows the same before and after.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use super::Live;
use super::second::{Second, reopen};
use crate::chain::open::{OpenOptions, open_image};
use crate::chain::reach::Reached;
use crate::chain::{Format, Layer, MAX_DEPTH, resolve};
use crate::error::{Error, Result};
use crate::image::Id;

impl Live {
    /// The place among the chain's layers of the one in the file at `path`.
    pub(super) fn number_of(&self, path: &Path) -> Option<usize> {
        let named = identity(path)?;
        let layers = self.chain.all_layers();
        layers.iter().position(|l| l.file.identity().is_ok_and(|own| own == named))
    }

    /// Whether the disk stands on the layer in the file at `path`, or that is its head.
    pub(in crate::chain) fn stands_on(&self, path: &Path) -> bool {
        self.number_of(path).is_some()
    }

    /// Opens one of the disk's own layers for changing it; see [`Second`]. The head is what it is.
    pub(in crate::chain) fn reach(&self, path: &Path, same_contents: bool) -> Result<Reached> {
        let number = self.number_of(path);
        let layer = number.and_then(|number| self.chain.all_layers().into_iter().nth(number));
        let gone = || Error::corrupt("is not the layer that is in use any more").at_path(path);
        let layer = layer.ok_or_else(gone)?;
        // What the head stands on may change, too.
        self.touch();
        if number == Some(0) {
            return Ok(Reached::Layer(layer));
        }
        // By the name that it has now.
        let layer = Layer { path: path.to_path_buf(), ..layer };
        Second::open(&layer, same_contents).map(Reached::Second)
    }

    /// Notes that the layers' files are changed by another way in.
    pub(in crate::chain) fn touch(&self) {
        self.touched.store(true, Ordering::SeqCst);
    }

    /// Puts the head on the layers that the files name, where that may have changed.
    ///
    /// # Errors
    /// Where one cannot be opened. The layers in memory stay, and show the same.
    pub(in crate::chain) fn settle(&self) -> Result<()> {
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
        |path: &Path| now.get(tail).is_some_and(|l| l.file.identity().ok() == identity(path));
    let mut found: Vec<Layer> = Vec::new();
    let mut backing = now[0].image.backing();
    while let Some(name) = backing.take() {
        let child = found.last().unwrap_or(&now[0]);
        let path = resolve(&child.path, &name.name)?;
        if is_tail(&path) {
            break;
        }
        let at = identity(&path);
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

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}
