//! Which file stands on which, over whole directories: bases, clones and snapshots as trees.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::gate;
use super::open::{Peek, peek};
use super::tree::names_beside;
use crate::error::Result;
use crate::image::{Id, Label, Role};
use crate::storage::draft::directory;

/// A file with all that stand on it.
#[derive(Debug, Clone)]
pub struct Node {
    /// The file.
    pub path: PathBuf,
    /// What its header says; `None` for a raw file, or one that is missing.
    pub peek: Option<Peek>,
    /// Bytes that it takes on the host; `None` where it is missing.
    pub allocated: Option<u64>,
    /// What stands on it.
    pub children: Vec<Node>,
}

impl Node {
    /// Its label, where it has one.
    pub fn label(&self) -> Option<&Label> {
        self.peek.as_ref()?.identity.label.as_ref()
    }

    /// The snapshot's name, if it is a snapshot.
    pub fn snapshot(&self) -> Option<&str> {
        self.label().filter(|l| l.role == Role::Snapshot).map(|l| l.name.as_str())
    }

    /// The node of the file at `path`: this one, or one on it.
    pub fn find(&self, path: &Path) -> Option<&Node> {
        if key(&self.path) == key(path) {
            return Some(self);
        }
        self.children.iter().find_map(|child| child.find(path))
    }

    /// Whether it, or something on it, is a layer of the disk with that id.
    fn holds_layer_of(&self, disk: Id) -> bool {
        let own = self.label().is_some_and(|l| l.disk == disk);
        own || self.children.iter().any(|c| c.holds_layer_of(disk))
    }

    /// Whether it, or something on it, is the file at `path`.
    pub fn holds(&self, path: &Path) -> bool {
        key(&self.path) == key(path) || self.children.iter().any(|c| c.holds(path))
    }
}

/// Device and inode number; the path itself for a file that is missing.
#[derive(PartialEq, Eq, PartialOrd, Ord, Clone)]
enum Key {
    File(u64, u64),
    Missing(PathBuf),
}

fn key(path: &Path) -> Key {
    match fs::metadata(path) {
        Ok(meta) => Key::File(meta.dev(), meta.ino()),
        Err(_) => Key::Missing(path.to_path_buf()),
    }
}

/// The trees of all disks in the directories, with the bases they stand on wherever those are.
pub fn forest(directories: &[PathBuf]) -> Result<Vec<Node>> {
    let mut files = BTreeMap::new();
    for dir in directories {
        for path in names_beside(&dir.join("x"), |name| !name.starts_with('.'))? {
            if path.is_file() {
                note(&path, &mut files);
            }
        }
    }
    let roots: Vec<Key> =
        files.iter().filter(|(_, f)| f.parent.is_none()).map(|(k, _)| k.clone()).collect();
    let mut nodes: Vec<Node> = roots.iter().map(|key| grow(key, &files, 0)).collect();
    // A plain file on which nothing stands is no disk of ours.
    nodes.retain(|n| n.peek.is_some() || !n.children.is_empty());
    sort(&mut nodes);
    Ok(nodes)
}

/// The trees that the disk at `path` and its snapshots belong to: one, unless a base was merged
/// into several branches.
pub fn trees_of(path: &Path) -> Result<Vec<Node>> {
    let mut directories = vec![directory(path).to_path_buf()];
    let mut at = path.to_path_buf();
    for _ in 0..gate::MAX_DEPTH {
        let backing = peek(&at)?.and_then(|p| p.identity.backing);
        let Some(below) = backing.and_then(|b| gate::resolve(&at, &b.name).ok()) else { break };
        if !below.is_file() {
            break;
        }
        let dir = directory(&below).to_path_buf();
        if !directories.iter().any(|d| key(d) == key(&dir)) {
            directories.push(dir);
        }
        at = below;
    }
    let disk = peek(path)?.and_then(|p| Some(p.identity.label?.disk));
    let mut trees = forest(&directories)?;
    trees.retain(|tree| tree.holds(path) || disk.is_some_and(|disk| tree.holds_layer_of(disk)));
    Ok(trees)
}

struct File {
    path: PathBuf,
    peek: Option<Peek>,
    allocated: Option<u64>,
    parent: Option<Key>,
}

/// Notes a file and, below it, the files that it stands on.
fn note(path: &Path, files: &mut BTreeMap<Key, File>) {
    let mut path = path.to_path_buf();
    for _ in 0..gate::MAX_DEPTH {
        let key = key(&path);
        if files.contains_key(&key) {
            return;
        }
        // What cannot be read is shown as a file that says nothing.
        let peek = peek(&path).ok().flatten();
        let backing = peek.as_ref().and_then(|p| p.identity.backing.as_ref());
        let below = backing.and_then(|b| gate::resolve(&path, &b.name).ok());
        let allocated = fs::metadata(&path).ok().map(|m| m.blocks() * 512);
        let parent = below.as_deref().map(self::key);
        files.insert(key, File { path, peek, allocated, parent });
        match below {
            Some(below) => path = below,
            None => return,
        }
    }
}

fn grow(key: &Key, files: &BTreeMap<Key, File>, depth: usize) -> Node {
    let Some(file) = files.get(key) else {
        return Node { path: PathBuf::new(), peek: None, allocated: None, children: Vec::new() };
    };
    let on =
        files.iter().filter(|(_, f)| depth < gate::MAX_DEPTH && f.parent.as_ref() == Some(key));
    let mut children: Vec<Node> = on.map(|(k, _)| grow(k, files, depth + 1)).collect();
    sort(&mut children);
    Node { path: file.path.clone(), peek: file.peek.clone(), allocated: file.allocated, children }
}

/// Snapshots in the order of their times, then disks by name.
fn sort(nodes: &mut [Node]) {
    nodes.sort_by_key(|n| {
        let time = n.label().filter(|l| l.role == Role::Snapshot).map_or(u64::MAX, |l| l.time);
        (time, n.path.clone())
    });
}
