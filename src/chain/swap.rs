//! Putting other layers into an open chain, between one request of the guest and the next.
//!
//! Whoever holds the layers' lock for writing is alone: the requests before have drained, those
//! after wait. So as little as can be is done under it.

use std::io::{IoSlice, IoSliceMut};
use std::sync::RwLockWriteGuard;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::addr::GuestOffset;
use crate::asymmetric::WriteGuard;
use crate::chain::device::whole_units;
use crate::chain::flat::Flat;
use crate::chain::{Chain, Layer, Layers};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, Mapping};

/// Bytes that are moved at a time.
const CHUNK: u64 = 1 << 20;

/// What a new head was put on, for the way back.
pub(crate) struct Before {
    head: Layer,
    lower: Flat,
    /// How long no request was served.
    pub pause: Duration,
}

impl Chain {
    pub(crate) fn layers_alone(&self) -> WriteGuard<'_, Layers> {
        self.layers.write()
    }

    /// Keeps flushes waiting until the change of the tree that is begun can be found on the host.
    pub(crate) fn begin_publishing(&self) -> RwLockWriteGuard<'_, ()> {
        self.publishing.write().unwrap_or_else(|e| e.into_inner())
    }

    /// The head, once it can be found on the host.
    pub(crate) fn published_head(&self) -> Layer {
        let _published = self.publishing.read().unwrap_or_else(|e| e.into_inner());
        self.head()
    }

    /// Refuses every change from now on.
    pub(crate) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
    }

    pub(crate) fn check_not_lost(&self) -> Result<()> {
        if self.lost.load(Ordering::Acquire) {
            let message = "an earlier change of the disk's snapshots failed; reopen the disk";
            // Without the head's name: callers hold the layers, which are not asked for twice.
            return Err(Error::new(ErrorKind::Poisoned, message));
        }
        Ok(())
    }

    /// Puts the empty delta `next` on the head, which is to be called `below` from then on.
    pub(crate) fn put_on(&self, next: Layer, below: Layer) -> Before {
        let mut lower = vec![below];
        lower.extend_from_slice(self.layers().lower.layers());
        // The new map is made before, the old one is let go after: both may take their time.
        let flat = self.layers().lower.over(lower);
        let since = Instant::now();
        let mut layers = self.layers_alone();
        let old = std::mem::replace(&mut *layers, Layers { head: next, lower: flat });
        drop(layers);
        Before { head: old.head, lower: old.lower, pause: since.elapsed() }
    }

    /// Takes the delta that [`put_on`](Chain::put_on) put there away again: what was written to it
    /// is written to the head before.
    ///
    /// # Errors
    /// Where that fails, the delta stays, the disk reads as before, and every change is refused.
    pub(crate) fn take_off(&self, before: Before) -> Result<()> {
        let mut layers = self.layers_alone();
        let old = Layers { head: before.head, lower: before.lower };
        let next = std::mem::replace(&mut *layers, old);
        let done = self.fold_in(&layers, &*next.head.image);
        if done.is_err() {
            *layers = next;
            self.lose();
        }
        done
    }

    /// Writes what `upper` holds to the head; nobody else uses either.
    fn fold_in(&self, layers: &Layers, upper: &dyn Image) -> Result<()> {
        let head = &layers.head.image;
        let (mut at, size) = (0, upper.size().min(head.size()));
        let mut buf = vec![0; CHUNK as usize];
        while at < size {
            let extent = upper.map(GuestOffset(at), size - at)?;
            let len = match extent.mapping {
                Mapping::Unallocated => extent.len,
                Mapping::Zero { .. } => {
                    self.zero_alone(layers, at, at + extent.len)?;
                    extent.len
                }
                Mapping::Data { .. } | Mapping::Compressed { .. } => {
                    let len = extent.len.min(CHUNK);
                    let bytes = &mut buf[..len as usize];
                    upper.read(&extent, extent.start, &mut [IoSliceMut::new(bytes)])?;
                    self.write(layers, at, &[IoSlice::new(bytes)])?;
                    len
                }
            };
            at += len;
        }
        Ok(())
    }

    /// Makes a range of the head zero, for a caller that is alone.
    pub(crate) fn zero_alone(&self, layers: &Layers, from: u64, to: u64) -> Result<()> {
        let head = &layers.head.image;
        let Some((start, end)) = whole_units(head.granularity(), from, to, head.size()) else {
            return self.write_zero_bytes(layers, from, to);
        };
        self.write_zero_bytes(layers, from, start)?;
        let done = head.zero(GuestOffset(start), end - start, true);
        self.or_with_bytes(layers, done, start, end)?;
        self.write_zero_bytes(layers, end, to)
    }

    /// Puts other layers below the head, which show the same to it.
    pub(crate) fn replace_lower(&self, lower: Vec<Layer>) {
        let flat = self.layers().lower.over(lower);
        let mut layers = self.layers_alone();
        let old = std::mem::replace(&mut layers.lower, flat);
        drop(layers);
        drop(old);
    }

    /// Returns when every request that was under way has been answered.
    pub(crate) fn wait_for_requests(&self) {
        drop(self.layers_alone());
    }

    /// Puts another image of the same file in the place of layer `number` below the head; returns
    /// the one before.
    pub(crate) fn replace_layer(&self, number: usize, layer: Layer) -> Option<Layer> {
        self.layers_alone().lower.replace(number, layer)
    }
}
