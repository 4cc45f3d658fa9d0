//! The files in a disk as a lower layer of an overlay: read without mounting them, and never
//! changed. Knows no disk and no image format.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;

use vdisk_fuse::attr::{Attr, DirEntry, StatFs, Time};
use vdisk_fuse::layer::{FileHandle, Layer, LayerDir, LayerFile};

use super::files::number;
use crate::error::Result;
use crate::filesystem::ext4::mounted::{Attributes, Mounted, ROOT, Seek};

/// The kind of a handle that is an inode's number and generation: `FILEID_INO32_GEN`, as the
/// kernel's ext4 gives it.
const INODE_AND_GENERATION: u8 = 1;
const TYPE: u16 = 0o170_000;
const DIRECTORY: u16 = 0o040_000;
const REGULAR: u16 = 0o100_000;
const LINK: u16 = 0o120_000;
/// Names that are asked for at a time.
const LISTED: usize = 1024;

/// The files in a disk, as a layer.
pub struct DiskLayer {
    fs: Arc<Mounted>,
    device: u64,
}

struct Directory {
    fs: Arc<Mounted>,
    inode: u32,
}

struct File {
    fs: Arc<Mounted>,
    inode: u32,
}

impl DiskLayer {
    /// The files in `fs`, which is only read. `device` tells it from all other file systems that
    /// layers of one overlay stand on; a disk and its snapshots are several.
    pub fn new(fs: Arc<Mounted>, device: u64) -> DiskLayer {
        DiskLayer { fs, device }
    }
}

fn refused(error: i32) -> io::Error {
    io::Error::from_raw_os_error(error)
}

fn done<T>(result: Result<T>) -> io::Result<T> {
    result.map_err(|error| number(&error))
}

/// The attributes of a file, as the overlay wants them.
pub(super) fn attr(known: &Attributes, block: u32) -> Attr {
    let time = |(sec, nsec)| Time { sec, nsec };
    Attr {
        ino: known.inode.into(),
        mode: known.mode.into(),
        nlink: known.links,
        uid: known.uid,
        gid: known.gid,
        rdev: libc::makedev(known.device.0, known.device.1),
        size: known.size,
        blocks: known.sectors,
        blksize: block,
        atime: time(known.accessed),
        mtime: time(known.modified),
        ctime: time(known.changed),
    }
}

/// How full a file system is, as statvfs(3) has it.
pub(super) fn stat_fs(fs: &Mounted) -> StatFs {
    let full = fs.statistics();
    StatFs {
        blocks: full.blocks,
        bfree: full.free,
        bavail: full.available,
        files: full.inodes.into(),
        ffree: full.free_inodes.into(),
        bsize: full.block_size,
        frsize: full.block_size,
        namelen: 255,
    }
}

impl Layer for DiskLayer {
    fn root(&self) -> io::Result<Arc<dyn LayerDir>> {
        Ok(Arc::new(Directory { fs: self.fs.clone(), inode: ROOT }))
    }

    fn device(&self) -> u64 {
        self.device
    }

    fn uuid(&self) -> [u8; 16] {
        self.fs.uuid()
    }

    fn statfs(&self) -> io::Result<StatFs> {
        Ok(stat_fs(&self.fs))
    }
}

impl Directory {
    /// What is known of a name, or of the directory itself.
    fn known(&self, name: Option<&OsStr>) -> io::Result<Option<Attributes>> {
        match name.map(OsStr::as_bytes) {
            None => done(self.fs.attributes(self.inode)).map(Some),
            Some(b"." | b"..") => Err(refused(libc::EINVAL)),
            Some(name) => done(self.fs.lookup_attributes(self.inode, name)),
        }
    }

    fn there(&self, name: Option<&OsStr>) -> io::Result<Attributes> {
        self.known(name)?.ok_or_else(|| refused(libc::ENOENT))
    }
}

impl LayerDir for Directory {
    fn attr(&self, name: Option<&OsStr>) -> io::Result<Option<Attr>> {
        Ok(self.known(name)?.map(|known| attr(&known, self.fs.block_size())))
    }

    fn dir(&self, name: &OsStr) -> io::Result<Arc<dyn LayerDir>> {
        let known = self.there(Some(name))?;
        match known.mode & TYPE {
            DIRECTORY => Ok(Arc::new(Directory { fs: self.fs.clone(), inode: known.inode })),
            _ => Err(refused(libc::ENOTDIR)),
        }
    }

    fn entries(&self) -> io::Result<Vec<DirEntry>> {
        let (mut after, mut all) = (0, Vec::new());
        loop {
            let names = done(self.fs.list(self.inode, after, LISTED))?;
            let Some(last) = names.last() else { return Ok(all) };
            after = last.next;
            for name in names {
                // No file has such a name, whatever a damaged directory says.
                let odd = name.name.is_empty() || name.name.iter().any(|b| matches!(b, b'/' | 0));
                if odd || matches!(name.name.as_slice(), b"." | b"..") {
                    continue;
                }
                let (ino, kind) = (name.inode.into(), name.kind.into());
                all.push(DirEntry { name: OsString::from_vec(name.name), ino, kind });
            }
        }
    }

    fn open(&self, name: &OsStr) -> io::Result<Arc<dyn LayerFile>> {
        let known = self.there(Some(name))?;
        match known.mode & TYPE {
            REGULAR => Ok(Arc::new(File { fs: self.fs.clone(), inode: known.inode })),
            DIRECTORY => Err(refused(libc::EISDIR)),
            LINK => Err(refused(libc::ELOOP)),
            _ => Err(refused(libc::ENXIO)),
        }
    }

    fn readlink(&self, name: &OsStr) -> io::Result<OsString> {
        let known = self.there(Some(name))?;
        Ok(OsString::from_vec(done(self.fs.read_link(known.inode))?))
    }

    fn xattr(&self, name: Option<&OsStr>, key: &OsStr) -> io::Result<Option<Vec<u8>>> {
        let known = self.there(name)?;
        done(self.fs.attribute(known.inode, key.as_bytes()))
    }

    fn xattrs(&self, name: Option<&OsStr>) -> io::Result<Vec<OsString>> {
        let known = self.there(name)?;
        let names = done(self.fs.attribute_names(known.inode))?;
        Ok(names.into_iter().map(OsString::from_vec).collect())
    }

    fn handle(&self, name: Option<&OsStr>) -> io::Result<Option<FileHandle>> {
        let known = self.there(name)?;
        let bytes = [known.inode.to_le_bytes(), known.generation.to_le_bytes()].concat();
        Ok(Some(FileHandle { kind: INODE_AND_GENERATION, bytes }))
    }
}

impl LayerFile for File {
    fn attr(&self) -> io::Result<Attr> {
        Ok(attr(&done(self.fs.attributes(self.inode))?, self.fs.block_size()))
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        done(self.fs.read(self.inode, offset, buf))
    }

    fn seek(&self, offset: u64, whence: i32) -> io::Result<u64> {
        match whence {
            libc::SEEK_DATA => done(self.fs.seek(self.inode, offset, Seek::Data)),
            libc::SEEK_HOLE => done(self.fs.seek(self.inode, offset, Seek::Hole)),
            _ => Err(refused(libc::EINVAL)),
        }
    }
}
