//! Which file stands on which, over whole directories: bases, clones and snapshots as trees.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{ErrorKind, Result};
use crate::family::exclusive::Holding;
use crate::family::names::disks_beside;
use crate::family::scan;
use crate::image::{Id, Label, Role};
use crate::open::disk::{Peek, peek};
use crate::open::{Format, gate};
use crate::storage::follow;
use crate::storage::name::directory;

/// A file with all that stand on it.
#[derive(Debug, Clone)]
pub struct Node {
    /// The file.
    pub path: PathBuf,
    /// What its header says; `None` for a raw file, or one that is missing.
    pub peek: Option<Peek>,
    /// Bytes that it takes on the host; `None` where it is missing.
    pub allocated: Option<u64>,
    /// Bytes of data that nothing on it shows, and that would be gone with it; `None` where that
    /// is not known, or was not asked for with [`measure`].
    pub exclusive: Option<u64>,
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

    /// The format that what stands on it declares for it.
    pub fn declared(&self) -> Option<Format> {
        let peek = self.children.iter().find_map(|child| child.peek.as_ref())?;
        declared(peek)
    }

    /// The node of the file at `path`: this one, or one on it.
    pub fn find(&self, path: &Path) -> Option<&Node> {
        self.find_key(&key(path))
    }

    fn find_key(&self, wanted: &Key) -> Option<&Node> {
        if key(&self.path) == *wanted {
            return Some(self);
        }
        self.children.iter().find_map(|child| child.find_key(wanted))
    }

    /// Whether it, or something on it, is a layer of the disk with that id.
    fn holds_layer_of(&self, disk: Id) -> bool {
        let own = self.label().is_some_and(|l| l.disk == disk);
        own || self.children.iter().any(|c| c.holds_layer_of(disk))
    }

    /// Whether it, or something on it, is the file at `path`.
    pub fn holds(&self, path: &Path) -> bool {
        self.find(path).is_some()
    }

    /// It, and all that stands on it.
    fn all<'a>(&'a self, into: &mut Vec<&'a Node>) {
        into.push(self);
        self.children.iter().for_each(|child| child.all(into));
    }
}

/// Finds out the [`Node::exclusive`] bytes of all nodes of the trees.
pub fn measure(trees: &mut [Node]) {
    let mut nodes = Vec::new();
    trees.iter().for_each(|tree| tree.all(&mut nodes));
    let held = scan::each(&nodes, |node| {
        let there = node.allocated.is_some();
        there.then(|| Holding::of(&node.path, node.declared()).ok().flatten()).flatten()
    });
    let paths = nodes.iter().map(|node| node.path.clone());
    let held: HashMap<PathBuf, Holding> =
        paths.zip(held).filter_map(|(path, held)| Some((path, held?))).collect();
    trees.iter_mut().for_each(|tree| take(tree, &held));
}

fn take(node: &mut Node, held: &HashMap<PathBuf, Holding>) {
    node.children.iter_mut().for_each(|child| take(child, held));
    // A child that could not be looked into may show anything of it.
    let children: Option<Vec<&Holding>> = node.children.iter().map(|c| held.get(&c.path)).collect();
    let own = held.get(&node.path);
    node.exclusive = own.zip(children).map(|(own, on)| own.exclusive(on.into_iter()));
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
        let mut paths = disks_beside(&dir.join("x"))?;
        paths.retain(|path| path.is_file());
        let seen = scan::each(&paths, |path| File::see(path));
        for (key, file) in seen {
            files.entry(key).or_insert(file);
        }
    }
    // What they stand on may be anywhere.
    let below: Vec<PathBuf> = files.values().filter_map(|f| f.below.clone()).collect();
    below.iter().for_each(|path| note(path, &mut files));
    silence(&mut files);
    let mut on: BTreeMap<&Key, Vec<&Key>> = BTreeMap::new();
    let mut roots = Vec::new();
    for (key, file) in &files {
        match &file.parent {
            Some(parent) => on.entry(parent).or_default().push(key),
            None => roots.push(key),
        }
    }
    let mut nodes: Vec<Node> = roots.iter().map(|key| grow(key, &files, &on, 0)).collect();
    // A plain file on which nothing stands is no disk of ours.
    nodes.retain(|n| n.peek.is_some() || !n.children.is_empty());
    sort(&mut nodes);
    Ok(nodes)
}

/// The trees that the disk at `path` and its snapshots belong to: one, unless a base was merged
/// into several branches.
pub fn trees_of(path: &Path) -> Result<Vec<Node>> {
    let path = &follow(path)?;
    let mut directories = vec![directory(path).to_path_buf()];
    let mut at = path.to_path_buf();
    for _ in 0..gate::MAX_DEPTH {
        let seen = match peek(&at) {
            // Whoever holds the disk has just merged it into another layer.
            Err(e) if e.kind() == ErrorKind::NotFound && at != *path => break,
            seen => seen?,
        };
        let Some(seen) = seen else { break };
        let backing = seen.identity.backing.as_ref();
        let Some(below) = backing.and_then(|b| gate::resolve(&at, &b.name).ok()) else { break };
        // What is declared to be raw is not asked what it names.
        let ends = declared(&seen).is_some_and(|format| format != Format::Qcow2);
        if !below.is_file() {
            break;
        }
        let dir = directory(&below).to_path_buf();
        if !directories.iter().any(|d| key(d) == key(&dir)) {
            directories.push(dir);
        }
        if ends {
            break;
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
    /// The file that it names as its base.
    below: Option<PathBuf>,
    parent: Option<Key>,
}

impl File {
    fn see(path: &Path) -> (Key, File) {
        // What cannot be read is shown as a file that says nothing.
        let peek = peek(path).ok().flatten();
        let backing = peek.as_ref().and_then(|p| p.identity.backing.as_ref());
        let below = backing.and_then(|b| gate::resolve(path, &b.name).ok());
        let allocated = fs::metadata(path).ok().map(|m| m.blocks() * 512);
        let parent = below.as_deref().map(self::key);
        (key(path), File { path: path.to_path_buf(), peek, allocated, below, parent })
    }
}

/// Notes a file and, below it, the files that it stands on.
fn note(path: &Path, files: &mut BTreeMap<Key, File>) {
    let mut path = path.to_path_buf();
    for _ in 0..gate::MAX_DEPTH {
        if files.contains_key(&key(&path)) {
            return;
        }
        let (key, file) = File::see(&path);
        let below = file.below.clone();
        files.insert(key, file);
        match below {
            Some(below) => path = below,
            None => return,
        }
    }
}

/// The format that an image declares for what it stands on.
fn declared(image: &Peek) -> Option<Format> {
    Format::from_name(image.identity.backing.as_ref()?.format.as_deref()?).ok()
}

/// Takes the headers away that only a guest can have written: of files that are declared to be of
/// another format.
fn silence(files: &mut BTreeMap<Key, File>) {
    let other = |file: &File| {
        let format = declared(file.peek.as_ref()?)?;
        (format != Format::Qcow2).then(|| file.parent.clone()).flatten()
    };
    let silent: Vec<Key> = files.values().filter_map(other).collect();
    for key in silent {
        if let Some(file) = files.get_mut(&key) {
            (file.peek, file.below, file.parent) = (None, None, None);
        }
    }
}

fn grow(
    key: &Key,
    files: &BTreeMap<Key, File>,
    on: &BTreeMap<&Key, Vec<&Key>>,
    depth: usize,
) -> Node {
    let (exclusive, mut children) = (None, Vec::new());
    let Some(file) = files.get(key) else {
        return Node { path: PathBuf::new(), peek: None, allocated: None, exclusive, children };
    };
    if depth < gate::MAX_DEPTH {
        let keys = on.get(key).into_iter().flatten();
        children = keys.map(|key| grow(key, files, on, depth + 1)).collect();
    }
    sort(&mut children);
    let File { path, peek, allocated, .. } = file;
    let (path, peek, allocated) = (path.clone(), peek.clone(), *allocated);
    Node { path, peek, allocated, exclusive, children }
}

/// Snapshots in the order of their times, then disks by name.
fn sort(nodes: &mut [Node]) {
    nodes.sort_by_key(|n| {
        let time = n.label().filter(|l| l.role == Role::Snapshot).map_or(u64::MAX, |l| l.time);
        (time, n.path.clone())
    });
}
