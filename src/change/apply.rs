//! Many writes to an idle disk as one change: all of them, or none.
//!
//! They go into a new delta that has no name yet. When it is whole and durable, the head becomes a
//! frozen layer under it and it takes the head's name, by one rename, as with a snapshot. Then it is
//! merged with what it stands on, as any snapshot is. A process that is killed before the rename
//! leaves the disk as it was; one that is killed after it leaves the new contents, and at worst a
//! snapshot that is still to be merged.

use std::path::Path;
use std::sync::Arc;

use crate::block::BlockDevice;
use crate::chain::{Chain, Layer};
use crate::change::merge::{self, plan_merge};
use crate::change::names;
use crate::change::open::open;
use crate::change::plan::Keeping;
use crate::change::run::head::{delta_on, demote, promote};
use crate::change::run::layer::refuse_encrypted;
use crate::error::{Error, Result};
use crate::family::tree::Family;
use crate::image::{Label, Role};
use crate::open::disk::Peek;
use crate::open::{Format, OpenOptions, open_file};
use crate::storage::{Draft, Storage as _, Turn, follow};

/// What the layer is called that a change stands on until the two are merged.
const BEFORE: &str = "before-apply";

/// How a change that was made has ended.
#[derive(Debug)]
pub enum Applied {
    /// The disk is as it is to be, in as many layers as before.
    Merged,
    /// The disk is as it is to be; what it was is the snapshot of this name, as the two could not be
    /// merged.
    Snapshot(String, Error),
}

/// Lets `work` write to the disk at `path`, all or nothing: where it fails, or the process ends
/// before it has come to its end, the disk is as it was. `work` must let go of the device.
///
/// # Errors
/// [`ErrorKind::InUse`](crate::ErrorKind::InUse) names who holds the disk; other errors of opening it
/// for writing, and of `work`.
pub fn apply(
    path: &Path,
    options: &OpenOptions,
    work: impl FnOnce(Arc<dyn BlockDevice>) -> Result<()>,
) -> Result<Applied> {
    let path = &follow(path)?;
    let turn = Turn::take(path)?;
    let chain = open(path, &OpenOptions { read_only: false, ..options.clone() })?;
    let head = chain.head();
    if head.format != Format::Qcow2 {
        let message = format!(
            "is {}: only a qcow2 disk can be changed as a whole; `vdisk convert` makes one",
            head.format
        );
        return Err(Error::unsupported(message).at_path(path));
    }
    refuse_encrypted(&*head.image).map_err(|e| e.at_path(path))?;
    let identity = head.image.identity()?;
    let label = identity.label.clone().unwrap_or_default();
    let family = match identity.label {
        Some(_) => Family::of(path)?,
        None => {
            let allocated = head.file.allocated()?;
            let peek = Peek { identity, size: head.image.size(), allocated };
            Family::of_one(path, label.clone(), peek)
        }
    };
    let name = (0..)
        .map(|n: u32| if n == 0 { BEFORE.to_owned() } else { format!("{BEFORE}-{n}") })
        .find(|name| names::check_new(&family, name).is_ok())
        .unwrap_or_default();
    let description = "the disk before a change that is not merged yet".to_owned();
    let label = Label { role: Role::Snapshot, name: name.clone(), description, ..label };
    label.encode()?;
    // The new head says that it stands on what the old one says then: so that comes first. Whoever
    // opens the disk after a crash finds no new head, and takes the mark away again.
    demote(&head, label)?;
    let changed = fill(path, &chain, &head, options.cache, work);
    let published = changed.and_then(Draft::replace);
    if let Err(error) = published {
        // If that fails, too, the next open does it.
        let _ = promote(path, &head);
        return Err(error);
    }
    drop((head, chain));
    let wishes = merge::Wishes { keeping: Keeping::NOTHING, ..merge::Wishes::default() };
    let merged = plan_merge(path, &name, wishes).and_then(|plan| plan.execute(&mut |_, _| true));
    drop(turn);
    Ok(match merged {
        Ok(()) => Applied::Merged,
        Err(error) => Applied::Snapshot(name, error),
    })
}

/// The new delta on the frozen head, with all that `work` writes.
fn fill(
    path: &Path,
    chain: &Chain,
    head: &Layer,
    memory: u64,
    work: impl FnOnce(Arc<dyn BlockDevice>) -> Result<()>,
) -> Result<Draft> {
    let bitmaps = head.image.bitmaps().map_err(|e| e.at_path(path))?;
    let (draft, _) = delta_on(path, head, &bitmaps)?;
    let as_head =
        OpenOptions { format: Some(Format::Qcow2), unprotected: true, ..OpenOptions::writable() };
    let layer = open_file(path, draft.file().clone(), &as_head)?;
    let disk = Arc::new(Chain::new(layer, chain.all_layers(), memory));
    work(disk.clone())?;
    disk.flush()?;
    // The second pass writes down which clusters the first one made free.
    disk.flush()?;
    match Arc::try_unwrap(disk) {
        // It writes what is left to be written.
        Ok(disk) => drop(disk),
        Err(_) => return Err(Error::invalid("the disk is still in use by what changed it")),
    }
    Ok(draft)
}
