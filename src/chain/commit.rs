//! Committing a disk: what it holds is written into its base, and the disk is empty on it.
//!
//! The disk shows its own contents at every moment, so it is right throughout. It first forgets
//! what its base was, which is about to change, and records what the base became before it gives up
//! what it holds: a commit that was interrupted is finished by the same command.

use std::path::{Path, PathBuf};

use super::clone::Base;
use super::cost::{cost, data_bytes};
use super::fold::{self, Meter};
use super::merge::Progress;
use super::open::{OpenOptions, open, open_image};
use super::plan::free_space;
use super::snapshot::{open_head, unprotected};
use super::tree::{Family, clones_of, same_file};
use super::{Chain, Format, Layer, gate, sealed};
use crate::addr::GuestOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Id, Parent, Role};

/// What an interrupted commit leaves.
const UNFINISHED: &str = "the disk is as it was; run it again to finish it";

/// What a commit will do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// The layer that is written.
    pub base: PathBuf,
    /// Its format.
    pub format: Format,
    /// Bytes that are copied.
    pub moved: u64,
    /// Bytes of the host that are taken: for a time, or by the base where it grows.
    pub space: u64,
    /// Whether what was copied is given back at once, for want of space.
    pub in_batches: bool,
}

/// What committing the disk at `path` will do.
///
/// # Errors
/// [`ErrorKind::Sealed`] names what else stands on the base; [`ErrorKind::Invalid`] for a disk
/// without one, or on a snapshot of its own; [`ErrorKind::NoSpace`] where the host has no room.
pub fn plan_commit(path: &Path) -> Result<Commit> {
    let head = open_head(path)?;
    plan(path, &head)
}

fn plan(path: &Path, head: &Layer) -> Result<Commit> {
    let backing = head.image.identity()?.backing.ok_or_else(|| {
        Error::invalid("stands alone: there is nothing to commit it to").at_path(path)
    })?;
    let (base, format) = gate::admit(path, &backing, false)?;
    let others = Family::read(path)?.map_or(Vec::new(), |family| family.layers);
    if let Some(own) = others.iter().find(|layer| same_file(&layer.path, &base)) {
        let message = format!(
            "stands on its own snapshot '{0}': `vdisk snapshot merge {1} '{0}'` folds them together",
            own.label.name,
            path.display()
        );
        return Err(Error::invalid(message).at_path(path));
    }
    let children: Vec<PathBuf> =
        clones_of(&base, None)?.into_iter().filter(|child| !same_file(child, path)).collect();
    if !children.is_empty() {
        let message = format!("others stand on it, too: {}", sealed::list(&children));
        return Err(Error::new(ErrorKind::Sealed, message).at_path(&base));
    }
    let look = OpenOptions { unprotected: true, format, ..OpenOptions::default() };
    let lower = open_image(&base, &look)?;
    let cost = cost(&*head.image, &*lower.image)?;
    let (space, free) = (cost.upper - cost.both, free_space(&base)?);
    let in_batches = space > free;
    if in_batches && fold::batch(&base)?.min(cost.upper) > free {
        let message = format!("the host has no space: {space} bytes are needed, {free} are free");
        return Err(Error::new(ErrorKind::NoSpace, message).at_path(&base));
    }
    Ok(Commit { base, format: lower.format, moved: cost.upper, space, in_batches })
}

/// Writes what the disk at `path` holds into its base; then the disk holds nothing itself.
///
/// # Errors
/// As [`plan_commit`]; [`ErrorKind::Interrupted`] where `progress` asked to stop.
pub fn commit(path: &Path, progress: &mut Progress<'_>) -> Result<()> {
    let head = open_head(path)?;
    let plan = plan(path, &head)?;
    let identity = head.image.identity()?;
    let format = Some(plan.format);
    let base = open(&plan.base, &OpenOptions { format, ..unprotected() })?;
    let label = base.head().image.identity()?.label;
    let was_sealed = label.as_ref().is_some_and(|l| l.role == Role::Base);
    let (content, witness) = (Id::nil(), None);
    expect(path, &head, label.map(|l| Parent { layer: l.layer, content, witness }))?;
    let mut meter = Meter::new(progress, data_bytes(&*head.image)?, UNFINISHED);
    fold::down((&head, plan.in_batches), &base, &mut meter, &mut |_| Ok(()))?;
    drop::<Chain>(base);
    if was_sealed || identity.label.is_some() {
        let base = Base::seal_as(&plan.base, format)?;
        expect(path, &head, Some(base.parent()))?;
    }
    let empty = || {
        head.image.discard(GuestOffset(0), head.image.size(), true)?;
        head.image.flush()
    };
    empty().map_err(|e| e.at_path(path))
}

/// Lets the disk remember its base as `parent`, where it remembers such things.
fn expect(path: &Path, head: &Layer, parent: Option<Parent>) -> Result<()> {
    let mut identity = head.image.identity()?;
    let Some(label) = &mut identity.label else { return Ok(()) };
    label.parent = parent;
    head.image.set_identity(&identity).map_err(|e| e.at_path(path))
}
