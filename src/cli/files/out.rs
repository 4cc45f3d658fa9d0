//! Files out of a disk, to the host.
//!
//! What is in a disk may be hostile: no link that a copy has made is ever followed, and every
//! directory is opened by its one name in the one above it.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, chownat,
    fchmod, fchown, fsetxattr, ftruncate, futimens, linkat, makedev, mkdirat, mknodat, openat,
    readlinkat, symlinkat, unlinkat, utimensat,
};
use vdisk::filesystem::ext4::mounted::{Attributes, Mounted, Seek};
use vdisk::filesystem::{path, tree};
use vdisk::{Error, Result};

use super::copy::How;
use super::target::last_name;
use super::{BLOCK, CHARACTER, DIRECTORY, FIFO, LINK, PIECE, REGULAR, SOCKET, TYPE};

/// Directories that may stand in each other.
const DEEPEST: usize = 4096;

/// One copy.
struct Copying<'a> {
    fs: &'a Mounted,
    how: How,
    /// Where files with several names were put.
    linked: HashMap<u32, PathBuf>,
    /// Where the copy begins, for those.
    base: OwnedFd,
}

/// Copies the file at `source` to `target`, or into it where it is a directory; `into` says that
/// it has to be one.
pub fn copy(fs: &Mounted, source: &[u8], target: &Path, how: How, into: bool) -> Result<()> {
    // A directory's own contents are asked for by a path without a last name.
    let known = path::file(fs, source, !how.deep() || last_name(source).is_empty())?;
    if known.mode & TYPE == DIRECTORY && !how.deep() {
        let shown = String::from_utf8_lossy(source);
        return Err(Error::invalid(format!("{shown} is a directory: --recursive copies it")));
    }
    let slash = target.as_os_str().as_bytes().ends_with(b"/");
    let (directory, name) = if target.is_dir() {
        (target.to_path_buf(), last_name(source).to_vec())
    } else if into || slash {
        let error = std::io::ErrorKind::NotADirectory.into();
        return Err(Error::io("cannot copy there", error).at_path(target));
    } else {
        let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
        let name = target.file_name().unwrap_or_default().as_bytes().to_vec();
        (parent.unwrap_or(Path::new(".")).to_path_buf(), name)
    };
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let base = openat(CWD, &directory, flags, Mode::empty());
    let base = base.map_err(|e| Error::io("cannot copy there", e.into()).at_path(&directory))?;
    let again = base.try_clone().map_err(|e| Error::io("cannot copy there", e))?;
    let mut copying = Copying { fs, how, linked: HashMap::new(), base: again };
    let done = if name.is_empty() {
        copying.directory(base.as_fd(), &known, Path::new(""), 0)
    } else {
        copying.file(base.as_fd(), &name, &known, Path::new(""), 0)
    };
    done.map_err(|e| e.at_path(target))
}

fn failed(what: &str, name: &[u8], error: rustix::io::Errno) -> Error {
    Error::io(format!("cannot {what} {}", String::from_utf8_lossy(name)), error.into())
}

impl Copying<'_> {
    fn file(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &[u8],
        known: &Attributes,
        above: &Path,
        depth: usize,
    ) -> Result<()> {
        let path = OsStr::from_bytes(name);
        let whole = above.join(path);
        if self.how.archive && known.links > 1 && known.mode & TYPE != DIRECTORY {
            if let Some(first) = self.linked.get(&known.inode) {
                let _ = unlinkat(directory, path, AtFlags::empty());
                return linkat(&self.base, first, directory, path, AtFlags::empty())
                    .map_err(|e| failed("link", name, e));
            }
            self.linked.insert(known.inode, whole.clone());
        }
        match known.mode & TYPE {
            DIRECTORY => {
                // The owner may fill it whatever its permissions are to be.
                let mode = Mode::from_raw_mode(u32::from(known.mode & 0o777) | 0o700);
                match mkdirat(directory, path, mode) {
                    Err(error) if error != rustix::io::Errno::EXIST => {
                        return Err(failed("make", name, error));
                    }
                    _ => {}
                }
                let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
                let below = openat(directory, path, flags, Mode::empty())
                    .map_err(|e| failed("open", name, e))?;
                self.directory(below.as_fd(), known, &whole, depth)
            }
            REGULAR => self.regular(directory, name, known),
            LINK => self.link(directory, name, known),
            kind => self.special(directory, name, known, kind),
        }
    }

    fn directory(
        &mut self,
        directory: BorrowedFd<'_>,
        known: &Attributes,
        whole: &Path,
        depth: usize,
    ) -> Result<()> {
        if depth >= DEEPEST {
            return Err(Error::corrupt("directories stand too deep in each other"));
        }
        for (name, inode) in tree::names(self.fs, known.inode)? {
            let known = self.fs.attributes(inode)?;
            self.file(directory, &name, &known, whole, depth + 1)?;
        }
        // What the user named as the target keeps its own.
        if whole.as_os_str().is_empty() { Ok(()) } else { self.finish(directory, known) }
    }

    fn regular(&self, directory: BorrowedFd<'_>, name: &[u8], known: &Attributes) -> Result<()> {
        let flags = OFlags::CREATE
            | OFlags::TRUNC
            | OFlags::WRONLY
            | OFlags::NOFOLLOW
            | OFlags::NONBLOCK
            | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(u32::from(known.mode & 0o777));
        let file = openat(directory, OsStr::from_bytes(name), flags, mode)
            .map_err(|e| failed("make", name, e))?;
        let file = File::from(file);
        self.contents(&file, known)?;
        self.finish(file.as_fd(), known)
    }

    /// What a file holds, with its holes.
    fn contents(&self, file: &File, known: &Attributes) -> Result<()> {
        ftruncate(file, known.size).map_err(|e| Error::io("cannot write", e.into()))?;
        let mut buf = vec![0; PIECE.min(known.size.max(1) as usize)];
        let mut at = 0;
        while at < known.size {
            let Ok(start) = self.fs.seek(known.inode, at, Seek::Data) else { break };
            let end = self.fs.seek(known.inode, start, Seek::Hole)?;
            at = start;
            while at < end {
                let want = (end - at).min(buf.len() as u64) as usize;
                let piece = buf.get_mut(..want).unwrap_or_default();
                let len = self.fs.read(known.inode, at, piece)?;
                if len == 0 {
                    return Ok(());
                }
                let piece = piece.get(..len).unwrap_or_default();
                file.write_all_at(piece, at).map_err(|e| Error::io("cannot write", e))?;
                at += len as u64;
            }
        }
        Ok(())
    }

    fn link(&self, directory: BorrowedFd<'_>, name: &[u8], known: &Attributes) -> Result<()> {
        let path = OsStr::from_bytes(name);
        let target = self.fs.read_link(known.inode)?;
        let target = OsStr::from_bytes(&target);
        match symlinkat(target, directory, path) {
            Err(rustix::io::Errno::EXIST) if readlinkat(directory, path, Vec::new()).is_ok() => {
                unlinkat(directory, path, AtFlags::empty())
                    .map_err(|e| failed("remove", name, e))?;
                symlinkat(target, directory, path)
            }
            done => done,
        }
        .map_err(|e| failed("make", name, e))?;
        self.finish_named(directory, name, known)
    }

    fn special(
        &self,
        directory: BorrowedFd<'_>,
        name: &[u8],
        known: &Attributes,
        kind: u16,
    ) -> Result<()> {
        let kind = match kind {
            FIFO => FileType::Fifo,
            SOCKET => FileType::Socket,
            CHARACTER if self.how.archive => FileType::CharacterDevice,
            BLOCK if self.how.archive => FileType::BlockDevice,
            _ => {
                let shown = String::from_utf8_lossy(name);
                eprintln!("vdisk: warning: {shown} is a device: only --archive copies it");
                return Ok(());
            }
        };
        let path = OsStr::from_bytes(name);
        let device = makedev(known.device.0, known.device.1);
        let mode = Mode::from_raw_mode(u32::from(known.mode & 0o777));
        mknodat(directory, path, kind, mode, device).map_err(|e| failed("make", name, e))?;
        self.finish_named(directory, name, known)
    }

    fn times(known: &Attributes) -> Timestamps {
        let time = |(seconds, nanoseconds): (i64, u32)| Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds.into(),
        };
        Timestamps { last_access: time(known.accessed), last_modification: time(known.modified) }
    }

    /// Gives an open file what else is kept of it.
    fn finish(&self, file: BorrowedFd<'_>, known: &Attributes) -> Result<()> {
        if !self.how.archive {
            return Ok(());
        }
        let kept = |e: rustix::io::Errno| Error::io("cannot keep the attributes", e.into());
        let (uid, gid) = (Uid::from_raw(known.uid), Gid::from_raw(known.gid));
        // As with cp, only root can give files away, and nobody else is told so for each.
        match fchown(file, Some(uid), Some(gid)) {
            Err(rustix::io::Errno::PERM) => {}
            done => done.map_err(kept)?,
        }
        for name in self.fs.attribute_names(known.inode)? {
            let value = self.fs.attribute(known.inode, &name)?.unwrap_or_default();
            let set = fsetxattr(file, OsStr::from_bytes(&name), &value, XattrFlags::empty());
            match set {
                Err(rustix::io::Errno::PERM | rustix::io::Errno::OPNOTSUPP) => {}
                done => done.map_err(kept)?,
            }
        }
        fchmod(file, Mode::from_raw_mode(u32::from(known.mode & 0o7777))).map_err(kept)?;
        futimens(file, &Copying::times(known)).map_err(kept)
    }

    /// The same of what cannot be opened.
    fn finish_named(&self, at: BorrowedFd<'_>, name: &[u8], known: &Attributes) -> Result<()> {
        if !self.how.archive {
            return Ok(());
        }
        let (path, flags) = (OsStr::from_bytes(name), AtFlags::SYMLINK_NOFOLLOW);
        let (uid, gid) = (Uid::from_raw(known.uid), Gid::from_raw(known.gid));
        match chownat(at, path, Some(uid), Some(gid), flags) {
            Err(rustix::io::Errno::PERM) => {}
            done => done.map_err(|e| failed("keep the owner of", name, e))?,
        }
        utimensat(at, path, &Copying::times(known), flags)
            .map_err(|e| failed("keep the time of", name, e))
    }
}
