//! The files of a disk by their names alone: those that are there, and the rules by which more are made
//! while it is in use. Who goes by that opens no file of the disk.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::family::names::{frozen_form, frozen_names};
use crate::family::tree::Family;
use crate::open::gate::same_file;
use crate::storage::draft::draft_form;
use crate::storage::follow;
use crate::storage::name::{Form, directory};

/// Which files are a disk's.
#[derive(Debug)]
pub struct Own {
    /// The head, no link.
    pub head: PathBuf,
    /// The names of its frozen layers, in the same directory, and its own.
    pub names: Vec<OsString>,
    /// How frozen layers and drafts of it are called that are made later.
    pub forms: Vec<Form>,
    /// What is called so, and is not its.
    pub others: Vec<OsString>,
}

impl Own {
    /// Whether the file at `path`, no link, is one of them.
    pub fn has(&self, path: &Path) -> bool {
        self.names.iter().any(|name| is_same_name(&self.head.with_file_name(name), path))
    }
}

fn name(path: &Path) -> OsString {
    path.file_name().unwrap_or_default().to_owned()
}

/// Whether both are one name in one directory.
fn is_same_name(a: &Path, b: &Path) -> bool {
    a.file_name() == b.file_name() && same_file(directory(a), directory(b))
}

/// Which files are those of the disk at `head`, which stands on layers of its own in the files `below`.
///
/// # Errors
/// Where the head is a link that leads nowhere.
pub fn own(head: &Path, below: &[PathBuf]) -> Result<Own> {
    let head = follow(head)?;
    let frozen = frozen_form(&head);
    // Where they cannot be seen, there are none whose names are known.
    let beside = frozen_names(&head).unwrap_or_default();
    let is_formed = |path: &Path| frozen.middle(name(path).as_encoded_bytes()).is_some();
    let is_below =
        |path: &Path| is_formed(path) && below.iter().any(|layer| is_same_name(layer, path));
    // Headers are read where there is more than what it stands on: its other branches, layers that have
    // their name from one that it had before.
    let more = beside.iter().any(|path| !is_below(path));
    let family = if more { Family::read(&head).ok().flatten() } else { None };
    let members = family.iter().flat_map(|family| family.layers.iter());
    let layers: Vec<PathBuf> = members.map(|member| member.path.clone()).collect();
    let is_own = |path: &PathBuf| layers.contains(path) || is_below(path);
    let (own, others): (Vec<PathBuf>, Vec<PathBuf>) = beside.into_iter().partition(is_own);
    let others = others.iter().filter(|path| is_formed(path)).map(|path| name(path)).collect();
    let names = own.iter().chain([&head]).map(|path| name(path)).collect();
    let forms = vec![draft_form(&head), frozen];
    Ok(Own { head, names, forms, others })
}
