//! A frozen layer of which the first part is somebody else's by now.
//!
//! A merge downwards in batches gives back what the layer below has taken in. Before it does, the
//! chain reads that part from there: this is what it sees of the layer meanwhile.

use std::sync::Arc;

use crate::addr::GuestOffset;
use crate::chain::Layer;
use crate::error::Result;
use crate::image::{Capabilities, Extent, Filter, Image, Mapping};

/// What a layer holds from an offset on; before it, the layer below decides.
pub(crate) struct Tail {
    inner: Arc<dyn Image>,
    /// In bytes, where no cluster is cut.
    from: u64,
}

impl Tail {
    /// `layer` without what it holds before `from`.
    pub fn of(layer: &Layer, from: u64) -> Layer {
        let image = Arc::new(Tail { inner: layer.image.clone(), from });
        Layer { image, ..layer.clone() }
    }
}

impl Filter for Tail {
    fn inner(&self) -> &dyn Image {
        &*self.inner
    }

    fn read_only(&self) -> bool {
        true
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { placed: self.inner.capabilities().placed, ..Capabilities::default() }
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        if at.0 < self.from {
            let len = len.min(self.from - at.0);
            return Ok(Extent { start: at, len, mapping: Mapping::Unallocated });
        }
        self.inner.map(at, len)
    }
}
