//! What putting a disk on another base, or on none, will do: told from the tables, without reading
//! or changing anything.

use std::path::{Path, PathBuf};

use crate::block::{BlockDevice, BlockStatus};
use crate::chain::Chain;
use crate::change::base::rebase::Contents;
use crate::change::open::take_head;
use crate::change::plan::{Fate, Touched};
use crate::error::{Error, Result};
use crate::image::{Mapping, Role};
use crate::open::gate::same_file;
use crate::open::{OpenOptions, gate, open_layers};
use crate::storage::follow;

/// What a rebase will do.
#[derive(Debug, Clone)]
pub struct Rebase {
    /// The disk.
    pub disk: PathBuf,
    /// What it will stand on; `None` for nothing.
    pub backing: Option<PathBuf>,
    /// What it stands on now.
    pub before: Option<PathBuf>,
    /// The layers that it touches.
    pub layers: Vec<Touched>,
    /// Bytes that both bases show and that are compared; only where they differ they are copied.
    pub compared: u64,
    /// Bytes that are copied into the disk, at most.
    pub moved: u64,
}

/// What [`flatten`](crate::change::rebase::flatten) will do to the disk at `path`.
///
/// # Errors
/// [`ErrorKind::InUse`](crate::ErrorKind::InUse) names who holds the disk.
pub fn plan_flatten(path: &Path) -> Result<Rebase> {
    let path = &follow(path)?;
    let mut plan = begin(path)?;
    let disk = open_layers(path, &OpenOptions::default())?;
    each_below(&disk, &mut |_, len, stored| {
        plan.moved += if stored { len } else { 0 };
        Ok(())
    })?;
    plan.layers.push(touched(path, Fate::Filled));
    Ok(plan)
}

/// What [`rebase`](crate::change::rebase::rebase) of the disk at `path` to `base`, which is opened as
/// `how` says, will do.
///
/// # Errors
/// As that, but for what only doing it can tell.
pub fn plan_rebase(
    path: &Path,
    base: &Path,
    how: &OpenOptions,
    contents: Contents,
) -> Result<Rebase> {
    let path = &follow(path)?;
    let mut plan = begin(path)?;
    let unprotected = OpenOptions { unprotected: true, ..how.clone() };
    let new = open_layers(base, &unprotected)?;
    if new.all_layers().iter().any(|layer| same_file(&layer.path, path)) {
        let message = format!("cannot stand on '{}', which stands on it", base.display());
        return Err(Error::invalid(message).at_path(path));
    }
    if contents == Contents::Keep {
        let disk = open_layers(path, &OpenOptions::default())?;
        each_below(&disk, &mut |at, len, stored| {
            let mut shown = 0;
            let there = new.size().saturating_sub(at).min(len);
            let (mut from, end) = (at, at + there);
            while from < end {
                let Some(extent) = new.extents(from, end - from, 1)?.first().copied() else {
                    break;
                };
                shown += if extent.status == BlockStatus::Data { extent.len } else { 0 };
                from = extent.offset + extent.len;
            }
            // What one shows and the other does not differs, unless it is zeroes that are stored.
            plan.moved += if stored { len } else { shown };
            plan.compared += if stored { shown } else { 0 };
            Ok(())
        })?;
        plan.layers.push(touched(path, Fate::Filled));
    }
    plan.layers.push(touched(path, Fate::Moved));
    let role = new.head().image.identity()?.label.map(|label| label.role);
    if matches!(role, None | Some(Role::Head)) {
        plan.layers.push(touched(base, Fate::Frozen));
    }
    plan.backing = Some(base.to_path_buf());
    Ok(plan)
}

fn begin(path: &Path) -> Result<Rebase> {
    // Nobody else has it, and it may be written.
    let head = take_head(path)?;
    let backing = head.image.identity()?.backing;
    let before = backing.and_then(|b| gate::resolve(path, &b.name).ok());
    let (disk, layers) = (path.to_path_buf(), Vec::new());
    Ok(Rebase { disk, backing: None, before, layers, compared: 0, moved: 0 })
}

fn touched(path: &Path, fate: Fate) -> Touched {
    Touched { path: path.to_path_buf(), name: None, fate }
}

/// Calls `act` with each stretch of the disk of which the head holds nothing, and whether a layer
/// below stores something there.
fn each_below(disk: &Chain, act: &mut dyn FnMut(u64, u64, bool) -> Result<()>) -> Result<()> {
    let (mut at, size) = (0, disk.size());
    while at < size {
        let extent = disk.map(at, size - at, true)?;
        let stored = matches!(extent.mapping, Mapping::Data { .. } | Mapping::Compressed { .. });
        if extent.depth > 0 || extent.mapping == Mapping::Unallocated {
            act(extent.start, extent.len, stored)?;
        }
        at = extent.start + extent.len;
    }
    Ok(())
}
