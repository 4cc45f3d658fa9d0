//! Taking back the last change that dropped something.
//!
//! Bringing an event back is marking its layers so. The first mark, [`Role::Returning`], decides,
//! and whoever opens the disk next finishes the rest.

use std::path::Path;

use super::aside::{collect, events, last, was_of};
use super::delete::open_frozen;
use super::fold::{self, Source};
use super::live::Taker;
use super::merge::Progress;
use super::open::{OpenOptions, open};
use super::plan::{Fate, Operation, Plan, Touched, Undoable, Work};
use super::reach::Reach;
use super::snapshot::{check_new_name, freeze, head_label, relabel, thaw, unprotected};
use super::tree::{Beside, Family, Member};
use super::{cost, heal};
use crate::block::BlockDevice;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Backing, Id, Kept, Label, Parent, Role, Was};
use crate::storage::draft::{rename, sync_directory};

/// What is to be taken back.
#[derive(Debug, Clone)]
pub(super) struct Undo {
    event: u64,
    keep: Option<String>,
}

/// What taking back the last change of the disk at `path` will do. The changes made since are
/// dropped, or kept as a snapshot of the name `keep`.
///
/// # Errors
/// [`ErrorKind::NotFound`] where nothing is kept; [`ErrorKind::Exists`] where a snapshot that would
/// come back has lost its name to another.
pub fn plan_undo(path: &Path, keep: Option<&str>) -> Result<Plan> {
    heal::heal(path)?;
    let nothing = || {
        let message = "nothing is kept aside that could be brought back";
        Error::new(ErrorKind::NotFound, message).at_path(path)
    };
    let family = Family::read(path)?.ok_or_else(nothing)?;
    let event = last(&family).ok_or_else(nothing)?;
    if event.was(Was::Head).is_some() {
        Beside::read(path)?.refuse_head(&family)?;
    }
    let work = Undo { event: event.kept.event, keep: keep.map(str::to_owned) };
    let mut plan = Plan::new(Operation::Undo, &family, Work::Undo(work));
    keep.map_or(Ok(()), |keep| check_new_name(path, keep))?;
    for member in event.layers.iter().filter(|m| was_of(m) != Some(Was::Head)) {
        let name = &member.label.name;
        if family.snapshots().any(|m| m.label.name == *name) || keep == Some(name) {
            let message = format!(
                "the snapshot '{name}' would come back, and another has its name by now: rename that first"
            );
            return Err(Error::new(ErrorKind::Exists, message).at_path(path));
        }
        plan.snapshots.push(name.clone());
        plan.layers.push(Touched::new(member, Fate::Restored));
    }
    if let Some(head) = event.was(Was::Head) {
        plan.layers.push(Touched::new(head, Fate::BecomesHead));
        let fate = if keep.is_some() { Fate::Frozen } else { Fate::Removed };
        plan.layers.push(Touched::new(&family.head, fate));
        if keep.is_none() {
            plan.dropped = cost::data_bytes(&*cost::look(&family.head)?.image)?;
            plan.freed = plan.dropped;
            plan.undo = Undoable::No("the changes made since are not kept");
        }
    } else if keep.is_some() {
        let message = "what comes back takes nothing's place: there is nothing to keep";
        return Err(Error::invalid(message).at_path(path));
    }
    if let Some(merged) = event.was(Was::Merged) {
        let moved = moved_off(&family, merged);
        if moved.is_empty() {
            let message = "what stood on the merged snapshot is gone: it cannot be brought back";
            return Err(Error::invalid(message).at_path(path));
        }
        plan.layers.extend(moved.iter().map(|m| Touched::new(m, Fate::Moved)));
    }
    plan.why = format!("takes back the {}", event.what());
    Ok(plan)
}

/// The layers that stood on a merged snapshot and now stand on its parent.
fn moved_off<'a>(family: &'a Family, merged: &Member) -> Vec<&'a Member> {
    let own = merged.label.kept.iter().flat_map(|k| &k.children).collect::<Vec<_>>();
    let is_own = |m: &&Member| own.contains(&&Kept::short(m.label.layer));
    let same_parent =
        |m: &&Member| m.parent() == merged.parent() || m.parent() == Some(merged.label.layer);
    family.members().filter(is_own).filter(same_parent).collect()
}

/// Executes an undo.
pub(super) fn undo(
    plan: &Plan,
    work: &Undo,
    reach: &Reach<'_>,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let path = &plan.disk;
    let (head, family) = plan.begin(reach)?;
    let gone = || Error::new(ErrorKind::NotFound, "what was kept aside is gone").at_path(path);
    let all = events(&family);
    let event = all.iter().find(|e| e.kept.event == work.event).ok_or_else(gone)?;
    for member in &event.layers {
        drop(reach.open(&member.path)?);
    }
    let was_head = event.was(Was::Head);
    let first = was_head.or_else(|| event.lowest()).ok_or_else(gone)?;
    if let Some(keep) = &work.keep {
        let label = Label { role: Role::Snapshot, name: keep.clone(), ..head_label(&head)? };
        freeze(&head, label)?;
        // Its second name must be there before another file takes the first one.
        sync_directory(path).inspect_err(|_| thaw(path, &head))?;
    }
    let first = reach.open(&first.path)?;
    // Where this fails, the mark may stand all the same: whoever opens the disk next finds out.
    relabel(&first, |label| label.role = Role::Returning)?;
    drop(first);
    // What loses its name stays locked meanwhile; what is moved must be free.
    let held = was_head.map(|_| head);
    finish(reach, path)?;
    drop(held);
    heal::bearing(collect(reach, path, Some(progress)))
}

/// Brings back what goes with a layer that is [`Role::Returning`].
pub(super) fn finish(reach: &Reach<'_>, path: &Path) -> Result<()> {
    let Some(family) = Family::read(path)? else { return Ok(()) };
    let Some(first) = family.members().find(|m| m.label.role == Role::Returning) else {
        return Ok(());
    };
    let Some(kept) = &first.label.kept else { return Ok(()) };
    for event in events(&family).iter().filter(|e| e.kept.event == kept.event) {
        event.layers.iter().try_for_each(|member| restore(reach, &member.path, Role::Snapshot))?;
    }
    match kept.was {
        // Its user would see another disk.
        Was::Head if reach.held().is_some() => Ok(()),
        Was::Head => {
            if first.label.layer != family.head.label.layer {
                rename(&first.path, path)?;
                sync_directory(path)?;
            }
            restore(reach, path, Role::Head)
        }
        Was::Snapshot => restore(reach, &first.path, Role::Snapshot),
        Was::Merged => {
            let moved = moved_off(&family, first);
            moved.into_iter().try_for_each(|m| move_onto(reach, m, first))?;
            restore(reach, &first.path, Role::Snapshot)
        }
    }
}

fn restore(reach: &Reach<'_>, path: &Path, role: Role) -> Result<()> {
    let layer = reach.open(path)?;
    let mut identity = layer.image.identity()?;
    let Some(label) = &mut identity.label else { return Ok(()) };
    (label.role, label.kept) = (role, None);
    if role == Role::Head {
        label.time = 0;
        identity.vouched = false;
    }
    layer.image.set_identity(&identity).map_err(|e| e.at_path(path))
}

/// Puts a layer back onto a merged one. It holds all that the other does, or is made to.
fn move_onto(reach: &Reach<'_>, member: &Member, merged: &Member) -> Result<()> {
    if member.parent() == Some(merged.label.layer) {
        return Ok(());
    }
    let below = open_frozen(&merged.path)?;
    let identity = below.image.identity()?;
    let into = match reach.held_on(&member.path) {
        Some(live) => live.taker(&member.path, None)?,
        None => {
            let options = OpenOptions { same_contents: true, ..unprotected() };
            Taker::Beside(open(&member.path, &options)?)
        }
    };
    let chain = into.chain();
    fold::up(chain, &Source::beside(&below), &mut |_, _| true)?;
    chain.flush()?;
    let image = chain.head().image;
    let mut own = image.identity()?;
    let name = merged.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    own.backing = Some(Backing { name, format: Some(below.format.name().to_owned()) });
    if let Some(label) = &mut own.label {
        let content = if identity.vouched { merged.label.content } else { Id::nil() };
        label.parent = Some(Parent { layer: merged.label.layer, content, witness: None });
    }
    image.set_identity(&own).map_err(|e| e.at_path(&member.path))
}
