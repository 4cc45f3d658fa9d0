//! The directory model: named volumes, in directories. What stands in a directory can be exchanged
//! while it is served. Knows no FUSE.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::volume::Volume;

/// The number of the root directory.
pub(crate) const ROOT: u64 = 1;

/// Named volumes in directories. Inode numbers are places in the list, from `ROOT`; none is ever
/// used for another volume, since the kernel keeps what it has read of one.
pub struct Tree {
    nodes: RwLock<Vec<Arc<Node>>>,
}

/// One file or directory.
pub(crate) struct Node {
    /// The number of the directory it stands in; the root stands in itself.
    pub(crate) parent: u64,
    /// What it is.
    pub(crate) kind: Kind,
    /// How many open files may write to it.
    pub(crate) writers: AtomicU64,
    /// Whether its name can go while it is served.
    pub(crate) passing: bool,
}

/// What a node is.
pub(crate) enum Kind {
    /// Names and the nodes they stand for.
    Directory(RwLock<BTreeMap<OsString, u64>>),
    /// A volume shown as a regular file.
    File(Arc<dyn Volume>),
}

impl Node {
    fn new(parent: u64, kind: Kind, passing: bool) -> Arc<Node> {
        Arc::new(Node { parent, kind, writers: AtomicU64::new(0), passing })
    }

    fn directory(parent: u64) -> Arc<Node> {
        Node::new(parent, Kind::Directory(RwLock::default()), false)
    }

    /// The names in a directory; `None` for a file.
    pub(crate) fn names(&self) -> Option<RwLockReadGuard<'_, BTreeMap<OsString, u64>>> {
        match &self.kind {
            Kind::Directory(names) => Some(names.read().unwrap_or_else(PoisonError::into_inner)),
            Kind::File(_) => None,
        }
    }

    fn names_mut(&self) -> io::Result<RwLockWriteGuard<'_, BTreeMap<OsString, u64>>> {
        match &self.kind {
            Kind::Directory(names) => Ok(names.write().unwrap_or_else(PoisonError::into_inner)),
            Kind::File(_) => Err(io::ErrorKind::NotADirectory.into()),
        }
    }
}

impl Default for Tree {
    fn default() -> Tree {
        Tree::new()
    }
}

impl Tree {
    /// An empty root directory.
    pub fn new() -> Tree {
        Tree { nodes: RwLock::new(vec![Node::directory(ROOT)]) }
    }

    /// Adds a volume under `path`, relative to the root, with `/` between names; directories on
    /// the way are made. Fails where a name is empty, `.`, `..` or longer than 255 bytes, where
    /// it is taken, or where a volume stands in the way.
    pub fn add(&self, path: &str, volume: Arc<dyn Volume>) -> io::Result<()> {
        let (parents, name) = path.rsplit_once('/').unwrap_or(("", path));
        let at = self.directory(parents)?;
        self.insert(at, name, |parent| Node::new(parent, Kind::File(volume), false)).map(drop)
    }

    /// Makes the directory at `path` hold these volumes and nothing else. A volume that it holds
    /// already keeps its number, under another name too; one that goes is served on to those who
    /// have it open.
    ///
    /// # Errors
    /// As [`add`](Tree::add); then nothing has changed.
    pub fn exchange(&self, path: &str, files: Vec<(String, Arc<dyn Volume>)>) -> io::Result<()> {
        let parent = self.directory(path)?;
        let directory = self.node(parent).ok_or(io::ErrorKind::NotFound)?;
        let mut names = BTreeMap::new();
        for (name, _) in &files {
            check_name(name)?;
            if names.insert(OsString::from(name), ROOT).is_some() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
        }
        let mut held = directory.names_mut()?;
        for (name, volume) in files {
            let known = held.values().copied().find(|number| self.is(*number, &volume));
            let number =
                known.unwrap_or_else(|| self.push(Node::new(parent, Kind::File(volume), true)));
            names.insert(name.into(), number);
        }
        *held = names;
        Ok(())
    }

    /// The number of the directory at `path`, which is made where it is missing.
    fn directory(&self, path: &str) -> io::Result<u64> {
        let mut at = ROOT;
        for part in path.split('/').filter(|_| !path.is_empty()) {
            at = match self.child(at, OsStr::new(part)) {
                Some(next) => next,
                None => self.insert(at, part, Node::directory)?,
            };
        }
        Ok(at)
    }

    fn insert(
        &self,
        parent: u64,
        name: &str,
        make: impl FnOnce(u64) -> Arc<Node>,
    ) -> io::Result<u64> {
        check_name(name)?;
        let directory = self.node(parent).ok_or(io::ErrorKind::NotFound)?;
        let mut names = directory.names_mut()?;
        if names.contains_key(OsStr::new(name)) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let number = self.push(make(parent));
        names.insert(name.into(), number);
        Ok(number)
    }

    fn push(&self, node: Arc<Node>) -> u64 {
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        nodes.push(node);
        nodes.len() as u64 - 1 + ROOT
    }

    /// Whether that number is the volume's.
    fn is(&self, number: u64, volume: &Arc<dyn Volume>) -> bool {
        self.node(number).is_some_and(|node| match &node.kind {
            Kind::File(own) => Arc::ptr_eq(own, volume),
            Kind::Directory(_) => false,
        })
    }

    fn nodes(&self) -> RwLockReadGuard<'_, Vec<Arc<Node>>> {
        self.nodes.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn node(&self, number: u64) -> Option<Arc<Node>> {
        self.nodes().get(usize::try_from(number.checked_sub(ROOT)?).ok()?).cloned()
    }

    /// The node that `name` stands for in a directory.
    pub(crate) fn child(&self, directory: u64, name: &OsStr) -> Option<u64> {
        self.node(directory)?.names()?.get(name).copied()
    }

    /// The number of nodes.
    pub(crate) fn len(&self) -> usize {
        self.nodes().len()
    }

    /// Every volume.
    pub(crate) fn volumes(&self) -> Vec<Arc<dyn Volume>> {
        let volume = |node: &Arc<Node>| match &node.kind {
            Kind::File(volume) => Some(volume.clone()),
            Kind::Directory(_) => None,
        };
        self.nodes().iter().filter_map(volume).collect()
    }
}

fn check_name(name: &str) -> io::Result<()> {
    if name.is_empty() || name == "." || name == ".." || name.len() > 255 || name.contains('/') {
        let text = format!("{name:?} cannot name a file");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;

    impl Volume for Nothing {
        fn size(&self) -> u64 {
            0
        }
        fn block_size(&self) -> u32 {
            512
        }
        fn read_only(&self) -> bool {
            true
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            Ok(())
        }
        fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
            Err(io::ErrorKind::ReadOnlyFilesystem.into())
        }
        fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
            Err(io::ErrorKind::ReadOnlyFilesystem.into())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_path_makes_its_directories_and_names_are_unique() {
        let tree = Tree::new();
        tree.add("disk.raw", Arc::new(Nothing)).unwrap();
        tree.add("snapshots/a.raw", Arc::new(Nothing)).unwrap();
        tree.add("snapshots/b.raw", Arc::new(Nothing)).unwrap();
        assert_eq!(tree.len(), 5);
        let dir = tree.child(ROOT, OsStr::new("snapshots")).unwrap();
        assert!(tree.child(dir, OsStr::new("b.raw")).is_some());
        assert!(tree.child(dir, OsStr::new("disk.raw")).is_none());
        for bad in ["disk.raw", "disk.raw/x", "", "..", "a//b", "/a", "a/"] {
            assert!(tree.add(bad, Arc::new(Nothing)).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn an_exchange_keeps_the_numbers_of_what_stays() {
        let tree = Tree::new();
        let volumes: Vec<Arc<dyn Volume>> =
            (0..3).map(|_| Arc::new(Nothing) as Arc<dyn Volume>).collect();
        let with = |list: &[(&str, usize)]| {
            let files = list.iter().map(|(name, n)| ((*name).to_owned(), volumes[*n].clone()));
            tree.exchange("snapshots", files.collect())
        };
        let number = |name: &str| {
            let dir = tree.child(ROOT, OsStr::new("snapshots")).unwrap();
            tree.child(dir, OsStr::new(name))
        };
        with(&[]).unwrap();
        with(&[("a", 0), ("b", 1)]).unwrap();
        let (a, b) = (number("a").unwrap(), number("b").unwrap());
        with(&[("c", 0), ("d", 2)]).unwrap();
        assert_eq!((number("a"), number("b"), number("c")), (None, None, Some(a)));
        assert!(![a, b].contains(&number("d").unwrap()));
        for bad in [&[("x", 1), ("x", 2)][..], &[("", 1)], &[("a/b", 1)]] {
            assert!(with(bad).is_err());
            assert_eq!(number("c"), Some(a), "nothing has changed");
        }
        assert!(tree.node(b).is_some(), "who has it open reads on");
    }
}
