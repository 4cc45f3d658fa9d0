//! A chain of layers as one flat guest disk: copy-on-write over images of any format.
//!
//! Only [`open`] names concrete formats. Nothing here sees an L2 entry or a refcount.

mod adopt;
mod aside;
mod clone;
pub mod commit;
mod compact;
mod compare;
mod convert;
pub mod cost;
mod create;
mod data_file;
mod delete;
mod descent;
mod device;
pub mod diff;
mod exclusive;
mod flat;
mod fold;
mod foreign;
pub mod forest;
mod gate;
mod heal;
mod inflight;
pub mod live;
pub mod merge;
mod open;
pub mod outlook;
mod parent;
pub mod plan;
pub mod queue;
mod reach;
pub mod rebase;
mod scan;
mod sealed;
mod search;
pub mod snapshot;
mod swap;
pub mod transfer;
pub mod tree;
mod undo;
mod way;
mod witness;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard};

use crate::addr::GuestOffset;
use crate::error::Result;
use crate::image::{Image, Mapping};
use crate::storage::FileStorage;

pub use clone::{Base, remembered, unseal};
pub use compact::{Compactable, Compacted};
pub use compare::{Difference, compare};
pub use convert::{Copying, Target, convert, copy_into};
pub use create::{create, create_raw, create_with_data, ephemeral};
pub use data_file::open_data_file;
pub use descent::Descent;
pub use foreign::open_vmdk;
pub use gate::{Format, MAX_DEPTH, resolve};
pub use open::{OpenOptions, Peek, open, open_file, open_image, peek, probe};
pub use sealed::refuse_sealed;
pub use witness::keeping_time;

use aside::Room;
use flat::Flat;
use inflight::InFlight;

/// One open layer.
#[derive(Clone)]
pub struct Layer {
    /// The file's name, as it was opened.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// What it maps.
    pub image: Arc<dyn Image>,
    /// The open file.
    pub file: Arc<FileStorage>,
}

/// A head and the layers below it, as one disk. See [`crate::block::BlockDevice`].
pub struct Chain {
    /// Read by everything that reads or writes; changed when the tree is changed under it.
    layers: RwLock<Layers>,
    inflight: InFlight,
    notes: Vec<String>,
    /// Held for writing by a change of the tree until the head that it made is to be found on the
    /// host. A flush, which waits for it, never calls durable what nobody would find.
    settled: RwLock<()>,
    /// Whether a change of the tree failed so that what is written now might not be found again.
    lost: AtomicBool,
    /// Held while what is kept aside is let go of to make room for what is written.
    room: Mutex<Room>,
}

struct Layers {
    head: Layer,
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
    /// `memory` bounds the flattened map, in bytes. Opening by name is [`open`]'s work.
    pub fn new(head: Layer, lower: Vec<Layer>, memory: u64) -> Chain {
        let layers = Layers { head, lower: Flat::new(lower, memory) };
        Chain {
            layers: RwLock::new(layers),
            inflight: InFlight::default(),
            notes: Vec::new(),
            settled: RwLock::default(),
            lost: AtomicBool::new(false),
            room: Mutex::default(),
        }
    }

    /// What the user should know of how it was opened: that a base was found elsewhere, or has
    /// changed and was accepted.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    fn layers(&self) -> RwLockReadGuard<'_, Layers> {
        self.layers.read().unwrap_or_else(|e| e.into_inner())
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
