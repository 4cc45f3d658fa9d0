//! Smaller images.

use std::sync::atomic::Ordering;

use super::image::Image;
use crate::addr::GuestOffset;
use crate::error::{Error, Result};

impl Image {
    /// Makes the disk `size` bytes long and gives back the clusters past that. What the last
    /// cluster holds past `size` stays: the caller has zeroed it.
    ///
    /// Mappings go first: after a crash in between, the disk has its old size and nothing past the
    /// new one; none of what is lost comes back when it grows again.
    pub(super) fn shrink(&self, size: u64) -> Result<()> {
        let header = self.header();
        if header.snapshots > 0 {
            let message = "an image with internal snapshots is not shrunk: they may need its size";
            return Err(Error::unsupported(message));
        }
        let from = self.shape.cluster.ceil(size);
        if from < header.size {
            self.discard_range(GuestOffset(from), header.size - from, true)?;
        }
        self.write_back()?;
        self.update_header(|h| h.size = size)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}
