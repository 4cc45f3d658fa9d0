//! What a layer that was dropped remembers, so that it can come back.
//!
//! All layers that one command dropped carry the same event. Numbers are big-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0-7 | the event, a random number |
//! | 8-9 | how many layers the event dropped |
//! | 10-11 | what the layer was: 0 head, 1 snapshot, 2 merged snapshot |
//! | 12-19, 20-27 | when it was dropped, and until when it is kept, in milliseconds since 1970 |
//! | 28- | 8 bytes for each layer that was moved off it |
//!
//! When it was dropped by the host's count stands in a record of its own: the boot, and milliseconds
//! since then, 8 bytes each.

use zerocopy::byteorder::big_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::id::Id;
use crate::error::{Error, Result};

/// The bytes before the children.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Fixed {
    event: U64,
    layers: U16,
    was: U16,
    since: U64,
    until: U64,
}

const _: () = assert!(size_of::<Fixed>() == 28);

/// A moment by the count of a host that runs: nobody sets that as they set a clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uptime {
    /// The beginning of the random id of the boot.
    pub boot: u64,
    /// Milliseconds since the boot, sleep included.
    pub ms: u64,
}

impl Uptime {
    pub(super) fn encode(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.boot.to_be_bytes());
        bytes[8..].copy_from_slice(&self.ms.to_be_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Uptime> {
        let (words, _) = <[U64; 2]>::ref_from_prefix(bytes).ok()?;
        Some(Uptime { boot: words[0].get(), ms: words[1].get() })
    }
}

/// What a dropped layer was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Was {
    /// The head.
    Head,
    /// A snapshot that was deleted.
    Snapshot,
    /// A snapshot that was merged: its children hold all of it, and were moved to its parent.
    Merged,
}

/// How a dropped layer comes back. See the module for its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// The same number in all layers that were dropped together.
    pub event: u64,
    /// How many were: where some are missing, none comes back.
    pub layers: u16,
    /// What it was.
    pub was: Was,
    /// When it was dropped, in milliseconds since 1970.
    pub since: u64,
    /// Until when it is kept, in milliseconds since 1970.
    pub until: u64,
    /// When it was dropped by the host's count, where that was known.
    pub uptime: Option<Uptime>,
    /// The layers that were moved off it, by [`Kept::short`].
    pub children: Vec<u64>,
}

impl Kept {
    /// The most children that are remembered: the label stays within a sector.
    pub const MAX_CHILDREN: usize = 8;

    /// The first bytes of a layer's id, which tell the layers of one disk apart.
    pub fn short(layer: Id) -> u64 {
        layer.as_u64_pair().0
    }

    /// The record's bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        let fixed = Fixed {
            event: self.event.into(),
            layers: self.layers.into(),
            was: (self.was as u16).into(),
            since: self.since.into(),
            until: self.until.into(),
        };
        let mut bytes = fixed.as_bytes().to_vec();
        self.children.iter().for_each(|child| bytes.extend_from_slice(&child.to_be_bytes()));
        bytes
    }

    /// Reads a record back.
    pub(super) fn decode(bytes: &[u8]) -> Result<Kept> {
        let damaged = || Error::corrupt("the header's vdisk label is damaged");
        let (fixed, children) = Fixed::ref_from_prefix(bytes).map_err(|_| damaged())?;
        let children = <[U64]>::ref_from_prefix(children).map_or(&[][..], |(all, _)| all);
        let was = match fixed.was.get() {
            0 => Was::Head,
            1 => Was::Snapshot,
            2 => Was::Merged,
            _ => return Err(damaged()),
        };
        Ok(Kept {
            event: fixed.event.get(),
            layers: fixed.layers.get(),
            was,
            since: fixed.since.get(),
            until: fixed.until.get(),
            uptime: None,
            children: children.iter().map(|child| child.get()).collect(),
        })
    }
}
