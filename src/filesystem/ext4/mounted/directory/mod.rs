//! The names in a directory's blocks: found, added, taken away (kernel:
//! Documentation/filesystems/ext4/directory.rst). The index over them is [`index`](index)'s.

pub(super) mod hash;
pub(super) mod index;

use super::super::bytes::{le16, le32, put, put16, put32};
use super::super::checksum::checksum;
use super::Tx;
use super::inode::{self, DIRECTORY, FLAG_INDEX, FLAG_INLINE, Inode};
use super::state::blocks::Block;
use crate::error::{Error, Result};

/// The longest name.
pub const MAX_NAME: usize = 255;
/// Blocks of one directory at most: 2 GiB of names of 1 KiB blocks.
const MAX_BLOCKS: u64 = 1 << 21;
const HEADER: usize = 8;
const TAIL: usize = 12;

/// What a listing gives names to: the name, its inode, its kind, and where to go on after it. False
/// says that it is enough.
pub type Take<'a> = dyn FnMut(&[u8], u32, u8, u64) -> bool + 'a;

/// One name in a block.
#[derive(Debug, Clone, Copy)]
pub struct Slot<'a> {
    /// Where in the block it begins.
    pub at: usize,
    /// How far it is to the next.
    pub len: usize,
    /// The inode's number, 0 where there is no name.
    pub inode: u32,
    pub name: &'a [u8],
    /// What kind of file it is, as directories say it; 0 where they do not.
    pub kind: u8,
}

impl Slot<'_> {
    fn used(&self) -> usize {
        if self.inode == 0 { 0 } else { space(self.name.len()) }
    }
}

/// What a name of that length takes.
pub fn space(name: usize) -> usize {
    (HEADER + name).next_multiple_of(4)
}

/// What a name stands for.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    pub inode: u32,
    /// As [`kind_of`] tells it; 0 in a file system that does not keep it with the name.
    pub kind: u8,
}

impl Target {
    /// What an entry without a name says.
    const NONE: Target = Target { inode: 0, kind: 0 };

    pub fn of(inode: &Inode) -> Target {
        Target { inode: inode.number, kind: kind_of(inode.mode()) }
    }
}

/// The kind of a file, as a directory says it.
pub fn kind_of(mode: u16) -> u8 {
    match mode & inode::TYPE_MASK {
        inode::REGULAR => 1,
        inode::DIRECTORY => 2,
        inode::CHARACTER => 3,
        inode::BLOCK => 4,
        inode::FIFO => 5,
        inode::SOCKET => 6,
        inode::SYMLINK => 7,
        _ => 0,
    }
}

/// The length of an entry: in blocks of 64 KiB, 16 bits do not hold it.
fn length(raw: u16, block: usize) -> usize {
    match raw {
        0 | 0xffff if block == 65536 => 65536,
        raw => raw.into(),
    }
}

/// Stores an entry's header and name.
pub fn store(block: &mut [u8], at: usize, len: usize, target: Target, name: &[u8]) {
    put32(block, at, target.inode);
    put16(block, at + 4, if len == 65536 { 0xffff } else { len as u16 });
    put(block, at + 6, &[name.len() as u8, target.kind]);
    put(block, at + HEADER, name);
}

/// Calls `look` with each entry of `block` until that says enough.
pub fn walk<'b, T>(
    block: &'b [u8],
    mut look: impl FnMut(Slot<'b>) -> Option<T>,
) -> Result<Option<T>> {
    let damaged = || Error::corrupt("ext4: a directory is damaged");
    let mut at = 0;
    while at < block.len() {
        let entry = block.get(at..).filter(|rest| rest.len() >= HEADER).ok_or_else(damaged)?;
        let len = length(le16(entry, 4), block.len());
        if len < HEADER || !len.is_multiple_of(4) || len > entry.len() {
            return Err(damaged());
        }
        let (name_len, kind) = (usize::from(entry[6]), entry[7]);
        let name = entry.get(HEADER..HEADER + name_len).filter(|_| HEADER + name_len <= len);
        let slot = Slot { at, len, inode: le32(entry, 0), name: name.ok_or_else(damaged)?, kind };
        if let Some(found) = look(slot) {
            return Ok(Some(found));
        }
        at += len;
    }
    Ok(None)
}

impl Tx<'_> {
    /// Bytes of a block that names can use.
    pub fn usable(&self) -> usize {
        self.fs.sb.block_size - if self.fs.has_checksums() { TAIL } else { 0 }
    }

    /// How many blocks a directory has.
    pub fn directory_blocks(&self, directory: &Inode) -> Result<u64> {
        let blocks = directory.size().div_ceil(self.fs.sb.block_size as u64);
        match blocks <= MAX_BLOCKS.min(self.fs.sb.blocks) {
            true => Ok(blocks),
            false => Err(Error::corrupt("ext4: a directory is too long to be one")),
        }
    }

    /// Fails where names cannot be changed.
    pub fn writable_directory(&self, directory: &Inode) -> Result<()> {
        if directory.has(FLAG_INLINE) {
            let text = "ext4: a directory with inline data is only read here";
            return Err(Error::unsupported(text).with_os_error(libc::EOPNOTSUPP));
        }
        if directory.has(inode::FLAG_ENCRYPT | inode::FLAG_CASEFOLD) {
            let text = "ext4: an encrypted or case-folding directory is only read here";
            return Err(Error::unsupported(text).with_os_error(libc::EOPNOTSUPP));
        }
        Ok(())
    }

    /// The inode and the kind that a name stands for.
    pub fn find(&mut self, directory: &Inode, name: &[u8]) -> Result<Option<(u32, u8)>> {
        if directory.has(FLAG_INLINE) {
            let names = self.inline_names(directory)?;
            let found = names.into_iter().find(|(found, ..)| found == name);
            return Ok(found.map(|(_, inode, kind)| (inode, kind)));
        }
        Ok(self.locate(directory, name)?.map(|(_, inode, kind)| (inode, kind)))
    }

    /// The block of the disk in which a name stands, and what it stands for.
    fn locate(&mut self, directory: &Inode, name: &[u8]) -> Result<Option<(u64, u32, u8)>> {
        let search = |block: &[u8]| {
            walk(block, |slot| {
                (slot.inode != 0 && slot.name == name).then_some((slot.inode, slot.kind))
            })
        };
        if let Some(leaves) = self.index_leaves(directory, name)? {
            for leaf in leaves {
                let place = self.block_of(directory, leaf)?;
                if let Some((inode, kind)) = search(&self.read_names(directory, place)?)? {
                    return Ok(Some((place, inode, kind)));
                }
            }
            return Ok(None);
        }
        for at in 0..self.directory_blocks(directory)? {
            let Some(place) = self.stretch(directory, at)?.place else { continue };
            if let Some((inode, kind)) = search(&self.read_names(directory, place)?)? {
                return Ok(Some((place, inode, kind)));
            }
        }
        Ok(None)
    }

    /// Adds a name that is not there. The directory's inode is changed and not stored.
    pub fn add(&mut self, directory: &mut Inode, name: &[u8], target: Target) -> Result<()> {
        self.writable_directory(directory)?;
        let target = Target { kind: if self.fs.has_kinds() { target.kind } else { 0 }, ..target };
        if directory.has(FLAG_INDEX) {
            if self.add_indexed(directory, name, target)? {
                return Ok(());
            }
            // An index that nobody understands is none: the names stay where they are.
            directory.set_flags(directory.flags() & !FLAG_INDEX);
        }
        let blocks = self.directory_blocks(directory)?;
        for at in 0..blocks {
            let place = self.block_of(directory, at)?;
            if self.add_to_block(directory, place, name, target)? {
                return Ok(());
            }
        }
        if blocks == 1 && self.fs.has_indexes() {
            self.make_index(directory)?;
            return match self.add_indexed(directory, name, target)? {
                true => Ok(()),
                false => Err(Error::corrupt("ext4: a new index of a directory is unusable")),
            };
        }
        let (_, place) = self.append_block(directory)?;
        self.empty_block(directory, place)?;
        self.add_to_block(directory, place, name, target)?;
        Ok(())
    }

    /// Gives a directory one more block; returns its number there and its place.
    pub fn append_block(&mut self, directory: &mut Inode) -> Result<(u64, u64)> {
        let at = self.directory_blocks(directory)?;
        let (place, _) = self.grow(directory, at, 1, true)?;
        directory.set_size((at + 1) * self.fs.sb.block_size as u64);
        self.st.blocks.fresh(place)?;
        Ok((at, place))
    }

    /// Makes a block one without names.
    pub fn empty_block(&mut self, directory: &Inode, place: u64) -> Result<()> {
        let usable = self.usable();
        let block = self.st.blocks.fresh(place)?;
        store(block, 0, usable, Target::NONE, b"");
        self.seal_block(directory, place)
    }

    /// Adds a name to a block where it has room.
    pub fn add_to_block(
        &mut self,
        directory: &Inode,
        place: u64,
        name: &[u8],
        target: Target,
    ) -> Result<bool> {
        let need = space(name.len());
        let usable = self.usable();
        let bytes = self.read_names(directory, place)?;
        let names = bytes.get(..usable).unwrap_or_default();
        let found = walk(names, |slot| {
            let used = slot.used();
            (slot.len >= used + need).then_some((slot.at, slot.len, used))
        })?;
        let Some((at, len, used)) = found else { return Ok(false) };
        let block = self.edit(place)?;
        if used > 0 {
            put16(block, at + 4, used as u16);
        }
        store(block, at + used, len - used, target, name);
        self.seal_block(directory, place)?;
        Ok(true)
    }

    /// Takes a name away; returns the inode that it stood for.
    pub fn remove(&mut self, directory: &Inode, name: &[u8]) -> Result<u32> {
        self.writable_directory(directory)?;
        let gone = || Error::corrupt("ext4: a name went missing while it was taken away");
        let (place, inode, _) = self.locate(directory, name)?.ok_or_else(gone)?;
        let usable = self.usable();
        let bytes = self.read(place)?;
        let mut before: Option<(usize, usize)> = None;
        let names = bytes.get(..usable).unwrap_or_default();
        let found = walk(names, |slot| {
            if slot.inode != 0 && slot.name == name {
                return Some((slot.at, slot.len));
            }
            before = Some((slot.at, slot.len));
            None
        })?;
        let (at, len) = found.ok_or_else(gone)?;
        let block = self.edit(place)?;
        if let Some((from, to)) = before {
            let len = to + len;
            put16(block, from + 4, if len == 65536 { 0xffff } else { len as u16 });
            block.get_mut(at..at + len - to).unwrap_or_default().fill(0);
        } else {
            put32(block, at, 0);
            put(block, at + 6, &[0, 0]);
        }
        self.seal_block(directory, place)?;
        Ok(inode)
    }

    /// Makes a name that is there stand for another inode.
    pub fn replace(&mut self, directory: &Inode, name: &[u8], target: Target) -> Result<()> {
        self.writable_directory(directory)?;
        let gone = || Error::corrupt("ext4: a name went missing while it was changed");
        let (place, ..) = self.locate(directory, name)?.ok_or_else(gone)?;
        let bytes = self.read(place)?;
        let at = walk(&bytes, |slot| (slot.inode != 0 && slot.name == name).then_some(slot.at))?;
        let at = at.ok_or_else(gone)?;
        let kinds = self.fs.has_kinds();
        let block = self.edit(place)?;
        put32(block, at, target.inode);
        if kinds {
            put(block, at + 7, &[target.kind]);
        }
        self.seal_block(directory, place)
    }

    /// Whether a directory has no names but its own and its parent's.
    pub fn is_empty(&mut self, directory: &Inode) -> Result<bool> {
        if directory.has(FLAG_INLINE) {
            return Ok(self.inline_names(directory)?.is_empty());
        }
        for at in 0..self.directory_blocks(directory)? {
            let Some(place) = self.stretch(directory, at)?.place else { continue };
            let block = self.read(place)?;
            let named = walk(&block, |slot| {
                (slot.inode != 0 && !matches!(slot.name, b"" | b"." | b"..")).then_some(())
            })?;
            if named.is_some() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Fills the first block of a new directory.
    pub fn fill_first(&mut self, directory: &mut Inode, parent: u32) -> Result<()> {
        let (_, place) = self.append_block(directory)?;
        let (usable, kind) = (self.usable(), if self.fs.has_kinds() { 2 } else { 0 });
        let number = directory.number;
        let block = self.edit(place)?;
        store(block, 0, 12, Target { inode: number, kind }, b".");
        store(block, 12, usable - 12, Target { inode: parent, kind }, b"..");
        self.seal_block(directory, place)
    }

    /// The parent that a directory names.
    pub fn parent(&mut self, directory: &Inode) -> Result<u32> {
        if directory.has(FLAG_INLINE) {
            return Ok(le32(directory.map(), 0));
        }
        let place = self.block_of(directory, 0)?;
        let block = self.read(place)?;
        let found = walk(&block, |slot| (slot.name == b"..").then_some(slot.inode))?;
        found.ok_or_else(|| Error::corrupt("ext4: a directory does not name its parent"))
    }

    /// Makes a directory name another parent.
    pub fn set_parent(&mut self, directory: &Inode, parent: u32) -> Result<()> {
        self.writable_directory(directory)?;
        let place = self.block_of(directory, 0)?;
        let block = self.read(place)?;
        let at = walk(&block, |slot| (slot.name == b"..").then_some(slot.at))?;
        let at = at.ok_or_else(|| Error::corrupt("ext4: a directory does not name its parent"))?;
        put32(self.edit(place)?, at, parent);
        if directory.has(FLAG_INDEX) {
            return self.seal_node(directory, place, true);
        }
        self.seal_block(directory, place)
    }

    /// Puts in the checksum of a block of names.
    pub fn seal_block(&mut self, directory: &Inode, place: u64) -> Result<()> {
        if !self.fs.has_checksums() {
            return Ok(());
        }
        let (seed, usable) = (self.inode_seed(directory), self.usable());
        let block = self.edit(place)?;
        let sum = checksum(seed, block.get(..usable).unwrap_or_default());
        put32(block, usable, 0);
        put16(block, usable + 4, TAIL as u16);
        put(block, usable + 6, &[0, 0xde]);
        put32(block, usable + 8, sum);
        Ok(())
    }

    /// A block of names, which has its checksum where it is to have one.
    fn read_names(&mut self, directory: &Inode, place: u64) -> Result<Block> {
        let block = self.read(place)?;
        if !self.fs.has_checksums() {
            return Ok(block);
        }
        let usable = self.usable();
        let tail = block.get(usable..).unwrap_or_default();
        // A node of the index has its own, and says that it has no names.
        let names =
            le32(tail, 0) == 0 && le16(tail, 4) == TAIL as u16 && tail.get(7) == Some(&0xde);
        let seed = self.inode_seed(directory);
        let sum = checksum(seed, block.get(..usable).unwrap_or_default());
        match names && le32(tail, 8) != sum {
            true => Err(Error::corrupt("ext4: a directory's block does not have its checksum")
                .with_os_error(libc::EBADMSG)),
            false => Ok(block),
        }
    }

    /// The names in a directory that has them in its inode.
    fn inline_names(&mut self, directory: &Inode) -> Result<Vec<(Vec<u8>, u32, u8)>> {
        let rest = self.inline_rest(directory);
        let mut names = Vec::new();
        for bytes in [directory.map().get(4..).unwrap_or_default(), rest.as_slice()] {
            walk(bytes, |slot| {
                if slot.inode != 0 {
                    names.push((slot.name.to_vec(), slot.inode, slot.kind));
                }
                None::<()>
            })?;
        }
        Ok(names)
    }

    /// Calls `take` with the names of a directory from `after` on, in an order that changes of
    /// the directory do not disturb, until that has enough. Each comes with the place to go on
    /// after it.
    pub fn list(&mut self, directory: &Inode, after: u64, take: &mut Take<'_>) -> Result<()> {
        if !directory.is_directory() {
            return Err(Error::invalid("not a directory").with_os_error(libc::ENOTDIR));
        }
        if after < 1 && !take(b".", directory.number, kind_of(DIRECTORY), 1) {
            return Ok(());
        }
        if after < 2 {
            let parent = self.parent(directory)?;
            if !take(b"..", parent, kind_of(DIRECTORY), 2) {
                return Ok(());
            }
        }
        if directory.has(FLAG_INLINE) {
            let names = self.inline_names(directory)?;
            for (at, (name, inode, kind)) in
                names.iter().enumerate().skip(after.max(2) as usize - 2)
            {
                if !take(name, *inode, *kind, at as u64 + 3) {
                    break;
                }
            }
            return Ok(());
        }
        if self.list_sorted(directory, after, take)? {
            return Ok(());
        }
        self.list_blocks(directory, after, take)
    }

    /// Lists names in the order of their places.
    fn list_blocks(&mut self, directory: &Inode, after: u64, take: &mut Take<'_>) -> Result<()> {
        let size = self.fs.sb.block_size as u64;
        // The first two names count for 1 and 2; any other begins at byte 24 at least.
        for at in after / size..self.directory_blocks(directory)? {
            let Some(place) = self.stretch(directory, at)?.place else { continue };
            let block = self.read(place)?;
            let enough = walk(&block, |slot| {
                // A name goes on after its first byte: it may be joined to the one before.
                let next = at * size + slot.at as u64 + 1;
                let seen = slot.inode == 0 || next <= after;
                if seen || matches!(slot.name, b"" | b"." | b"..") {
                    return None;
                }
                (!take(slot.name, slot.inode, slot.kind, next.max(3))).then_some(())
            })?;
            if enough.is_some() {
                break;
            }
        }
        Ok(())
    }
}
