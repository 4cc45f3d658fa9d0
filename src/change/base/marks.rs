//! Marking the layer that a clone is about to stand on, and taking the mark back.
//!
//! The mark is in the layer's label and durable before the clone appears: whoever would drop or change
//! the layer reads it there, wherever the clone is. Others may read the layer meanwhile.

use std::collections::HashSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::family::names::disks_beside;
use crate::family::standing::{disk_stands_on, names};
use crate::family::tree::{Family, Member};
use crate::image::{Backing, Clones, Id, Label, Parent, Place, Role, Seen};
use crate::open::gate::same_file;
use crate::open::{fingerprint, gate, peek, sameness};
use crate::storage::name::directory;

/// A clone that stands on a layer, or is about to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clone<'a> {
    /// The id of its disk; nil for one without a label.
    pub disk: Id,
    /// Its head.
    pub path: &'a Path,
}

/// Marks the layer at `base`, which is sealed and was seen as `parent` says. Returns how the clones are
/// to remember it.
///
/// # Errors
/// [`ErrorKind::Sealed`] where the layer will not stay. A layer that nobody may write is as good as
/// sealed, and is not marked.
pub(crate) fn mark(base: &Path, parent: Parent, clones: &[Clone<'_>]) -> Result<Parent> {
    let mut own = parent;
    let marked = sameness::relabel_shared(base, |layer, identity| {
        let (vouched, told) = (identity.vouched, identity.clone());
        let Some(label) = &mut identity.label else { return Ok(()) };
        refuse_passing(base, label)?;
        // A base that became an ordinary disk again is one whose user says that nothing stands on it.
        let unsealed = label.role == Role::Head;
        let other = label.layer != parent.layer;
        if unsealed || other || !parent.content.is_nil() && label.content != parent.content {
            let message = "was changed meanwhile by another command";
            return Err(Error::new(ErrorKind::Busy, message).at_path(base));
        }
        let as_left = sameness::is_as_left(layer, &told)?;
        let known = label.clones.get_or_insert_default();
        clones.iter().for_each(|clone| known.add(place(base, clone)));
        if let Some(stamp) = own.stamp.as_mut().filter(|_| vouched) {
            if !matches!(known.seen, Seen::As(_)) || !as_left {
                known.seen = Seen::As(fingerprint::file_stamp(layer, stamp)?);
            }
            stamp.follows = true;
        }
        Ok(())
    });
    match marked {
        Err(e) if sameness::is_out_of_reach(&e) => Ok(parent),
        marked => marked.map(|()| own),
    }
}

/// Refuses a layer that will not stay.
pub(crate) fn refuse_passing(path: &Path, label: &Label) -> Result<()> {
    let message = match label.role {
        Role::Head | Role::Snapshot | Role::Base => return Ok(()),
        Role::Merging | Role::Rising | Role::Leaving => "is being merged",
        _ => "is only kept aside for `vdisk snapshot undo`",
    };
    Err(Error::new(ErrorKind::Sealed, message).at_path(path))
}

fn place(base: &Path, clone: &Clone<'_>) -> Place {
    let absolute = |path: &Path| fs::canonicalize(directory(path)).ok();
    let path = absolute(base).zip(absolute(clone.path)).and_then(|(from, to)| {
        let path = relative(&from, &to.join(clone.path.file_name()?));
        path.to_str().map(str::to_owned)
    });
    let disk = if clone.disk.is_nil() { 0 } else { Clones::short(clone.disk) };
    Place { disk, path: path.unwrap_or_default() }
}

/// Marks the file that `backing`, as the image at `child` is about to name it, means: as far as that is
/// a layer with a label that is frozen. `disk` is the id of the child's disk, nil without a label.
pub fn mark_below(child: &Path, backing: &Backing, disk: Id) {
    if !is_qcow2(backing) {
        return;
    }
    let below = gate::resolve(child, &backing.name).ok();
    let below = below.and_then(|below| fs::canonicalize(below).ok());
    let Some(base) = below else { return };
    let Some(label) = peek(&base).ok().flatten().and_then(|seen| seen.identity.label) else {
        return;
    };
    if matches!(label.role, Role::Snapshot | Role::Base) {
        let parent = Parent { layer: label.layer, content: Id::nil(), stamp: None };
        let _ = mark(&base, parent, &[Clone { disk, path: child }]);
    }
}

/// Notes in the layers of other disks on which a disk stands where it is by now: it may have been copied
/// or moved since it was made there. Where that cannot be written, nothing is noted.
pub(crate) fn note_places(family: &Family) {
    let head = &family.head;
    if !matches!(head.label.role, Role::Head | Role::Base) {
        return;
    }
    for member in family.members() {
        let backing = member.peek.identity.backing.as_ref().filter(|b| is_qcow2(b));
        let below = backing.and_then(|backing| gate::resolve(&member.path, &backing.name).ok());
        let (Some(below), Some(layer)) = (below, member.parent()) else { continue };
        if family.member(layer).is_none() && !knows(&below, layer, family) {
            let parent = Parent { layer, content: Id::nil(), stamp: None };
            let _ = mark(&below, parent, &[Clone { disk: head.label.disk, path: &head.path }]);
        }
    }
}

/// Whether the file at `base` is not the layer `layer` of another disk, on which clones stand, or says
/// that the disk does.
fn knows(base: &Path, layer: Id, family: &Family) -> bool {
    let head = &family.head;
    let label = peek(base).ok().flatten().and_then(|seen| seen.identity.label);
    let label = label.filter(|label| label.layer == layer && label.disk != head.label.disk);
    let Some(clones) = label.and_then(|label| label.clones) else { return true };
    let own = clones.places.iter().filter(|p| p.disk == Clones::short(head.label.disk));
    let here =
        |p: &Place| p.path.is_empty() || same_file(&directory(base).join(&p.path), &head.path);
    clones.more || own.into_iter().any(here)
}

/// What a disk stands on before it is put elsewhere.
pub struct Bases {
    disk: Id,
    below: Vec<PathBuf>,
}

impl Bases {
    /// The layers of other disks that the disk at `path` stands on.
    pub fn of(path: &Path) -> Result<Bases> {
        if let Some(family) = Family::read(path)? {
            return Ok(Bases { disk: family.head.label.disk, below: bases_of(&family) });
        }
        let below = below(path).map(|(below, _)| below);
        Ok(Bases { disk: Id::nil(), below: below.into_iter().collect() })
    }

    /// The same of a disk whose layers stand on several, as it does once it was put on another base: a
    /// change of its tree may let go of one. None where they stand on one, which none lets go of.
    pub(crate) fn several(family: &Family) -> Bases {
        let name = |m: &Member| m.peek.identity.backing.as_ref().map(|b| b.name.clone());
        let roots = family.members().map(|member| name(family.root_of(member)));
        let distinct: HashSet<Option<String>> = roots.collect();
        let below = if distinct.len() > 1 { bases_of(family) } else { Vec::new() };
        Bases { disk: family.head.label.disk, below }
    }

    /// The id of the disk; nil for one without a label.
    pub fn disk(&self) -> Id {
        self.disk
    }

    /// Takes back the marks of those that the disk at `path` stands on no more.
    pub fn leave(&self, path: &Path) {
        let left = self.below.iter().filter(|base| !disk_stands_on(path, base));
        // Where that fails, a mark stays too long.
        left.for_each(|base| drop(unmark(base, &Clone { disk: self.disk, path })));
    }
}

/// Whether the layer is declared to be one that carries a label: in a raw disk the guest may have
/// written what looks like one.
fn is_qcow2(backing: &Backing) -> bool {
    backing.format.as_deref() == Some("qcow2")
}

/// The file that the image at `child` names as its backing file, and the id of the child's disk; `None`
/// where that carries no label.
fn below(child: &Path) -> Option<(PathBuf, Id)> {
    let identity = peek(child).ok()??.identity;
    let backing = identity.backing.filter(is_qcow2)?;
    let below = gate::resolve(child, &backing.name).ok()?;
    let below = fs::canonicalize(below).ok()?;
    Some((below, identity.label.map_or(Id::nil(), |label| label.disk)))
}

/// The layers of other disks that the members of a disk stand on.
pub(crate) fn bases_of(family: &Family) -> Vec<PathBuf> {
    let mut bases: Vec<PathBuf> = Vec::new();
    for member in family.members() {
        let Some((below, _)) = below(&member.path) else { continue };
        let own = family.members().any(|m| same_file(&m.path, &below));
        if !own && !bases.contains(&below) {
            bases.push(below);
        }
    }
    bases
}

/// Takes back the mark of the disk at `clone`, which stands on `base` no more or is gone. Copies of it
/// that do are marked in its place.
///
/// # Errors
/// Where the base cannot be written now: it stays marked.
pub(crate) fn unmark(base: &Path, clone: &Clone<'_>) -> Result<()> {
    let is_marked = |label: &Label| label.is_marked();
    if !matches!(peek(base), Ok(Some(seen)) if seen.identity.label.as_ref().is_some_and(is_marked))
    {
        return Ok(());
    }
    let copies = copies(base, clone);
    let own = place(base, clone);
    sameness::relabel_shared(base, |_, identity| {
        let Some(known) = identity.label.as_mut().and_then(|l| l.clones.as_mut()) else {
            return Ok(());
        };
        let stays = |p: &Place| {
            let at = directory(base).join(&p.path);
            let another = p.disk != own.disk || p.disk == 0 && p.path != own.path;
            another || p.path != own.path && !p.path.is_empty() && disk_stands_on(&at, base)
        };
        known.places.retain(stays);
        let add = |path: &PathBuf| known.add(place(base, &Clone { disk: clone.disk, path }));
        copies.iter().for_each(add);
        Ok(())
    })
}

/// Other files in the directories of the clone and of its base that say that they are the same disk,
/// and stand on the base.
fn copies(base: &Path, clone: &Clone<'_>) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for dir in [clone.path, base] {
        for path in disks_beside(dir).unwrap_or_default() {
            let label = peek(&path).ok().flatten().and_then(|peek| peek.identity.label);
            let is_copy = label.is_some_and(|label| label.disk == clone.disk)
                && !same_file(&path, clone.path)
                && names(&path, base);
            if is_copy && !found.iter().any(|known| same_file(known, &path)) {
                found.push(path);
            }
        }
    }
    found
}

/// The path from the directory `from` to `to`; both are absolute and without symbolic links.
pub(crate) fn relative(from: &Path, to: &Path) -> PathBuf {
    let mut from = from.components().peekable();
    let mut to = to.components().peekable();
    while let (Some(a), Some(b)) = (from.peek(), to.peek()) {
        if a != b {
            break;
        }
        from.next();
        to.next();
    }
    from.map(|_| Component::ParentDir).chain(to).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_is_named_relative_to_its_clone() {
        let of = |a: &str, b: &str| relative(Path::new(a), Path::new(b)).display().to_string();
        assert_eq!(of("/vm", "/vm/base"), "base");
        assert_eq!(of("/vm/clones", "/vm/base"), "../base");
        assert_eq!(of("/a/b", "/c/base"), "../../c/base");
    }
}
