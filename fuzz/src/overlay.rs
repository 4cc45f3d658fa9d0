//! Overlays over layers that say anything: names of whiteouts, opaque directories, redirects, origins.

use std::collections::{BTreeMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;

use vdisk_fuse::attr::{Attr, DirEntry, StatFs};
use vdisk_fuse::files::{Caller, Files, ROOT};
use vdisk_fuse::layer::{FileHandle, Layer, LayerDir, LayerFile};
use vdisk_fuse::overlay::{Layers, Overlay};

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFIFO: u32 = 0o010_000;
const ENOENT: i32 = 2;
const ENOTDIR: i32 = 20;
const EINVAL: i32 = 22;

/// What files are called: few names, so that they meet, and some that mean something.
const NAMES: [&[u8]; 12] = [
    b"a",
    b"b",
    b"c",
    b"d",
    b".wh.a",
    b".wh.b",
    b".wh.",
    b".wh..wh.opq",
    b".wh..wh..opq",
    b".wh..wh.plnk",
    b".wh..wh.a",
    b"\xff\xfe",
];
/// Extended attributes, some the overlay's own.
const KEYS: [&str; 9] = [
    "trusted.overlay.opaque",
    "trusted.overlay.redirect",
    "trusted.overlay.origin",
    "trusted.overlay.impure",
    "trusted.overlay.metacopy",
    "trusted.overlay.whiteout",
    "trusted.overlay.overlay.opaque",
    "user.containers.override_stat",
    "user.mine",
];
/// What they say.
const VALUES: [&[u8]; 16] = [
    b"y",
    b"x",
    b"",
    b"a",
    b"b\0",
    b"/",
    b"/a",
    b"/a/b/c",
    b"/b/a",
    b"..",
    b"/../a",
    b"a/b",
    b"//a",
    b"0:0:04755",
    b"4294967295:-1:x",
    b"\0\xfb\x1d\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
];
/// Looks at names that one tree costs at most.
const LOOKS: usize = 3000;
const DEPTH: usize = 12;

/// One file.
#[derive(Clone, Default)]
struct Node {
    ino: u64,
    mode: u32,
    rdev: u64,
    /// Of a file, or the target of a link.
    bytes: Vec<u8>,
    xattrs: BTreeMap<OsString, Vec<u8>>,
    /// By name: numbers of nodes.
    names: BTreeMap<OsString, usize>,
}

/// A layer in memory; the first node is the root.
struct Tree {
    nodes: Arc<Vec<Node>>,
    device: u64,
}

/// A directory or a file in one.
struct At(Arc<Vec<Node>>, usize);

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

impl Node {
    fn attr(&self) -> Attr {
        let (ino, mode, rdev) = (self.ino, self.mode, self.rdev);
        Attr { ino, mode, rdev, nlink: 1, size: self.bytes.len() as u64, ..Attr::default() }
    }
}

impl At {
    fn node(&self) -> &Node {
        &self.0[self.1]
    }

    fn find(&self, name: Option<&OsStr>) -> Option<usize> {
        name.map_or(Some(self.1), |name| self.node().names.get(name).copied())
    }

    fn found(&self, name: Option<&OsStr>) -> io::Result<&Node> {
        Ok(&self.0[self.find(name).ok_or_else(|| errno(ENOENT))?])
    }
}

impl Layer for Tree {
    fn root(&self) -> io::Result<Arc<dyn LayerDir>> {
        Ok(Arc::new(At(self.nodes.clone(), 0)))
    }

    fn device(&self) -> u64 {
        self.device
    }

    fn uuid(&self) -> [u8; 16] {
        [self.device as u8; 16]
    }

    fn statfs(&self) -> io::Result<StatFs> {
        Ok(StatFs::default())
    }
}

impl LayerDir for At {
    fn attr(&self, name: Option<&OsStr>) -> io::Result<Option<Attr>> {
        Ok(self.find(name).map(|at| self.0[at].attr()))
    }

    fn dir(&self, name: &OsStr) -> io::Result<Arc<dyn LayerDir>> {
        let at = self.find(Some(name)).ok_or_else(|| errno(ENOENT))?;
        let is_dir = self.0[at].attr().is_dir();
        if is_dir { Ok(Arc::new(At(self.0.clone(), at))) } else { Err(errno(ENOTDIR)) }
    }

    fn entries(&self) -> io::Result<Vec<DirEntry>> {
        let entry = |(name, at): (&OsString, &usize)| {
            let Node { ino, mode, .. } = self.0[*at];
            DirEntry { name: name.clone(), ino, kind: mode & 0o170_000 }
        };
        Ok(self.node().names.iter().map(entry).collect())
    }

    fn open(&self, name: &OsStr) -> io::Result<Arc<dyn LayerFile>> {
        let at = self.find(Some(name)).ok_or_else(|| errno(ENOENT))?;
        let is_file = self.0[at].attr().is_file();
        if is_file { Ok(Arc::new(At(self.0.clone(), at))) } else { Err(errno(EINVAL)) }
    }

    fn readlink(&self, name: &OsStr) -> io::Result<OsString> {
        let node = self.found(Some(name))?;
        let is_link = node.mode & 0o170_000 == S_IFLNK;
        if is_link { Ok(OsString::from_vec(node.bytes.clone())) } else { Err(errno(EINVAL)) }
    }

    fn xattr(&self, name: Option<&OsStr>, key: &OsStr) -> io::Result<Option<Vec<u8>>> {
        Ok(self.found(name)?.xattrs.get(key).cloned())
    }

    fn xattrs(&self, name: Option<&OsStr>) -> io::Result<Vec<OsString>> {
        Ok(self.found(name)?.xattrs.keys().cloned().collect())
    }

    fn handle(&self, name: Option<&OsStr>) -> io::Result<Option<FileHandle>> {
        let bytes = self.found(name)?.ino.to_le_bytes().to_vec();
        Ok(Some(FileHandle { kind: 1, bytes }))
    }
}

impl LayerFile for At {
    fn attr(&self) -> io::Result<Attr> {
        Ok(self.node().attr())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = self.node().bytes.get(from..).unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn seek(&self, offset: u64, _: i32) -> io::Result<u64> {
        Ok(offset)
    }
}

/// Layers as bytes say it: the first how many, then six for each file.
fn layers(bytes: &[u8]) -> Vec<Arc<dyn Layer>> {
    let [first, rest @ ..] = bytes else { return Vec::new() };
    let root = Node { ino: 1, mode: S_IFDIR | 0o755, ..Node::default() };
    let mut trees = vec![vec![root]; 1 + usize::from(first & 3)];
    let count = trees.len();
    for record in rest.chunks_exact(6) {
        let [place, parent, name, kind, key, value] = record else { continue };
        let nodes = &mut trees[usize::from(*place) % count];
        let parent = usize::from(*parent) % nodes.len();
        let value = VALUES[usize::from(*value) % VALUES.len()].to_vec();
        let key = OsString::from(KEYS[usize::from(*key) % KEYS.len()]);
        if kind & 8 != 0 {
            // Of one that is there.
            nodes[parent].xattrs.insert(key, value);
            continue;
        }
        if nodes[parent].mode & 0o170_000 != S_IFDIR {
            continue;
        }
        let (mode, rdev) = match kind & 7 {
            0..=2 => (S_IFDIR, 0),
            3 => (S_IFREG, 0),
            4 => (S_IFLNK, 0),
            5 => (S_IFCHR, 0),
            6 => (S_IFCHR, u64::from(*name)),
            _ => (S_IFIFO, 0),
        };
        let name = OsStr::from_bytes(NAMES[usize::from(*name) % NAMES.len()]).to_owned();
        let number = nodes.len();
        let xattrs = BTreeMap::from([(key, value.clone())]);
        let xattrs = if kind & 16 != 0 { xattrs } else { BTreeMap::new() };
        let bytes = if kind & 32 != 0 { value } else { Vec::new() };
        let ino = number as u64 + 1;
        let mode = mode | 0o755;
        nodes.push(Node { ino, mode, rdev, bytes, xattrs, names: BTreeMap::new() });
        nodes[parent].names.insert(name, number);
    }
    // Some stand on one file system.
    let device = |number: u64| if first & 4 != 0 { 7 } else { number };
    let tree = |(number, nodes)| {
        Arc::new(Tree { nodes: Arc::new(nodes), device: device(number) }) as Arc<dyn Layer>
    };
    (1..).zip(trees).map(tree).collect()
}

/// Bytes as the trees of an overlay's layers: all that it shows is looked at.
pub fn overlay(bytes: &[u8]) {
    let lowers = layers(bytes);
    let layers = Layers { lowers, upper: None, user_xattrs: Some(false) };
    let Ok(overlay) = Overlay::new(layers, 16) else { return };
    let mut looks = LOOKS;
    look(&overlay, ROOT, DEPTH, &mut looks);
}

/// Looks at all that is below a directory, and requires that what is listed can be found and is no whiteout.
fn look(overlay: &Overlay, dir: u64, depth: usize, looks: &mut usize) {
    let mut names = Vec::new();
    let listed = overlay.readdir(dir, 0, &mut |entry, _| {
        names.push(entry.name.clone());
        true
    });
    let _ = overlay.listxattr(Caller::default(), dir);
    let mut seen = HashSet::new();
    for name in &names {
        assert!(seen.insert(name), "{name:?} is listed twice");
    }
    let own = names.iter().filter(|name| !matches!(name.as_bytes(), b"." | b".."));
    let others = NAMES.iter().map(|name| OsStr::from_bytes(name).to_owned());
    let others: Vec<OsString> = others.filter(|name| !seen.contains(name)).collect();
    for name in own.chain(&others) {
        if *looks == 0 {
            return;
        }
        *looks -= 1;
        let found = overlay.lookup(dir, name);
        if listed.is_ok() && seen.contains(name) {
            assert!(!matches!(found, Ok(None)), "{name:?} is listed and is not there");
        }
        let Ok(Some(entry)) = found else { continue };
        assert!(!seen_is_whiteout(&entry.attr), "{name:?} is a whiteout");
        assert!(listed.is_err() || seen.contains(name), "{name:?} is there and is not listed");
        use_it(overlay, entry.node, entry.attr, depth, looks);
        overlay.forget(entry.node, 1);
    }
}

fn seen_is_whiteout(attr: &Attr) -> bool {
    attr.kind() == S_IFCHR && attr.rdev == 0
}

fn use_it(overlay: &Overlay, node: u64, attr: Attr, depth: usize, looks: &mut usize) {
    let _ = overlay.getattr(node, None);
    let _ = overlay.listxattr(Caller::default(), node);
    for key in KEYS {
        let _ = overlay.getxattr(node, OsStr::new(key));
    }
    match attr.kind() {
        S_IFDIR if depth > 0 => look(overlay, node, depth - 1, looks),
        S_IFLNK => drop(overlay.readlink(node)),
        S_IFREG => {
            if let Ok(open) = overlay.open(Caller::default(), node, 0, false) {
                let _ = overlay.read(open.handle, 0, &mut [0; 64]);
                overlay.release(open.handle);
            }
            assert!(overlay.open(Caller::default(), node, 2, false).is_err(), "it is read only");
        }
        _ => {}
    }
}
