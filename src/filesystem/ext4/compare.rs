//! Which files differ between two moments of a file system: added, removed, renamed, modified.
//!
//! Both trees are walked together. A file is known again by its inode's number, generation and time
//! of creation: what went at one name and came at another with the same ones was renamed. Contents
//! are read only where the inode says that it has changed, and only blocks that may have.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::contents::Moments;
use super::{Ext4, Inode, ROOT, Time};
use crate::error::{Error, ErrorKind, Result};

/// The most bytes of changed names.
const MAX_NAMES: usize = 512 << 20;

/// What happened to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// It is there only at the later moment.
    Added,
    /// It was there only at the earlier one.
    Removed,
    /// It has another name; its contents may have changed too.
    Renamed,
    /// Its contents are others.
    Modified,
    /// Its contents are the same, and something else of it is not.
    Attributes,
}

/// What of a file differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aspect {
    /// What it holds: contents, a link's target, a device's number.
    Contents,
    /// Permissions.
    Mode,
    /// Owner or group.
    Owner,
    /// Extended attributes, such as access lists and labels.
    Attributes,
    /// The time of the last write, of a file whose contents are the same.
    Time,
}

/// One file that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileChange {
    /// What happened.
    pub kind: Kind,
    /// Its path from the root of the file system, which begins with `/`, as bytes.
    pub path: Vec<u8>,
    /// The path that it had, where it was renamed.
    pub from: Option<Vec<u8>>,
    /// What differs; nothing for what was added or removed.
    pub aspects: Vec<Aspect>,
    /// The file as it was.
    pub old: Option<Inode>,
    /// The file as it is.
    pub new: Option<Inode>,
}

/// How a file is known again under another name.
type Identity = (u32, u32, Time, u16);

fn identity(inode: &Inode) -> Identity {
    (inode.number, inode.generation, inode.created, inode.kind())
}

/// Lists what differs, in the order of the paths.
///
/// # Errors
/// [`ErrorKind::Corrupt`] where one of the two cannot be believed; [`ErrorKind::Interrupted`] where
/// the user has asked to stop.
pub fn compare(moments: &Moments<'_, '_>) -> Result<Vec<FileChange>> {
    let mut walk =
        Walk { moments, found: Vec::new(), bytes: 0, pairs: Vec::new(), seen: HashSet::new() };
    let (old, new) = (moments.before.inode(ROOT)?, moments.after.inode(ROOT)?);
    walk.pair(Vec::new(), None, &old, &new)?;
    let (mut went, mut came) = (Side::default(), Side::default());
    loop {
        walk.pairs(&mut went, &mut came)?;
        if walk.renames(&mut went, &mut came)? {
            continue;
        }
        // What came may hold what went, so it is opened first.
        if !came.open(moments.after, &mut walk)? && !went.open(moments.before, &mut walk)? {
            break;
        }
    }
    for one in came.files.into_values().flatten() {
        let (old, new, aspects) = (None, Some(one.inode), Vec::new());
        walk.add(FileChange { kind: Kind::Added, path: one.path, from: None, aspects, old, new })?;
    }
    for one in went.files.into_values().flatten() {
        let (old, new, aspects) = (Some(one.inode), None, Vec::new());
        walk.add(FileChange {
            kind: Kind::Removed,
            path: one.path,
            from: None,
            aspects,
            old,
            new,
        })?;
    }
    let mut found = walk.found;
    found.sort_by(|a, b| (&a.path, a.kind).cmp(&(&b.path, b.kind)));
    Ok(found)
}

/// A name that is there at one of the moments only.
struct Single {
    path: Vec<u8>,
    inode: Inode,
}

/// The names that are there at one of the moments only.
#[derive(Default)]
struct Side {
    files: HashMap<Identity, Vec<Single>>,
    /// Directories that were not looked into yet.
    closed: Vec<Identity>,
    seen: HashSet<u32>,
}

impl Side {
    fn put(&mut self, path: Vec<u8>, inode: Inode) {
        let key = identity(&inode);
        if inode.is_directory() && self.seen.insert(inode.number) {
            self.closed.push(key);
        }
        self.files.entry(key).or_default().push(Single { path, inode });
    }

    /// Looks into the directories that are new; whether there were any.
    fn open(&mut self, fs: &Ext4<'_>, walk: &mut Walk<'_, '_, '_>) -> Result<bool> {
        let closed = std::mem::take(&mut self.closed);
        let mut any = false;
        for key in closed {
            // Those that were renamed are walked with what they were.
            let Some(one) = self.files.get(&key).and_then(|all| all.first()) else { continue };
            any = true;
            let (path, directory) = (one.path.clone(), one.inode.clone());
            for entry in fs.entries(&directory)? {
                let inode = fs.inode(entry.inode)?;
                let path = join(&path, &entry.name);
                walk.count(&path)?;
                self.put(path, inode);
            }
        }
        Ok(any)
    }
}

/// Directories that are compared with what they were.
struct Pair {
    path: Vec<u8>,
    old: Inode,
    new: Inode,
}

struct Walk<'a, 'b, 'd> {
    moments: &'a Moments<'b, 'd>,
    found: Vec<FileChange>,
    /// Of all names that are kept.
    bytes: usize,
    pairs: Vec<Pair>,
    seen: HashSet<(u32, u32)>,
}

impl Walk<'_, '_, '_> {
    fn count(&mut self, path: &[u8]) -> Result<()> {
        self.bytes += path.len() + size_of::<Single>();
        match self.bytes > MAX_NAMES {
            true => Err(Error::new(ErrorKind::Unsupported, "too many files differ to be listed")),
            false => Ok(()),
        }
    }

    fn add(&mut self, change: FileChange) -> Result<()> {
        self.count(&change.path)?;
        self.found.push(change);
        Ok(())
    }

    /// Compares the directories that are to be compared, and those in them.
    fn pairs(&mut self, went: &mut Side, came: &mut Side) -> Result<()> {
        while let Some(Pair { path, old, new }) = self.pairs.pop() {
            let names = |fs: &Ext4<'_>, inode: &Inode| -> Result<BTreeMap<Vec<u8>, u32>> {
                Ok(fs.entries(inode)?.into_iter().map(|e| (e.name, e.inode)).collect())
            };
            let mut before = names(self.moments.before, &old)?;
            for (name, number) in names(self.moments.after, &new)? {
                let path = join(&path, &name);
                let new = self.moments.after.inode(number)?;
                let old = before.remove(&name).map(|old| self.moments.before.inode(old));
                match old.transpose()? {
                    Some(old) if old.kind() == new.kind() => self.pair(path, None, &old, &new)?,
                    old => {
                        self.count(&path)?;
                        old.into_iter().for_each(|old| went.put(path.clone(), old));
                        came.put(path, new);
                    }
                }
            }
            for (name, number) in before {
                let path = join(&path, &name);
                self.count(&path)?;
                went.put(path, self.moments.before.inode(number)?);
            }
        }
        Ok(())
    }

    /// Finds what came under another name than it went by; whether there was anything.
    fn renames(&mut self, went: &mut Side, came: &mut Side) -> Result<bool> {
        let both: Vec<Identity> =
            came.files.keys().filter(|key| went.files.contains_key(*key)).copied().collect();
        for key in &both {
            let (Some(mut old), Some(mut new)) = (went.files.remove(key), came.files.remove(key))
            else {
                continue;
            };
            while let Some((was, is)) = old.pop().zip(new.pop()) {
                self.pair(is.path, Some(was.path), &was.inode, &is.inode)?;
            }
            // A file of several names may have got more or fewer of them.
            if !old.is_empty() {
                went.files.insert(*key, old);
            }
            if !new.is_empty() {
                came.files.insert(*key, new);
            }
        }
        Ok(!both.is_empty())
    }

    /// Compares a file with what it was.
    fn pair(
        &mut self,
        path: Vec<u8>,
        from: Option<Vec<u8>>,
        old: &Inode,
        new: &Inode,
    ) -> Result<()> {
        self.moments.after.go_on()?;
        if new.is_directory() && self.seen.insert((old.number, new.number)) {
            self.count(&path)?;
            self.pairs.push(Pair { path: path.clone(), old: old.clone(), new: new.clone() });
        }
        // An inode that says that nothing has changed is believed.
        let aspects = match old == new {
            true => Vec::new(),
            false => self.aspects(old, new).map_err(|e| named(e, &path))?,
        };
        let kind = match (&from, &aspects[..]) {
            (None, []) => return Ok(()),
            (Some(_), _) => Kind::Renamed,
            (None, some) if some.contains(&Aspect::Contents) => Kind::Modified,
            (None, _) => Kind::Attributes,
        };
        let path = if path.is_empty() { b"/".to_vec() } else { path };
        let (old, new) = (Some(old.clone()), Some(new.clone()));
        self.add(FileChange { kind, path, from, aspects, old, new })
    }

    fn aspects(&self, old: &Inode, new: &Inode) -> Result<Vec<Aspect>> {
        let mut found = Vec::new();
        if !new.is_directory() {
            if !self.moments.same_contents(old, new)? {
                found.push(Aspect::Contents);
            } else if old.modified != new.modified {
                found.push(Aspect::Time);
            }
        }
        if old.mode != new.mode {
            found.push(Aspect::Mode);
        }
        if (old.uid, old.gid) != (new.uid, new.gid) {
            found.push(Aspect::Owner);
        }
        if !self.moments.same_attributes(old, new)? {
            found.push(Aspect::Attributes);
        }
        Ok(found)
    }
}

fn named(error: Error, path: &[u8]) -> Error {
    match error.kind() {
        ErrorKind::Interrupted => error,
        kind => {
            let name = String::from_utf8_lossy(path);
            Error::new(kind, format!("{} ({})", error.message(), name.escape_debug()))
        }
    }
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(directory.len() + 1 + name.len());
    path.extend_from_slice(directory);
    path.push(b'/');
    path.extend_from_slice(name);
    path
}
