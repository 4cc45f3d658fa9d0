//! The family of a disk: its head and its frozen layers, read from the files themselves.
//!
//! Each file's label says which disk it belongs to and what it stands on; there is no catalogue.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::family::names::{
    frozen_head, frozen_id, frozen_names, frozen_path, has_frozen_name, starts_with, stem_of,
};
use crate::family::scan::peek_all;
use crate::image::{Id, Identity, Label, Role};
use crate::open::disk::{Peek, peek};
use crate::open::gate;
use crate::open::gate::same_file;
use crate::storage::follow;

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

    /// The layer in the file at `path`; `None` where that carries no label.
    pub(crate) fn read(path: &Path) -> Result<Option<Member>> {
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
    /// Whether layers of it have the name of a head that is not there any more.
    pub(super) inherited: bool,
}

impl Family {
    /// Reads the family of the disk at `head`, or, where that is a symbolic link, of the one that it
    /// leads to: the layers stand beside the file itself. `None` where the file carries no label, and
    /// so has no snapshots.
    ///
    /// Its layers are known by its disk's id in the directory, whatever the head is called by now. What
    /// has the name of another head of the same disk that is there (a copy of this one, or what this
    /// one is a copy of) is that one's.
    pub fn read(head: &Path) -> Result<Option<Family>> {
        let Some(head) = Member::read(&follow(head)?)? else { return Ok(None) };
        let own = stem_of(&head.path);
        let is_layer = frozen_id(&head.path).is_some_and(|id| starts_with(head.label.layer, &id));
        let mut owned: HashMap<String, bool> = HashMap::from([(own.clone(), true)]);
        let (mut layers, mut inherited) = (Vec::new(), false);
        for (path, peek) in peek_all(frozen_names(&head.path)?) {
            let Some(label) = peek.identity.label.clone() else { continue };
            if label.disk != head.label.disk || same_file(&path, &head.path) {
                continue;
            }
            if path == frozen_path(&head.path, label.layer) {
                layers.push(Member { path, label, peek });
                continue;
            }
            let name = frozen_head(&path);
            let owner = || !is_layer && !is_head_of(&path.with_file_name(&name), label.disk);
            if *owned.entry(name.clone()).or_insert_with(owner) {
                inherited |= name != own;
                layers.push(Member { path, label, peek });
            }
        }
        drop_copies(&head, &mut layers);
        layers.sort_by_key(|m| (m.label.time, m.label.layer));
        Ok(Some(Family { head, layers, inherited }))
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
    pub(crate) fn children_first(&self) -> Vec<&Member> {
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

    /// A disk that carries no label yet, and so has no frozen layers; `label` is what it is about to get.
    pub(crate) fn of_one(path: &Path, label: Label, peek: Peek) -> Family {
        let head = Member { path: path.to_path_buf(), label, peek };
        Family { head, layers: Vec::new(), inherited: false }
    }

    /// Notes what the layer in the file at `path` says of itself by now.
    pub(crate) fn relabel(&mut self, path: &Path, identity: Identity) {
        let known = self.layers.iter_mut().chain([&mut self.head]).find(|m| m.path == path);
        if let (Some(member), Some(label)) = (known, identity.label.clone()) {
            (member.label, member.peek.identity) = (label, identity);
        }
    }

    /// Notes that the file at `path`, a frozen layer's, is gone; returns what it was.
    pub(crate) fn take(&mut self, path: &Path) -> Option<Member> {
        let at = self.layers.iter().position(|m| m.path == path)?;
        Some(self.layers.remove(at))
    }

    /// Notes that `member` has the name of the head, or that of a frozen layer.
    pub(crate) fn put(&mut self, member: Member) {
        if member.path == self.head.path {
            self.head = member;
            return;
        }
        self.layers.retain(|m| m.path != member.path);
        self.layers.push(member);
        self.layers.sort_by_key(|m| (m.label.time, m.label.layer));
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

    /// The lowest layer of the disk below `member`: what that stands on is another's.
    pub(crate) fn root_of<'a>(&'a self, member: &'a Member) -> &'a Member {
        let mut at = member;
        for _ in 0..=self.layers.len() {
            let below = at.parent().and_then(|id| self.layers.iter().find(|m| m.label.layer == id));
            match below {
                Some(below) => at = below,
                None => break,
            }
        }
        at
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

/// Whether a file says that it belongs to the disk.
fn is_head_of(path: &Path, disk: Id) -> bool {
    let label = peek(path).ok().flatten().and_then(|peek| peek.identity.label);
    label.is_some_and(|label| label.disk == disk)
}

/// Leaves out copies of layers: of several that have the right name for the same id, the one that has
/// the head's name, or else the one that others name, is it.
fn drop_copies(head: &Member, layers: &mut Vec<Member>) {
    let mut ids = HashSet::new();
    let named = |m: &Member| has_frozen_name(&m.path, m.label.layer);
    if layers.iter().filter(|m| named(m)).all(|m| ids.insert(m.label.layer)) {
        return;
    }
    let below: HashSet<PathBuf> = layers
        .iter()
        .chain([head])
        .filter_map(|m| gate::resolve(&m.path, &m.peek.identity.backing.as_ref()?.name).ok())
        .collect();
    let rank = |m: &Member| {
        let own = m.path == frozen_path(&head.path, m.label.layer);
        (!own, !below.contains(&m.path), m.path.clone())
    };
    let mut best: HashMap<Id, PathBuf> = HashMap::new();
    layers.sort_by_key(rank);
    for member in layers.iter().filter(|m| named(m)) {
        best.entry(member.label.layer).or_insert_with(|| member.path.clone());
    }
    layers.retain(|m| !named(m) || best.get(&m.label.layer) == Some(&m.path));
}
