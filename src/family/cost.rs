//! What layers hold: the bytes that a change of the tree moves, frees or keeps.
//!
//! It only walks tables; no data is read.

use crate::addr::GuestOffset;
use crate::chain::Layer;
use crate::error::Result;
use crate::family::tree::Member;
use crate::image::{Image, Mapping};
use crate::open::disk::{OpenOptions, open_image};

/// Opens a layer for looking at its tables, whoever holds it.
pub(crate) fn look(member: &Member) -> Result<Layer> {
    let options = OpenOptions { unprotected: true, shared: true, ..OpenOptions::default() };
    open_image(&member.path, &options)
}

/// The bytes of data that a layer holds itself.
pub fn data_bytes(image: &dyn Image) -> Result<u64> {
    let (mut at, mut bytes) = (0, 0);
    while at < image.size() {
        let extent = image.map(GuestOffset(at), image.size() - at)?;
        if is_data(extent.mapping) {
            bytes += extent.len;
        }
        at += extent.len;
    }
    Ok(bytes)
}

fn is_data(mapping: Mapping) -> bool {
    matches!(mapping, Mapping::Data { .. } | Mapping::Compressed { .. })
}

/// Whether a layer says nothing of any part of the disk.
pub(crate) fn is_bare(image: &dyn Image) -> Result<bool> {
    let mut at = 0;
    while at < image.size() {
        let extent = image.map(GuestOffset(at), image.size() - at)?;
        if extent.mapping != Mapping::Unallocated {
            return Ok(false);
        }
        at += extent.len;
    }
    Ok(true)
}

/// A layer that is gone through from its start to its end, in steps that others set.
struct Walk<'a> {
    image: &'a dyn Image,
    /// How far `mapping` goes.
    end: u64,
    mapping: Mapping,
}

impl<'a> Walk<'a> {
    fn of(image: &'a dyn Image) -> Walk<'a> {
        Walk { image, end: 0, mapping: Mapping::Unallocated }
    }

    /// What stands at `at`, which never goes back, and how far, at most `len` bytes. Past its end a
    /// layer hides what is below it.
    fn at(&mut self, at: u64, len: u64) -> Result<(u64, Mapping)> {
        let size = self.image.size();
        if at >= size {
            return Ok((len, Mapping::Zero { host: None }));
        }
        if at >= self.end {
            let extent = self.image.map(GuestOffset(at), size - at)?;
            (self.end, self.mapping) = (at + extent.len, extent.mapping);
        }
        Ok((len.min(self.end - at), self.mapping))
    }
}

/// Bytes of data that two layers, one on the other, hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Cost {
    /// In the upper one.
    pub upper: u64,
    /// In the lower one, where the upper one says nothing.
    pub only_lower: u64,
    /// Of that, what is compressed.
    pub packed: u64,
    /// In both.
    pub both: u64,
}

/// Compares what `upper` and `lower` hold.
pub(crate) fn cost(upper: &dyn Image, lower: &dyn Image) -> Result<Cost> {
    let mut cost = Cost::default();
    let (mut over, mut under) = (Walk::of(upper), Walk::of(lower));
    let (mut at, end) = (0, upper.size());
    while at < end {
        let (len, above) = over.at(at, end - at)?;
        let (len, below) = under.at(at, len)?;
        match (is_data(above), is_data(below)) {
            (true, true) => (cost.upper, cost.both) = (cost.upper + len, cost.both + len),
            (true, false) => cost.upper += len,
            (false, true) if above == Mapping::Unallocated => {
                cost.only_lower += len;
                let packed = matches!(below, Mapping::Compressed { .. });
                cost.packed += if packed { len } else { 0 };
            }
            _ => {}
        }
        at += len;
    }
    Ok(cost)
}

/// What a layer holds, as those who stand on it see it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    /// Bytes that only the layer itself shows: they go when it goes.
    pub exclusive: u64,
    /// Bytes that at least one layer on it shows too.
    pub shared: u64,
}

/// Tells apart what only `layer` shows and what one of the layers `on` it shows as well.
pub fn share(layer: &dyn Image, on: &[&dyn Image]) -> Result<Share> {
    let mut share = Share::default();
    let mut own = Walk::of(layer);
    let mut on: Vec<Walk<'_>> = on.iter().map(|child| Walk::of(*child)).collect();
    let (mut at, end) = (0, layer.size());
    while at < end {
        let (mut len, mapping) = own.at(at, end - at)?;
        if is_data(mapping) {
            let mut shows = false;
            for child in &mut on {
                let above;
                (len, above) = child.at(at, len)?;
                shows |= above == Mapping::Unallocated;
            }
            *(if shows { &mut share.shared } else { &mut share.exclusive }) += len;
        }
        at += len;
    }
    Ok(share)
}

/// [`share`] for a member of a family and those on it.
pub(crate) fn share_of(member: &Member, on: &[&Member]) -> Result<Share> {
    let layer = look(member)?;
    let on = on.iter().map(|m| look(m)).collect::<Result<Vec<_>>>()?;
    let on: Vec<&dyn Image> = on.iter().map(|l| &*l.image).collect();
    share(&*layer.image, &on)
}
