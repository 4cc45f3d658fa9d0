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

use byteorder::{BigEndian, ByteOrder};

use super::label::Id;
use crate::error::{Error, Result};

/// Bytes before the children.
const FIXED: usize = 28;

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
        let mut bytes = vec![0; FIXED];
        BigEndian::write_u64(&mut bytes, self.event);
        BigEndian::write_u16(&mut bytes[8..], self.layers);
        BigEndian::write_u16(&mut bytes[10..], self.was as u16);
        BigEndian::write_u64(&mut bytes[12..], self.since);
        BigEndian::write_u64(&mut bytes[20..], self.until);
        self.children.iter().for_each(|child| bytes.extend_from_slice(&child.to_be_bytes()));
        bytes
    }

    /// Reads a record back.
    pub(super) fn decode(bytes: &[u8]) -> Result<Kept> {
        let damaged = || Error::corrupt("the header's vdisk label is damaged");
        let (fixed, rest) = bytes.split_at_checked(FIXED).ok_or_else(damaged)?;
        let was = match BigEndian::read_u16(&fixed[10..]) {
            0 => Was::Head,
            1 => Was::Snapshot,
            2 => Was::Merged,
            _ => return Err(damaged()),
        };
        Ok(Kept {
            event: BigEndian::read_u64(fixed),
            layers: BigEndian::read_u16(&fixed[8..]),
            was,
            since: BigEndian::read_u64(&fixed[12..]),
            until: BigEndian::read_u64(&fixed[20..]),
            children: rest.chunks_exact(8).map(BigEndian::read_u64).collect(),
        })
    }
}
