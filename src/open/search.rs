//! Finding a base that was moved or renamed, by the ids in its label.
//!
//! Looked at are regular files in the directory that the child names, in the child's own, and in one
//! of the recorded directory's name beside it or below it: the first that carries exactly the layer
//! and content id that the child recorded is it. What a hostile image names can make no other file
//! be opened than one that holds those ids.

use std::fs;
use std::path::{Path, PathBuf};

use crate::image::Parent;
use crate::open::disk::peek;
use crate::open::gate::same_file;
use crate::storage::name::directory;

/// The most files whose headers are looked at.
const MAX_FILES: usize = 20_000;

/// The file that `parent` means, which is not, or not any more, at `recorded`, as `child` has it.
pub(crate) fn find(child: &Path, recorded: &Path, parent: &Parent) -> Option<PathBuf> {
    if parent.labelled().is_none() || parent.content.is_nil() {
        return None;
    }
    let directories = directories(child, recorded);
    let name = recorded.file_name()?;
    let named = directories.iter().map(|dir| dir.join(name));
    if let Some(found) = named.into_iter().find(|path| is(path, parent)) {
        return Some(found);
    }
    let mut left = MAX_FILES;
    for dir in &directories {
        let Ok(entries) = fs::read_dir(dir) else { continue };
        let mut paths: Vec<PathBuf> = entries.take(left).flatten().map(|e| e.path()).collect();
        left -= paths.len();
        paths.sort();
        if let Some(found) = paths.into_iter().find(|path| is(path, parent)) {
            return Some(found);
        }
    }
    None
}

/// Where to look, each directory once.
fn directories(child: &Path, recorded: &Path) -> Vec<PathBuf> {
    let (own, old) = (directory(child), directory(recorded));
    let mut all = vec![old.to_path_buf(), own.to_path_buf()];
    if let Some(name) = old.file_name() {
        all.push(own.join(name));
        all.push(own.join("..").join(name));
    }
    let mut once: Vec<PathBuf> = Vec::new();
    for dir in all {
        if dir.is_dir() && !once.iter().any(|known| same_file(known, &dir)) {
            once.push(dir);
        }
    }
    once
}

/// Whether the file at `path` says that it is `parent`, unchanged.
fn is(path: &Path, parent: &Parent) -> bool {
    // No link is followed, and nothing that is no file is opened.
    if !path.symlink_metadata().is_ok_and(|meta| meta.is_file()) {
        return false;
    }
    let Ok(Some(peek)) = peek(path) else { return false };
    let same = |label: &crate::image::Label| {
        label.layer == parent.layer && label.content == parent.content
    };
    peek.identity.vouched && peek.identity.label.as_ref().is_some_and(same)
}
