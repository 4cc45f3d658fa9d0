//! Layers that others stand on are not written: who refuses it, and how the children are named.

use std::path::{Path, PathBuf};

use super::open::peek;
use super::tree::{Family, clones_of};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Identity, Role};
use crate::storage::draft::directory;

/// More children than these are only counted.
const NAMED: usize = 8;
/// The most files of a directory that are looked at whenever a head is opened for writing.
const AROUND: usize = 256;

/// Refuses to write to the layer at `path`, which says of itself that others stand on it.
///
/// # Errors
/// [`ErrorKind::Sealed`] names its children, as far as they are in its directory.
pub(super) fn refuse(path: &Path, identity: &Identity) -> Result<()> {
    let Some(label) = &identity.label else { return Ok(()) };
    let message = match label.role {
        Role::Head => return Ok(()),
        Role::Base => {
            let children = clones_of(path, Some(label.disk)).unwrap_or_default();
            let who = match &children[..] {
                [] => "clones stand on it, none of them in its directory".to_owned(),
                some => format!("clones stand on it: {}", list(some)),
            };
            format!(
                "is a base: {who}. Writing would change them: make a clone of it and write to that, \
                 or `vdisk unseal` it when no clone is left"
            )
        }
        Role::Dropped | Role::Dropping | Role::Returning | Role::Unnamed => {
            "is a frozen layer of a disk; write to the disk itself".to_owned()
        }
        Role::Snapshot | Role::Merging | Role::Leaving | Role::Rising => format!(
            "is the frozen layer of snapshot '{}', {}; write to the disk itself or to a clone of \
             this",
            label.name,
            match &standing_on(path, identity)[..] {
                [] => "sealed".to_owned(),
                some => format!("on which these stand: {}", list(some)),
            }
        ),
    };
    Err(Error::new(ErrorKind::Sealed, message).at_path(path))
}

/// Refuses to write to the layer at `path`, which does not say that others stand on it, if a file in
/// its directory names it as its base: other programs make clones and leave no word in the base.
///
/// A head is written often and its directory may hold thousands of clones of another: it is looked
/// around in only where there are at most [`AROUND`] files. What changes a whole tree looks at all.
///
/// # Errors
/// [`ErrorKind::Sealed`] names them.
pub(super) fn refuse_unaware(path: &Path, identity: &Identity) -> Result<()> {
    let children = match &identity.label {
        None => clones_of(path, None).unwrap_or_default(),
        Some(label) if label.role == Role::Head && is_small(path) => {
            clones_of(path, Some(label.disk)).unwrap_or_default()
        }
        Some(_) => return Ok(()),
    };
    refuse_children(path, &children)
}

/// Refuses to change the layer at `path` on which `children` stand.
pub(super) fn refuse_children(path: &Path, children: &[PathBuf]) -> Result<()> {
    if children.is_empty() {
        return Ok(());
    }
    let message = format!(
        "is a base: these stand on it: {}. Writing would change them: make a clone of it and write \
         to that",
        list(children)
    );
    Err(Error::new(ErrorKind::Sealed, message).at_path(path))
}

/// Whether the directory of `path` holds few files.
fn is_small(path: &Path) -> bool {
    let entries = std::fs::read_dir(directory(path));
    entries.is_ok_and(|entries| entries.take(AROUND + 1).count() <= AROUND)
}

/// Refuses to overwrite or remove the file at `path` where its label says that others stand on it.
/// A file that cannot be read as a disk is nobody's base.
///
/// # Errors
/// [`ErrorKind::Sealed`] names its children.
pub fn refuse_sealed(path: &Path) -> Result<()> {
    match peek(path) {
        Ok(Some(peek)) => refuse(path, &peek.identity),
        _ => Ok(()),
    }
}

/// The layers of its own disk and the clones of others that stand on a frozen layer.
fn standing_on(path: &Path, identity: &Identity) -> Vec<PathBuf> {
    let Some(label) = &identity.label else { return Vec::new() };
    let mut found = Vec::new();
    // The name of its head is not known here, but all that stands on it names it.
    for child in clones_of(path, None).unwrap_or_default() {
        let own = Family::read(&child).ok().flatten().filter(|f| f.head.label.disk == label.disk);
        match own {
            Some(family) if family.head.label.role == Role::Snapshot => {
                found.push(PathBuf::from(format!("snapshot '{}'", family.head.label.name)));
            }
            _ => found.push(child),
        }
    }
    found
}

/// Names files in a message.
pub(super) fn list(paths: &[PathBuf]) -> String {
    let named = paths.iter().take(NAMED).map(|p| p.display().to_string());
    let mut text = named.collect::<Vec<_>>().join(", ");
    if paths.len() > NAMED {
        text += &format!(" and {} more", paths.len() - NAMED);
    }
    text
}
