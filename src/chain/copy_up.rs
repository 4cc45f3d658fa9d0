//! Copying up: making the head hold what the layers below show, so that it can leave them.
//!
//! The disk shows the same before, during and after, so nothing is lost when it is interrupted.
//! The guest may use the disk meanwhile: a cluster is looked at again and copied under its in-flight
//! entry, so that no write comes between the look and the copy.

use std::io::IoSlice;

use crate::addr::GuestOffset;
use crate::chain::{Chain, Layers};
use crate::error::{ErrorKind, Result};
use crate::image::{Image, Mapping};

impl Chain {
    /// Makes the head hold what the disk shows in a range, wherever it does not hold it yet: also
    /// zeroes that show only because nothing stands below.
    ///
    /// # Errors
    /// What reading the layers or writing the head fails with.
    pub fn copy_up(&self, at: u64, len: u64) -> Result<()> {
        self.with_space(|| {
            self.for_each_open(at, len, &|layers, pos, len| self.copy_open(layers, pos, len))
        })
    }

    /// Makes the head say zero of a range that reads as zeroes, wherever it says nothing yet.
    pub(crate) fn copy_up_zeroes(&self, at: u64, len: u64) -> Result<()> {
        self.for_each_open(at, len, &|layers, pos, len| {
            let head = &layers.head.image;
            let (unit, end) = (head.granularity(), pos + len);
            let whole = unit.aligned(pos) && (unit.aligned(end) || end == head.size());
            if whole && say_zero(&**head, pos, len)? {
                return Ok(len);
            }
            self.copy_open(layers, pos, len)
        })
    }

    /// Copies what the disk shows into the head, which holds none of the range; returns how much of
    /// it was copied. The caller has its in-flight entry.
    fn copy_open(&self, layers: &Layers, pos: u64, len: u64) -> Result<u64> {
        let head = &layers.head.image;
        let unit = head.granularity();
        let (start, end) = (unit.floor(pos), unit.ceil(pos + len).min(head.size()));
        let zero = layers.is_zero(start, end)?;
        if zero && say_zero(&**head, start, end - start)? {
            return Ok(len);
        }
        let token = head.prepare(GuestOffset(start), end - start)?;
        let covered = (token.start().0 + token.len()).min(pos + len) - pos;
        layers.fill(&*token, None, token.start().0, &[])?;
        if zero {
            // Where nothing had to be written, the file may end before what is referred to.
            token.write(token.len() - 1, &[IoSlice::new(&[0])])?;
        }
        token.commit()?;
        Ok(covered)
    }

    /// Calls `fill` for each part of the range that the head holds nothing of, when it comes there,
    /// under the part's in-flight entry; it returns how much it has filled.
    fn for_each_open(
        &self,
        at: u64,
        len: u64,
        fill: &dyn Fn(&Layers, u64, u64) -> Result<u64>,
    ) -> Result<()> {
        let layers = self.layers();
        let head = &layers.head.image;
        self.check_not_lost()?;
        let _hold = head.hold();
        let cluster = head.cluster();
        let (mut pos, end) = (at, (at + len).min(head.size()));
        while pos < end {
            let extent = head.map(GuestOffset(pos), end - pos)?;
            if extent.mapping != Mapping::Unallocated {
                pos += extent.len;
                continue;
            }
            let to = pos + extent.len;
            let _entry = self.inflight.enter(cluster.floor(pos)..cluster.ceil(to));
            // Whoever was here before may have filled it.
            let extent = head.map(GuestOffset(pos), extent.len)?;
            pos += match extent.mapping {
                Mapping::Unallocated => fill(&layers, pos, extent.len)?,
                _ => extent.len,
            };
        }
        Ok(())
    }
}

/// Makes whole units zero without data; `false` where the format cannot say it.
fn say_zero(head: &dyn Image, at: u64, len: u64) -> Result<bool> {
    // Where space may be given up, a head without a backing file says it by holding nothing.
    match head.zero(GuestOffset(at), len, false) {
        Err(e) if e.kind() == ErrorKind::Unsupported => Ok(false),
        done => done.map(|()| true),
    }
}
