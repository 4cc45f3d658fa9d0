//! What changed on a disk between two of its moments: the extents that the layers between hold.
//!
//! Only tables are read. What was written again with the same bytes counts as changed.

use crate::addr::GuestOffset;
use crate::chain::Layer;
use crate::error::Result;
use crate::family::tree::{Family, Member};
use crate::image::{Id, Mapping};
use crate::open::disk::{OpenOptions, open_image};

/// A stretch that was written since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// First byte of the disk.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// Whether it is known to read as zeroes at the later moment.
    pub zero: bool,
}

/// The layers that hold what differs between two moments of a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Between {
    /// From the earlier moment's branch, top first: taken back by the way to the later one.
    left: Vec<Id>,
    /// On the later moment's branch, top first.
    right: Vec<Id>,
}

impl Between {
    /// The way from the snapshot `from` to the snapshot `to`, or to the disk as it is now.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound), with the names that there are.
    pub fn moments(family: &Family, from: &str, to: Option<&str>) -> Result<Between> {
        let from = line(family, family.snapshot(from)?);
        let to = match to {
            Some(name) => line(family, family.snapshot(name)?),
            None => line(family, &family.head),
        };
        let open = |one: &[Id], other: &[Id]| -> Vec<Id> {
            one.iter().copied().take_while(|id| !other.contains(id)).collect()
        };
        Ok(Between { left: open(&from, &to), right: open(&to, &from) })
    }

    /// The extents that differ, in order. `held` are the open layers of the disk, whose tables may
    /// be newer than what their files say; others are opened.
    pub fn changes(&self, family: &Family, held: &[(Id, Layer)]) -> Result<Vec<Change>> {
        let layers = |ids: &[Id]| ids.iter().map(|id| find(family, held, *id)).collect();
        let (left, right): (Result<Vec<Layer>>, Result<Vec<Layer>>) =
            (layers(&self.left), layers(&self.right));
        let (left, right) = (left?, right?);
        let size = left.iter().chain(&right).map(|l| l.image.size()).max().unwrap_or(0);
        let mut found: Vec<Change> = Vec::new();
        let mut at = 0;
        while at < size {
            let (later, len) = first(&right, at, size - at)?;
            let (earlier, len) = match later {
                Mapping::Unallocated => first(&left, at, len)?,
                _ => (Mapping::Unallocated, len),
            };
            if later != Mapping::Unallocated || earlier != Mapping::Unallocated {
                let zero = matches!(later, Mapping::Zero { .. });
                match found.last_mut() {
                    Some(last) if last.start + last.len == at && last.zero == zero => {
                        last.len += len;
                    }
                    _ => found.push(Change { start: at, len, zero }),
                }
            }
            at += len;
        }
        Ok(found)
    }
}

/// The layer and those below it that belong to the disk, top first.
fn line(family: &Family, member: &Member) -> Vec<Id> {
    let mut found = vec![member.label.layer];
    let mut at = member.parent();
    while let Some(below) = at.and_then(|id| family.member(id)) {
        if found.contains(&below.label.layer) {
            break;
        }
        found.push(below.label.layer);
        at = below.parent();
    }
    found
}

fn find(family: &Family, held: &[(Id, Layer)], id: Id) -> Result<Layer> {
    if let Some((_, layer)) = held.iter().find(|(held, _)| *held == id) {
        return Ok(layer.clone());
    }
    let path = family.member(id).map_or(family.head.path.clone(), |m| m.path.clone());
    open_image(&path, &OpenOptions { unprotected: true, shared: true, ..OpenOptions::default() })
}

/// What the topmost of `layers` that says anything says at `at`, and for how long.
fn first(layers: &[Layer], at: u64, mut len: u64) -> Result<(Mapping, u64)> {
    for layer in layers {
        let left = layer.image.size().saturating_sub(at);
        if left == 0 {
            continue;
        }
        let extent = layer.image.map(GuestOffset(at), len.min(left));
        let extent = extent.map_err(|e| e.at_path(&layer.path))?;
        len = extent.len;
        if extent.mapping != Mapping::Unallocated {
            return Ok((extent.mapping, len));
        }
    }
    Ok((Mapping::Unallocated, len))
}

/// What changed on an idle disk; see [`Between`].
///
/// # Errors
/// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) for a snapshot that the disk does not have.
pub fn diff(family: &Family, from: &str, to: Option<&str>) -> Result<Vec<Change>> {
    Between::moments(family, from, to)?.changes(family, &[])
}
