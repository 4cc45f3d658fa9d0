//! Names: looked up, listed, taken away, changed.

use super::create::{New, check_name};
use super::directory::Target;
use super::inode::{Inode, Moment};
use super::{Attributes, Mounted, ROOT, Tx, errno};
use crate::error::{Error, Result};

/// Directories that may stand in each other.
const DEEPEST: u32 = 1 << 20;

/// Where a file stands: a directory, by the number of its inode, and a name in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place<'a> {
    /// The directory.
    pub directory: u32,
    /// The name, as bytes.
    pub name: &'a [u8],
}

impl<'a> Place<'a> {
    /// A name in a directory.
    pub fn new(directory: u32, name: &'a [u8]) -> Place<'a> {
        Place { directory, name }
    }
}

/// One of the two directories of a move, and the name in it.
struct Side<'a> {
    name: &'a [u8],
    directory: Inode,
}

/// A file that gets a name that is free, or that `other` loses.
struct Move<'a> {
    from: Side<'a>,
    to: Side<'a>,
    moved: Inode,
    other: Option<Inode>,
    /// What gets the old name.
    left: Option<&'a New<'a>>,
}

/// One of two files that change places.
struct Swapped<'a> {
    name: &'a [u8],
    directory: Inode,
    file: Inode,
}

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// The name, as bytes: no encoding is promised.
    pub name: Vec<u8>,
    /// The number of the inode.
    pub inode: u32,
    /// The type, as the upper bits of `st_mode`; 0 where the directory does not say it.
    pub kind: u16,
    /// Where a listing goes on after it.
    pub next: u64,
}

/// How [`Mounted::rename`] treats the new name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Onto {
    /// What has it loses it.
    #[default]
    Replace,
    /// It has to be free.
    Free,
    /// Both files change names.
    Exchange,
}

/// One end of a rename.
struct End {
    directory: Inode,
    file: Option<Inode>,
}

impl Tx<'_> {
    fn end(&mut self, directory: u32, name: &[u8]) -> Result<End> {
        let directory = self.parent_directory(directory)?;
        let found = self.find(&directory, name)?;
        let file = found.map(|(number, _)| self.file(number)).transpose()?;
        Ok(End { directory, file })
    }

    /// Fails where a directory would come below itself.
    fn check_circle(&mut self, moved: &Inode, into: &Inode) -> Result<()> {
        if !moved.is_directory() {
            return Ok(());
        }
        let mut at = into.number;
        // More steps than directories can stand in each other are a circle already.
        for _ in 0..self.fs.sb.inodes.min(DEEPEST) {
            if at == moved.number {
                return Err(errno(libc::EINVAL, "a directory cannot be moved into itself"));
            }
            if at == ROOT {
                return Ok(());
            }
            let directory = self.file(at)?;
            at = self.parent(&directory)?;
        }
        Err(Error::corrupt("ext4: directories stand in a circle"))
    }

    /// Changes the time of an inode that got another name, and its parent where it has one.
    fn moved(&mut self, inode: &Inode, parent: Option<u32>) -> Result<()> {
        let mut inode = self.inode(inode.number)?;
        let now = self.now;
        inode.set_time(Moment::Changed, now);
        self.put_inode(&mut inode)?;
        match parent.filter(|_| inode.is_directory()) {
            Some(parent) => self.set_parent(&inode, parent),
            None => Ok(()),
        }
    }

    /// Takes one name away from a file that lost it in a directory; returns whether it is to be
    /// reaped.
    fn lose_name(&mut self, number: u32, held: bool) -> Result<bool> {
        let mut inode = self.inode(number)?;
        let now = self.now;
        inode.set_time(Moment::Changed, now);
        inode.set_links(if inode.is_directory() { 0 } else { inode.links().saturating_sub(1) });
        self.unlinked(inode, held)
    }
}

impl Mounted {
    /// The inode that a name stands for.
    pub fn lookup(&self, directory: u32, name: &[u8]) -> Result<Option<u32>> {
        Ok(self.lookup_attributes(directory, name)?.map(|attributes| attributes.inode))
    }

    /// What is known of the file that a name stands for, which is [held](Mounted::hold) once: no
    /// other thread can delete it in between.
    pub fn lookup_held(&self, directory: u32, name: &[u8]) -> Result<Option<Attributes>> {
        self.look_up(directory, name, true)
    }

    /// What is known of the file that a name stands for.
    pub fn lookup_attributes(&self, directory: u32, name: &[u8]) -> Result<Option<Attributes>> {
        self.look_up(directory, name, false)
    }

    fn look_up(&self, directory: u32, name: &[u8], hold: bool) -> Result<Option<Attributes>> {
        self.look(|tx| {
            let directory = tx.file(directory)?;
            if !directory.is_directory() {
                return Err(errno(libc::ENOTDIR, "not a directory"));
            }
            let found = match name {
                b"." => Some((directory.number, 0)),
                b".." => Some((tx.parent(&directory)?, 0)),
                name if name.len() > super::directory::MAX_NAME => {
                    return Err(errno(libc::ENAMETOOLONG, "the name is too long"));
                }
                name => tx.find(&directory, name)?,
            };
            let Some((number, _)) = found else { return Ok(None) };
            let known = tx.file(number)?.attributes_of(self.sb.block_size);
            if hold {
                self.hold(number, 1);
            }
            Ok(Some(known))
        })
    }

    /// The names in a directory after the place `after`, 0 for all; at most about `most`.
    pub fn list(&self, directory: u32, after: u64, most: usize) -> Result<Vec<Name>> {
        self.look(|tx| {
            let directory = tx.file(directory)?;
            let mut names = Vec::new();
            tx.list(&directory, after, &mut |name, inode, kind, next| {
                let kind = mode_of(kind);
                names.push(Name { name: name.to_vec(), inode, kind, next });
                names.len() < most
            })?;
            Ok(names)
        })
    }

    /// Takes a name away from what is no directory.
    pub fn unlink(&self, directory: u32, name: &[u8]) -> Result<()> {
        check_name(name)?;
        let reap = self.change(|tx| {
            let End { directory: mut parent, file } = tx.end(directory, name)?;
            let file = file.ok_or_else(|| errno(libc::ENOENT, "no such file"))?;
            if file.is_directory() {
                return Err(errno(libc::EISDIR, "a directory"));
            }
            if file.has(super::inode::FLAG_IMMUTABLE | super::inode::FLAG_APPEND) {
                return Err(errno(libc::EPERM, "the file is immutable"));
            }
            tx.remove(&parent, name)?;
            tx.touch_directory(&mut parent)?;
            let held = self.is_held(file.number);
            Ok(tx.lose_name(file.number, held)?.then_some(file.number))
        })?;
        reap.map_or(Ok(()), |number| self.reap(number))
    }

    /// Takes away a directory without names.
    pub fn remove_directory(&self, directory: u32, name: &[u8]) -> Result<()> {
        check_name(name).map_err(|error| match name {
            b"." => errno(libc::EINVAL, "the directory itself"),
            b".." => errno(libc::ENOTEMPTY, "the directory above"),
            _ => error,
        })?;
        let reap = self.change(|tx| {
            let End { directory: mut parent, file } = tx.end(directory, name)?;
            let file = file.ok_or_else(|| errno(libc::ENOENT, "no such directory"))?;
            if !file.is_directory() {
                return Err(errno(libc::ENOTDIR, "not a directory"));
            }
            if !tx.is_empty(&file)? {
                return Err(errno(libc::ENOTEMPTY, "the directory is not empty"));
            }
            tx.remove(&parent, name)?;
            tx.remove_child(&mut parent);
            tx.touch_directory(&mut parent)?;
            let held = self.is_held(file.number);
            Ok(tx.lose_name(file.number, held)?.then_some(file.number))
        })?;
        reap.map_or(Ok(()), |number| self.reap(number))
    }

    /// Gives a file another name, and what has that name as `onto` says.
    pub fn rename(&self, from: Place<'_>, to: Place<'_>, onto: Onto) -> Result<()> {
        self.rename_leaving(from, to, onto, None)
    }

    /// The same; the old name becomes that of a new file, in the same step.
    pub fn rename_leaving(
        &self,
        from: Place<'_>,
        to: Place<'_>,
        onto: Onto,
        left: Option<&New<'_>>,
    ) -> Result<()> {
        for name in [from.name, to.name] {
            check_name(name).map_err(|error| match name {
                b"." | b".." => errno(libc::EBUSY, "the directory itself"),
                _ => error,
            })?;
        }
        let reap = self.change(|tx| {
            let old = tx.end(from.directory, from.name)?;
            let new = tx.end(to.directory, to.name)?;
            let moved = old.file.ok_or_else(|| errno(libc::ENOENT, "no such file"))?;
            match (onto, &new.file) {
                (Onto::Free, Some(_)) => return Err(errno(libc::EEXIST, "the name is taken")),
                (Onto::Exchange, None) => return Err(errno(libc::ENOENT, "no such file")),
                // Two names of one file: nothing is to be done.
                (_, Some(file)) if file.number == moved.number => return Ok(None),
                _ => {}
            }
            tx.check_circle(&moved, &new.directory)?;
            match (onto, new.file) {
                (Onto::Exchange, Some(other)) => {
                    tx.check_circle(&other, &old.directory)?;
                    let one = Swapped { name: from.name, directory: old.directory, file: moved };
                    let other = Swapped { name: to.name, directory: new.directory, file: other };
                    self.exchange(tx, one, other)?;
                    Ok(None)
                }
                (_, other) => {
                    let from = Side { name: from.name, directory: old.directory };
                    let to = Side { name: to.name, directory: new.directory };
                    self.move_onto(tx, Move { from, to, moved, other, left })
                }
            }
        })?;
        reap.map_or(Ok(()), |number| self.reap(number))
    }

    fn exchange(&self, tx: &mut Tx<'_>, one: Swapped<'_>, another: Swapped<'_>) -> Result<()> {
        let Swapped { name, directory: mut parent, file } = one;
        let Swapped { name: other_name, directory: mut other_parent, file: other } = another;
        tx.replace(&parent, name, Target::of(&other))?;
        tx.replace(&other_parent, other_name, Target::of(&file))?;
        let apart = parent.number != other_parent.number;
        if apart && file.is_directory() != other.is_directory() {
            let (gains, loses) = match file.is_directory() {
                true => (&mut other_parent, &mut parent),
                false => (&mut parent, &mut other_parent),
            };
            tx.add_child(gains)?;
            tx.remove_child(loses);
        }
        tx.touch_directory(&mut parent)?;
        if apart {
            tx.touch_directory(&mut other_parent)?;
        }
        tx.moved(&file, apart.then_some(other_parent.number))?;
        tx.moved(&other, apart.then_some(parent.number))
    }

    /// Returns what is to be reaped.
    fn move_onto(&self, tx: &mut Tx<'_>, what: Move<'_>) -> Result<Option<u32>> {
        let Move { from, to, moved, other, left } = what;
        let Side { name: from, directory: mut old } = from;
        let Side { name: to, directory: mut new } = to;
        let apart = old.number != new.number;
        let target = Target::of(&moved);
        if let Some(other) = &other {
            match (moved.is_directory(), other.is_directory()) {
                (false, true) => return Err(errno(libc::EISDIR, "a directory")),
                (true, false) => return Err(errno(libc::ENOTDIR, "not a directory")),
                (true, true) if !tx.is_empty(other)? => {
                    return Err(errno(libc::ENOTEMPTY, "the directory is not empty"));
                }
                _ => {}
            }
            tx.replace(&new, to, target)?;
        } else if apart {
            tx.add(&mut new, to, target)?;
        } else {
            tx.add(&mut old, to, target)?;
        }
        match left.map(|left| tx.make(&old, left)).transpose()? {
            Some(left) => tx.replace(&old, from, Target::of(&left))?,
            None => drop(tx.remove(&old, from)?),
        }
        if moved.is_directory() {
            if apart && other.is_none() {
                tx.add_child(&mut new)?;
            }
            if apart || other.is_some() {
                tx.remove_child(&mut old);
            }
        }
        tx.touch_directory(&mut old)?;
        if apart {
            tx.touch_directory(&mut new)?;
        }
        tx.moved(&moved, apart.then_some(new.number))?;
        let Some(other) = other else { return Ok(None) };
        let held = self.is_held(other.number);
        Ok(tx.lose_name(other.number, held)?.then_some(other.number))
    }
}

/// The type of a file, from what a directory says of it.
fn mode_of(kind: u8) -> u16 {
    use super::inode::{BLOCK, CHARACTER, DIRECTORY, FIFO, REGULAR, SOCKET, SYMLINK};
    match kind {
        1 => REGULAR,
        2 => DIRECTORY,
        3 => CHARACTER,
        4 => BLOCK,
        5 => FIFO,
        6 => SOCKET,
        7 => SYMLINK,
        _ => 0,
    }
}
