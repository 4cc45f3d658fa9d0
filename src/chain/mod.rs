//! An open disk: a chain of layers of any format as one flat guest disk, with copy-on-write.
//!
//! The flattened map, in-flight copy-on-write, read and write, and the exchange of layers. Nothing
//! here sees an L2 entry or a refcount, opens a file by name, or knows a tree.

pub(crate) mod compact;
mod copy_up;
mod device;
mod flat;
mod inflight;
mod layer;
mod space;
mod swap;

use std::sync::atomic::AtomicBool;

use crate::addr::GuestOffset;
use crate::asymmetric::{ReadGuard, RwLock};
use crate::error::Result;
use crate::image::Mapping;

pub use compact::{Compactable, Compacted};
pub use layer::Layer;
pub use space::MakeSpace;

use flat::Flat;
use inflight::InFlight;
use space::Space;

/// A head and the layers below it, as one disk. See [`crate::block::BlockDevice`].
pub struct Chain {
    /// Read by everything that reads or writes; changed when the tree is changed under it.
    layers: RwLock<Layers>,
    pub(crate) inflight: InFlight,
    pub(crate) notes: Vec<String>,
    /// Held for writing by a change of the tree until the head that it made is to be found on the
    /// host. A flush, which waits for it, never calls durable what nobody would find.
    publishing: std::sync::RwLock<()>,
    /// Whether a change of the tree failed so that what is written now might not be found again.
    lost: AtomicBool,
    space: Space,
}

pub(crate) struct Layers {
    pub(crate) head: Layer,
    lower: Flat,
}

/// A piece of the disk, and the layer that it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapExtent {
    /// First byte of the disk.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// How the layer maps it; [`Mapping::Unallocated`] where no layer does.
    pub mapping: Mapping,
    /// The layer's depth: 0 is the head.
    pub depth: usize,
}

impl Chain {
    /// The disk whose layers are `head` and, from the one below it down to the base, `lower`.
    /// `memory` bounds the flattened map, in bytes. Opening by name is the work of [`crate::open`].
    pub fn new(head: Layer, lower: Vec<Layer>, memory: u64) -> Chain {
        let layers = Layers { head, lower: Flat::new(lower, memory) };
        Chain {
            layers: RwLock::new(layers),
            inflight: InFlight::default(),
            notes: Vec::new(),
            publishing: std::sync::RwLock::default(),
            lost: AtomicBool::new(false),
            space: Space::default(),
        }
    }

    /// What the user should know of how it was opened: that a base was found elsewhere, or has
    /// changed and was accepted.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Writes down all that would be written when the disk is dropped, durably, and says how that went.
    pub fn close(&self) -> Result<()> {
        use crate::block::BlockDevice;
        self.flush()?;
        if self.read_only() { Ok(()) } else { self.head().image.close() }
    }

    pub(crate) fn layers(&self) -> ReadGuard<'_, Layers> {
        self.layers.read()
    }

    /// The layers from the head down to the base.
    pub fn all_layers(&self) -> Vec<Layer> {
        let layers = self.layers();
        let mut all = vec![layers.head.clone()];
        all.extend_from_slice(layers.lower.layers());
        all
    }

    /// The head.
    pub fn head(&self) -> Layer {
        self.layers().head.clone()
    }

    /// The first piece of the disk from `at` on that one layer maps in one way, at most `len` bytes.
    /// Stretches that the host can tell to be holes are told apart where `narrow`.
    pub fn map(&self, at: u64, len: u64, narrow: bool) -> Result<MapExtent> {
        self.layers().map(GuestOffset(at), len, narrow)
    }
}
