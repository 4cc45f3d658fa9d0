//! Trees of extents, read and changed (kernel: Documentation/filesystems/ext4/ifork.rst).
//!
//! There is one change: a stretch of a file is mapped as a list says, and what stood there before
//! comes back to the caller. Holes, allocation, truncation and the marking of what was written all
//! are that. A node that overflows becomes several, one that is empty goes, and the keys above a
//! node are always those of its first entry.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::filesystem::ext4::bytes::{le16, le32, put16, put32, wide};
use crate::filesystem::ext4::checksum::checksum;
use crate::filesystem::ext4::mounted::Tx;
use crate::filesystem::ext4::mounted::inode::Inode;

const MAGIC: u16 = 0xf30a;
const HEADER: usize = 12;
const ENTRY: usize = 12;
/// The deepest tree that the format allows.
const MAX_DEPTH: u16 = 5;
/// The longest extent; of blocks that were never written, one less.
pub const LONGEST: u32 = 32768;
/// Blocks of a file at most.
pub const MAX_BLOCKS: u64 = u32::MAX as u64;

/// Blocks of a file that follow one another on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The first one's number in the file.
    pub at: u32,
    /// How many.
    pub len: u32,
    /// The first one's place.
    pub place: u64,
    /// Whether they hold anything; else they read as zeroes.
    pub written: bool,
}

impl Extent {
    fn end(&self) -> u64 {
        u64::from(self.at) + u64::from(self.len)
    }

    /// The part of it in `from..to`.
    pub fn cut(&self, from: u64, to: u64) -> Option<Extent> {
        let (start, end) = (from.max(self.at.into()), to.min(self.end()));
        let skip = start.checked_sub(self.at.into())?;
        (start < end).then(|| Extent {
            at: start as u32,
            len: (end - start) as u32,
            place: self.place + skip,
            written: self.written,
        })
    }

    fn joins(&self, next: &Extent) -> bool {
        let most = if self.written { LONGEST } else { LONGEST - 1 };
        self.written == next.written
            && self.end() == u64::from(next.at)
            && self.place + u64::from(self.len) == next.place
            && u64::from(self.len) + u64::from(next.len) <= most.into()
    }

    fn parse(entry: &[u8]) -> Extent {
        let raw = u32::from(le16(entry, 4));
        let written = raw <= LONGEST;
        Extent {
            at: le32(entry, 0),
            len: if written { raw } else { raw - LONGEST },
            place: wide(le16(entry, 6).into(), le32(entry, 8)),
            written,
        }
    }

    fn store(&self, entry: &mut [u8]) {
        put32(entry, 0, self.at);
        let len = if self.written { self.len } else { self.len + LONGEST };
        put16(entry, 4, len as u16);
        put16(entry, 6, (self.place >> 32) as u16);
        put32(entry, 8, self.place as u32);
    }
}

/// A child of a node, and the number of the first block that it maps.
#[derive(Debug, Clone, Copy)]
struct Child {
    at: u32,
    block: u64,
}

enum Node {
    Leaf(Vec<Extent>),
    Inner(Vec<Child>),
}

impl Node {
    fn len(&self) -> usize {
        match self {
            Node::Leaf(extents) => extents.len(),
            Node::Inner(children) => children.len(),
        }
    }

    fn first(&self) -> u32 {
        match self {
            Node::Leaf(extents) => extents.first().map_or(0, |extent| extent.at),
            Node::Inner(children) => children.first().map_or(0, |child| child.at),
        }
    }

    fn split_off(&mut self, at: usize) -> Node {
        match self {
            Node::Leaf(extents) => Node::Leaf(extents.split_off(at)),
            Node::Inner(children) => Node::Inner(children.split_off(at)),
        }
    }

    fn store(&self, raw: &mut [u8], depth: u16) {
        let most = (raw.len() - HEADER) / ENTRY;
        put16(raw, 0, MAGIC);
        put16(raw, 2, self.len() as u16);
        put16(raw, 4, most as u16);
        put16(raw, 6, depth);
        put32(raw, 8, 0);
        let mut entries = raw.get_mut(HEADER..).unwrap_or_default().chunks_exact_mut(ENTRY);
        match self {
            Node::Leaf(extents) => {
                extents.iter().zip(&mut entries).for_each(|(extent, raw)| extent.store(raw));
            }
            Node::Inner(children) => {
                for (child, raw) in children.iter().zip(&mut entries) {
                    put32(raw, 0, child.at);
                    put32(raw, 4, child.block as u32);
                    put16(raw, 8, (child.block >> 32) as u16);
                    put16(raw, 10, 0);
                }
            }
        }
        entries.for_each(|rest| rest.fill(0));
    }
}

/// One change of a tree.
struct Change<'a> {
    /// The stretch, in blocks of the file.
    from: u64,
    to: u64,
    /// How it is mapped from now on, in order.
    new: &'a [Extent],
    /// What stood there.
    old: Vec<Extent>,
    /// Where new nodes had best stand.
    goal: u64,
    /// What was taken for nodes, less what was given back.
    nodes: i64,
    number: u32,
    seed: u32,
}

/// An empty tree in an inode.
pub fn clear(map: &mut [u8]) {
    map.fill(0);
    Node::Leaf(Vec::new()).store(map, 0);
}

fn corrupt(number: u32) -> Error {
    Error::corrupt(format!("ext4: inode {number}: its tree of extents is damaged"))
}

fn parse(raw: &[u8], depth: u16, number: u32) -> Result<Node> {
    let (count, most) = (usize::from(le16(raw, 2)), (raw.len() - HEADER) / ENTRY);
    if le16(raw, 0) != MAGIC || le16(raw, 6) != depth || depth > MAX_DEPTH || count > most {
        return Err(corrupt(number));
    }
    let entries = raw.get(HEADER..).unwrap_or_default().chunks_exact(ENTRY).take(count);
    if depth == 0 {
        let extents: Vec<Extent> = entries.map(Extent::parse).collect();
        let ordered = extents.windows(2).all(|w| w[0].end() <= u64::from(w[1].at));
        let sound = |e: &Extent| e.len > 0 && e.end() <= MAX_BLOCKS + 1;
        return match ordered && extents.iter().all(sound) {
            true => Ok(Node::Leaf(extents)),
            false => Err(corrupt(number)),
        };
    }
    let child = |e: &[u8]| Child { at: le32(e, 0), block: wide(le16(e, 8).into(), le32(e, 4)) };
    let children: Vec<Child> = entries.map(child).collect();
    match children.windows(2).all(|w| w[0].at < w[1].at) {
        true => Ok(Node::Inner(children)),
        false => Err(corrupt(number)),
    }
}

impl Tx<'_> {
    /// What maps block `at` of a file, or the hole around it: its extent, and how many blocks from
    /// `at` on are alike.
    pub fn extent_at(&mut self, inode: &Inode, at: u64) -> Result<(Option<Extent>, u64)> {
        let mut depth = le16(inode.map(), 6);
        let mut node = parse(inode.map(), depth, inode.number)?;
        let mut limit = MAX_BLOCKS + 1;
        loop {
            match &node {
                Node::Leaf(extents) => {
                    let next = extents.partition_point(|e| u64::from(e.at) <= at);
                    limit = extents.get(next).map_or(limit, |e| limit.min(e.at.into()));
                    let found = next.checked_sub(1).and_then(|i| extents.get(i)).copied();
                    return Ok(match found.filter(|extent| extent.end() > at) {
                        Some(extent) => (Some(extent), extent.end().min(limit) - at),
                        None => (None, limit.saturating_sub(at).max(1)),
                    });
                }
                Node::Inner(children) => {
                    let next = children.partition_point(|c| u64::from(c.at) <= at);
                    limit = children.get(next).map_or(limit, |c| limit.min(c.at.into()));
                    let child = next.checked_sub(1).and_then(|i| children.get(i)).copied();
                    let Some(child) = child else {
                        return Ok((None, limit.saturating_sub(at).max(1)));
                    };
                    depth -= 1;
                    let raw = self.read(child.block)?;
                    node = parse(&raw, depth, inode.number)?;
                }
            }
        }
    }

    /// Maps a range of a file as `new` says, and as holes for the rest; returns what stood
    /// there. The inode is changed and not stored.
    pub fn map_extents(
        &mut self,
        inode: &mut Inode,
        range: Range<u64>,
        new: &[Extent],
    ) -> Result<Vec<Extent>> {
        let Range { start: from, end: to } = range;
        let goal = new.first().map_or_else(|| self.fs.goal_of(inode.number), |e| e.place);
        let (number, seed) = (inode.number, self.inode_seed(inode));
        let mut change = Change { from, to, new, old: Vec::new(), goal, nodes: 0, number, seed };
        let mut depth = le16(inode.map(), 6);
        let node = parse(inode.map(), depth, number)?;
        let mut node = self.changed(node, depth, 0..MAX_BLOCKS + 1, &mut change)?;
        let room = (inode.map().len() - HEADER) / ENTRY;
        while node.len() > room {
            if depth >= MAX_DEPTH {
                return Err(corrupt(number));
            }
            let children = self.store_nodes(node, depth, None, &mut change)?;
            node = Node::Inner(children);
            depth += 1;
        }
        // What fits into the inode comes back into it.
        while let Node::Inner(children) = &node {
            match children.as_slice() {
                [] => {
                    node = Node::Leaf(Vec::new());
                    depth = 0;
                }
                [only] => {
                    let only = *only;
                    let raw = self.read(only.block)?;
                    let below = parse(&raw, depth - 1, number)?;
                    if below.len() > room {
                        break;
                    }
                    self.free_metadata(only.block)?;
                    change.nodes -= 1;
                    node = below;
                    depth -= 1;
                }
                _ => break,
            }
        }
        node.store(inode.map_mut(), depth);
        let size = self.fs.sb.block_size;
        inode.add_blocks(change.nodes, size);
        Ok(change.old)
    }

    /// A node as it is after the change; it maps nothing outside `bounds`.
    fn changed(
        &mut self,
        node: Node,
        depth: u16,
        bounds: Range<u64>,
        change: &mut Change<'_>,
    ) -> Result<Node> {
        let children = match node {
            Node::Leaf(extents) => return Ok(Node::Leaf(leaf(extents, bounds, change))),
            Node::Inner(children) => children,
        };
        let mut after = Vec::with_capacity(children.len() + 1);
        for (index, child) in children.iter().enumerate() {
            let next = children.get(index + 1).map_or(bounds.end, |next| next.at.into());
            // The first child takes what is mapped before its key from now on.
            let first = if index == 0 { bounds.start } else { child.at.into() };
            if change.to <= first || change.from >= next {
                after.push(*child);
                continue;
            }
            let raw = self.read(child.block)?;
            let below = parse(&raw, depth - 1, change.number)?;
            let below = self.changed(below, depth - 1, first..next, change)?;
            if below.len() == 0 {
                self.free_metadata(child.block)?;
                change.nodes -= 1;
            } else {
                after.extend(self.store_nodes(below, depth - 1, Some(child.block), change)?);
            }
        }
        Ok(Node::Inner(after))
    }

    /// Stores a node, the first part of it in `place`, and returns the entries for it.
    fn store_nodes(
        &mut self,
        node: Node,
        depth: u16,
        mut place: Option<u64>,
        change: &mut Change<'_>,
    ) -> Result<Vec<Child>> {
        let most = (self.fs.sb.block_size - HEADER) / ENTRY;
        let mut children = Vec::new();
        let mut rest = Some(node);
        while let Some(mut node) = rest.take() {
            if node.len() > most {
                // A file that grows leaves full nodes behind; others are split in halves.
                let grows = change.to >= u64::from(last_key(&node)) && node.len() <= most + 4;
                let keep = if grows { most } else { node.len().div_ceil(2).min(most) };
                rest = Some(node.split_off(keep));
            }
            let sums = self.fs.has_checksums();
            let (block, raw) = match place.take() {
                Some(block) => (block, self.edit(block)?),
                None => {
                    change.nodes += 1;
                    let block = self.allocate(change.goal, 1)?.0;
                    (block, self.st.blocks.fresh(block)?)
                }
            };
            node.store(raw, depth);
            if sums {
                let tail = HEADER + ENTRY * ((raw.len() - HEADER) / ENTRY);
                let sum = checksum(change.seed, raw.get(..tail).unwrap_or_default());
                put32(raw, tail, sum);
            }
            children.push(Child { at: node.first(), block });
        }
        Ok(children)
    }
}

fn last_key(node: &Node) -> u32 {
    match node {
        Node::Leaf(extents) => extents.last().map_or(0, |extent| extent.at),
        Node::Inner(children) => children.last().map_or(0, |child| child.at),
    }
}

/// The extents of a leaf after the change.
fn leaf(extents: Vec<Extent>, bounds: Range<u64>, change: &mut Change<'_>) -> Vec<Extent> {
    let (from, to) = (change.from.max(bounds.start), change.to.min(bounds.end));
    let mut after: Vec<Extent> = Vec::with_capacity(extents.len() + change.new.len() + 1);
    let mut add = |extent: Extent| match after.last_mut() {
        Some(last) if last.joins(&extent) => last.len += extent.len,
        _ => after.push(extent),
    };
    let mut new = change.new.iter().filter_map(|extent| extent.cut(from, to)).peekable();
    for extent in &extents {
        extent.cut(0, from).into_iter().for_each(&mut add);
        if let Some(old) = extent.cut(from, to) {
            change.old.push(old);
        }
        if extent.end() > from {
            while let Some(extent) = new.next_if(|_| true) {
                add(extent);
            }
        }
        extent.cut(to, u64::MAX).into_iter().for_each(&mut add);
    }
    new.for_each(&mut add);
    after
}
