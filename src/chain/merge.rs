//! Merging a snapshot: its name goes, its changes are folded into a neighbour.
//!
//! Up: what the layer holds is copied into each of its children, which do not show anything else
//! for it; then they are moved to its parent, and it goes. Until that moment the old tree stands.
//!
//! Down: what its only child holds is written into the layer, which then takes the child's place
//! and name. The child shows its own contents at every moment, so the disk is right throughout; but
//! the snapshot is no restore point from the first write on, and so is marked before it. A merge
//! that is interrupted then is finished by the next open for writing.

use std::io::{IoSlice, IoSliceMut};
use std::path::Path;

use super::Chain;
use super::open::{open, open_image};
use super::snapshot::{data_bytes, open_head, unprotected};
use super::tree::{Family, Member, clones_of};
use crate::addr::GuestOffset;
use crate::block::BlockDevice;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Id, Image, Mapping, Role};
use crate::storage::draft::{directory, remove, rename, sync_directory};

/// Bytes that are copied at a time.
const CHUNK: u64 = 2 << 20;

/// What an interrupted merge upwards leaves.
const UNCHANGED: &str = "the disk and its snapshots are as they were";
/// What an interrupted merge downwards leaves.
const UNFINISHED: &str =
    "the disk is as it was; the merge is finished by running it again, or by the next writer";

/// Where a merge goes, and what it costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Whether the layer's child is folded into it, or it into its children.
    pub down: bool,
    /// Bytes that are copied.
    pub bytes: u64,
    /// Bytes of the host that are taken meanwhile.
    pub space: u64,
}

/// Told the bytes done and to be done; `false` asks to stop.
pub type Progress<'a> = dyn FnMut(u64, u64) -> bool + 'a;

/// Merges the snapshot `name` of the disk at `path`.
///
/// # Errors
/// [`ErrorKind::Sealed`] where clones stand on it; [`ErrorKind::Invalid`] where nothing stands on
/// it, so that there is nothing to fold it into; [`ErrorKind::Interrupted`] where `progress` asked
/// to stop: the tree is then as it was, or is finished by the next open for writing.
pub fn merge(path: &Path, name: &str, progress: &mut Progress<'_>) -> Result<()> {
    if let Some(layer) = unfinished(path, name)? {
        return fold_down(path, layer, progress);
    }
    drop(open_head(path)?);
    let family = Family::of(path)?;
    let layer = family.snapshot(name)?;
    let plan = plan(&family, layer)?;
    check_space(path, &plan)?;
    if plan.down {
        mark(layer, Role::Merging)?;
        return fold_down(path, layer.label.layer, progress);
    }
    let id = layer.label.layer;
    for child in family.children(id) {
        fold_up(child, layer, progress)?;
    }
    mark(layer, Role::Leaving)?;
    leave(path, id)
}

/// The layer of a snapshot `name` whose merge was interrupted.
fn unfinished(path: &Path, name: &str) -> Result<Option<Id>> {
    let family = Family::read(path)?;
    let merging = |m: &&Member| m.label.role == Role::Merging && m.label.name == name;
    Ok(family.and_then(|f| Some(f.layers.iter().find(merging)?.label.layer)))
}

fn plan(family: &Family, layer: &Member) -> Result<Plan> {
    let clones = clones_of(&layer.path, Some(layer.label.disk))?;
    let name = &layer.label.name;
    if !clones.is_empty() {
        let names: Vec<String> = clones.iter().map(|p| p.display().to_string()).collect();
        let message =
            format!("snapshot '{name}' is not merged: clones stand on it: {}", names.join(", "));
        return Err(Error::new(ErrorKind::Sealed, message).at_path(&family.head.path));
    }
    let children = family.children(layer.label.layer);
    let Some(first) = children.first() else {
        let message = format!(
            "nothing stands on snapshot '{name}', so there is nothing to merge it with: delete it"
        );
        return Err(Error::invalid(message).at_path(&family.head.path));
    };
    let (mut up, mut down) = (0, Plan { down: true, bytes: 0, space: 0 });
    for child in &children {
        let cost = cost(&*look(child)?.image, &*look(layer)?.image)?;
        up += cost.only_lower;
        down.bytes += cost.upper;
        down.space += cost.upper - cost.both;
    }
    // A shorter child would have to cut the layer.
    let may_go_down = children.len() == 1 && first.peek.size >= layer.peek.size;
    if may_go_down && down.bytes < up {
        return Ok(down);
    }
    Ok(Plan { down: false, bytes: up, space: up })
}

/// Opens a layer for looking at its tables, whoever holds it.
fn look(member: &Member) -> Result<super::Layer> {
    let options = super::OpenOptions { unprotected: true, shared: true, ..Default::default() };
    open_image(&member.path, &options)
}

/// Bytes of data that two layers, one on the other, hold.
pub(super) struct Cost {
    /// In the upper one.
    pub upper: u64,
    /// In the lower one, where the upper one says nothing.
    pub only_lower: u64,
    /// In both.
    pub both: u64,
}

pub(super) fn cost(upper: &dyn Image, lower: &dyn Image) -> Result<Cost> {
    let is_data = |m| matches!(m, Mapping::Data { .. } | Mapping::Compressed { .. });
    let mut cost = Cost { upper: 0, only_lower: 0, both: 0 };
    let (mut at, end) = (0, upper.size());
    while at < end {
        let above = upper.map(GuestOffset(at), end - at)?;
        let mut len = above.len;
        let mut below = Mapping::Unallocated;
        if at < lower.size() {
            let extent = lower.map(GuestOffset(at), len)?;
            (len, below) = (extent.len, extent.mapping);
        }
        match (is_data(above.mapping), is_data(below)) {
            (true, true) => (cost.upper, cost.both) = (cost.upper + len, cost.both + len),
            (true, false) => cost.upper += len,
            (false, true) if above.mapping == Mapping::Unallocated => cost.only_lower += len,
            _ => {}
        }
        at += len;
    }
    Ok(cost)
}

/// Refuses a merge for which the host has no room, before anything is changed.
fn check_space(path: &Path, plan: &Plan) -> Result<()> {
    let stat = nix::sys::statvfs::statvfs(directory(path))
        .map_err(|e| Error::io("the free space could not be told", e.into()).at_path(path))?;
    let free = stat.blocks_available() as u64 * stat.fragment_size() as u64;
    if plan.space <= free {
        return Ok(());
    }
    let message = format!(
        "the host has no space for the merge, which takes {} bytes of it for a time; {free} are free, \
         and nothing was changed",
        plan.space
    );
    Err(Error::new(ErrorKind::NoSpace, message).at_path(path))
}

fn mark(layer: &Member, role: Role) -> Result<()> {
    let open = open_image(&layer.path, &unprotected())?;
    let mut identity = open.image.identity()?;
    if let Some(label) = &mut identity.label {
        label.role = role;
    }
    open.image.set_identity(&identity).map_err(|e| e.at_path(&layer.path))
}

/// Copies into `child` what only `layer` holds.
pub(super) fn fold_up(child: &Member, layer: &Member, progress: &mut Progress<'_>) -> Result<()> {
    let options = super::OpenOptions { same_contents: true, ..unprotected() };
    let chain = open(&child.path, &options)?;
    let below = chain.all_layers().get(1).cloned();
    let below =
        below.filter(|l| super::tree::same_file(&l.path, &layer.path)).ok_or_else(|| {
            Error::corrupt("does not stand on the layer that its label names").at_path(&child.path)
        })?;
    let keeps_zeroes = below.image.backing().is_some();
    let total = data_bytes(&*below.image)?;
    let (mut at, mut done, end) = (0, 0, chain.size());
    while at < end {
        let (len, mapping) = if at < below.image.size() {
            let extent = below.image.map(GuestOffset(at), end - at)?;
            (extent.len, extent.mapping)
        } else {
            // The layer ends here and hides what is below it.
            (end - at, Mapping::Zero { host: None })
        };
        let len = len.min(CHUNK);
        match mapping {
            Mapping::Unallocated => {}
            Mapping::Zero { .. } if keeps_zeroes => chain.adopt_zeroes(at, len)?,
            Mapping::Zero { .. } => {}
            Mapping::Data { .. } | Mapping::Compressed { .. } => {
                chain.adopt(at, len)?;
                done += len;
                tell(progress, done, total, UNCHANGED)?;
            }
        }
        at += len;
    }
    chain.flush()
}

/// Moves the children of a layer that is leaving to its parent, and removes it.
pub(super) fn leave(path: &Path, layer: Id) -> Result<()> {
    let family = Family::of(path)?;
    let Some(layer) = family.layers.iter().find(|m| m.label.layer == layer) else { return Ok(()) };
    for child in family.children(layer.label.layer) {
        let open = open_image(&child.path, &unprotected())?;
        let mut identity = open.image.identity()?;
        identity.backing = layer.peek.identity.backing.clone();
        if let Some(label) = &mut identity.label {
            label.parent = layer.label.parent;
        }
        open.image.set_identity(&identity).map_err(|e| e.at_path(&child.path))?;
    }
    remove(&layer.path)?;
    sync_directory(path)
}

/// Goes on with a merge downwards that was interrupted.
pub(super) fn resume(path: &Path, layer: Id) -> Result<()> {
    fold_down(path, layer, &mut |_, _| true)
}

/// Writes what the only child of a merging layer holds into it; then it takes the child's place.
fn fold_down(path: &Path, layer: Id, progress: &mut Progress<'_>) -> Result<()> {
    let family = Family::of(path)?;
    let Some(layer) = family.layers.iter().find(|m| m.label.layer == layer) else { return Ok(()) };
    let children = family.children(layer.label.layer);
    let [child] = &children[..] else {
        let message = "is being merged, but not exactly one layer stands on it";
        return Err(Error::corrupt(message).at_path(&layer.path));
    };
    // Held for writing though it is only read: nobody may change it meanwhile.
    let upper = open_image(&child.path, &unprotected())?;
    let chain = open(&layer.path, &unprotected())?;
    copy_down(&*upper.image, &chain, progress)?;
    chain.flush()?;
    let image = chain.head().image;
    let mut identity = upper.image.identity()?;
    identity.backing = image.backing();
    if let Some(label) = &mut identity.label {
        label.parent = layer.label.parent;
    }
    image.set_identity(&identity).map_err(|e| e.at_path(&layer.path))?;
    drop((upper, image, chain));
    rename(&layer.path, &child.path)?;
    sync_directory(path)
}

fn copy_down(upper: &dyn Image, lower: &Chain, progress: &mut Progress<'_>) -> Result<()> {
    if upper.size() > lower.size() {
        lower.resize(upper.size())?;
    }
    let total = data_bytes(upper)?;
    let (mut at, mut done) = (0, 0);
    let mut buf = vec![0; CHUNK as usize];
    while at < upper.size() {
        let extent = upper.map(GuestOffset(at), upper.size() - at)?;
        let len = extent.len.min(CHUNK);
        match extent.mapping {
            Mapping::Unallocated => {}
            Mapping::Zero { .. } => lower.write_zeroes(at, len, true)?,
            Mapping::Data { .. } | Mapping::Compressed { .. } => {
                let bytes = &mut buf[..len as usize];
                upper.read(&extent, extent.start, &mut [IoSliceMut::new(bytes)])?;
                lower.write_at(at, &[IoSlice::new(bytes)])?;
                done += len;
                tell(progress, done, total, UNFINISHED)?;
            }
        }
        at += len;
    }
    Ok(())
}

fn tell(progress: &mut Progress<'_>, done: u64, total: u64, state: &str) -> Result<()> {
    if progress(done, total) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Interrupted, format!("the merge was interrupted: {state}")))
}
