//! The files of a disk as a tar: all of them, or what a layer changed (OCI image specification, layer.md).
//!
//! Knows a file system and a tar stream, no disk and no image. The same files give the same bytes.

use std::collections::{BTreeSet, HashMap};
use std::io::Write;

use tar_core::builder::EntryBuilder;
use tar_core::{EntryType, SparseEntry};

use crate::error::{Error, ErrorKind, Result};
use crate::filesystem::ext4::compare::{FileChange, Kind};
use crate::filesystem::ext4::mounted::{Attributes, Mounted, ROOT, Seek};
use crate::filesystem::{path, tree};

const TYPE: u16 = 0o170_000;
const DIRECTORY: u16 = 0o040_000;
const REGULAR: u16 = 0o100_000;
pub(super) const BLOCK: u64 = 512;
pub(super) const PIECE: usize = 256 << 10;
/// Bytes of holes for which a file is written as one that has some.
pub(super) const HOLES: u64 = 64 << 10;
/// Directories that may stand in each other.
const DEEPEST: usize = 4096;

/// A tar that is written.
pub struct Packing<'a> {
    fs: &'a Mounted,
    out: &'a mut dyn Write,
    /// The first names of files that have several.
    linked: HashMap<u32, Vec<u8>>,
    /// Told the bytes of contents so far; `false` stops.
    go_on: &'a mut dyn FnMut(u64) -> bool,
    bytes: u64,
}

/// Writes all files in `fs`, from the root on.
///
/// # Errors
/// [`ErrorKind::Interrupted`] where `go_on` asks to stop.
pub fn pack_all(
    fs: &Mounted,
    out: &mut dyn Write,
    go_on: &mut dyn FnMut(u64) -> bool,
) -> Result<()> {
    let mut packing = Packing { fs, out, linked: HashMap::new(), go_on, bytes: 0 };
    packing.file(b"", ROOT)?;
    packing.below(b"", ROOT, 0)?;
    packing.end()
}

/// Writes what `changes` made of the files below, in `fs` as it is after them.
///
/// # Errors
/// As [`pack_all`].
pub fn pack_changes(
    fs: &Mounted,
    changes: &[FileChange],
    out: &mut dyn Write,
    go_on: &mut dyn FnMut(u64) -> bool,
) -> Result<()> {
    let mut packing = Packing { fs, out, linked: HashMap::new(), go_on, bytes: 0 };
    let mut there: BTreeSet<&[u8]> = BTreeSet::new();
    let mut gone: BTreeSet<&[u8]> = BTreeSet::new();
    for change in changes {
        match change.kind {
            Kind::Removed => drop(gone.insert(&change.path)),
            Kind::Renamed => {
                there.insert(&change.path);
                gone.extend(change.from.as_deref());
            }
            Kind::Added | Kind::Modified | Kind::Attributes => drop(there.insert(&change.path)),
        }
    }
    // What stands on the way to a file says what its directory is like.
    let mut all: BTreeSet<Vec<u8>> = BTreeSet::new();
    for path in &there {
        all.insert(path.to_vec());
        // A directory that was renamed brings along what is in it, of which nobody said anything.
        let renamed = changes.iter().any(|c| c.kind == Kind::Renamed && c.path == *path);
        let file = path::file(fs, path, false)?;
        if renamed && file.mode & TYPE == DIRECTORY {
            collect(fs, path, file.inode, &mut all, 0)?;
        }
    }
    // What goes with its directory needs no word of its own.
    let whiteouts = gone
        .iter()
        .filter(|path| !all.contains(**path) && !parents(path).any(|above| gone.contains(above)));
    let mut entries: Vec<(Vec<u8>, bool)> = all.iter().map(|path| (path.clone(), false)).collect();
    // The root is above all of them.
    entries.push((Vec::new(), false));
    for path in whiteouts {
        entries.push((path.to_vec(), true));
    }
    // A new directory at the name of one that went elsewhere shows nothing of that.
    for path in gone.iter().filter(|path| all.contains(**path)) {
        if path::file(fs, path, false)?.mode & TYPE == DIRECTORY {
            entries.push(([path, &b"/.wh..opq"[..]].concat(), true));
        }
    }
    for (path, _) in entries.clone() {
        for above in parents(&path) {
            entries.push((above.to_vec(), false));
        }
    }
    entries.sort();
    entries.dedup();
    for (path, whiteout) in entries {
        if whiteout {
            packing.whiteout(&path)?;
        } else {
            let file = path::file(fs, &path, false)?;
            packing.file(&path, file.inode)?;
        }
    }
    packing.end()
}

/// The paths of the directories above a path, the nearest first, but for the root.
fn parents(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let cut = |path: &&[u8]| -> Option<usize> { path.iter().rposition(|b| *b == b'/') };
    std::iter::successors(cut(&path).map(|at| &path[..at]), move |p| cut(p).map(|at| &p[..at]))
        .filter(|p| !p.is_empty())
}

fn collect(
    fs: &Mounted,
    path: &[u8],
    directory: u32,
    all: &mut BTreeSet<Vec<u8>>,
    depth: usize,
) -> Result<()> {
    deep(depth)?;
    for (name, inode) in tree::names(fs, directory)? {
        let path = [path, b"/", &name].concat();
        if fs.attributes(inode)?.mode & TYPE == DIRECTORY {
            collect(fs, &path, inode, all, depth + 1)?;
        }
        all.insert(path);
    }
    Ok(())
}

fn deep(depth: usize) -> Result<()> {
    match depth < DEEPEST {
        true => Ok(()),
        false => Err(Error::corrupt("directories stand too deep in each other")),
    }
}

fn unfit(path: &[u8], error: impl std::fmt::Display) -> Error {
    let path = String::from_utf8_lossy(path);
    Error::unsupported(format!("{path}: cannot stand in a tar: {error}"))
}

impl Packing<'_> {
    fn below(&mut self, path: &[u8], directory: u32, depth: usize) -> Result<()> {
        deep(depth)?;
        let mut names = tree::names(self.fs, directory)?;
        names.sort();
        for (name, inode) in names {
            // mke2fs makes it for e2fsck, and nobody's image has it.
            if depth == 0 && name == b"lost+found" {
                continue;
            }
            let path = [path, b"/", &name].concat();
            self.file(&path, inode)?;
            if self.fs.attributes(inode)?.mode & TYPE == DIRECTORY {
                self.below(&path, inode, depth + 1)?;
            }
        }
        Ok(())
    }

    fn whiteout(&mut self, path: &[u8]) -> Result<()> {
        let at = path.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
        let (above, name) = path.split_at(at);
        let mut entry = EntryBuilder::new_ustar();
        entry.path([above, b".wh.", name].concat().strip_prefix(b"/").unwrap_or_default());
        entry.entry_type(EntryType::Regular);
        self.write(path, &mut entry)
    }

    /// Writes a file with its contents.
    fn file(&mut self, path: &[u8], inode: u32) -> Result<()> {
        let file = self.fs.attributes(inode)?;
        let mut entry = EntryBuilder::new_ustar();
        let name = path.strip_prefix(b"/").unwrap_or(path);
        let directory = file.mode & TYPE == DIRECTORY;
        let name = if directory {
            [if name.is_empty() { b"." } else { name }, b"/"].concat()
        } else {
            name.to_vec()
        };
        entry.path(&name);
        let failed = |e: tar_core::HeaderError| unfit(path, e);
        entry.mode(u32::from(file.mode & 0o7777)).map_err(failed)?;
        entry.uid(file.uid.into()).map_err(failed)?;
        entry.gid(file.gid.into()).map_err(failed)?;
        time(&mut entry, file.modified.0, file.modified.1).map_err(failed)?;
        for name in self.fs.attribute_names(inode)? {
            let value = self.fs.attribute(inode, &name)?.unwrap_or_default();
            let key = std::str::from_utf8(&name).map_err(|e| unfit(path, e))?;
            entry.add_pax(&format!("SCHILY.xattr.{key}"), value);
        }
        if !directory && file.links > 1 {
            if let Some(first) = self.linked.get(&inode) {
                entry.entry_type(EntryType::Link).link_name(first);
                return self.write(path, &mut entry);
            }
            self.linked.insert(inode, name);
        }
        match file.mode & TYPE {
            DIRECTORY => drop(entry.entry_type(EntryType::Directory)),
            REGULAR => return self.regular(path, &file, entry),
            0o120_000 => {
                entry.entry_type(EntryType::Symlink).link_name(self.fs.read_link(inode)?);
            }
            0o010_000 => drop(entry.entry_type(EntryType::Fifo)),
            kind @ (0o020_000 | 0o060_000) => {
                let block = kind == 0o060_000;
                entry.entry_type(if block { EntryType::Block } else { EntryType::Char });
                entry.device(file.device.0, file.device.1).map_err(failed)?;
            }
            // A socket is nobody's once its program has ended, and tar has no word for it.
            _ => return Ok(()),
        }
        self.write(path, &mut entry)
    }

    fn regular(&mut self, path: &[u8], file: &Attributes, mut entry: EntryBuilder) -> Result<()> {
        let map = self.data(file)?;
        let stored: u64 = map.iter().map(|s| s.length).sum();
        entry.entry_type(EntryType::Regular);
        entry.size(stored).map_err(|e| unfit(path, e))?;
        if stored != file.size {
            entry.sparse(&map, file.size);
        }
        self.write(path, &mut entry)?;
        let mut buffer = vec![0; PIECE];
        for SparseEntry { mut offset, length } in map {
            let end = offset + length;
            while offset < end {
                let piece = buffer.len().min(usize::try_from(end - offset).unwrap_or(usize::MAX));
                let piece = buffer.get_mut(..piece).unwrap_or_default();
                let read = self.fs.read(file.inode, offset, piece)?;
                if read < piece.len() {
                    return Err(Error::corrupt("a file became shorter").at_offset(offset));
                }
                self.out.write_all(piece).map_err(failed)?;
                offset += read as u64;
                self.bytes += read as u64;
                if !(self.go_on)(self.bytes) {
                    return Err(Error::new(ErrorKind::Interrupted, "interrupted"));
                }
            }
        }
        let fill = (stored.next_multiple_of(BLOCK) - stored) as usize;
        self.out.write_all(&[0; BLOCK as usize][..fill]).map_err(failed)
    }

    /// The stretches of a file that are not holes; all of it where those are not worth it.
    fn data(&self, file: &Attributes) -> Result<Vec<SparseEntry>> {
        let whole = vec![SparseEntry { offset: 0, length: file.size }];
        if file.sectors * 512 + HOLES > file.size {
            return Ok(whole);
        }
        let (mut map, mut at) = (Vec::new(), 0);
        while at < file.size {
            let data = match self.fs.seek(file.inode, at, Seek::Data) {
                Ok(data) => data,
                Err(e) if e.raw_os_error() == Some(libc::ENXIO) => break,
                Err(e) => return Err(e),
            };
            let hole = self.fs.seek(file.inode, data, Seek::Hole)?.min(file.size);
            map.push(SparseEntry { offset: data, length: hole - data });
            at = hole;
        }
        // What ends in a hole says so by a stretch of nothing.
        if map.last().is_none_or(|last| last.offset + last.length < file.size) {
            map.push(SparseEntry { offset: file.size, length: 0 });
        }
        Ok(map)
    }

    fn write(&mut self, path: &[u8], entry: &mut EntryBuilder) -> Result<()> {
        let _ = path;
        self.out.write_all(&entry.finish_bytes()).map_err(failed)
    }

    fn end(self) -> Result<()> {
        self.out.write_all(&[0; 2 * BLOCK as usize]).map_err(failed)
    }
}

pub(super) fn time(
    entry: &mut EntryBuilder,
    seconds: i64,
    nanoseconds: u32,
) -> std::result::Result<(), tar_core::HeaderError> {
    let whole = u64::try_from(seconds).unwrap_or(0);
    entry.mtime(whole)?;
    if seconds < 0 || nanoseconds != 0 {
        let text = match seconds < 0 && nanoseconds > 0 {
            // The fraction counts away from 0.
            true => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds),
            false => format!("{seconds}.{nanoseconds:09}"),
        };
        entry.add_pax("mtime", text.trim_end_matches('0').trim_end_matches('.'));
    }
    Ok(())
}

fn failed(error: std::io::Error) -> Error {
    Error::io("the tar could not be written", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directories_above_a_path_are_named_nearest_first() {
        let above: Vec<&[u8]> = parents(b"/a/b/c").collect();
        assert_eq!(above, [&b"/a/b"[..], b"/a"]);
        assert_eq!(parents(b"/a").count(), 0);
    }
}
