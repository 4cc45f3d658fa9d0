//! The files and directories of an overlay that the kernel knows or that are in use: what of
//! each stands in the upper layer, what in lower ones, and under which names. Knows no request.
//!
//! Locks are taken in this order: a directory's `names` (parents before children, else by number),
//! a node's state (children before parents), the table.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::hash::BuildHasher;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::list::Listing;
use super::recent::{Kept, Recent};
use crate::files::ROOT;
use crate::host::{HostDir, Spot};
use crate::kernel::Backing;
use crate::layer::{Layer, LayerDir};

/// A file system that layers stand on, and an inode in it.
pub(crate) type Inode = (u16, u64);

/// A directory of a lower layer.
pub(crate) struct LowerDir {
    /// Which layer, 0 for the uppermost.
    pub(crate) layer: u16,
    /// Where it stands; the layer's root stands nowhere.
    place: Option<(Arc<LowerDir>, Box<OsStr>)>,
    open: Arc<Kept<dyn LayerDir>>,
    /// Whether whiteouts that are names, or attributes of files, are in it.
    pub(crate) whiteouts: Tri,
}

/// A thing that is found out once: yes, no, or not known yet.
#[derive(Default)]
pub(crate) struct Tri(AtomicU8);

impl Tri {
    pub(crate) fn get(&self) -> Option<bool> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            known => Some(known == 2),
        }
    }

    pub(crate) fn set(&self, value: bool) {
        self.0.store(1 + u8::from(value), Ordering::Relaxed);
    }

    pub(crate) fn forget(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

impl LowerDir {
    pub(crate) fn root(layer: u16, of: &dyn Layer) -> io::Result<Arc<LowerDir>> {
        let open = Kept::new(Some(of.root()?));
        Ok(Arc::new(LowerDir { layer, place: None, open, whiteouts: Tri::default() }))
    }

    pub(crate) fn child(self: &Arc<Self>, name: &OsStr) -> Arc<LowerDir> {
        Arc::new(LowerDir {
            layer: self.layer,
            place: Some((self.clone(), name.into())),
            open: Kept::new(None),
            whiteouts: Tri::default(),
        })
    }

    /// The directory it stands in, and its name there.
    pub(crate) fn beside(&self) -> Option<(Arc<LowerDir>, Box<OsStr>)> {
        self.place.clone()
    }

    pub(crate) fn get(&self, recent: &Recent) -> io::Result<Arc<dyn LayerDir>> {
        self.open.get(recent, || match &self.place {
            Some((parent, name)) => parent.get(recent)?.dir(name),
            // The root is never closed.
            None => Err(io::Error::from_raw_os_error(libc::EIO)),
        })
    }
}

/// A file of a lower layer that is no directory.
#[derive(Clone)]
pub(crate) struct LowerFile {
    pub(crate) dir: Arc<LowerDir>,
    pub(crate) name: Box<OsStr>,
}

/// A name of a node.
pub(crate) struct Alias {
    pub(crate) parent: Arc<Node>,
    pub(crate) name: Arc<OsStr>,
    /// Whether the name stands in the upper layer.
    pub(crate) upper: bool,
}

/// A file or directory.
pub(crate) struct Node {
    pub(crate) id: u64,
    /// One of the `S_IF*`.
    pub(crate) kind: u32,
    /// What stat(2) shows.
    pub(crate) ino: u64,
    /// Of a directory.
    pub(crate) dir: Option<Box<Dir>>,
    /// Whether it stands in the upper layer; never goes back. Set with the state locked.
    upper: AtomicBool,
    state: Mutex<State>,
}

/// What a directory has besides.
pub(crate) struct Dir {
    /// The lower directories that are merged into it, uppermost first.
    pub(crate) lowers: Vec<Arc<LowerDir>>,
    pub(crate) open: Arc<Kept<HostDir>>,
    /// Held for writing while a name in it is made or removed.
    names: RwLock<()>,
    pub(crate) listing: Mutex<Option<Listing>>,
    /// Whether whiteouts that are names are in the upper directory.
    pub(crate) whiteouts: Tri,
    /// Whether files with an origin are in the upper directory.
    pub(crate) impure: Tri,
    /// Whether what is made in it inherits an ACL.
    pub(crate) default_acl: Tri,
    /// Whether what is made in it gets its group.
    pub(crate) set_gid: Tri,
}

impl Dir {
    pub(crate) fn new(lowers: Vec<Arc<LowerDir>>, open: Option<Arc<HostDir>>) -> Box<Dir> {
        Box::new(Dir {
            lowers,
            open: Kept::new(open),
            names: RwLock::default(),
            listing: Mutex::default(),
            whiteouts: Tri::default(),
            impure: Tri::default(),
            default_acl: Tri::default(),
            set_gid: Tri::default(),
        })
    }

    /// Held while names in it are looked up.
    pub(crate) fn reading(&self) -> RwLockReadGuard<'_, ()> {
        self.names.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held while a name in it is made or removed.
    pub(crate) fn changing(&self) -> RwLockWriteGuard<'_, ()> {
        self.names.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn listing(&self) -> MutexGuard<'_, Option<Listing>> {
        self.listing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What changes about a node.
#[derive(Default)]
pub(crate) struct State {
    /// Its names that are known; none once it is removed.
    pub(crate) names: Vec<Alias>,
    /// The upper file, where no name leads to it.
    pub(crate) orphan: Option<Arc<OwnedFd>>,
    /// The lower file, or the one that this was copied up from.
    pub(crate) lower: Option<LowerFile>,
    /// The lower file that has the contents, where the upper or lower one has attributes only.
    pub(crate) data: Option<LowerFile>,
    /// The number of links of a file in the index, and its name there.
    pub(crate) index: Option<Index>,
    /// Under which inodes it stands in the table.
    pub(crate) inodes: Vec<Inode>,
    /// Whether its last name was removed.
    pub(crate) removed: bool,
    /// Whether it is known to have no `security.capability`: the kernel asks for it before each
    /// first write and each change of owner.
    pub(crate) incapable: bool,
    /// How it is open.
    pub(crate) access: Opens,
}

/// How a file is open: the kernel does not mix its own pages with a file in their place.
#[derive(Default)]
pub(crate) struct Opens {
    /// Openings through the kernel's pages.
    pub(crate) cached: u32,
    /// Openings in which the kernel uses the upper file itself.
    pub(crate) backed: u32,
    /// Those of them that may change it in memory (mmap(2)), of which nobody is told.
    pub(crate) mappers: u32,
    /// That file.
    pub(crate) backing: Option<Arc<Backing>>,
    /// Whether pages of the kernel's may be older than the file.
    pub(crate) stale: bool,
    /// Whether the kernel was given the contents.
    pub(crate) stored: bool,
}

/// A file that has several names of which some may not have been copied up.
pub(crate) struct Index {
    /// Names in the overlay.
    pub(crate) links: u32,
    /// The name in the index.
    pub(crate) name: Box<OsStr>,
}

/// A file in the upper layer, reached by what does not move while it is held.
pub(crate) enum Held {
    Name(Arc<HostDir>, Arc<OsStr>),
    Open(Arc<OwnedFd>),
    Dir(Arc<HostDir>),
}

impl Held {
    pub(crate) fn spot(&self) -> Spot<'_> {
        match self {
            Held::Name(dir, name) => Spot::Name(dir, name),
            Held::Open(fd) => Spot::Open(std::os::fd::AsFd::as_fd(fd)),
            Held::Dir(dir) => dir.this(),
        }
    }
}

/// What a new node is made of.
pub(crate) struct Fresh {
    pub(crate) kind: u32,
    pub(crate) ino: u64,
    pub(crate) upper: bool,
    pub(crate) dir: Option<Box<Dir>>,
    pub(crate) state: State,
}

impl Node {
    pub(crate) fn is_dir(&self) -> bool {
        self.dir.is_some()
    }

    pub(crate) fn directory(&self) -> io::Result<&Dir> {
        self.dir.as_deref().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOTDIR))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn has_upper(&self) -> bool {
        self.upper.load(Ordering::Acquire)
    }

    /// To be called with the state locked.
    pub(crate) fn set_upper(&self) {
        self.upper.store(true, Ordering::Release);
    }

    /// The upper directory; the node must have one.
    pub(crate) fn upper_dir(&self, recent: &Recent) -> io::Result<Arc<HostDir>> {
        let dir = self.directory()?;
        dir.open.get(recent, || {
            let state = self.lock();
            let alias = state.names.first().ok_or_else(gone)?;
            Ok(Arc::new(alias.parent.upper_dir(recent)?.child(&alias.name)?))
        })
    }

    /// The upper file. What is returned is good as long as `state` is locked.
    pub(crate) fn upper(&self, state: &State, recent: &Recent) -> io::Result<Held> {
        if let Some(fd) = &state.orphan {
            return Ok(Held::Open(fd.clone()));
        }
        if let Some(dir) = &self.dir {
            let open = dir.open.get(recent, || {
                let alias = state.names.first().ok_or_else(gone)?;
                Ok(Arc::new(alias.parent.upper_dir(recent)?.child(&alias.name)?))
            })?;
            return Ok(Held::Dir(open));
        }
        let alias = state.names.iter().find(|alias| alias.upper).ok_or_else(gone)?;
        Ok(Held::Name(alias.parent.upper_dir(recent)?, alias.name.clone()))
    }
}

fn gone() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

/// Names in directories, by a hash of both.
type Names = HashMap<u64, Vec<(u64, Arc<OsStr>, Arc<Node>)>, Plain>;

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
