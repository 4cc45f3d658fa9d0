//! A tree of files as it should be, and the same of a file system.

use std::collections::BTreeMap;

use vdisk::internals::filesystem::ext4::mounted::{Mounted, ROOT};

/// A file, by its number in the model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct File {
    pub mode: u16,
    pub bytes: Vec<u8>,
    pub names: BTreeMap<Vec<u8>, usize>,
    pub target: Vec<u8>,
    pub attributes: BTreeMap<Vec<u8>, Vec<u8>>,
    pub owner: (u32, u32),
    pub links: u32,
}

impl File {
    pub fn is_directory(&self) -> bool {
        self.mode & 0xf000 == 0x4000
    }

    pub fn is_regular(&self) -> bool {
        self.mode & 0xf000 == 0x8000
    }
}

/// What one file looks like from its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub mode: u16,
    pub owner: (u32, u32),
    pub links: u32,
    pub bytes: Vec<u8>,
    pub attributes: BTreeMap<Vec<u8>, Vec<u8>>,
}

pub type View = BTreeMap<Vec<u8>, Seen>;

/// The tree of a model, from its file number 0.
pub fn view(files: &[File]) -> View {
    let mut found = View::new();
    let mut left = vec![(Vec::new(), 0)];
    while let Some((path, number)) = left.pop() {
        let file = &files[number];
        let bytes = if file.is_regular() { &file.bytes } else { &file.target };
        let seen = Seen {
            mode: file.mode,
            owner: file.owner,
            links: file.links,
            bytes: bytes.clone(),
            attributes: file.attributes.clone(),
        };
        for (name, child) in &file.names {
            left.push(([path.as_slice(), b"/", name].concat(), *child));
        }
        found.insert(path, seen);
    }
    found
}

/// The tree of a file system; `lost+found` is nobody's.
pub fn tree(fs: &Mounted) -> View {
    let mut found = View::new();
    let mut left = vec![(Vec::new(), ROOT)];
    while let Some((path, number)) = left.pop() {
        let known = fs.attributes(number).unwrap();
        let mut bytes = Vec::new();
        match known.mode & 0xf000 {
            0x4000 => {
                let mut after = 0;
                loop {
                    // Few at a time, so that a listing goes on often.
                    let names = fs.list(number, after, 7).unwrap();
                    let Some(last) = names.last() else { break };
                    assert!(last.next > after, "a listing goes back");
                    after = last.next;
                    for name in names {
                        let lost = path.is_empty() && name.name == b"lost+found";
                        if lost || matches!(name.name.as_slice(), b"." | b"..") {
                            continue;
                        }
                        let path = [path.as_slice(), b"/", &name.name].concat();
                        assert!(!found.contains_key(&path), "a name comes twice");
                        left.push((path, name.inode));
                    }
                }
            }
            0x8000 => {
                bytes = vec![0; known.size as usize];
                assert_eq!(fs.read(number, 0, &mut bytes).unwrap(), bytes.len());
            }
            0xa000 => bytes = fs.read_link(number).unwrap(),
            _ => {}
        }
        let names = fs.attribute_names(number).unwrap();
        let value = |name: &Vec<u8>| fs.attribute(number, name).unwrap().unwrap();
        let attributes = names.iter().map(|name| (name.clone(), value(name))).collect();
        let owner = (known.uid, known.gid);
        let links = known.links - u32::from(path.is_empty());
        found.insert(path, Seen { mode: known.mode, owner, links, bytes, attributes });
    }
    found
}

/// Fails where two trees differ, and says where.
pub fn same(model: &View, tree: &View, what: &str) {
    for (path, seen) in model {
        let name = String::from_utf8_lossy(path);
        let there = tree.get(path).unwrap_or_else(|| panic!("{what}: {name:?} is missing"));
        let short = |seen: &Seen| Seen { bytes: Vec::new(), ..seen.clone() };
        assert_eq!(short(seen), short(there), "{what}: {name:?}");
        let first = seen.bytes.iter().zip(&there.bytes).position(|(one, two)| one != two);
        let lens = (seen.bytes.len(), there.bytes.len());
        assert!(seen.bytes == there.bytes, "{what}: {name:?} differs at {first:?}, {lens:?}");
    }
    let more = tree.keys().find(|path| !model.contains_key(*path));
    let more = more.map(|path| String::from_utf8_lossy(path));
    assert!(more.is_none(), "{what}: {more:?} should not be there");
}
