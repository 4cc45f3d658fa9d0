//! Files of the host, into a disk.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, lgetxattr, llistxattr, seek};
use rustix::io::Errno;
use vdisk::filesystem::ext4::mounted::{Change, Mounted, Need, New, Onto, Place};
use vdisk::filesystem::path;
use vdisk::{Error, ErrorKind, Result};

use super::copy::How;
use super::target::last_name;
use super::{DIRECTORY, PIECE, REGULAR, TYPE};

/// Directories that may stand in each other.
const DEEPEST: usize = 4096;

/// One copy.
pub struct Copying<'a> {
    fs: &'a Mounted,
    how: How,
    umask: u16,
    owner: (u32, u32),
    /// Files of the host with several names, by device and inode, and their inodes in the disk.
    linked: HashMap<(u64, u64), u32>,
}

/// Copies files to `target` in a disk, or into it where it is a directory; `into` says that it has
/// to be one.
pub fn copy(fs: &Mounted, sources: &[PathBuf], target: &[u8], how: How, into: bool) -> Result<()> {
    let umask = rustix::process::umask(rustix::fs::Mode::empty());
    rustix::process::umask(umask);
    let owner = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    let umask = umask.bits() as u16;
    let mut copying = Copying { fs, how, umask, owner, linked: HashMap::new() };
    for source in sources {
        copying.source(source, target, into).map_err(|e| e.at_path(source))?;
    }
    Ok(())
}

fn failed(error: io::Error) -> Error {
    Error::io("cannot be read", error)
}

impl<'a> Copying<'a> {
    /// One that keeps all that can be kept of a file.
    pub fn whole(fs: &'a Mounted) -> Copying<'a> {
        let how = How { recursive: true, archive: true };
        Copying { fs, how, umask: 0, owner: (0, 0), linked: HashMap::new() }
    }

    fn source(&mut self, source: &Path, target: &[u8], into: bool) -> Result<()> {
        let name = last_name(source.as_os_str().as_bytes()).to_vec();
        let follow = !self.how.deep() || name.is_empty();
        let meta = if follow { source.metadata() } else { source.symlink_metadata() };
        let meta = meta.map_err(failed)?;
        if meta.is_dir() && !self.how.deep() {
            return Err(Error::invalid("is a directory: --recursive copies it"));
        }
        let place = path::find(self.fs, target, true)?;
        let there = place.file.as_ref().filter(|file| file.mode & TYPE == DIRECTORY);
        match there {
            Some(directory) if name.is_empty() => self.contents_of(source, directory.inode, 0),
            Some(directory) => self.file(source, &meta, Place::new(directory.inode, &name), 0),
            None if into || target.ends_with(b"/") && !meta.is_dir() => {
                let shown = String::from_utf8_lossy(target);
                Err(Error::invalid(format!("{shown} in the disk is not a directory")))
            }
            None => self.file(source, &meta, Place::new(place.directory, &place.name), 0),
        }
    }

    fn file(
        &mut self,
        source: &Path,
        meta: &Metadata,
        place: Place<'_>,
        depth: usize,
    ) -> Result<()> {
        let Place { directory, name } = place;
        let old = self.fs.lookup_attributes(directory, name)?;
        let key = (meta.dev(), meta.ino());
        let linked = self.how.archive && meta.nlink() > 1 && !meta.is_dir();
        if let Some(inode) = self.linked.get(&key).copied().filter(|_| linked) {
            if old.as_ref().is_some_and(|old| old.inode == inode) {
                return Ok(());
            }
            if old.is_some() {
                self.fs.unlink(directory, name)?;
            }
            return self.fs.link(inode, directory, name);
        }
        let inode = if meta.is_dir() {
            let inode = match &old {
                Some(old) if old.mode & TYPE == DIRECTORY => old.inode,
                Some(_) => return Err(self.in_the_way(name)),
                None => self.make(meta, place, &[])?,
            };
            self.contents_of(source, inode, depth)?;
            inode
        } else if meta.is_file() {
            self.regular(source, meta, place, old.is_some())?
        } else {
            if old.as_ref().is_some_and(|old| old.mode & TYPE == DIRECTORY) {
                return Err(self.in_the_way(name));
            }
            let kind = meta.file_type();
            if (kind.is_char_device() || kind.is_block_device()) && !self.how.archive {
                let shown = source.display();
                eprintln!("vdisk: warning: {shown} is a device: only --archive copies it");
                return Ok(());
            }
            if old.is_some() {
                self.fs.unlink(directory, name)?;
            }
            let target = match kind.is_symlink() {
                true => source.read_link().map_err(failed)?.into_os_string(),
                false => Default::default(),
            };
            self.make(meta, place, target.as_bytes())?
        };
        if linked {
            self.linked.insert(key, inode);
        }
        self.finish(source, meta, inode)
    }

    fn in_the_way(&self, name: &[u8]) -> Error {
        let shown = String::from_utf8_lossy(name);
        Error::new(ErrorKind::Exists, format!("{shown} in the disk is of another kind"))
    }

    fn contents_of(&mut self, source: &Path, inode: u32, depth: usize) -> Result<()> {
        if depth >= DEEPEST {
            return Err(Error::invalid("directories stand too deep in each other"));
        }
        for entry in source.read_dir().map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let path = entry.path();
            let meta = path.symlink_metadata().map_err(|e| failed(e).at_path(&path))?;
            self.file(&path, &meta, Place::new(inode, entry.file_name().as_bytes()), depth + 1)
                .map_err(|e| e.at_path(&path))?;
        }
        Ok(())
    }

    /// Makes a file like this one under a name in a directory, without what it holds.
    pub fn make(&self, meta: &Metadata, place: Place<'_>, target: &[u8]) -> Result<u32> {
        let Place { directory: at, name } = place;
        let (umask, owner) = match self.how.archive {
            true => (0, (meta.uid(), meta.gid())),
            false => (self.umask, self.owner),
        };
        let device = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
        let kept = if self.how.archive { 0o7777 } else { 0o777 };
        let mode = meta.mode() as u16 & (TYPE | kept);
        let new = New { mode, umask, uid: owner.0, gid: owner.1, device, target };
        self.fs.create(at, name, &new)
    }

    /// Copies a regular file. It gets its name when it is whole: who comes before finds the old
    /// one.
    fn regular(
        &self,
        source: &Path,
        meta: &Metadata,
        place: Place<'_>,
        replaces: bool,
    ) -> Result<u32> {
        let Place { directory, name } = place;
        let from = File::open(source).map_err(failed)?;
        if !replaces {
            let inode = self.make(meta, place, &[])?;
            self.contents(&from, meta.len(), inode)?;
            return Ok(inode);
        }
        let old = self.fs.lookup_attributes(directory, name)?;
        if old.as_ref().is_some_and(|old| old.mode & TYPE == DIRECTORY) {
            return Err(self.in_the_way(name));
        }
        let draft = format!(".vdisk-copy-{}", std::process::id());
        let inode = self.make(meta, Place::new(directory, draft.as_bytes()), &[])?;
        let copied = self.contents(&from, meta.len(), inode).and_then(|()| {
            // As cp, which writes into the old one: its owner and permissions stay.
            if let Some(old) = old.filter(|old| !self.how.archive && old.mode & TYPE == REGULAR) {
                let (mode, uid, gid) = (Some(old.mode & 0o7777), Some(old.uid), Some(old.gid));
                self.fs.set_attributes(inode, &Change { mode, uid, gid, ..Change::default() })?;
            }
            self.fs.rename(
                Place::new(directory, draft.as_bytes()),
                Place::new(directory, name),
                Onto::Replace,
            )
        });
        if copied.is_err() {
            let _ = self.fs.unlink(directory, draft.as_bytes());
        }
        copied.map(|()| inode)
    }

    /// What a file holds, with its holes; the one in the disk is empty.
    pub fn contents(&self, from: &File, size: u64, inode: u32) -> Result<()> {
        let mut buf = vec![0; PIECE.min(size.max(1) as usize)];
        let mut at = 0;
        while at < size {
            let start = match seek(from, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(Errno::NXIO) => break,
                // Without holes all of it is data.
                Err(_) => at,
            };
            let end = seek(from, SeekFrom::Hole(start)).unwrap_or(size).min(size).max(start + 1);
            at = start;
            while at < end {
                let want = (end - at).min(buf.len() as u64) as usize;
                let piece = buf.get_mut(..want).unwrap_or_default();
                let len = from.read_at(piece, at).map_err(failed)?;
                if len == 0 {
                    return Err(Error::new(ErrorKind::Io, "became shorter while it was copied"));
                }
                let piece = piece.get(..len).unwrap_or_default();
                if self.fs.write(inode, at, piece)? < len {
                    return Err(Error::new(ErrorKind::NoSpace, "the disk's file system is full"));
                }
                at += len as u64;
            }
        }
        let change = Change { size: Some(size), ..Change::default() };
        self.fs.set_attributes(inode, &change).map(drop)
    }

    /// Gives a copy what else is kept of a file.
    fn finish(&self, source: &Path, meta: &Metadata, inode: u32) -> Result<()> {
        if !self.how.archive {
            return Ok(());
        }
        for name in attribute_names(source)? {
            let mut value = vec![0; 65536];
            let Ok(len) = lgetxattr(source, name.as_slice(), &mut value) else { continue };
            let value = value.get(..len);
            self.fs.set_attribute(inode, &name, value, Need::Either)?;
        }
        let time = |seconds: i64, nanoseconds: i64| Some((seconds, nanoseconds as u32));
        let change = Change {
            mode: (!meta.is_symlink()).then_some(meta.mode() as u16 & 0o7777),
            uid: Some(meta.uid()),
            gid: Some(meta.gid()),
            accessed: time(meta.atime(), meta.atime_nsec()),
            modified: time(meta.mtime(), meta.mtime_nsec()),
            ..Change::default()
        };
        self.fs.set_attributes(inode, &change).map(drop)
    }
}

/// The names of a file's attributes that a copy keeps.
pub fn attribute_names(source: &Path) -> Result<Vec<Vec<u8>>> {
    let mut list = vec![0; 65536];
    let len = match llistxattr(source, &mut list) {
        Ok(len) => len,
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(error) => return Err(failed(error.into())),
    };
    let names = list.get(..len).unwrap_or_default().split(|byte| *byte == 0);
    Ok(names.filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect())
}
