//! Whether a layer stands on the one that it was made on.

use std::path::Path;

use crate::chain::Layer;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{BaseStamp, Identity, Label, Parent, Role};
use crate::open::fingerprint::Verdict;
use crate::open::gate::Named;
use crate::open::{fingerprint, gate, sameness};

/// Whether the child's label proves that this program put it on `parent`: it names the layer by an id
/// that nobody can guess, or tells what is in the files. Times prove nothing: whoever may look at a
/// directory knows them.
pub(crate) fn vouches(child: &Identity, parent: &Layer, identity: &Identity) -> Result<bool> {
    let known = child.label.as_ref().and_then(|label| label.parent?.stamp);
    if knows_id(child, identity) {
        return Ok(true);
    }
    known.map_or(Ok(false), |known| fingerprint::has_contents(parent, &known))
}

/// Whether the child's label names the parent by its id.
fn knows_id(child: &Identity, parent: &Identity) -> bool {
    let (Some(own), Some(label)) = (&child.label, &parent.label) else { return false };
    let Some(expected) = own.parent.filter(|_| !label.layer.is_nil()) else { return false };
    // The second: a merge that was stopped, and the parent is all of the child.
    label.layer == expected.layer || label.layer == own.layer
}

/// Refuses to write to a layer below `path`, which says `child` of itself: unless the user vouches for
/// it, it stands by it, or the label names it by its id. To know what is in it is not enough: much
/// of a host's contents everybody knows.
///
/// # Errors
/// [`ErrorKind::Denied`] tells how the user vouches for it.
pub(crate) fn refuse_stranger(path: &Path, child: &Identity, below: &Layer) -> Result<()> {
    let reached = gate::follows_links()
        || child.backing.as_ref().is_some_and(|b| gate::reaches(path, &b.name, &below.path))
        || knows_id(child, &below.image.identity()?);
    if reached { Ok(()) } else { Err(gate::refused(path, &below.path, Named::Base)) }
}

/// How a parent differs from the one that its child was made on.
#[derive(Debug)]
pub(crate) struct Change {
    /// What is different, for people.
    pub what: String,
    /// Whether it is another layer altogether: the right one may have another name now.
    pub another: bool,
}

/// Compares `parent` with what its child recorded; `None` where it is the same, or where nothing
/// was recorded.
pub(crate) fn change(
    child: &Identity,
    parent: &Layer,
    identity: &Identity,
) -> Result<Option<Change>> {
    let Some(own) = &child.label else { return Ok(None) };
    let Some(expected) = own.parent else { return Ok(None) };
    // A merge that was stopped: the parent holds all of the child, and is to take its name; or it is
    // losing, or being overwritten with, what its child holds, and shows itself, anyway.
    let merged = |label: &Label| {
        let merging = matches!(label.role, Role::Merging | Role::Rising | Role::Leaving);
        label.layer == own.layer || merging && label.layer == expected.layer
    };
    if identity.label.as_ref().is_some_and(merged) {
        return Ok(None);
    }
    if let Some(change) = label_change(&expected, identity) {
        return Ok(Some(change));
    }
    let Some(known) = &expected.stamp else { return Ok(None) };
    let speaks = !expected.content.is_nil();
    let what = match sameness::compare(parent, identity, speaks, known)? {
        Verdict::Same => return Ok(None),
        verdict => explain(parent, known, verdict)?,
    };
    Ok(Some(Change { what, another: false }))
}

/// What the parent's label tells.
fn label_change(expected: &Parent, identity: &Identity) -> Option<Change> {
    let another = |what: &str| Some(Change { what: what.to_owned(), another: true });
    let changed = |what: &str| Some(Change { what: what.to_owned(), another: false });
    let layer = expected.labelled()?;
    match &identity.label {
        None => another("it is another file than before, or its label was removed"),
        Some(label) if label.layer != layer => another("it is another layer than before"),
        Some(_) if expected.content.is_nil() => None,
        Some(label) if label.content != expected.content => {
            changed("it was written and sealed again since: its contents have a new id")
        }
        Some(_) if identity.vouched => None,
        Some(label) if label.role == Role::Head => {
            changed("it was unsealed, and may have been written since")
        }
        Some(_) => changed("another program has opened it for writing"),
    }
}

fn explain(parent: &Layer, known: &BaseStamp, verdict: Verdict) -> Result<String> {
    let now = fingerprint::modified(parent)?;
    let times = if now == known.modified {
        "its time says that it was not written since".to_owned()
    } else {
        let (now, then) = (fingerprint::time(now), fingerprint::time(known.modified));
        format!("it was written, or its time set, at {now}; it was {then}")
    };
    Ok(match verdict {
        Verdict::Length => {
            format!("its files are not {} bytes long any more ({times})", known.len)
        }
        Verdict::Contents => format!("its contents are not the same ({times})"),
        Verdict::Unsure | Verdict::Same => format!(
            "{times}. Its length and those parts of its contents that were compared are the same, \
             but not all were"
        ),
    })
}

/// The error for a parent that changed; `outside` where nothing else lets the child reach it.
pub(crate) fn changed(
    disk: &Path,
    child: &Path,
    parent: &Path,
    change: &Change,
    outside: bool,
) -> Error {
    let message = format!(
        "has changed since '{}' was made on it: {}. Bring the old file back, or take it as it is now \
         with `vdisk rebase {} --accept-base{}`",
        child.display(),
        change.what,
        disk.display(),
        if outside { " --follow" } else { "" }
    );
    Error::new(ErrorKind::BaseChanged, message).at_path(parent)
}
