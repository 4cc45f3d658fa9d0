//! Which way a merge goes: up or down, by copying or by sharing, and what that costs.

use std::path::Path;

use super::cost::{cost, data_bytes, look};
use super::fold;
use super::plan::{Direction, Method};
use super::tree::Member;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Role;

/// Bytes that are copied as fast as this many bytes are shared, at least.
const SHARING: u64 = 32;
/// Sharing is always worth it for layers up to this size.
const ALWAYS_SHARED: u64 = 1 << 30;
/// The least free space with which a fold in batches is begun.
const ELBOW_ROOM: u64 = 4 << 20;

/// Where a merge goes, and how, and what it costs.
#[derive(Debug, Clone)]
pub(super) struct Way {
    pub direction: Direction,
    pub method: Method,
    pub moved: u64,
    pub linked: u64,
    pub space: u64,
    pub freed: u64,
    pub why: &'static str,
}

/// The cheaper way for a layer and those that stand on it.
///
/// While the disk is in use its head stays the file that it is, and below it only what a layer hides
/// as a whole is written into another one.
pub(super) fn choose(layer: &Member, on: &[&Member], share: bool, in_use: bool) -> Result<Way> {
    let lower = look(layer)?;
    let mut may_hide = true;
    let (mut up, mut packed, mut upper, mut both) = (0, 0, 0, 0);
    for child in on {
        let above = look(child)?.image;
        may_hide &= child.label.role != Role::Head
            && above.granularity().bits() >= lower.image.cluster().bits();
        let cost = cost(&*above, &*lower.image)?;
        (up, packed) = (up + cost.only_lower, packed + cost.packed);
        (upper, both) = (upper + cost.upper, both + cost.both);
    }
    let own = data_bytes(&*lower.image)?;
    let freed = own.saturating_sub(up);
    // A shorter child would have to cut the layer.
    let longer = on.iter().all(|m| m.peek.size >= layer.peek.size);
    let may_go_down = on.len() == 1 && longer && (may_hide || !in_use);
    let worth_sharing = up <= ALWAYS_SHARED.max(upper.saturating_mul(SHARING));
    if share && (worth_sharing || !may_go_down) {
        let why = "the host lets files share bytes, so hardly any are copied, and it can be undone";
        let (moved, linked) = (packed, up - packed);
        let (direction, method) = (Direction::Up, Method::Share);
        return Ok(Way { direction, method, moved, linked, space: packed, freed, why });
    }
    let method = Method::Copy;
    if may_go_down && upper < up {
        let why = "what stands on it holds less than it";
        let (direction, space) = (Direction::Down, upper - both);
        return Ok(Way { direction, method, moved: upper, linked: 0, space, freed: both, why });
    }
    let why = match on.len() {
        1 if may_go_down => "it holds less than what stands on it",
        1 if !longer => "what stands on it is a smaller disk",
        1 => "the disk is in use",
        _ => "several layers stand on it, and each needs what it holds",
    };
    Ok(Way { direction: Direction::Up, method, moved: up, linked: 0, space: up, freed, why })
}

impl Way {
    /// Goes the same way in batches.
    pub fn in_batches(&mut self, path: &Path) -> Result<()> {
        if self.method != Method::Copy {
            return Ok(());
        }
        self.method = Method::Batches;
        // What several layers take is not all given back by the one that loses it.
        let given_back = match self.direction {
            Direction::Down => self.moved,
            Direction::Up => self.freed.saturating_add(self.moved),
        };
        self.space = fold::batch(path)?.min(self.moved) + self.moved.saturating_sub(given_back);
        Ok(())
    }
}

/// Refuses a merge for which the host has no room, before anything is changed.
pub(super) fn check_space(path: &Path, way: &Way, free: u64) -> Result<()> {
    if way.space.max(way.moved.min(ELBOW_ROOM)) <= free {
        return Ok(());
    }
    let message = format!(
        "the host has no space for the merge, which takes {} bytes of it for a time; {free} are free, \
         and nothing was changed",
        way.space
    );
    Err(Error::new(ErrorKind::NoSpace, message).at_path(path))
}
