//! The names of a disk's files, and the files beside it.
//!
//! The frozen layers of `web.qcow2` stand beside it as `web@ID.qcow2`, so that relative backing names stay
//! right when a layer becomes the head or the head a layer. No file is opened here.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::image::Id;
use crate::storage::follow;
use crate::storage::name::{Differs, Form, directory, fitting};

/// Digits of a layer's id in its file's name.
pub(crate) const DIGITS: usize = 12;
/// A longer ending of a name is not kept where the name gets too long.
const MAX_ENDING: usize = 64;

/// The file of a frozen layer of the disk at `head`. Its name is UTF-8 whatever that of the head is,
/// and no longer than the host allows: of a long one only the beginning stays.
pub fn frozen_path(head: &Path, layer: Id) -> PathBuf {
    let id = layer.simple().to_string();
    head.with_file_name(frozen_form(head).name(&id[..DIGITS]))
}

/// How the frozen layers of the disk at `head` are called: by their ids.
pub(crate) fn frozen_form(head: &Path) -> Form {
    let (stem, extension) = split(head);
    Form { before: format!("{stem}@"), differs: Differs::Digits(DIGITS), behind: extension }
}

/// What stands before and after the id in the names of the frozen layers of `head`.
fn split(head: &Path) -> (String, String) {
    let name = head.file_name().unwrap_or_default().to_string_lossy();
    let (stem, extension) = match name.rsplit_once('.') {
        Some((stem, end)) if !stem.is_empty() && end.len() < MAX_ENDING => {
            (stem, format!(".{end}"))
        }
        Some((stem, end)) if !stem.is_empty() && fits(&name) => (stem, format!(".{end}")),
        _ => (&*name, String::new()),
    };
    (fitting(stem, 1 + DIGITS + extension.len()).to_owned(), extension)
}

/// Whether a layer's name fits that has all of its head's.
fn fits(name: &str) -> bool {
    fitting(name, 1 + DIGITS).len() == name.len()
}

/// The files beside `head` that have the name of a frozen layer, of whichever disk.
pub(super) fn frozen_names(head: &Path) -> Result<Vec<PathBuf>> {
    names_beside(head, |name| frozen_id(Path::new(OsStr::from_bytes(name))).is_some())
}

/// The part of a frozen layer's name that is the begin of its id.
pub(super) fn frozen_id(path: &Path) -> Option<String> {
    frozen_parts(path).map(|(_, id, _)| id)
}

/// What stands before the id in a frozen layer's name, the id, and what stands behind it.
fn frozen_parts(path: &Path) -> Option<(String, String, String)> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let (at, id) = name.rmatch_indices('@').find_map(|(at, _)| {
        let id = name.get(at + 1..at + 1 + DIGITS)?;
        let ends = matches!(name.as_bytes().get(at + 1 + DIGITS), None | Some(b'.'));
        (ends && id.bytes().all(|b| b.is_ascii_hexdigit())).then_some((at, id))
    })?;
    let ending = name.get(at + 1 + DIGITS..).unwrap_or_default();
    Some((name.get(..at).unwrap_or_default().to_owned(), id.to_owned(), ending.to_owned()))
}

pub(super) fn starts_with(layer: Id, id: &str) -> bool {
    layer.simple().to_string().starts_with(id)
}

/// Whether the file has the name of the frozen layer that it is.
pub(crate) fn has_frozen_name(path: &Path, layer: Id) -> bool {
    frozen_id(path).is_some_and(|id| starts_with(layer, &id))
}

/// The name of the head that a frozen layer has its name from.
pub(super) fn frozen_head(path: &Path) -> String {
    match frozen_parts(path) {
        Some((stem, _, extension)) => stem + &extension,
        None => stem_of(path),
    }
}

pub(super) fn stem_of(head: &Path) -> String {
    head.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The files in the directory of `path` whose name `is_wanted`.
pub(crate) fn names_beside(path: &Path, is_wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<PathBuf>> {
    let dir = directory(path);
    let entries =
        fs::read_dir(dir).map_err(|e| Error::io("could not be listed", e).at_path(dir))?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("could not be listed", e).at_path(dir))?;
        // To open a directory would be to use what may be mounted there.
        let directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if !directory && is_wanted(entry.file_name().as_bytes()) {
            found.push(path.with_file_name(entry.file_name()));
        }
    }
    found.sort();
    Ok(found)
}

/// The files in the directory of `path` that may be disks, each once: what a link leads to, not the
/// link, since the names in it are meant from where it is.
pub(crate) fn disks_beside(path: &Path) -> Result<Vec<PathBuf>> {
    let all = names_beside(path, |name| !name.starts_with(b"."))?;
    let mut all: Vec<PathBuf> = all.iter().filter_map(|path| follow(path).ok()).collect();
    all.sort();
    all.dedup();
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frozen_layer_stands_beside_its_head() {
        let id = Id::from_u128(0x1234_5678_9abc_def0_0000_0000_0000_0000);
        let of = |head: &str| frozen_path(Path::new(head), id).to_string_lossy().into_owned();
        assert_eq!(of("/d/web.qcow2"), "/d/web@123456789abc.qcow2");
        assert_eq!(of("web"), "web@123456789abc");
        assert_eq!(of(".hidden"), ".hidden@123456789abc");
    }
}
