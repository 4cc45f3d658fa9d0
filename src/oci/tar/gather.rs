//! The files of a directory of the host as a tar: all of them, or as what an overlay's upper directory changed (OCI
//! image specification, layer.md).
//!
//! Knows no disk and no image. The same tree gives the same bytes, whatever the host's file system made of it: names are
//! sorted, and holes are told by what is read. Nothing leads out of the directory, nor into another file system.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, Mode, OFlags, Stat, lgetxattr, llistxattr, openat, readlinkat, statat,
};
use rustix::io::Errno;
use tar_core::builder::EntryBuilder;
use tar_core::{EntryType, SparseEntry};

use super::pack::{BLOCK, HOLES, PIECE, time};
use crate::block::is_zero;
use crate::error::{Error, ErrorKind, Result};

const TYPE: u32 = 0o170_000;
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;
/// Directories that may stand in each other.
const DEEPEST: usize = 1000;
/// Zeroes in stretches of this length, and only from its multiples on, are holes.
const GRAIN: u64 = 64 << 10;
/// What overlays write beside their files.
const OVERLAYS: [&[u8]; 3] = [b"trusted.overlay.", b"user.overlay.", b"user.fuseoverlayfs."];
/// Of the host and not of the files.
const HOST: &[u8] = b"security.selinux";

/// How a directory is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gather {
    /// All files are root's, whoever has them here.
    pub root_owns: bool,
    /// It is an overlay's upper directory: its whiteouts and opaque directories become a layer's.
    pub upper: bool,
}

/// Writes what is in `directory`, itself the first.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for what is in an upper directory and means nothing without what is below;
/// [`ErrorKind::Interrupted`] where `go_on`, told the bytes of contents, asks to stop.
pub fn gather(
    directory: &Path,
    how: Gather,
    out: &mut dyn Write,
    go_on: &mut dyn FnMut(u64) -> bool,
) -> Result<()> {
    let failed = |e: Errno| Error::io("cannot be read", e.into()).at_path(directory);
    let root = openat(CWD, directory, FOLDER, Mode::empty()).map_err(failed)?;
    let stat = rustix::fs::fstat(&root).map_err(failed)?;
    let device = stat.st_dev;
    let mut gathering = Gathering { how, out, go_on, device, linked: HashMap::new(), bytes: 0 };
    gathering.directory(&root, &stat, b"", 0).map_err(|e| e.at_path(directory))?;
    gathering.out.write_all(&[0; 2 * BLOCK as usize]).map_err(unwritten)
}

const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

struct Gathering<'a> {
    how: Gather,
    out: &'a mut dyn Write,
    go_on: &'a mut dyn FnMut(u64) -> bool,
    device: u64,
    /// The first names of files that have several.
    linked: HashMap<(u64, u64), Vec<u8>>,
    bytes: u64,
}

fn unwritten(error: std::io::Error) -> Error {
    Error::io("the tar could not be written", error)
}

/// Says which file an error is about.
fn at(path: &[u8], error: impl Into<std::io::Error>) -> Error {
    Error::io(format!("{} cannot be read", String::from_utf8_lossy(path)), error.into())
}

fn unfit(path: &[u8], what: impl std::fmt::Display) -> Error {
    Error::unsupported(format!("{}: {what}", String::from_utf8_lossy(path)))
}

impl Gathering<'_> {
    fn directory(&mut self, dir: &OwnedFd, stat: &Stat, path: &[u8], depth: usize) -> Result<()> {
        if depth >= DEEPEST {
            return Err(unfit(path, "directories stand too deep in each other"));
        }
        let name = [if path.is_empty() { b"." } else { path }, b"/"].concat();
        let own = format!("/proc/self/fd/{}/.", dir.as_raw_fd()).into_bytes();
        let mut entry = self.entry(&name, stat, &own)?;
        entry.entry_type(EntryType::Directory);
        self.write(&mut entry)?;
        if self.how.upper && opaque(path, &own)? {
            self.marker(path, b".wh..wh..opq")?;
        }
        // What is another file system's is not in the directory.
        if stat.st_dev != self.device {
            return Ok(());
        }
        let mut names: Vec<CString> = Vec::new();
        for found in Dir::read_from(dir).map_err(|e| at(path, e))? {
            let name = found.map_err(|e| at(path, e))?.file_name().to_owned();
            if !matches!(name.to_bytes(), b"." | b"..") {
                names.push(name);
            }
        }
        names.sort();
        for name in names {
            let path = match path.is_empty() {
                true => name.to_bytes().to_vec(),
                false => [path, b"/", name.to_bytes()].concat(),
            };
            self.one(dir, &name, &path, depth)?;
        }
        Ok(())
    }

    fn one(&mut self, dir: &OwnedFd, name: &CStr, path: &[u8], depth: usize) -> Result<()> {
        let failed = |e: Errno| at(path, e);
        let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
        let kind = stat.st_mode & TYPE;
        if kind == DIRECTORY {
            let below =
                openat(dir, name, FOLDER | OFlags::NOFOLLOW, Mode::empty()).map_err(failed)?;
            let stat = rustix::fs::fstat(&below).map_err(failed)?;
            return self.directory(&below, &stat, path, depth + 1);
        }
        if self.how.upper && kind == CHARACTER && stat.st_rdev == 0 {
            let (above, name) = path.split_at(path.len() - name.to_bytes().len());
            let above = above.strip_suffix(b"/").unwrap_or(above);
            return self.marker(above, &[b".wh.", name].concat());
        }
        let front = format!("/proc/self/fd/{}/", dir.as_raw_fd());
        let own = [front.as_bytes(), name.to_bytes()].concat();
        let mut entry = self.entry(path, &stat, &own)?;
        if stat.st_nlink > 1 {
            if let Some(first) = self.linked.get(&(stat.st_dev, stat.st_ino)) {
                entry.entry_type(EntryType::Link).link_name(first);
                return self.write(&mut entry);
            }
            self.linked.insert((stat.st_dev, stat.st_ino), path.to_vec());
        }
        match kind {
            REGULAR => return self.regular(dir, name, path, entry),
            0o120_000 => {
                let target = readlinkat(dir, name, Vec::new()).map_err(failed)?;
                entry.entry_type(EntryType::Symlink).link_name(target.to_bytes());
            }
            0o010_000 => drop(entry.entry_type(EntryType::Fifo)),
            CHARACTER | 0o060_000 => {
                let block = kind != CHARACTER;
                entry.entry_type(if block { EntryType::Block } else { EntryType::Char });
                let (major, minor) =
                    (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
                entry.device(major, minor).map_err(|e| unfit(path, e))?;
            }
            // A socket is nobody's once its program has ended, and tar has no word for it.
            _ => return Ok(()),
        }
        self.write(&mut entry)
    }

    /// What all kinds of files have; `own` is how its attributes are asked for.
    fn entry(&self, name: &[u8], stat: &Stat, own: &[u8]) -> Result<EntryBuilder> {
        let mut entry = EntryBuilder::new_ustar();
        entry.path(name);
        let failed = |e: tar_core::HeaderError| unfit(name, e);
        let (uid, gid) = if self.how.root_owns { (0, 0) } else { (stat.st_uid, stat.st_gid) };
        entry.mode(stat.st_mode & 0o7777).map_err(failed)?;
        entry.uid(uid.into()).map_err(failed)?;
        entry.gid(gid.into()).map_err(failed)?;
        time(&mut entry, stat.st_mtime, stat.st_mtime_nsec as u32).map_err(failed)?;
        for key in attributes(own).map_err(|e| at(name, e))? {
            if self.how.upper && OVERLAYS.iter().any(|front| key.starts_with(front)) {
                refuse_meaning(name, &key)?;
                continue;
            }
            if key == HOST {
                continue;
            }
            let value = attribute(own, &key).map_err(|e| at(name, e))?.unwrap_or_default();
            let key = std::str::from_utf8(&key).map_err(|e| unfit(name, e))?;
            entry.add_pax(&format!("SCHILY.xattr.{key}"), value);
        }
        Ok(entry)
    }

    fn regular(
        &mut self,
        dir: &OwnedFd,
        name: &CStr,
        path: &[u8],
        mut entry: EntryBuilder,
    ) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(dir.as_fd(), name, flags, Mode::empty()).map_err(|e| at(path, e))?;
        let file = File::from(file);
        let size = file.metadata().map_err(|e| at(path, e))?.len();
        let map = data(&file, size).map_err(|e| at(path, e))?;
        let stored: u64 = map.iter().map(|s| s.length).sum();
        entry.entry_type(EntryType::Regular);
        entry.size(stored).map_err(|e| unfit(path, e))?;
        if stored != size {
            entry.sparse(&map, size);
        }
        self.write(&mut entry)?;
        let mut buffer = vec![0; PIECE];
        for SparseEntry { mut offset, length } in map {
            let end = offset + length;
            while offset < end {
                let piece = buffer.len().min(usize::try_from(end - offset).unwrap_or(usize::MAX));
                let piece = buffer.get_mut(..piece).unwrap_or_default();
                file.read_exact_at(piece, offset).map_err(|e| at(path, e))?;
                self.out.write_all(piece).map_err(unwritten)?;
                offset += piece.len() as u64;
                self.bytes += piece.len() as u64;
                if !(self.go_on)(self.bytes) {
                    return Err(Error::new(ErrorKind::Interrupted, "interrupted"));
                }
            }
        }
        let fill = (stored.next_multiple_of(BLOCK) - stored) as usize;
        self.out.write_all(&[0; BLOCK as usize][..fill]).map_err(unwritten)
    }

    /// A whiteout, or what makes a directory opaque.
    fn marker(&mut self, above: &[u8], name: &[u8]) -> Result<()> {
        let mut entry = EntryBuilder::new_ustar();
        match above.is_empty() {
            true => entry.path(name),
            false => entry.path([above, b"/", name].concat()),
        };
        entry.entry_type(EntryType::Regular);
        self.write(&mut entry)
    }

    fn write(&mut self, entry: &mut EntryBuilder) -> Result<()> {
        self.out.write_all(&entry.finish_bytes()).map_err(unwritten)
    }
}

/// The stretches of a file that hold anything but zeroes; all of it where the others are not worth it.
fn data(file: &File, size: u64) -> std::io::Result<Vec<SparseEntry>> {
    let whole = vec![SparseEntry { offset: 0, length: size }];
    if size <= HOLES {
        return Ok(whole);
    }
    let mut map: Vec<SparseEntry> = Vec::new();
    let mut buffer = vec![0; GRAIN as usize];
    let mut at = 0;
    while at < size {
        // What the host has not stored is not looked at.
        let data = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data / GRAIN * GRAIN,
            Err(Errno::NXIO) => break,
            Err(_) => at,
        };
        at = data.max(at);
        let len = GRAIN.min(size - at);
        let piece = buffer.get_mut(..len as usize).unwrap_or_default();
        file.read_exact_at(piece, at)?;
        if !is_zero(piece) {
            match map.last_mut().filter(|last| last.offset + last.length == at) {
                Some(last) => last.length += len,
                None => map.push(SparseEntry { offset: at, length: len }),
            }
        }
        at += len;
    }
    let stored: u64 = map.iter().map(|s| s.length).sum();
    if stored + HOLES > size {
        return Ok(whole);
    }
    // What ends in a hole says so by a stretch of nothing.
    if map.last().is_none_or(|last| last.offset + last.length < size) {
        map.push(SparseEntry { offset: size, length: 0 });
    }
    Ok(map)
}

fn attributes(own: &[u8]) -> std::result::Result<Vec<Vec<u8>>, Errno> {
    let mut raw: Vec<u8> = vec![0; 65536];
    match llistxattr(own, &mut raw) {
        Ok(len) => raw.truncate(len),
        Err(Errno::OPNOTSUPP) => raw.clear(),
        Err(e) => return Err(e),
    }
    let mut names: Vec<Vec<u8>> =
        raw.split(|b| *b == 0).filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect();
    names.sort();
    Ok(names)
}

fn attribute(own: &[u8], key: &[u8]) -> std::result::Result<Option<Vec<u8>>, Errno> {
    let mut value: Vec<u8> = vec![0; 65536];
    match lgetxattr(own, key, &mut value) {
        Ok(len) => {
            value.truncate(len);
            Ok(Some(value))
        }
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM) => Ok(None),
        Err(e) => Err(e),
    }
}

fn opaque(path: &[u8], own: &[u8]) -> Result<bool> {
    for front in OVERLAYS {
        let key = [front, b"opaque"].concat();
        match attribute(own, &key).map_err(|e| at(path, e))?.as_deref() {
            Some(b"y") => return Ok(true),
            Some(b"x") => {
                return Err(unfit(path, "has whiteouts that are files, which cannot be exported"));
            }
            _ => {}
        }
    }
    Ok(false)
}

/// Refuses what says that something stands below under another name, or that contents do.
fn refuse_meaning(path: &[u8], key: &[u8]) -> Result<()> {
    let what = OVERLAYS.iter().find_map(|front| key.strip_prefix(*front)).unwrap_or_default();
    match what {
        b"redirect" | b"metacopy" => Err(unfit(
            path,
            "was moved in the overlay, and means nothing without what is below: `vdisk apply` puts it into a disk, \
             which can be exported",
        )),
        _ => Ok(()),
    }
}
