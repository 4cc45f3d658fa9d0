//! A frozen layer of which the first part is somebody else's by now.
//!
//! A merge downwards in batches gives back what the layer below has taken in. Before it does, the
//! chain reads that part from there: this is what it sees of the layer meanwhile.

use std::io::IoSliceMut;
use std::sync::Arc;

use crate::addr::{GuestOffset, HostOffset, Unit};
use crate::chain::Layer;
use crate::error::Result;
use crate::image::{Backing, Details, Extent, Identity, Image, Mapping};
use crate::storage::Storage;

/// What a layer holds from an offset on; before it, the layer below decides.
pub(super) struct Rest {
    inner: Arc<dyn Image>,
    /// In bytes, where no cluster is cut.
    from: u64,
}

impl Rest {
    /// `layer` without what it holds before `from`.
    pub fn of(layer: &Layer, from: u64) -> Layer {
        let image = Arc::new(Rest { inner: layer.image.clone(), from });
        Layer { image, ..layer.clone() }
    }
}

impl Image for Rest {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn cluster(&self) -> Unit {
        self.inner.cluster()
    }

    fn granularity(&self) -> Unit {
        self.inner.granularity()
    }

    fn backing(&self) -> Option<Backing> {
        self.inner.backing()
    }

    fn encrypted(&self) -> bool {
        self.inner.encrypted()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        if at.0 < self.from {
            let len = len.min(self.from - at.0);
            return Ok(Extent { start: at, len, mapping: Mapping::Unallocated });
        }
        self.inner.map(at, len)
    }

    fn narrow(&self, extent: Extent) -> Result<Extent> {
        self.inner.narrow(extent)
    }

    fn place(&self, host: HostOffset) -> Option<(&str, HostOffset)> {
        self.inner.place(host)
    }

    fn stored(&self, extent: &Extent, at: GuestOffset) -> Option<(&dyn Storage, u64)> {
        self.inner.stored(extent, at)
    }

    fn is_stored(&self, extent: &Extent) -> Result<Option<bool>> {
        self.inner.is_stored(extent)
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.inner.read(extent, at, bufs)
    }

    fn identity(&self) -> Result<Identity> {
        self.inner.identity()
    }

    fn details(&self) -> Option<Details> {
        self.inner.details()
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}
