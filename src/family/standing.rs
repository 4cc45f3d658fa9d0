//! Who stands on a layer: what its label says of the clones that were made on it, wherever they are,
//! and what names it in its own directory.
//!
//! The label is marked before a clone appears ([`crate::change::Base`]). A clone that is not found where
//! it was made may have been moved: that it is not there proves nothing. Where its disk is found and
//! stands on something else by now, it does not count any more.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::family::tree::Family;
use crate::image::{Clones, Id, Label, Place};
use crate::open::disk::peek;
use crate::open::gate;
use crate::open::gate::same_file;

/// More children than these are only counted.
const NAMED: usize = 8;
/// What is known of who stands on a layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    /// Files of other disks, and copies of the disk's own, that stand on it.
    pub found: Vec<PathBuf>,
    /// Where clones were made that are not found there.
    pub lost: Vec<PathBuf>,
    /// Whether there are clones of which no place is known.
    pub more: bool,
}

impl Standing {
    /// What the label of the layer at `path` says. The disk `but`, by its id and where it is, does not
    /// count; a copy of it that is found elsewhere does.
    pub fn by_label(path: &Path, label: &Label, but: Option<(Id, &Path)>) -> Standing {
        let mut standing = Standing::default();
        let Some(clones) = &label.clones else { return standing };
        standing.more = clones.more;
        for place in &clones.places {
            let own = but.filter(|(disk, _)| Clones::short(*disk) == place.disk);
            if place.path.is_empty() {
                standing.more |= own.is_none();
                continue;
            }
            let at = path.parent().unwrap_or(Path::new("")).join(&place.path);
            match stands(place, &at, path) {
                Some(true) if own.is_some_and(|(_, head)| same_file(head, &at)) => {}
                Some(true) => standing.found.push(at),
                None if own.is_none() => standing.lost.push(at),
                _ => {}
            }
        }
        standing
    }

    /// Adds what was found otherwise.
    pub fn with(mut self, others: impl IntoIterator<Item = PathBuf>) -> Standing {
        for other in others {
            if !self.found.iter().any(|known| same_file(known, &other)) {
                self.found.push(other);
            }
        }
        self
    }

    /// Whether nobody does, as far as is known.
    pub fn is_nobody(&self) -> bool {
        self.found.is_empty() && self.lost.is_empty() && !self.more
    }

    /// Who they are.
    pub fn words(&self) -> String {
        let mut words = Vec::new();
        if !self.found.is_empty() {
            words.push(list(&self.found));
        }
        if !self.lost.is_empty() {
            words.push(format!("{}, not found there now", list(&self.lost)));
        }
        if self.more {
            words.push("and others whose places are not recorded".to_owned());
        }
        words.join("; ")
    }

    /// Refuses to change or drop the layer at `path`, which is `what`.
    pub fn refuse(&self, path: &Path, what: &str) -> Result<()> {
        if self.is_nobody() {
            return Ok(());
        }
        let message = format!(
            "is {what}, and clones stand on it: {}. `vdisk rm CLONE` removes one, `vdisk unseal {}` says \
             that none is left, and --even-if-cloned goes on all the same: they can be read no more \
             then",
            self.words(),
            path.display()
        );
        Err(Error::new(ErrorKind::Sealed, message).at_path(path))
    }
}

/// Whether the clone that was made at `at` stands on `layer`; `None` where it is not found there.
fn stands(place: &Place, at: &Path, layer: &Path) -> Option<bool> {
    let peek = peek(at).ok()??;
    let disk = peek.identity.label.as_ref().map_or(0, |label| Clones::short(label.disk));
    if place.disk != 0 && disk != place.disk {
        return None;
    }
    Some(disk_stands_on(at, layer))
}

/// Whether the disk at `head`, or one of its snapshots, stands right on the layer in the file `layer`.
pub(crate) fn disk_stands_on(head: &Path, layer: &Path) -> bool {
    if let Ok(Some(family)) = Family::read(head) {
        return family.members().any(|member| names(&member.path, layer));
    }
    names(head, layer)
}

/// Whether the file at `child` names the file `layer` as its backing file.
pub(crate) fn names(child: &Path, layer: &Path) -> bool {
    let backing = peek(child).ok().flatten().and_then(|peek| peek.identity.backing);
    let below = backing.and_then(|backing| gate::resolve(child, &backing.name).ok());
    below.is_some_and(|below| same_file(&below, layer))
}

/// Refuses to change the layer at `path` on which `children` stand.
pub(crate) fn refuse_children(path: &Path, children: &[PathBuf]) -> Result<()> {
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

/// Names files in a message.
pub(crate) fn list(paths: &[PathBuf]) -> String {
    let named = paths.iter().take(NAMED).map(|p| p.display().to_string());
    let mut text = named.collect::<Vec<_>>().join(", ");
    if paths.len() > NAMED {
        text += &format!(" and {} more", paths.len() - NAMED);
    }
    text
}
