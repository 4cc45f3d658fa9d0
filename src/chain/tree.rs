//! The family of a disk: its head and its frozen layers, read from the files themselves.
//!
//! The frozen layers of `web.qcow2` stand beside it as `web@ID.qcow2`, so that relative backing
//! names stay right when a layer becomes the head or the head a layer. Each file's label says which
//! disk it belongs to and what it stands on; there is no catalogue.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::open::{Peek, peek};
use super::scan::peek_all;
use super::{gate, sealed};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Id, Label, Role};
use crate::storage::draft::directory;

/// One layer of a family.
#[derive(Debug, Clone)]
pub struct Member {
    /// Its file.
    pub path: PathBuf,
    /// Who it says it is.
    pub label: Label,
    /// The rest of what its header says.
    pub peek: Peek,
}

impl Member {
    /// Whether it is a snapshot that can be gone back to.
    pub fn is_snapshot(&self) -> bool {
        self.label.role == Role::Snapshot
    }

    /// The id of the layer below, where that has a label.
    pub fn parent(&self) -> Option<Id> {
        self.label.parent.and_then(|p| p.labelled())
    }

    fn read(path: &Path) -> Result<Option<Member>> {
        let Some(peek) = peek(path)? else { return Ok(None) };
        let label = peek.identity.label.clone();
        Ok(label.map(|label| Member { path: path.to_path_buf(), label, peek }))
    }
}

/// A disk with all its frozen layers.
#[derive(Debug, Clone)]
pub struct Family {
    /// The writable layer, whose path is the disk's name.
    pub head: Member,
    /// The frozen layers, oldest first.
    pub layers: Vec<Member>,
}

impl Family {
    /// Reads the family of the disk at `head`; `None` where the file carries no label, and so has
    /// no snapshots.
    pub fn read(head: &Path) -> Result<Option<Family>> {
        let Some(head) = Member::read(head)? else { return Ok(None) };
        let mut layers = Vec::new();
        for path in frozen_names(&head.path)? {
            // A file that cannot be read is not this disk's: check says more about it.
            let Ok(Some(member)) = Member::read(&path) else { continue };
            if member.label.disk == head.label.disk && !same_file(&member.path, &head.path) {
                layers.push(member);
            }
        }
        layers.sort_by_key(|m| (m.label.time, m.label.layer));
        Ok(Some(Family { head, layers }))
    }

    /// The family of a disk that must have one.
    pub fn of(head: &Path) -> Result<Family> {
        Family::read(head)?
            .ok_or_else(|| Error::new(ErrorKind::NotFound, "has no snapshots").at_path(head))
    }

    /// The snapshot with that name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], with the names that there are.
    pub fn snapshot(&self, name: &str) -> Result<&Member> {
        self.snapshots().find(|m| m.label.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.snapshots().map(|m| m.label.name.as_str()).collect();
            let known = match &names[..] {
                [] => "it has none".to_owned(),
                some => format!("it has {}", some.join(", ")),
            };
            Error::new(ErrorKind::NotFound, format!("has no snapshot '{name}': {known}"))
                .at_path(&self.head.path)
        })
    }

    /// All snapshots, oldest first.
    pub fn snapshots(&self) -> impl Iterator<Item = &Member> {
        self.layers.iter().filter(|m| m.is_snapshot())
    }

    /// The layer with that id, the head included.
    pub fn member(&self, layer: Id) -> Option<&Member> {
        self.members().find(|m| m.label.layer == layer)
    }

    /// The frozen layer with that id.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where it is gone.
    pub fn layer(&self, layer: Id) -> Result<&Member> {
        self.layers.iter().find(|m| m.label.layer == layer).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "has lost a layer").at_path(&self.head.path)
        })
    }

    /// The frozen layers, then the head.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.layers.iter().chain(std::iter::once(&self.head))
    }

    /// The layers of this disk that stand directly on `layer`.
    pub fn children(&self, layer: Id) -> Vec<&Member> {
        self.members().filter(|m| m.parent() == Some(layer)).collect()
    }

    /// All layers above `layer`, each after those that stand on it.
    pub fn descendants(&self, layer: Id) -> Vec<&Member> {
        let on = self.by_parent();
        let mut found = Vec::new();
        let mut seen = HashSet::from([layer]);
        let mut todo = vec![layer];
        while let Some(id) = todo.pop() {
            for &child in on.get(&id).into_iter().flatten() {
                if seen.insert(child.label.layer) {
                    found.push(child);
                    todo.push(child.label.layer);
                }
            }
        }
        found.reverse();
        found
    }

    /// All layers, each after those that stand on it.
    pub(super) fn children_first(&self) -> Vec<&Member> {
        let known: HashSet<Id> = self.members().map(|m| m.label.layer).collect();
        let on = self.by_parent();
        let is_root = |m: &&Member| !m.parent().is_some_and(|id| known.contains(&id));
        let mut found: Vec<&Member> = self.members().filter(is_root).collect();
        let mut seen: HashSet<Id> = found.iter().map(|m| m.label.layer).collect();
        let mut at = 0;
        while let Some(member) = found.get(at) {
            let above = on.get(&member.label.layer).into_iter().flatten();
            let new: Vec<&Member> = above.copied().filter(|m| seen.insert(m.label.layer)).collect();
            found.extend(new);
            at += 1;
        }
        found.reverse();
        found
    }

    /// The layers that stand on each.
    fn by_parent(&self) -> HashMap<Id, Vec<&Member>> {
        let mut on: HashMap<Id, Vec<&Member>> = HashMap::new();
        for member in self.members() {
            if let Some(parent) = member.parent() {
                on.entry(parent).or_default().push(member);
            }
        }
        on
    }

    /// The snapshot that the head stands on, directly or over layers without a name.
    pub fn current(&self) -> Option<&Member> {
        self.snapshot_below(&self.head)
    }

    /// The snapshot that a layer stands on, directly or over layers without a name.
    pub fn snapshot_below(&self, member: &Member) -> Option<&Member> {
        let mut at = member.parent();
        for _ in 0..=self.layers.len() {
            let member = self.layers.iter().find(|m| Some(m.label.layer) == at)?;
            if member.is_snapshot() {
                return Some(member);
            }
            at = member.parent();
        }
        None
    }
}

/// The file of a frozen layer of the disk at `head`.
pub fn frozen_path(head: &Path, layer: Id) -> PathBuf {
    let (stem, extension) = split(head);
    let id = layer.simple().to_string();
    head.with_file_name(format!("{stem}@{}{extension}", &id[..12]))
}

fn split(head: &Path) -> (String, String) {
    let name = head.file_name().unwrap_or_default().to_string_lossy();
    match name.rsplit_once('.') {
        Some((stem, extension)) if !stem.is_empty() => (stem.to_owned(), format!(".{extension}")),
        _ => (name.into_owned(), String::new()),
    }
}

/// The files beside `head` that have the name of one of its frozen layers.
pub(super) fn frozen_names(head: &Path) -> Result<Vec<PathBuf>> {
    let (stem, extension) = split(head);
    let prefix = format!("{stem}@");
    names_beside(head, |name| {
        let id = name.strip_prefix(&prefix).and_then(|n| n.strip_suffix(&extension));
        id.is_some_and(|id| id.len() == 12 && id.bytes().all(|b| b.is_ascii_hexdigit()))
    })
}

/// The files in the directory of `path` whose name `is_wanted`.
pub(super) fn names_beside(path: &Path, is_wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let dir = directory(path);
    let entries =
        fs::read_dir(dir).map_err(|e| Error::io("could not be listed", e).at_path(dir))?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("could not be listed", e).at_path(dir))?;
        if entry.file_name().to_str().is_some_and(&is_wanted) {
            found.push(path.with_file_name(entry.file_name()));
        }
    }
    found.sort();
    Ok(found)
}

/// Files of other disks in the same directory that name `layer` as their backing file.
pub fn clones_of(layer: &Path, own_disk: Option<Id>) -> Result<Vec<PathBuf>> {
    let beside = names_beside(layer, |name| !name.starts_with('.'))?;
    let mut clones = Vec::new();
    // Nearly all of thousands of clones name their base in the same way.
    let mut known: Option<(String, bool)> = None;
    for (path, peek) in peek_all(beside) {
        let own = peek.identity.label.as_ref().is_some_and(|l| Some(l.disk) == own_disk);
        let Some(backing) = peek.identity.backing.filter(|_| !own) else { continue };
        let is_layer = match known.take() {
            Some((name, is_layer)) if name == backing.name => is_layer,
            _ => gate::resolve(&path, &backing.name).is_ok_and(|below| same_file(&below, layer)),
        };
        known = Some((backing.name, is_layer));
        if is_layer {
            clones.push(path);
        }
    }
    Ok(clones)
}

/// Device and inode number of a file, which all its names share.
type FileKey = (u64, u64);

/// The files in a directory that name others as their backing file: read once, asked often.
pub(super) struct Beside {
    /// By the file that is named: who names it, and which disk that says it belongs to.
    on: HashMap<FileKey, Vec<(PathBuf, Option<Id>)>>,
}

impl Beside {
    /// Reads the headers of all files in the directory of `path`.
    pub fn read(path: &Path) -> Result<Beside> {
        let mut beside = Beside { on: HashMap::new() };
        for (path, peek) in peek_all(names_beside(path, |name| !name.starts_with('.'))?) {
            let Some(backing) = peek.identity.backing else { continue };
            let below = gate::resolve(&path, &backing.name).ok();
            let Some(below) = below.and_then(|below| file_key(&below)) else { continue };
            let disk = peek.identity.label.map(|label| label.disk);
            beside.on.entry(below).or_default().push((path, disk));
        }
        Ok(beside)
    }

    /// Files of other disks that name `member` as their backing file.
    pub fn clones_of(&self, member: &Member) -> Vec<&Path> {
        let on = file_key(&member.path).and_then(|key| self.on.get(&key));
        let others = on.into_iter().flatten().filter(|(_, d)| *d != Some(member.label.disk));
        others.map(|(path, _)| path.as_path()).collect()
    }

    /// Refuses to change what a disk shows on which other disks stand.
    pub fn refuse_head(&self, family: &Family) -> Result<()> {
        let clones = self.clones_of(&family.head).into_iter().map(Path::to_path_buf);
        sealed::refuse_children(&family.head.path, &clones.collect::<Vec<_>>())
    }

    /// Refuses to change or drop a layer on which other disks stand.
    pub fn refuse_clones(&self, member: &Member) -> Result<()> {
        let clones = self.clones_of(member);
        if clones.is_empty() {
            return Ok(());
        }
        let names: Vec<PathBuf> = clones.into_iter().map(Path::to_path_buf).collect();
        let message = format!(
            "is the layer of snapshot '{}', and clones stand on it: {}",
            member.label.name,
            sealed::list(&names)
        );
        Err(Error::new(ErrorKind::Sealed, message).at_path(&member.path))
    }
}

/// Refuses to change or drop a layer on which other disks stand.
pub(super) fn refuse_clones(member: &Member) -> Result<()> {
    Beside::read(&member.path)?.refuse_clones(member)
}

/// Whether two names mean one file.
pub(super) fn same_file(a: &Path, b: &Path) -> bool {
    matches!((file_key(a), file_key(b)), (Some(a), Some(b)) if a == b)
}

fn file_key(path: &Path) -> Option<FileKey> {
    fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
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
