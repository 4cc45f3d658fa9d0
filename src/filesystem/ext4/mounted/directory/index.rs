//! The index of a large directory: a tree, sorted by the hashes of names, over its blocks (kernel:
//! Documentation/filesystems/ext4/directory.rst, "Hash Tree Directories").

use crate::error::{Error, Result};
use crate::filesystem::ext4::bytes::{le16, le32, put, put16, put32};
use crate::filesystem::ext4::checksum::checksum;
use crate::filesystem::ext4::mounted::directory::hash::{Hash, Kind, hash};
use crate::filesystem::ext4::mounted::directory::{self, Take, Target, space, store, walk};
use crate::filesystem::ext4::mounted::inode::{FLAG_CASEFOLD, FLAG_ENCRYPT, FLAG_INDEX, Inode};
use crate::filesystem::ext4::mounted::{Tx, no_space};

const INCOMPAT_LARGE: u32 = 0x4000;
const ENTRY: usize = 8;
/// Where entries begin in the root and in other nodes.
const ROOT: usize = 32;
const NODE: usize = 8;

/// Splits after which a name has found its place, where the index is what it should be.
const MOST_SPLITS: usize = 64;

/// A node on the way to a leaf.
struct Frame {
    /// Its block on the disk.
    place: u64,
    /// Where its entries begin.
    base: usize,
    /// Hashes and blocks of the directory. The first one's hash is 0.
    entries: Vec<(u32, u32)>,
    /// The one that the way goes on with.
    at: usize,
}

impl Frame {
    fn block(&self) -> u32 {
        self.entries.get(self.at).map_or(0, |(_, block)| *block)
    }
}

/// What the root says of all.
struct Index {
    kind: Kind,
    levels: u8,
}

/// A name that is to go into one of two blocks.
struct Moved {
    hash: Hash,
    inode: u32,
    kind: u8,
    name: Vec<u8>,
}

impl Tx<'_> {
    fn limit(&self, base: usize) -> usize {
        let tail = if self.fs.has_checksums() { 8 } else { 0 };
        (self.fs.sb.block_size - base - tail) / ENTRY
    }

    fn most_levels(&self) -> u8 {
        if self.fs.sb.incompat & INCOMPAT_LARGE != 0 { 3 } else { 2 }
    }

    /// The index of a directory; `None` where it has none that is understood.
    fn index(&mut self, dir: &Inode) -> Result<Option<Index>> {
        if !dir.has(FLAG_INDEX) || dir.has(FLAG_ENCRYPT | FLAG_CASEFOLD) || !self.fs.has_indexes() {
            return Ok(None);
        }
        let place = self.block_of(dir, 0)?;
        let root = self.read(place)?;
        let info = root.get(24..32).unwrap_or_default();
        let kind = Kind::new(info[4], self.fs.sb.hash_unsigned);
        let sound = le32(info, 0) == 0 && info[5] == 8 && info[6] < self.most_levels();
        Ok(kind.filter(|_| sound).map(|kind| Index { kind, levels: info[6] }))
    }

    fn hash_of(&self, kind: Kind, name: &[u8]) -> Hash {
        hash(name, kind, &self.fs.sb.hash_seed)
    }

    fn frame(&mut self, dir: &Inode, block: u32, base: usize) -> Result<Frame> {
        let place = self.block_of(dir, block.into())?;
        let raw = self.read(place)?;
        let (limit, count) = (usize::from(le16(&raw, base)), usize::from(le16(&raw, base + 2)));
        if limit != self.limit(base) || count == 0 || count > limit {
            return Err(Error::corrupt("ext4: the index of a directory is damaged"));
        }
        let entry = |n: usize| {
            let at = base + n * ENTRY;
            (if n == 0 { 0 } else { le32(&raw, at) }, le32(&raw, at + 4) & 0x0fff_ffff)
        };
        Ok(Frame { place, base, entries: (0..count).map(entry).collect(), at: 0 })
    }

    /// The way to the leaf where a name of that hash would be.
    fn descend(&mut self, dir: &Inode, index: &Index, hash: u32) -> Result<Vec<Frame>> {
        let mut path: Vec<Frame> = Vec::with_capacity(3);
        for level in 0..=index.levels {
            let block = path.last().map_or(0, Frame::block);
            let mut frame = self.frame(dir, block, if level == 0 { ROOT } else { NODE })?;
            frame.at = frame.entries.partition_point(|(key, _)| *key <= hash).saturating_sub(1);
            path.push(frame);
        }
        Ok(path)
    }

    /// Goes on to the next leaf; returns its key.
    fn advance(&mut self, dir: &Inode, path: &mut Vec<Frame>) -> Result<Option<u32>> {
        let depth = path.len();
        while path.last().is_some_and(|frame| frame.at + 1 >= frame.entries.len()) {
            path.pop();
        }
        let Some(frame) = path.last_mut() else { return Ok(None) };
        frame.at += 1;
        let key = frame.entries.get(frame.at).map_or(0, |(key, _)| *key);
        while path.len() < depth {
            let block = path.last().map_or(0, Frame::block);
            let below = self.frame(dir, block, NODE)?;
            path.push(below);
        }
        Ok(Some(key))
    }

    /// The blocks of a directory that can hold a name, where it has an index.
    pub fn index_leaves(&mut self, dir: &Inode, name: &[u8]) -> Result<Option<Vec<u64>>> {
        let Some(index) = self.index(dir)? else { return Ok(None) };
        let (major, _) = self.hash_of(index.kind, name);
        let mut path = self.descend(dir, &index, major)?;
        let mut leaves = Vec::with_capacity(1);
        let most = self.directory_blocks(dir)?;
        loop {
            leaves.push(path.last().map_or(0, Frame::block).into());
            if leaves.len() as u64 > most {
                return Err(Error::corrupt("ext4: the index of a directory leads in circles"));
            }
            // Names that share a hash may be in the blocks after it too.
            match self.advance(dir, &mut path)? {
                Some(key) if key & 1 == 1 && key & !1 == major => {}
                _ => return Ok(Some(leaves)),
            }
        }
    }

    /// Adds a name where the index says; false where it is not understood.
    pub fn add_indexed(&mut self, dir: &mut Inode, name: &[u8], target: Target) -> Result<bool> {
        for _ in 0..MOST_SPLITS {
            let Some(index) = self.index(dir)? else { return Ok(false) };
            let (major, _) = self.hash_of(index.kind, name);
            let mut path = self.descend(dir, &index, major)?;
            let leaf = path.last().map_or(0, Frame::block);
            let place = self.block_of(dir, leaf.into())?;
            if self.add_to_block(dir, place, name, target)? {
                return Ok(true);
            }
            let full = |frame: &Frame, tx: &Tx<'_>| frame.entries.len() >= tx.limit(frame.base);
            // From the root down: what is full and below room is split, and the search begins anew.
            match path.iter().position(|frame| full(frame, self)) {
                Some(0) => self.deepen(dir, &index, &path)?,
                Some(level) => self.split_node(dir, &mut path, level)?,
                None => self.split_leaf(dir, &index, &mut path, place)?,
            }
        }
        Err(Error::corrupt("ext4: the index of a directory is damaged"))
    }

    /// Stores the entries of a node.
    fn store_frame(&mut self, dir: &Inode, frame: &Frame) -> Result<()> {
        let limit = self.limit(frame.base);
        let raw = self.edit(frame.place)?;
        for (n, (key, block)) in frame.entries.iter().enumerate() {
            let at = frame.base + n * ENTRY;
            put32(raw, at, *key);
            put32(raw, at + 4, *block);
        }
        put16(raw, frame.base, limit as u16);
        put16(raw, frame.base + 2, frame.entries.len() as u16);
        self.seal_node(dir, frame.place, frame.base == ROOT)
    }

    /// Puts in the checksum of a node.
    pub fn seal_node(&mut self, dir: &Inode, place: u64, root: bool) -> Result<()> {
        if !self.fs.has_checksums() {
            return Ok(());
        }
        let base = if root { ROOT } else { NODE };
        let seed = self.inode_seed(dir);
        let raw = self.edit(place)?;
        let (limit, count) = (usize::from(le16(raw, base)), usize::from(le16(raw, base + 2)));
        let tail = base + limit * ENTRY;
        let sum = checksum(seed, raw.get(..base + count * ENTRY).unwrap_or_default());
        let sum = checksum(sum, raw.get(tail..tail + 4).unwrap_or_default());
        put32(raw, tail + 4, checksum(sum, &[0; 4]));
        Ok(())
    }

    /// A new node with those entries; returns its number in the directory.
    fn new_node_block(&mut self, dir: &mut Inode, entries: Vec<(u32, u32)>) -> Result<u32> {
        let (number, place) = self.append_block(dir)?;
        let size = self.fs.sb.block_size;
        store(self.edit(place)?, 0, size, Target::NONE, b"");
        self.store_frame(dir, &Frame { place, base: NODE, entries, at: 0 })?;
        Ok(number as u32)
    }

    /// Puts a level between a full root and what is below it.
    fn deepen(&mut self, dir: &mut Inode, index: &Index, path: &[Frame]) -> Result<()> {
        let Some(root) = path.first() else { return Err(no_space()) };
        if index.levels + 1 >= self.most_levels() {
            return Err(no_space());
        }
        let below = self.new_node_block(dir, root.entries.clone())?;
        put(self.edit(root.place)?, 30, &[index.levels + 1]);
        let frame = Frame { place: root.place, base: ROOT, entries: vec![(0, below)], at: 0 };
        self.store_frame(dir, &frame)
    }

    /// Splits a full node in two; the one above has room.
    fn split_node(&mut self, dir: &mut Inode, path: &mut [Frame], level: usize) -> Result<()> {
        let Some((above, below)) = path.split_at_mut_checked(level) else { return Err(no_space()) };
        let (Some(above), Some(node)) = (above.last_mut(), below.first_mut()) else {
            return Err(no_space());
        };
        let upper = node.entries.split_off(node.entries.len() / 2);
        let key = upper.first().map_or(0, |(key, _)| *key);
        let block = self.new_node_block(dir, upper)?;
        self.store_frame(dir, node)?;
        above.entries.insert(above.at + 1, (key, block));
        self.store_frame(dir, above)
    }

    /// Splits a full block of names in two; the node above has room.
    fn split_leaf(
        &mut self,
        dir: &mut Inode,
        index: &Index,
        path: &mut [Frame],
        place: u64,
    ) -> Result<()> {
        let names = self.names_of(index.kind, place)?;
        let total: usize = names.iter().map(|moved| space(moved.name.len())).sum();
        let mut half = 0;
        let middle = names
            .iter()
            .position(|moved| {
                half += space(moved.name.len());
                half > total / 2
            })
            .unwrap_or(0)
            .clamp(1, names.len().saturating_sub(1).max(1));
        let (Some(last), Some(first)) = (names.get(middle - 1), names.get(middle)) else {
            return Err(Error::corrupt("ext4: a directory's block cannot be split"));
        };
        // A key that goes on with the hash of the block before it has the lowest bit set.
        let key = first.hash.0 | u32::from(first.hash.0 == last.hash.0);
        let (number, new) = self.append_block(dir)?;
        self.fill_block(dir, new, names.get(middle..).unwrap_or_default())?;
        self.fill_block(dir, place, names.get(..middle).unwrap_or_default())?;
        let Some(above) = path.last_mut() else { return Err(no_space()) };
        above.entries.insert(above.at + 1, (key, number as u32));
        self.store_frame(dir, above)
    }

    /// The names in a block, in the order of their hashes.
    fn names_of(&mut self, kind: Kind, place: u64) -> Result<Vec<Moved>> {
        let block = self.read(place)?;
        let mut names = Vec::new();
        let seed = &self.fs.sb.hash_seed;
        walk(&block, |slot| {
            if slot.inode != 0 && !matches!(slot.name, b"" | b"." | b"..") {
                names.push(Moved {
                    hash: hash(slot.name, kind, seed),
                    inode: slot.inode,
                    kind: slot.kind,
                    name: slot.name.to_vec(),
                });
            }
            None::<()>
        })?;
        names.sort_by_key(|moved| moved.hash);
        Ok(names)
    }

    fn fill_block(&mut self, dir: &Inode, place: u64, names: &[Moved]) -> Result<()> {
        let usable = self.usable();
        let block = self.st.blocks.fresh(place)?;
        let mut at = 0;
        for (index, moved) in names.iter().enumerate() {
            let used = space(moved.name.len());
            let len = if index + 1 == names.len() { usable - at } else { used };
            store(block, at, len, Target { inode: moved.inode, kind: moved.kind }, &moved.name);
            at += used;
        }
        self.seal_block(dir, place)
    }

    /// Gives a directory of one block an index: its names move to a second one.
    pub fn make_index(&mut self, dir: &mut Inode) -> Result<()> {
        let unusable = || Error::corrupt("ext4: a directory's first block is damaged");
        let root = self.block_of(dir, 0)?;
        let parent = self.parent(dir)?;
        let kind = Kind::new(self.fs.sb.hash_version, self.fs.sb.hash_unsigned);
        let kind = kind.ok_or_else(unusable)?;
        let names = self.names_of(kind, root)?;
        if names.is_empty() {
            return Err(unusable());
        }
        let (number, leaf) = self.append_block(dir)?;
        self.fill_block(dir, leaf, &names)?;
        let (size, version) = (self.fs.sb.block_size, self.fs.sb.hash_version);
        let file_kind =
            if self.fs.has_kinds() { directory::kind_of(super::inode::DIRECTORY) } else { 0 };
        let block = self.st.blocks.fresh(root)?;
        store(block, 0, 12, Target { inode: dir.number, kind: file_kind }, b".");
        store(block, 12, size - 12, Target { inode: parent, kind: file_kind }, b"..");
        put(block, 28, &[version, 8, 0, 0]);
        dir.set_flags(dir.flags() | FLAG_INDEX);
        let entries = vec![(0, number as u32)];
        self.store_frame(dir, &Frame { place: root, base: ROOT, entries, at: 0 })
    }

    /// Lists names in the order of their hashes; false where there is no such order.
    pub fn list_sorted(&mut self, dir: &Inode, after: u64, take: &mut Take<'_>) -> Result<bool> {
        let after = after.checked_sub(3).filter(|_| after >= 3);
        let Some(index) = self.index(dir)? else {
            let kind = Kind::new(self.fs.sb.hash_version, self.fs.sb.hash_unsigned);
            let one = self.directory_blocks(dir)? == 1 && !dir.has(FLAG_INDEX);
            let Some(kind) = kind.filter(|_| one && self.fs.has_indexes()) else {
                return Ok(false);
            };
            let place = self.block_of(dir, 0)?;
            let names = self.names_of(kind, place)?;
            show(&names, after, take);
            return Ok(true);
        };
        let from = after.map_or(0, |after| (after >> 32) as u32) << 1;
        let mut path = self.descend(dir, &index, from)?;
        // A damaged index may lead in circles.
        let mut left = self.directory_blocks(dir)?;
        loop {
            let mut names: Vec<Moved> = Vec::new();
            let next = loop {
                let leaf = path.last().map_or(0, Frame::block);
                let place = self.block_of(dir, leaf.into())?;
                names.append(&mut self.names_of(index.kind, place)?);
                left = left.saturating_sub(1);
                match self.advance(dir, &mut path)? {
                    Some(key) if key & 1 == 1 && left > 0 => {}
                    next => break next,
                }
            };
            names.sort_by_key(|moved| moved.hash);
            if !show(&names, after, take) || next.is_none() || left == 0 {
                return Ok(true);
            }
        }
    }
}

/// Where a listing goes on after a name of that hash.
fn cookie(hash: Hash) -> u64 {
    (u64::from(hash.0 >> 1) << 32 | u64::from(hash.1)) + 3
}

/// Calls `take` with the names after a place; false where it had enough.
fn show(names: &[Moved], after: Option<u64>, take: &mut Take<'_>) -> bool {
    let start = names.partition_point(|m| after.is_some_and(|after| cookie(m.hash) - 3 <= after));
    let rest = names.get(start..).unwrap_or_default();
    for (at, moved) in rest.iter().enumerate() {
        let own = cookie(moved.hash);
        // Of names with one hash all come again unless the last was taken.
        let more = rest.get(at + 1).is_some_and(|next| next.hash == moved.hash);
        let next = if more { own - 1 } else { own };
        if !take(&moved.name, moved.inode, moved.kind, next.max(3)) {
            return false;
        }
    }
    true
}
