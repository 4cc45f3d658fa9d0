//! The directory model: a small fixed list of named volumes, in directories. Knows no FUSE.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::Arc;

use crate::volume::Volume;

/// The number of the root directory.
pub(crate) const ROOT: u64 = 1;

/// Named volumes in directories. Inode numbers are places in the list, from [`ROOT`].
pub struct Tree {
    nodes: Vec<Node>,
}

/// One file or directory.
pub(crate) struct Node {
    /// The number of the directory it stands in; the root stands in itself.
    pub(crate) parent: u64,
    /// What it is.
    pub(crate) kind: Kind,
}

/// What a node is.
pub(crate) enum Kind {
    /// Names and the nodes they stand for.
    Directory(BTreeMap<OsString, u64>),
    /// A volume shown as a regular file.
    File(Arc<dyn Volume>),
}

impl Default for Tree {
    fn default() -> Tree {
        Tree::new()
    }
}

impl Tree {
    /// An empty root directory.
    pub fn new() -> Tree {
        Tree { nodes: vec![Node { parent: ROOT, kind: Kind::Directory(BTreeMap::new()) }] }
    }

    /// Adds a volume under `path`, relative to the root, with `/` between names; directories on
    /// the way are made. Fails where a name is empty, `.`, `..` or longer than 255 bytes, where
    /// it is taken, or where a volume stands in the way.
    pub fn add(&mut self, path: &str, volume: Arc<dyn Volume>) -> io::Result<()> {
        let (parents, name) = path.rsplit_once('/').unwrap_or(("", path));
        let mut at = ROOT;
        for part in parents.split('/').filter(|_| !parents.is_empty()) {
            at = match self.child(at, OsStr::new(part)) {
                Some(next) => next,
                None => self.insert(at, part, Kind::Directory(BTreeMap::new()))?,
            };
        }
        self.insert(at, name, Kind::File(volume)).map(drop)
    }

    fn insert(&mut self, parent: u64, name: &str, kind: Kind) -> io::Result<u64> {
        if name.is_empty() || name == "." || name == ".." || name.len() > 255 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{name:?} cannot name a file"),
            ));
        }
        let number = self.nodes.len() as u64 + ROOT;
        let Some(Node { kind: Kind::Directory(names), .. }) = self.node_mut(parent) else {
            return Err(io::ErrorKind::NotADirectory.into());
        };
        if names.contains_key(OsStr::new(name)) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        names.insert(name.into(), number);
        self.nodes.push(Node { parent, kind });
        Ok(number)
    }

    pub(crate) fn node(&self, number: u64) -> Option<&Node> {
        self.nodes.get(usize::try_from(number.checked_sub(ROOT)?).ok()?)
    }

    fn node_mut(&mut self, number: u64) -> Option<&mut Node> {
        self.nodes.get_mut(usize::try_from(number.checked_sub(ROOT)?).ok()?)
    }

    /// The node that `name` stands for in a directory.
    pub(crate) fn child(&self, directory: u64, name: &OsStr) -> Option<u64> {
        match &self.node(directory)?.kind {
            Kind::Directory(names) => names.get(name).copied(),
            Kind::File(_) => None,
        }
    }

    /// The number of nodes.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Every volume.
    pub(crate) fn volumes(&self) -> impl Iterator<Item = &Arc<dyn Volume>> {
        self.nodes.iter().filter_map(|node| match &node.kind {
            Kind::File(volume) => Some(volume),
            Kind::Directory(_) => None,
        })
    }
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
        let mut tree = Tree::new();
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
}
