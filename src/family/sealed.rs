//! Layers that others stand on are not written: who refuses it, and how the children are named.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::family::beside::clones_of;
use crate::family::standing::{Standing, list, refuse_children};
use crate::family::tree::Family;
use crate::image::{Identity, Role};
use crate::open::disk::peek;
use crate::storage::name::directory;

/// The most files of a directory that are looked at whenever a head is opened for writing.
const AROUND: usize = 256;

/// Refuses to write to the layer at `path`, which says of itself that others stand on it.
///
/// # Errors
/// [`ErrorKind::Sealed`] names its children, as far as they are in its directory.
pub fn refuse(path: &Path, identity: &Identity) -> Result<()> {
    let Some(label) = &identity.label else { return Ok(()) };
    let message = match label.role {
        Role::Head => return Ok(()),
        Role::Base => {
            let marked = Standing::by_label(path, label, None);
            let all = marked.with(clones_of(path).unwrap_or_default());
            let who = match all.is_nobody() {
                true if label.clones.is_some() => "no clone that it knows of is left".to_owned(),
                true => "clones stand on it, none of them in its directory".to_owned(),
                false => format!("clones stand on it: {}", all.words()),
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
pub(crate) fn refuse_unaware(path: &Path, identity: &Identity) -> Result<()> {
    let children = match &identity.label {
        None => clones_of(path).unwrap_or_default(),
        Some(label) if label.role == Role::Head && is_small(path) => {
            clones_of(path).unwrap_or_default()
        }
        Some(_) => return Ok(()),
    };
    refuse_children(path, &children)
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
    for child in clones_of(path).unwrap_or_default() {
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
