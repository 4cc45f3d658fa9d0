//! Copying up: making the head hold what the layers below show, so that it can leave them.
//!
//! The disk shows the same before, during and after, so nothing is lost when it is interrupted.

use std::io::{IoSlice, IoSliceMut};

use super::Chain;
use crate::addr::GuestOffset;
use crate::block::BlockDevice;
use crate::error::{ErrorKind, Result};
use crate::image::Mapping;

impl Chain {
    /// Makes the head hold what the disk shows in a range, wherever it does not hold it yet.
    pub(super) fn adopt(&self, at: u64, len: u64) -> Result<()> {
        self.for_each_open(at, len, |pos, len| {
            let mut bytes = vec![0; len as usize];
            self.read_at(pos, &mut [IoSliceMut::new(&mut bytes)])?;
            self.write_at(pos, &[IoSlice::new(&bytes)])
        })
    }

    /// Makes the head say zero of a range that reads as zeroes, wherever it says nothing yet.
    pub(super) fn adopt_zeroes(&self, at: u64, len: u64) -> Result<()> {
        let head = self.head().image;
        let unit = head.granularity();
        self.for_each_open(at, len, |pos, len| {
            let end = pos + len;
            let whole = unit.aligned(pos) && (unit.aligned(end) || end == head.size());
            if whole {
                match head.zero(GuestOffset(pos), len, true) {
                    Err(e) if e.kind() == ErrorKind::Unsupported => {}
                    done => return done,
                }
            }
            self.write_at(pos, &[IoSlice::new(&vec![0; len as usize])])
        })
    }

    /// Calls `fill` for each part of the range that the head holds nothing of, when it comes there.
    pub(super) fn for_each_open(
        &self,
        at: u64,
        len: u64,
        fill: impl Fn(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let head = self.head().image;
        let (mut pos, end) = (at, at + len);
        while pos < end {
            let extent = head.map(GuestOffset(pos), end - pos)?;
            if extent.mapping == Mapping::Unallocated {
                fill(pos, extent.len)?;
            }
            pos += extent.len;
        }
        Ok(())
    }
}
