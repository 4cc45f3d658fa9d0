//! A layer's tar onto the files of the layers below (OCI image specification, layer.md): what it adds, changes and takes
//! away.
//!
//! Knows a file system and a tar stream, no disk and no image. Nothing in an archive leads out of the file system that
//! it is put into: links are followed from that file system's own root.

use std::collections::{HashMap, HashSet};
use std::io::Read;

use super::archive::{Archive, Entry, Kind};
use crate::error::{Error, ErrorKind, Result};
use crate::filesystem::ext4::mounted::{Attributes, Change, Mounted, Need, New, ROOT};
use crate::filesystem::path::{self, Place};
use crate::filesystem::tree;

const TYPE: u16 = 0o170_000;
const DIRECTORY: u16 = 0o040_000;
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What a layer did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Files and directories that it holds.
    pub entries: u64,
    /// Bytes of their contents.
    pub bytes: u64,
    /// Names that it takes away.
    pub whiteouts: u64,
}

/// Puts a layer on what is in `fs`. `go_on` is told the bytes of contents so far, and stops it with `false`.
///
/// # Errors
/// [`ErrorKind::Corrupt`] names the entry that cannot be in a layer; [`ErrorKind::NoSpace`] where the file system is full;
/// [`ErrorKind::Interrupted`].
pub fn unpack(
    fs: &Mounted,
    layer: impl Read,
    go_on: &mut dyn FnMut(u64) -> bool,
) -> Result<Unpacked> {
    let mut archive = Archive::new(layer);
    let mut unpacking =
        Unpacking { fs, made: HashSet::new(), times: HashMap::new(), done: Unpacked::default() };
    while let Some(entry) = archive.next()? {
        let named = |error: Error| named(&entry.path, error);
        let file = unpacking.one(&entry).map_err(named)?;
        if let Some(number) = file.filter(|_| entry.kind == Kind::File) {
            unpacking.contents(number, &entry, &mut archive, go_on).map_err(named)?;
        }
    }
    archive.finish()?;
    unpacking.set_times()?;
    Ok(unpacking.done)
}

/// Says which entry an error is about.
fn named(path: &[u8], error: Error) -> Error {
    match error.kind() {
        ErrorKind::Interrupted | ErrorKind::Io => error,
        kind => {
            let path = String::from_utf8_lossy(path);
            Error::new(kind, format!("{path}: {}", error.message()))
        }
    }
}

struct Unpacking<'a> {
    fs: &'a Mounted,
    /// What this layer made: its own whiteouts do not take that away.
    made: HashSet<u32>,
    /// The times that directories are to have in the end.
    times: HashMap<u32, (i64, u32)>,
    done: Unpacked,
}

impl Unpacking<'_> {
    /// Returns the inode of what it made.
    fn one(&mut self, entry: &Entry) -> Result<Option<u32>> {
        let mut names = names(&entry.path)?;
        let Some(name) = names.pop() else {
            // The root itself.
            return match entry.kind {
                Kind::Directory => self.dress(ROOT, entry).map(|()| None),
                _ => Err(Error::corrupt("the root is a directory")),
            };
        };
        let marks = name == OPAQUE || name.starts_with(WHITEOUT);
        let Some(parent) = self.parent(&names, marks)? else {
            self.done.whiteouts += 1;
            return Ok(None);
        };
        if name == OPAQUE {
            self.done.whiteouts += 1;
            return self.hide(parent).map(|()| None);
        }
        if let Some(gone) = name.strip_prefix(WHITEOUT) {
            return self.take_away(parent, gone).map(|()| None);
        }
        self.note_times(parent)?;
        self.done.entries += 1;
        let there = self.fs.lookup_attributes(parent, name)?;
        if entry.kind == Kind::Directory
            && let Some(there) = there.as_ref().filter(|there| is_directory(there))
        {
            return self.dress(there.inode, entry).map(|()| None);
        }
        if let Kind::Link(target) = &entry.kind {
            return self.link(parent, name, target, there).map(|()| None);
        }
        self.remove(parent, name, there)?;
        let number = self.fs.create(parent, name, &new(entry))?;
        self.made.insert(number);
        self.dress(number, entry)?;
        Ok(Some(number))
    }

    /// Gives a file what its entry says of it but for its contents.
    fn dress(&mut self, number: u32, entry: &Entry) -> Result<()> {
        for (name, value) in &entry.attributes {
            self.fs.set_attribute(number, name, Some(value), Need::Either)?;
        }
        let link = matches!(entry.kind, Kind::Symlink(_));
        self.fs.set_attributes(
            number,
            &Change {
                mode: (!link).then_some(entry.mode),
                uid: Some(entry.uid),
                gid: Some(entry.gid),
                accessed: Some(entry.modified),
                modified: Some(entry.modified),
                changed: Some(entry.modified),
                ..Change::default()
            },
        )?;
        if entry.kind == Kind::Directory {
            self.times.insert(number, entry.modified);
        }
        Ok(())
    }

    fn contents<R: Read>(
        &mut self,
        number: u32,
        entry: &Entry,
        archive: &mut Archive<R>,
        go_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<()> {
        let (fs, done) = (self.fs, &mut self.done);
        archive.contents(|offset, piece| {
            if fs.write(number, offset, piece)? < piece.len() {
                return Err(Error::new(ErrorKind::NoSpace, "no space is left in the file system"));
            }
            done.bytes += piece.len() as u64;
            match go_on(done.bytes) {
                true => Ok(()),
                false => Err(Error::new(ErrorKind::Interrupted, "interrupted")),
            }
        })?;
        let at = Some(entry.modified);
        let size = Some(entry.size);
        // Writing changed its times, and what ends in a hole is longer than what was written.
        fs.set_attributes(
            number,
            &Change { size, accessed: at, modified: at, changed: at, ..Change::default() },
        )?;
        // And took away what only holds for what was there before.
        for (name, value) in
            entry.attributes.iter().filter(|(name, _)| name == b"security.capability")
        {
            fs.set_attribute(number, name, Some(value), Need::Either)?;
            fs.set_attributes(number, &Change { changed: at, ..Change::default() })?;
        }
        if entry.mode & 0o6000 != 0 {
            let mode = Some(entry.mode);
            fs.set_attributes(number, &Change { mode, changed: at, ..Change::default() })?;
        }
        Ok(())
    }

    fn link(
        &mut self,
        parent: u32,
        name: &[u8],
        target: &[u8],
        there: Option<Attributes>,
    ) -> Result<()> {
        names_of_link(target)?;
        let file = path::find(self.fs, target, false)?.file;
        let file = file.ok_or_else(|| {
            let target = String::from_utf8_lossy(target);
            Error::corrupt(format!("is a hard link to {target}, which is not there"))
        })?;
        if is_directory(&file) {
            return Err(Error::corrupt("is a hard link to a directory"));
        }
        if there.as_ref().is_some_and(|there| there.inode == file.inode) {
            return Ok(());
        }
        self.remove(parent, name, there)?;
        self.fs.link(file.inode, parent, name)?;
        let changed = Some(file.changed);
        self.fs.set_attributes(file.inode, &Change { changed, ..Change::default() })?;
        self.made.insert(file.inode);
        Ok(())
    }

    /// The directory at `names`, made as far as it is not there. Nothing for what `marks` that something is gone
    /// where no directory is any more: the file that has taken its place comes with marks for all that was in it.
    fn parent(&mut self, names: &[&[u8]], marks: bool) -> Result<Option<u32>> {
        let mut at = ROOT;
        let mut walked = Vec::new();
        for name in names {
            walked.extend_from_slice(b"/");
            walked.extend_from_slice(name);
            let place = match path::find(self.fs, &walked, true) {
                // A link leads to where nothing is.
                Err(e) if e.kind() == ErrorKind::NotFound => None,
                place => Some(place?),
            };
            at = match place {
                Some(Place { file: Some(file), .. }) if is_directory(&file) => file.inode,
                Some(Place { file: None, directory, name }) if !name.is_empty() => {
                    self.make_directory(directory, &name)?
                }
                _ if marks => return Ok(None),
                // What was a file or a link to nowhere below gives way to what this layer says is a directory.
                _ => {
                    let place = path::find(self.fs, &walked, false)?;
                    self.note_times(place.directory)?;
                    self.remove(place.directory, &place.name, place.file)?;
                    self.make_directory(place.directory, &place.name)?
                }
            };
        }
        Ok(Some(at))
    }

    fn make_directory(&mut self, parent: u32, name: &[u8]) -> Result<u32> {
        self.note_times(parent)?;
        let new = New { mode: DIRECTORY | 0o755, ..New::default() };
        let number = self.fs.create(parent, name, &new)?;
        self.made.insert(number);
        Ok(number)
    }

    /// Takes away what has a name, where this layer did not put it there.
    fn take_away(&mut self, parent: u32, name: &[u8]) -> Result<()> {
        if name.is_empty() || name.starts_with(WHITEOUT) {
            return Err(Error::corrupt("is no whiteout"));
        }
        self.done.whiteouts += 1;
        let Some(there) = self.fs.lookup_attributes(parent, name)? else { return Ok(()) };
        self.note_times(parent)?;
        if is_directory(&there) {
            self.hide(there.inode)?;
            if !self.made.contains(&there.inode) && self.is_empty(there.inode)? {
                self.fs.remove_directory(parent, name)?;
            }
        } else if !self.made.contains(&there.inode) {
            self.fs.unlink(parent, name)?;
        }
        Ok(())
    }

    /// Takes away what is in a directory and was not put there by this layer.
    fn hide(&mut self, directory: u32) -> Result<()> {
        self.note_times(directory)?;
        for (name, number) in tree::names(self.fs, directory)? {
            let file = self.fs.attributes(number)?;
            if !is_directory(&file) {
                if !self.made.contains(&number) {
                    self.fs.unlink(directory, &name)?;
                }
            } else if !self.holds_made(number)? {
                tree::remove(self.fs, number)?;
                self.fs.remove_directory(directory, &name)?;
            } else {
                self.hide(number)?;
            }
        }
        Ok(())
    }

    /// Whether something below a directory, or it itself, was made by this layer.
    fn holds_made(&self, directory: u32) -> Result<bool> {
        if self.made.contains(&directory) {
            return Ok(true);
        }
        let mut found = false;
        tree::walk(self.fs, directory, &mut |number| {
            found |= self.made.contains(&number);
            !found
        })?;
        Ok(found)
    }

    fn is_empty(&self, directory: u32) -> Result<bool> {
        Ok(tree::names(self.fs, directory)?.is_empty())
    }

    /// Removes what has the name that something else gets.
    fn remove(&mut self, parent: u32, name: &[u8], there: Option<Attributes>) -> Result<()> {
        let Some(there) = there else { return Ok(()) };
        if is_directory(&there) {
            tree::remove(self.fs, there.inode)?;
            self.times.remove(&there.inode);
            self.fs.remove_directory(parent, name)?;
        } else {
            self.fs.unlink(parent, name)?;
        }
        // Its number is another file's now, or will be.
        if there.links <= 1 || is_directory(&there) {
            self.made.remove(&there.inode);
        }
        Ok(())
    }

    /// What is done in a directory is not to be seen by its time, where the layer says nothing of it.
    fn note_times(&mut self, directory: u32) -> Result<()> {
        if !self.times.contains_key(&directory) {
            let modified = self.fs.attributes(directory)?.modified;
            self.times.insert(directory, modified);
        }
        Ok(())
    }

    fn set_times(&mut self) -> Result<()> {
        let mut times: Vec<(u32, (i64, u32))> = self.times.drain().collect();
        // The same order each time gives the same bytes.
        times.sort_unstable();
        for (directory, at) in times {
            let at = Some(at);
            let change = Change { accessed: at, modified: at, changed: at, ..Change::default() };
            match self.fs.set_attributes(directory, &change) {
                // It was taken away after.
                Err(error) if error.raw_os_error() == Some(libc::ESTALE) => {}
                set => {
                    set?;
                }
            }
        }
        Ok(())
    }
}

fn is_directory(file: &Attributes) -> bool {
    file.mode & TYPE == DIRECTORY
}

/// A new file as an entry says, without contents.
fn new(entry: &Entry) -> New<'_> {
    let (kind, device, target): (u16, _, &[u8]) = match &entry.kind {
        Kind::File | Kind::Link(_) => (0o100_000, (0, 0), b""),
        Kind::Directory => (DIRECTORY, (0, 0), b""),
        Kind::Symlink(target) => (0o120_000, (0, 0), target),
        Kind::Character(major, minor) => (0o020_000, (*major, *minor), b""),
        Kind::Block(major, minor) => (0o060_000, (*major, *minor), b""),
        Kind::Fifo => (0o010_000, (0, 0), b""),
    };
    New { mode: kind | entry.mode, uid: entry.uid, gid: entry.gid, device, target, umask: 0 }
}

/// The names on the way to an entry.
fn names(path: &[u8]) -> Result<Vec<&[u8]>> {
    let names: Vec<&[u8]> =
        path.split(|b| *b == b'/').filter(|name| !matches!(*name, b"" | b".")).collect();
    match names.contains(&&b".."[..]) || path.contains(&0) {
        true => Err(Error::corrupt("leads out of the layer, or has no name that a file can have")),
        false => Ok(names),
    }
}

fn names_of_link(target: &[u8]) -> Result<()> {
    names(target)
        .map(drop)
        .map_err(|_| Error::corrupt("is a hard link that leads out of the layer"))
}
