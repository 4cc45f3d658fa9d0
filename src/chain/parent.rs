//! Whether a layer stands on the one that it was made on.

use std::path::Path;

use super::Layer;
use super::witness::{self, Verdict};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Identity, Label, Parent, Role, Witness};

/// How a parent differs from the one that its child was made on.
#[derive(Debug)]
pub(super) struct Change {
    /// What is different, for people.
    pub what: String,
    /// Whether it is another layer altogether: the right one may have another name now.
    pub another: bool,
}

/// Compares `parent` with what its child recorded; `None` where it is the same, or where nothing
/// was recorded.
pub(super) fn change(
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
    let Some(known) = &expected.witness else { return Ok(None) };
    let speaks = !expected.content.is_nil();
    let what = match witness::compare(parent, speaks, known)? {
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

fn explain(parent: &Layer, known: &Witness, verdict: Verdict) -> Result<String> {
    let now = witness::modified(parent)?;
    let times = if now == known.modified {
        "its time says that it was not written since".to_owned()
    } else {
        let (now, then) = (witness::time(now), witness::time(known.modified));
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

/// The error for a parent that changed.
pub(super) fn changed(disk: &Path, child: &Path, parent: &Path, change: &Change) -> Error {
    let message = format!(
        "has changed since '{}' was made on it: {}. Bring the old file back, or take it as it is now \
         with `vdisk rebase {} --accept-base`",
        child.display(),
        change.what,
        disk.display(),
    );
    Error::new(ErrorKind::BaseChanged, message).at_path(parent)
}
