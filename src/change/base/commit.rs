//! Committing a disk: what it holds is written into its base, and the disk is empty on it.
//!
//! The disk shows its own contents at every moment, so it is right throughout. It first forgets
//! what its base was, which is about to change, and records what the base became before it gives up
//! what it holds: a commit that was interrupted is finished by the same command.

use std::path::{Path, PathBuf};

use crate::addr::GuestOffset;
use crate::chain::{Chain, Layer};
use crate::change::base::clone::Base;
use crate::change::open::{take_head, take_head_same, with_space};
use crate::change::run::fold;
use crate::change::run::fold::{Meter, free_space};
use crate::change::run::layer::unprotected;
use crate::error::{Error, ErrorKind, Result};
use crate::family::clones_of;
use crate::family::cost::{cost, data_bytes};
use crate::family::standing::Standing;
use crate::family::tree::Family;
use crate::image::{Id, Parent, Role};
use crate::open::gate::same_file;
use crate::open::{Format, OpenOptions, gate, open_image, open_layers, parent, peek};
use crate::progress::Progress;
use crate::storage::{Turn, follow};

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
    let path = &follow(path)?;
    let head = take_head(path)?;
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
    refuse_others(path, head, &base)?;
    let look = OpenOptions { unprotected: true, format, ..OpenOptions::default() };
    let lower = open_image(&base, &look)?;
    parent::refuse_stranger(path, &head.image.identity()?, &lower)?;
    let cost = cost(&*head.image, &*lower.image)?;
    let (space, free) = (cost.upper - cost.both, free_space(&base)?);
    let in_batches = space > free;
    if in_batches && fold::batch(&base)?.min(cost.upper) > free {
        let message = format!("the host has no space: {space} bytes are needed, {free} are free");
        return Err(Error::new(ErrorKind::NoSpace, message).at_path(&base));
    }
    Ok(Commit { base, format: lower.format, moved: cost.upper, space, in_batches })
}

/// Refuses to write into a base that others stand on, too.
fn refuse_others(path: &Path, head: &Layer, base: &Path) -> Result<()> {
    let own = head.image.identity()?.label.map(|label| (label.disk, path));
    let label = peek(base)?.and_then(|peek| peek.identity.label);
    let marked = label.map_or(Standing::default(), |l| Standing::by_label(base, &l, own));
    let beside = clones_of(base)?.into_iter().filter(|child| !same_file(child, path));
    let all = marked.with(beside);
    if all.is_nobody() {
        return Ok(());
    }
    let message = format!("others stand on it, too: {}", all.words());
    Err(Error::new(ErrorKind::Sealed, message).at_path(base))
}

/// Writes what the disk at `path` holds into its base; then the disk holds nothing itself.
///
/// # Errors
/// As [`plan_commit`]; [`ErrorKind::Interrupted`] where `progress` asked to stop.
pub fn commit(path: &Path, progress: &mut Progress<'_>) -> Result<()> {
    let path = &follow(path)?;
    let _turn = Turn::take(path)?;
    let head = take_head_same(path)?;
    let plan = plan(path, &head)?;
    let identity = head.image.identity()?;
    let format = Some(plan.format);
    let base = with_space(open_layers(&plan.base, &OpenOptions { format, ..unprotected() })?);
    // Whoever makes a clone of it has it open: nobody does so from here on.
    refuse_others(path, &head, &plan.base)?;
    let label = base.head().image.identity()?.label;
    let was_sealed = label.as_ref().is_some_and(|l| l.role == Role::Base);
    let (content, stamp) = (Id::nil(), None);
    expect(path, &head, label.map(|l| Parent { layer: l.layer, content, stamp }))?;
    let mut meter = Meter::new(progress, data_bytes(&*head.image)?, UNFINISHED);
    fold::down(&head, plan.in_batches, &base, &mut meter, &mut |_| Ok(()))?;
    drop::<Chain>(base);
    if was_sealed || identity.label.is_some() {
        let base = Base::seal_as(&plan.base, format, &[])?;
        let disk = identity.label.map_or(Id::nil(), |label| label.disk);
        expect(path, &head, Some(base.mark(disk, path)?))?;
        base.used();
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
