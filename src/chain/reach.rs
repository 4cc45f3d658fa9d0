//! How a change of the tree reaches the layers that it writes: those of an idle disk are opened one
//! by one, alone; those that this process has open because the disk is in use, by a second way in.
//!
//! It knows who may write which file, and nothing of what is written.

use std::ops::Deref;
use std::path::Path;

use super::Layer;
use super::live::Live;
use super::live::second::Second;
use super::open::{OpenOptions, open_image};
use super::snapshot::unprotected;
use crate::error::Result;

/// Who makes a change of the tree.
#[derive(Clone, Copy)]
pub(super) enum Reach<'a> {
    /// A command, of a disk that nobody uses.
    Idle,
    /// The process that holds the disk, beside its user.
    Held(&'a Live),
}

/// A layer that may be changed, and nobody else has meanwhile.
pub(super) enum Reached {
    /// Opened for this; or the head in use, which its user goes on writing.
    Layer(Layer),
    /// A frozen layer that the disk in use stands on.
    Second(Second),
}

impl Deref for Reached {
    type Target = Layer;

    fn deref(&self) -> &Layer {
        match self {
            Reached::Layer(layer) => layer,
            Reached::Second(second) => second.layer(),
        }
    }
}

impl<'a> Reach<'a> {
    /// The disk in use, if it is one.
    pub fn held(&self) -> Option<&'a Live> {
        match self {
            Reach::Idle => None,
            Reach::Held(live) => Some(live),
        }
    }

    /// The disk in use, if it stands on the layer in the file at `path`.
    pub fn held_on(&self, path: &Path) -> Option<&'a Live> {
        self.held().filter(|live| live.stands_on(path))
    }

    /// Opens the layer at `path` for changing it.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`](crate::ErrorKind::InUse) names who else has it.
    pub fn open(&self, path: &Path) -> Result<Reached> {
        self.open_with(path, &unprotected())
    }

    /// As [`open`](Reach::open), for changes after which the layer shows what it showed before.
    pub fn open_same(&self, path: &Path) -> Result<Reached> {
        self.open_with(path, &OpenOptions { same_contents: true, ..unprotected() })
    }

    fn open_with(&self, path: &Path, options: &OpenOptions) -> Result<Reached> {
        match self.held_on(path) {
            Some(live) => live.reach(path, options.same_contents),
            None => open_image(path, options).map(Reached::Layer),
        }
    }

    /// Notes that files were renamed.
    pub fn touch(&self) {
        if let Some(live) = self.held() {
            live.touch();
        }
    }

    /// Makes a disk in use stand on the layers that the files name by now.
    pub fn settle(&self) -> Result<()> {
        self.held().map_or(Ok(()), Live::settle)
    }
}
