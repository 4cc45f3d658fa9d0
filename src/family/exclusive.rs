//! What only one layer shows: the bytes that would be missed by nobody else if it were gone.

use std::path::Path;

use crate::addr::GuestOffset;
use crate::error::Result;
use crate::image::Mapping;
use crate::open::Format;
use crate::open::disk::{OpenOptions, open_image};

/// The most pieces of a layer that are looked at: what is in more pieces is not told.
const MAX_PIECES: usize = 1 << 20;

/// Where a layer holds something, and where that is data.
#[derive(Debug, Clone, Default)]
pub(crate) struct Holding {
    /// Begin and end of each stretch, in order, and whether it is data; the rest is left to the
    /// layers below.
    stretches: Vec<(u64, u64, bool)>,
    /// The layer's size: it hides all that lies beyond.
    size: u64,
}

impl Holding {
    /// Looks into the layer at `path`, whoever holds it, of the format that what stands on it
    /// declares; `None` where it is in too many pieces.
    pub fn of(path: &Path, format: Option<Format>) -> Result<Option<Holding>> {
        // It is gone through once, from the front.
        let cache = 1 << 20;
        let options = OpenOptions {
            unprotected: true,
            shared: true,
            cache,
            format,
            ..OpenOptions::default()
        };
        let image = open_image(path, &options)?.image;
        let mut held = Holding { stretches: Vec::new(), size: image.size() };
        let mut at = 0;
        while at < held.size {
            let extent = image.map(GuestOffset(at), held.size - at)?;
            let extent = match extent.mapping {
                Mapping::Data { .. } => image.narrow(extent)?,
                _ => extent,
            };
            let end = at + extent.len;
            let is_data =
                matches!(extent.mapping, Mapping::Data { .. } | Mapping::Compressed { .. });
            if extent.mapping != Mapping::Unallocated {
                let full = held.stretches.len() == MAX_PIECES;
                match held.stretches.last_mut() {
                    Some(last) if last.1 == at && last.2 == is_data => last.1 = end,
                    _ if full => return Ok(None),
                    _ => held.stretches.push((at, end, is_data)),
                }
            }
            at = end;
        }
        Ok(Some(held))
    }

    /// The bytes of data that none of `children` shows: each holds something else there.
    pub fn exclusive<'a>(&self, children: impl Iterator<Item = &'a Holding>) -> u64 {
        let data = self.stretches.iter().filter(|s| s.2);
        let mut left: Vec<(u64, u64)> = data.map(|s| (s.0, s.1)).collect();
        for child in children {
            if left.is_empty() {
                break;
            }
            left = child.hides(&left);
        }
        left.iter().map(|(from, to)| to - from).sum()
    }

    /// The parts of `ranges`, which are in order, that this layer hides.
    fn hides(&self, ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let beyond = (self.size, u64::MAX, false);
        let mut own = self.stretches.iter().copied().chain([beyond]).peekable();
        let mut hidden = Vec::new();
        for (from, to) in ranges {
            while let Some((start, end, _)) = own.peek() {
                let (first, last) = ((*from).max(*start), (*to).min(*end));
                if first < last {
                    hidden.push((first, last));
                }
                if end > to {
                    break;
                }
                own.next();
            }
        }
        hidden
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exclusive_is_what_every_child_holds_otherwise() {
        let layer =
            |size, stretches: &[(u64, u64, bool)]| Holding { stretches: stretches.to_vec(), size };
        let base = layer(100, &[(0, 40, true), (50, 60, false), (70, 100, true)]);
        assert_eq!(base.exclusive([].iter()), 70);
        let one = layer(100, &[(10, 20, true), (30, 80, false)]);
        assert_eq!(base.exclusive([&one].into_iter()), 10 + 10 + 10);
        let shorter = layer(75, &[(15, 35, true)]);
        assert_eq!(base.exclusive([&shorter].into_iter()), 20 + 25);
        assert_eq!(base.exclusive([&one, &shorter].into_iter()), 5 + 5 + 5);
    }
}
