//! Access control lists: as programs pass them and as inodes keep them, and what they do to
//! permissions.
//!
//! A list that says no more than the permissions is not kept. The lists of programs have 8 bytes
//! for each entry, those of the file system 4 where no user or group is named.

use super::super::bytes::{le16, le32};
use super::inode::{DIRECTORY, Inode, Moment};
use super::{Mounted, Tx, errno};
use crate::error::{Error, Result};

const ACCESS: &[u8] = b"system.posix_acl_access";
const DEFAULT: &[u8] = b"system.posix_acl_default";
/// The version of a list in programs, and on the disk.
const OUTSIDE: u32 = 2;
const INSIDE: u32 = 1;

const USER_OBJ: u16 = 1;
const USER: u16 = 2;
const GROUP_OBJ: u16 = 4;
const GROUP: u16 = 8;
const MASK: u16 = 16;
const OTHER: u16 = 32;

/// One line of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Line {
    tag: u16,
    permissions: u16,
    id: u32,
}

fn from_outside(bytes: &[u8]) -> Option<Vec<Line>> {
    if le32(bytes, 0) != OUTSIDE || bytes.len() < 4 || !(bytes.len() - 4).is_multiple_of(8) {
        return None;
    }
    let line = |raw: &[u8]| Line { tag: le16(raw, 0), permissions: le16(raw, 2), id: le32(raw, 4) };
    Some(bytes.get(4..)?.chunks_exact(8).map(line).collect())
}

fn to_outside(lines: &[Line]) -> Vec<u8> {
    let mut bytes = OUTSIDE.to_le_bytes().to_vec();
    for line in lines {
        bytes.extend(line.tag.to_le_bytes());
        bytes.extend(line.permissions.to_le_bytes());
        let named = matches!(line.tag, USER | GROUP);
        bytes.extend(if named { line.id } else { u32::MAX }.to_le_bytes());
    }
    bytes
}

fn from_inside(bytes: &[u8]) -> Result<Vec<Line>> {
    let damaged = || Error::corrupt("ext4: an access list is damaged");
    if le32(bytes, 0) != INSIDE {
        return Err(damaged());
    }
    let (mut lines, mut at) = (Vec::new(), 4);
    while at < bytes.len() {
        let named = matches!(le16(bytes, at), USER | GROUP);
        let len = if named { 8 } else { 4 };
        let raw = bytes.get(at..at + len).ok_or_else(damaged)?;
        let id = if named { le32(raw, 4) } else { u32::MAX };
        lines.push(Line { tag: le16(raw, 0), permissions: le16(raw, 2), id });
        at += len;
    }
    Ok(lines)
}

fn to_inside(lines: &[Line]) -> Vec<u8> {
    let mut bytes = INSIDE.to_le_bytes().to_vec();
    for line in lines {
        bytes.extend(line.tag.to_le_bytes());
        bytes.extend(line.permissions.to_le_bytes());
        if matches!(line.tag, USER | GROUP) {
            bytes.extend(line.id.to_le_bytes());
        }
    }
    bytes
}

/// Whether a list is one: each kind of line once, in order, with a mask where others are named.
fn is_valid(lines: &[Line]) -> bool {
    let order =
        |line: &Line| (line.tag, if matches!(line.tag, USER | GROUP) { line.id } else { 0 });
    let known = |line: &Line| {
        matches!(line.tag, USER_OBJ | USER | GROUP_OBJ | GROUP | MASK | OTHER)
            && line.permissions <= 7
    };
    let count = |tag| lines.iter().filter(|line| line.tag == tag).count();
    let named = count(USER) + count(GROUP) > 0;
    // Ids may come in any order, kinds of lines may not.
    lines.windows(2).all(|pair| order(&pair[0]).0 <= order(&pair[1]).0)
        && lines.iter().all(known)
        && [USER_OBJ, GROUP_OBJ, OTHER].iter().all(|tag| count(*tag) == 1)
        && (count(MASK) == 1 || count(MASK) == 0 && !named)
}

/// The permissions that say what a list says, and whether they say all of it.
fn permissions(lines: &[Line]) -> (u16, bool) {
    let (mut mode, mut all, mut mask) = (0, true, None);
    for line in lines {
        match line.tag {
            USER_OBJ => mode |= line.permissions << 6,
            GROUP_OBJ => mode |= line.permissions << 3,
            OTHER => mode |= line.permissions,
            MASK => mask = Some(line.permissions),
            _ => all = false,
        }
    }
    match mask {
        Some(mask) => (mode & !0o070 | mask << 3, false),
        None => (mode, all),
    }
}

/// Makes a list say what permissions say; where there is a mask, the group's stand there.
fn apply(lines: &mut [Line], mode: u16) {
    let masked = lines.iter().any(|line| line.tag == MASK);
    for line in lines {
        match line.tag {
            USER_OBJ => line.permissions = mode >> 6 & 7,
            GROUP_OBJ if !masked => line.permissions = mode >> 3 & 7,
            MASK => line.permissions = mode >> 3 & 7,
            OTHER => line.permissions = mode & 7,
            _ => {}
        }
    }
}

/// Takes from a list what `mode` does not allow; returns the permissions that are left.
fn restrict(lines: &mut [Line], mode: u16) -> u16 {
    let masked = lines.iter().any(|line| line.tag == MASK);
    for line in lines.iter_mut() {
        match line.tag {
            USER_OBJ => line.permissions &= mode >> 6 & 7,
            GROUP_OBJ if !masked => line.permissions &= mode >> 3 & 7,
            MASK => line.permissions &= mode >> 3 & 7,
            OTHER => line.permissions &= mode & 7,
            _ => {}
        }
    }
    permissions(lines).0
}

impl Tx<'_> {
    fn list_of(&mut self, inode: &Inode, name: &[u8]) -> Result<Option<Vec<Line>>> {
        self.attribute(inode, name)?.map(|bytes| from_inside(&bytes)).transpose()
    }

    /// Makes the access list of a file say what its permissions say. The inode is not stored.
    pub fn chmod_list(&mut self, inode: &mut Inode) -> Result<()> {
        let Some(mut lines) = self.list_of(inode, ACCESS)? else { return Ok(()) };
        apply(&mut lines, inode.mode());
        self.set_attribute(inode, ACCESS, Some(&to_inside(&lines))).map(drop)
    }

    /// Gives a new file what its directory has for new files, or takes `umask` from its
    /// permissions. The inode is not stored.
    pub fn inherit_list(&mut self, parent: &Inode, inode: &mut Inode, umask: u16) -> Result<()> {
        let Some(default) = self.list_of(parent, DEFAULT)? else {
            inode.set_mode(inode.mode() & !(umask & 0o777));
            return Ok(());
        };
        if inode.kind() == DIRECTORY {
            self.set_attribute(inode, DEFAULT, Some(&to_inside(&default)))?;
        }
        let mut lines = default;
        let mode = restrict(&mut lines, inode.mode());
        inode.set_mode(inode.mode() & !0o777 | mode);
        if !permissions(&lines).1 {
            self.set_attribute(inode, ACCESS, Some(&to_inside(&lines)))?;
        }
        Ok(())
    }

    /// Sets an access list, and the permissions with it.
    fn set_list(&mut self, inode: &mut Inode, name: &[u8], value: Option<&[u8]>) -> Result<bool> {
        let lines = match value {
            // A list of no lines is none.
            Some(value) if value.len() > 4 => {
                let lines = from_outside(value).filter(|lines| is_valid(lines));
                Some(lines.ok_or_else(|| errno(libc::EINVAL, "not an access list"))?)
            }
            _ => None,
        };
        if name == DEFAULT && !inode.is_directory() {
            return match lines {
                Some(_) => Err(errno(libc::EACCES, "only a directory has a list for new files")),
                None => Ok(false),
            };
        }
        let mut kept = lines;
        if name == ACCESS
            && let Some(lines) = &kept
        {
            let (mode, all) = permissions(lines);
            inode.set_mode(inode.mode() & !0o777 | mode);
            if all {
                kept = None;
            }
        }
        let bytes = kept.map(|lines| to_inside(&lines));
        self.set_attribute(inode, name, bytes.as_deref())
    }
}

/// Whether an attribute has to be new, or has to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Need {
    /// Either.
    #[default]
    Either,
    /// It must not be there.
    New,
    /// It must be there.
    Old,
}

impl Mounted {
    /// The names of a file's extended attributes.
    pub fn attribute_names(&self, number: u32) -> Result<Vec<Vec<u8>>> {
        self.look(|tx| {
            let inode = tx.file(number)?;
            tx.attribute_names(&inode)
        })
    }

    /// The value of an extended attribute; `None` where there is none.
    pub fn attribute(&self, number: u32, name: &[u8]) -> Result<Option<Vec<u8>>> {
        self.look(|tx| {
            let inode = tx.file(number)?;
            if matches!(name, ACCESS | DEFAULT) {
                return Ok(tx.list_of(&inode, name)?.map(|lines| to_outside(&lines)));
            }
            tx.attribute(&inode, name)
        })
    }

    /// Sets an extended attribute, or takes it away.
    pub fn set_attribute(
        &self,
        number: u32,
        name: &[u8],
        value: Option<&[u8]>,
        need: Need,
    ) -> Result<()> {
        self.change(|tx| {
            let mut inode = tx.file(number)?;
            if inode.has(super::inode::FLAG_IMMUTABLE | super::inode::FLAG_APPEND) {
                return Err(errno(libc::EPERM, "the file is immutable"));
            }
            let there = match need {
                Need::Either => None,
                _ => Some(tx.attribute(&inode, name)?.is_some()),
            };
            match (need, there) {
                (Need::New, Some(true)) => return Err(errno(libc::EEXIST, "it is there")),
                (Need::Old, Some(false)) => return Err(errno(libc::ENODATA, "it is not there")),
                _ => {}
            }
            let list = matches!(name, ACCESS | DEFAULT);
            let was = match list {
                true => tx.set_list(&mut inode, name, value)?,
                false => tx.set_attribute(&mut inode, name, value)?,
            };
            if value.is_none() && !was && !list {
                return Err(errno(libc::ENODATA, "no such attribute"));
            }
            let now = tx.now;
            inode.set_time(Moment::Changed, now);
            tx.put_inode(&mut inode)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_comes_back_and_says_its_permissions() {
        let line = |tag, permissions, id| Line { tag, permissions, id };
        let none = u32::MAX;
        let lines = [
            line(USER_OBJ, 7, none),
            line(USER, 5, 1000),
            line(GROUP_OBJ, 4, none),
            line(MASK, 6, none),
            line(OTHER, 0, none),
        ];
        assert!(is_valid(&lines) && !is_valid(&lines[1..]));
        assert_eq!(from_outside(&to_outside(&lines)).unwrap(), lines);
        assert_eq!(from_inside(&to_inside(&lines)).unwrap(), lines);
        assert_eq!(permissions(&lines), (0o760, false));
        let mut plain = [lines[0], lines[2], lines[4]];
        assert_eq!(permissions(&plain), (0o740, true));
        apply(&mut plain, 0o123);
        assert_eq!(permissions(&plain), (0o123, true));
        let mut lines = lines;
        assert_eq!(restrict(&mut lines, 0o644), 0o640);
    }
}
