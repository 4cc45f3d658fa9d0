//! The nodes that the kernel knows, by number, by name and by file.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::hash::BuildHasher;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Fresh, Inode, Node, State};
use crate::files::ROOT;

/// Takes a hash for what it is.
#[derive(Default, Clone, Copy)]
pub(crate) struct Plain(u64);

impl BuildHasher for Plain {
    type Hasher = Plain;
    fn build_hasher(&self) -> Plain {
        Plain(0)
    }
}

impl std::hash::Hasher for Plain {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }
    fn write_u64(&mut self, number: u64) {
        self.0 = number;
    }
}

/// Names in directories, by a hash of both.
type Names = HashMap<u64, Vec<(u64, Arc<OsStr>, Arc<Node>)>, Plain>;

/// What became of a new node.
pub(crate) enum Entered {
    /// It stands in the table, or the one that stood there under its name.
    Here(Arc<Node>),
    /// Its file is this node's, under another name.
    Known(Arc<Node>, Box<Fresh>),
}

/// All nodes.
pub(crate) struct Table {
    inner: Mutex<Inner>,
    random: std::hash::RandomState,
}

struct Inner {
    next: u64,
    /// Each node with the lookups that the kernel has not forgotten.
    nodes: HashMap<u64, (Arc<Node>, u64)>,
    names: Names,
    inodes: HashMap<Inode, Arc<Node>>,
    /// Nodes in the order in which they were made, or last named to be forgotten.
    order: VecDeque<u64>,
}

impl Table {
    /// With the root, which is never forgotten.
    pub(crate) fn new(root: Fresh) -> Table {
        let inner = Inner {
            next: ROOT,
            nodes: HashMap::new(),
            names: HashMap::default(),
            inodes: HashMap::new(),
            order: VecDeque::new(),
        };
        let table = Table { inner: Mutex::new(inner), random: std::hash::RandomState::new() };
        let mut inner = table.lock();
        inner.insert(root, 1);
        drop(inner);
        table
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A hash of a name that nobody outside can foresee.
    pub(crate) fn hash(&self, parent: u64, name: &OsStr) -> u64 {
        self.random.hash_one((parent, name))
    }

    pub(crate) fn len(&self) -> usize {
        self.lock().nodes.len()
    }

    /// The node that stat(2) shows this number of.
    pub(crate) fn numbered(&self, ino: u64) -> Option<Arc<Node>> {
        let inner = self.lock();
        let mut nodes = inner.nodes.values().map(|(node, _)| node);
        nodes.find(|node| node.ino == ino).cloned()
    }

    /// Up to `most` of the nodes that have been known the longest; no directories.
    pub(crate) fn oldest(&self, most: usize) -> Vec<u64> {
        let mut inner = self.lock();
        let mut oldest = Vec::with_capacity(most);
        for _ in 0..inner.order.len() {
            let Some(id) = inner.order.pop_front() else { break };
            let Some((node, _)) = inner.nodes.get(&id) else { continue };
            if !node.is_dir() {
                oldest.push(id);
            }
            inner.order.push_back(id);
            if oldest.len() == most {
                break;
            }
        }
        oldest
    }

    /// A node by its number.
    pub(crate) fn get(&self, id: u64) -> io::Result<Arc<Node>> {
        let found = self.lock().nodes.get(&id).map(|(node, _)| node.clone());
        // The kernel asks only for what it was told of.
        found.ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))
    }

    /// The node that is known under a name; `count` lookups are added to it.
    pub(crate) fn named(&self, parent: u64, name: &OsStr, count: u64) -> Option<Arc<Node>> {
        let hash = self.hash(parent, name);
        let mut inner = self.lock();
        let node = inner.named(hash, parent, name)?;
        inner.count(&node, count);
        Some(node)
    }

    /// The node that is known as an inode.
    pub(crate) fn inode(&self, inode: Inode) -> Option<Arc<Node>> {
        self.lock().inodes.get(&inode).cloned()
    }

    /// Adds lookups.
    pub(crate) fn count(&self, node: &Arc<Node>, count: u64) {
        self.lock().count(node, count);
    }

    /// Makes a node under its names and inodes, with `count` lookups; or returns the one that
    /// stands there already.
    pub(crate) fn enter(&self, fresh: Fresh, count: u64) -> Entered {
        let mut inner = self.lock();
        let names: Vec<_> =
            fresh.state.names.iter().map(|alias| (alias.parent.id, alias.name.clone())).collect();
        for (parent, name) in &names {
            if let Some(node) = inner.named(self.hash(*parent, name), *parent, name) {
                inner.count(&node, count);
                return Entered::Here(node);
            }
        }
        let inodes = fresh.state.inodes.clone();
        if let Some(node) = inodes.iter().find_map(|inode| inner.inodes.get(inode)) {
            return Entered::Known(node.clone(), Box::new(fresh));
        }
        let node = inner.insert(fresh, count);
        for (parent, name) in names {
            inner.name(self.hash(parent, &name), parent, name, &node);
        }
        for inode in inodes {
            inner.inodes.insert(inode, node.clone());
        }
        Entered::Here(node)
    }

    /// Gives a node one more name.
    pub(crate) fn add_name(&self, node: &Arc<Node>, parent: u64, name: &Arc<OsStr>) {
        let hash = self.hash(parent, name);
        self.lock().name(hash, parent, name.clone(), node);
    }

    /// Takes a name away.
    pub(crate) fn remove_name(&self, parent: u64, name: &OsStr) {
        let hash = self.hash(parent, name);
        self.lock().unname(hash, parent, name);
    }

    /// Lets a node be found as an inode; `state` is its own.
    pub(crate) fn add_inode(&self, node: &Arc<Node>, state: &mut State, inode: Inode) {
        if !state.inodes.contains(&inode) {
            state.inodes.push(inode);
            self.lock().inodes.insert(inode, node.clone());
        }
    }

    /// Takes lookups away; a node without any is dropped.
    pub(crate) fn forget(&self, id: u64, count: u64) {
        let mut inner = self.lock();
        let Some((_, lookups)) = inner.nodes.get_mut(&id) else { return };
        *lookups = lookups.saturating_sub(count);
        if *lookups > 0 || id == ROOT {
            return;
        }
        let Some((node, _)) = inner.nodes.remove(&id) else { return };
        drop(inner);
        self.let_go(node);
    }

    /// Drops a node that the kernel does not know any more, and directories that were kept for it
    /// only. A directory in which a known node has a name is kept, though the kernel has come to
    /// that node by another of its names: made anew it would be a second one for the same place.
    fn let_go(&self, node: Arc<Node>) {
        let mut leaving = vec![node];
        while let Some(node) = leaving.pop() {
            let state = node.lock();
            let mut inner = self.lock();
            // Somebody may have found it by a name meanwhile, and keeps it.
            let known = inner.nodes.contains_key(&node.id);
            // Ours, and the table's for each name.
            let needed = node.is_dir() && Arc::strong_count(&node) > 1 + state.names.len();
            if known || needed {
                continue;
            }
            for alias in &state.names {
                let hash = self.hash(alias.parent.id, &alias.name);
                inner.unname(hash, alias.parent.id, &alias.name);
                if !inner.nodes.contains_key(&alias.parent.id) {
                    leaving.push(alias.parent.clone());
                }
            }
            for inode in &state.inodes {
                if inner.inodes.get(inode).is_some_and(|other| other.id == node.id) {
                    inner.inodes.remove(inode);
                }
            }
        }
    }
}

impl Inner {
    fn insert(&mut self, fresh: Fresh, count: u64) -> Arc<Node> {
        let id = self.next;
        self.next += 1;
        let node = Arc::new(Node {
            id,
            kind: fresh.kind,
            ino: fresh.ino,
            dir: fresh.dir,
            upper: AtomicBool::new(fresh.upper),
            state: Mutex::new(fresh.state),
        });
        self.nodes.insert(id, (node.clone(), count));
        self.order.push_back(id);
        node
    }

    fn count(&mut self, node: &Arc<Node>, count: u64) {
        // One that was just forgotten comes back.
        self.nodes.entry(node.id).or_insert_with(|| (node.clone(), 0)).1 += count;
    }

    fn named(&self, hash: u64, parent: u64, name: &OsStr) -> Option<Arc<Node>> {
        let bucket = self.names.get(&hash)?;
        let entry = bucket.iter().find(|entry| entry.0 == parent && *entry.1 == *name)?;
        Some(entry.2.clone())
    }

    fn name(&mut self, hash: u64, parent: u64, name: Arc<OsStr>, node: &Arc<Node>) {
        self.unname(hash, parent, &name);
        self.names.entry(hash).or_default().push((parent, name, node.clone()));
    }

    fn unname(&mut self, hash: u64, parent: u64, name: &OsStr) {
        if let Some(bucket) = self.names.get_mut(&hash) {
            bucket.retain(|entry| entry.0 != parent || *entry.1 != *name);
            if bucket.is_empty() {
                self.names.remove(&hash);
            }
        }
    }
}
