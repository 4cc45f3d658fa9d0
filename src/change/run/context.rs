//! In which process a change of the tree is made: by a command, of an idle disk, whose layers are opened
//! one by one; or by the process that holds the disk, beside its user, through second handles.
//!
//! It knows who may write which file, and nothing of what is written.

use std::path::Path;

use crate::change::live::handle::OpenLayer;
use crate::change::live::held::Held;
use crate::change::run::layer::unprotected;
use crate::error::Result;
use crate::open::open_image;

/// Who makes a change of the tree.
#[derive(Clone, Copy)]
pub(crate) enum Context<'a> {
    /// A command, of a disk that nobody uses.
    Idle,
    /// The process that holds the disk, beside its user.
    Held(&'a Held),
}

impl<'a> Context<'a> {
    /// The disk in use, if it is one.
    pub fn held(&self) -> Option<&'a Held> {
        match self {
            Context::Idle => None,
            Context::Held(held) => Some(held),
        }
    }

    /// Whether the disk is in use.
    pub fn in_use(&self) -> bool {
        self.held().is_some()
    }

    /// The disk in use, if it stands on the layer in the file at `path`.
    pub fn held_on(&self, path: &Path) -> Option<&'a Held> {
        self.held().filter(|held| held.stands_on(path))
    }

    /// Opens the layer at `path` for changing it.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`](crate::ErrorKind::InUse) names who else has it.
    pub fn open(&self, path: &Path) -> Result<OpenLayer> {
        match self.held_on(path) {
            Some(held) => held.open(path),
            None => open_image(path, &unprotected()).map(OpenLayer::Layer),
        }
    }

    /// Notes that files were renamed.
    pub fn touch(&self) {
        if let Some(held) = self.held() {
            held.touch();
        }
    }

    /// Makes a disk in use stand on the layers that the files name by now.
    pub fn reload(&self) -> Result<()> {
        self.held().map_or(Ok(()), Held::reload)
    }
}
