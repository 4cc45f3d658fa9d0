//! Extended attributes, in the inode and in a block of their own (kernel:
//! Documentation/filesystems/ext4/attributes.rst).

use super::super::bytes::{le16, le32, put, put16, put32};
use super::super::checksum::checksum;
use super::inode::{FLAG_EA_INODE, Inode};
use super::{Tx, errno, no_space};
use crate::error::{Error, Result};

const MAGIC: u32 = 0xea02_0000;
const ENTRY: usize = 16;
/// The header of a block of attributes.
const HEADER: usize = 32;
/// The longest value that is read from an inode of its own.
const MAX_VALUE: u64 = 65536;
/// What stands for the beginnings of names, by their numbers.
const PREFIXES: &[(u8, &[u8])] = &[
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (8, b"system.richacl"),
    (1, b"user."),
    (4, b"trusted."),
    (6, b"security."),
    (7, b"system."),
];

/// One attribute as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attribute {
    /// The number of its name's beginning.
    pub index: u8,
    /// The rest of its name.
    pub name: Vec<u8>,
    value: Vec<u8>,
    /// The inode that holds the value, and its length there.
    elsewhere: Option<(u32, u32)>,
}

impl Attribute {
    fn value_len(&self) -> usize {
        if self.elsewhere.is_some() { 0 } else { self.value.len().next_multiple_of(4) }
    }

    fn size(&self) -> usize {
        (ENTRY + self.name.len()).next_multiple_of(4) + self.value_len()
    }

    fn key(&self) -> (u8, usize, &[u8]) {
        (self.index, self.name.len(), &self.name)
    }

    /// Its whole name; `None` for one that nobody outside is to see.
    fn full_name(&self) -> Option<Vec<u8>> {
        let (index, prefix) = PREFIXES.iter().find(|(index, _)| *index == self.index)?;
        if *index == 7 && self.name == b"data" {
            return None;
        }
        Some([prefix, self.name.as_slice()].concat())
    }

    /// The hash by which it is told from others.
    fn hash(&self) -> u32 {
        let name = self.name.iter().fold(0u32, |hash, byte| hash.rotate_left(5) ^ u32::from(*byte));
        self.value.chunks(4).fold(name, |hash, chunk| {
            let mut word = [0; 4];
            put(&mut word, 0, chunk);
            hash.rotate_left(16) ^ u32::from_le_bytes(word)
        })
    }
}

/// The number of a name's beginning, and the rest of it.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    let (index, prefix) = PREFIXES.iter().find(|(_, prefix)| name.starts_with(prefix))?;
    let rest = name.get(prefix.len()..)?;
    let whole = !prefix.ends_with(b".");
    match rest.is_empty() == whole {
        true => Some((*index, rest)),
        false => None,
    }
}

/// Reads the entries in `area`, of which values are counted from its begin; entries begin at
/// `first`.
fn parse(area: &[u8], first: usize) -> Result<Vec<Attribute>> {
    let damaged = || Error::corrupt("ext4: extended attributes are damaged");
    let (mut found, mut at) = (Vec::new(), first);
    while let Some(entry) = area.get(at..).filter(|rest| rest.len() >= 4 && le32(rest, 0) != 0) {
        if entry.len() < ENTRY {
            return Err(damaged());
        }
        let name_len = usize::from(entry[0]);
        let name = entry.get(ENTRY..ENTRY + name_len).ok_or_else(damaged)?.to_vec();
        let (start, inode, len) = (usize::from(le16(entry, 2)), le32(entry, 4), le32(entry, 8));
        let (value, elsewhere) = if inode != 0 {
            (Vec::new(), Some((inode, len)))
        } else {
            let end = start.checked_add(len as usize).ok_or_else(damaged)?;
            (area.get(start..end).ok_or_else(damaged)?.to_vec(), None)
        };
        found.push(Attribute { index: entry[1], name, value, elsewhere });
        at += (ENTRY + name_len).next_multiple_of(4);
    }
    Ok(found)
}

/// Fills `area` from `first` on. They fit: [`fits`] was asked.
fn store(area: &mut [u8], first: usize, attributes: &[Attribute], hashes: bool) {
    area.get_mut(first..).unwrap_or_default().fill(0);
    let (mut at, mut end) = (first, area.len());
    for attribute in attributes {
        let len = attribute.elsewhere.map_or(attribute.value.len() as u32, |(_, len)| len);
        put(area, at, &[attribute.name.len() as u8, attribute.index]);
        if attribute.elsewhere.is_none() {
            end -= attribute.value_len();
            put16(area, at + 2, if attribute.value.is_empty() { 0 } else { end as u16 });
            put(area, end, &attribute.value);
        }
        put32(area, at + 4, attribute.elsewhere.map_or(0, |(inode, _)| inode));
        put32(area, at + 8, len);
        put32(area, at + 12, if hashes { attribute.hash() } else { 0 });
        put(area, at + ENTRY, &attribute.name);
        at += (ENTRY + attribute.name.len()).next_multiple_of(4);
    }
}

/// Whether attributes fit into that many bytes, with the mark of their end.
fn fits(attributes: &[Attribute], bytes: usize) -> bool {
    attributes.iter().map(Attribute::size).sum::<usize>() + 4 <= bytes
}

impl Tx<'_> {
    /// Where in the inode its attributes stand: after the magic.
    fn inner_area(inode: &Inode) -> Option<std::ops::Range<usize>> {
        let start = 128 + inode.extra() + 4;
        (inode.raw.len() > 128 && inode.extra() > 0 && start + 4 <= inode.raw.len())
            .then_some(start..inode.raw.len())
    }

    fn inner(inode: &Inode) -> Result<Vec<Attribute>> {
        let Some(area) = Tx::inner_area(inode) else { return Ok(Vec::new()) };
        if le32(&inode.raw, area.start - 4) != MAGIC {
            return Ok(Vec::new());
        }
        parse(inode.raw.get(area).unwrap_or_default(), 0)
    }

    fn outer(&mut self, inode: &Inode) -> Result<Vec<Attribute>> {
        match inode.attributes() {
            0 => Ok(Vec::new()),
            place => {
                let block = self.read(place)?;
                if le32(&block, 0) != MAGIC {
                    return Err(Error::corrupt("ext4: a block of attributes is damaged"));
                }
                parse(&block, HEADER)
            }
        }
    }

    /// What of inline data does not stand in the inode's map.
    pub fn inline_rest(&mut self, inode: &Inode) -> Vec<u8> {
        let inner = Tx::inner(inode).unwrap_or_default();
        let data = inner.into_iter().find(|a| a.index == 7 && a.name == b"data");
        data.map(|attribute| attribute.value).unwrap_or_default()
    }

    /// The names of all attributes.
    pub fn attribute_names(&mut self, inode: &Inode) -> Result<Vec<Vec<u8>>> {
        let mut all = Tx::inner(inode)?;
        all.append(&mut self.outer(inode)?);
        Ok(all.iter().filter_map(Attribute::full_name).collect())
    }

    /// The value of an attribute.
    pub fn attribute(&mut self, inode: &Inode, name: &[u8]) -> Result<Option<Vec<u8>>> {
        let Some((index, rest)) = split(name) else { return Ok(None) };
        let same = |a: &Attribute| a.index == index && a.name == rest;
        let mut found = Tx::inner(inode)?.into_iter().find(same);
        if found.is_none() {
            found = self.outer(inode)?.into_iter().find(same);
        }
        let Some(found) = found.filter(|a| a.full_name().is_some()) else { return Ok(None) };
        let Some((holder, len)) = found.elsewhere else { return Ok(Some(found.value)) };
        let holder = self.inode(holder)?;
        if !holder.has(FLAG_EA_INODE) || u64::from(len) > MAX_VALUE.min(holder.size()) {
            return Err(Error::corrupt("ext4: the value of an attribute is damaged"));
        }
        let mut value = vec![0; len as usize];
        self.read_file(&holder, 0, &mut value)?;
        Ok(Some(value))
    }

    /// Sets an attribute, or takes it away; the inode is changed and not stored. Returns whether
    /// it was there.
    pub fn set_attribute(
        &mut self,
        inode: &mut Inode,
        name: &[u8],
        value: Option<&[u8]>,
    ) -> Result<bool> {
        let unknown = || errno(libc::EOPNOTSUPP, "no such kind of attribute");
        let (index, rest) = split(name).ok_or_else(unknown)?;
        let (mut inner, mut outer) = (Tx::inner(inode)?, self.outer(inode)?);
        let before = (inner.clone(), outer.clone());
        let mut there = false;
        for list in [&mut inner, &mut outer] {
            if let Some(at) = list.iter().position(|a| a.index == index && a.name == rest) {
                if list.remove(at).elsewhere.is_some() {
                    return Err(errno(libc::EOPNOTSUPP, "the value is in an inode of its own"));
                }
                there = true;
            }
        }
        let Some(value) = value else {
            if there {
                self.store_attributes(inode, &inner, &outer, &before)?;
            }
            return Ok(there);
        };
        let new = Attribute { index, name: rest.to_vec(), value: value.to_vec(), elsewhere: None };
        let inner_room = Tx::inner_area(inode).map_or(0, |area| area.len());
        let outer_room = self.fs.sb.block_size - HEADER;
        inner.push(new);
        if !fits(&inner, inner_room) {
            outer.extend(inner.pop());
            outer.sort_by(|a, b| a.key().cmp(&b.key()));
            if !fits(&outer, outer_room) {
                return Err(no_space());
            }
        }
        self.store_attributes(inode, &inner, &outer, &before)?;
        Ok(there)
    }

    fn store_attributes(
        &mut self,
        inode: &mut Inode,
        inner: &[Attribute],
        outer: &[Attribute],
        before: &(Vec<Attribute>, Vec<Attribute>),
    ) -> Result<()> {
        if inner != before.0
            && let Some(area) = Tx::inner_area(inode)
        {
            put32(&mut inode.raw, area.start - 4, if inner.is_empty() { 0 } else { MAGIC });
            store(inode.raw.get_mut(area).unwrap_or_default(), 0, inner, false);
        }
        if outer == before.1 {
            return Ok(());
        }
        if outer.is_empty() {
            return self.drop_attributes(inode);
        }
        let place = self.own_attributes(inode)?;
        let sums = self.fs.has_checksums();
        let seed = self.fs.sb.seed;
        let block = self.edit(place)?;
        store(block, HEADER, outer, true);
        put32(block, 0, MAGIC);
        put32(block, 4, 1);
        put32(block, 8, 1);
        let all = outer.iter().fold(0u32, |all, a| all.rotate_left(16) ^ a.hash());
        put32(block, 12, all);
        put32(block, 16, 0);
        if sums {
            let sum = checksum(checksum(seed, &place.to_le_bytes()), block);
            put32(block, 16, sum);
        }
        Ok(())
    }

    /// The block of an inode's attributes that nobody shares, a new one where there is none.
    fn own_attributes(&mut self, inode: &mut Inode) -> Result<u64> {
        let old = inode.attributes();
        if old != 0 && le32(&self.read(old)?, 4) == 1 {
            return Ok(old);
        }
        let (place, _) = self.allocate(self.fs.goal_of(inode.number), 1)?;
        self.st.blocks.fresh(place)?;
        if old != 0 {
            self.drop_attributes(inode)?;
        }
        let size = self.fs.sb.block_size;
        inode.set_attributes(place);
        inode.add_blocks(1, size);
        Ok(place)
    }

    /// Lets go of the block of an inode's attributes. The inode is not stored.
    pub fn drop_attributes(&mut self, inode: &mut Inode) -> Result<()> {
        let place = inode.attributes();
        if place == 0 {
            return Ok(());
        }
        let users = le32(&self.read(place)?, 4);
        if users > 1 {
            let (sums, seed) = (self.fs.has_checksums(), self.fs.sb.seed);
            let block = self.edit(place)?;
            put32(block, 4, users - 1);
            put32(block, 16, 0);
            if sums {
                let sum = checksum(checksum(seed, &place.to_le_bytes()), block);
                put32(block, 16, sum);
            }
        } else {
            self.free_metadata(place)?;
        }
        let size = self.fs.sb.block_size;
        inode.set_attributes(0);
        inode.add_blocks(-1, size);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_come_back_from_the_bytes_they_were_stored_in() {
        let make = |index, name: &str, value: &[u8]| Attribute {
            index,
            name: name.into(),
            value: value.to_vec(),
            elsewhere: None,
        };
        let all = [make(1, "a", b"12345"), make(6, "capability", &[1; 20]), make(4, "", b"")];
        assert!(fits(&all, 96) && !fits(&all, 95));
        let mut area = vec![0xee; 96];
        store(&mut area, 0, &all, true);
        assert_eq!(parse(&area, 0).unwrap(), all);
        assert_eq!(split(b"user.x"), Some((1, &b"x"[..])));
        assert_eq!(split(b"system.posix_acl_access"), Some((2, &b""[..])));
        assert_eq!(split(b"user."), None);
        assert_eq!(split(b"other.x"), None);
        assert!(parse(&[5, 1, 0, 0], 0).is_err());
    }
}
