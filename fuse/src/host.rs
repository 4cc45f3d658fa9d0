//! Directories of the host as layers, and what an upper layer needs besides: changes. Every file
//! is reached by an open directory and one name in it, or by an open file: no path is walked and
//! no symbolic link followed. Knows no overlay.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, RawDir, RenameFlags, SeekFrom, Stat, Timespec,
    Timestamps, UTIME_NOW, UTIME_OMIT, Uid, XattrFlags, chownat, fchmod, fstat, fstatvfs, futimens,
    linkat, mkdirat, mknodat, openat, readlinkat, renameat_with, statat, symlinkat, unlinkat,
    utimensat,
};
use rustix::io::Errno;

use crate::attr::{Attr, DirEntry, SetTime, StatFs, Time};
use crate::layer::{FileHandle, Layer, LayerDir, LayerFile};
use crate::mount::detached_copy;
use crate::sys;

/// A directory of the host as a layer.
pub struct HostLayer {
    root: Arc<HostDir>,
    device: u64,
    uuid: [u8; 16],
}

impl HostLayer {
    /// The layer that stands at `path`, whose last component may be a symbolic link.
    ///
    /// # Errors
    /// Where it is no directory, or cannot be opened.
    pub fn open(path: &Path) -> io::Result<HostLayer> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        HostLayer::of(openat(rustix::fs::CWD, path, flags, Mode::empty())?)
    }

    /// The same for reading, as the kernel's overlayfs has its lower layers: what it stands on can be
    /// unmounted while the layer is in use, and what is mounted in it is not seen. Where this process may not
    /// mount, it is as [`open`](HostLayer::open) has it.
    ///
    /// # Errors
    /// As of `open`.
    pub fn open_detached(path: &Path) -> io::Result<HostLayer> {
        match detached_copy(path) {
            Ok(root) => HostLayer::of(root),
            Err(_) => HostLayer::open(path),
        }
    }

    /// The layer that an open directory is.
    pub(crate) fn of(root: OwnedFd) -> io::Result<HostLayer> {
        let root = HostDir(root);
        let device = fstat(&root.0)?.st_dev;
        let read = openat(&root.0, ".", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        // File systems without one, and kernels that do not tell, count as all the same one.
        let uuid = read.ok().and_then(|fd| sys::file_system_uuid(fd.as_fd()).ok());
        Ok(HostLayer { root: Arc::new(root), device, uuid: uuid.unwrap_or_default() })
    }

    /// The root itself.
    pub fn directory(&self) -> &Arc<HostDir> {
        &self.root
    }
}

impl Layer for HostLayer {
    fn root(&self) -> io::Result<Arc<dyn LayerDir>> {
        Ok(self.root.clone())
    }

    fn device(&self) -> u64 {
        self.device
    }

    fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    fn statfs(&self) -> io::Result<StatFs> {
        statfs(self.root.0.as_fd())
    }
}

pub(crate) fn statfs(fd: BorrowedFd<'_>) -> io::Result<StatFs> {
    let fs = fstatvfs(fd)?;
    let small = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    Ok(StatFs {
        blocks: fs.f_blocks,
        bfree: fs.f_bfree,
        bavail: fs.f_bavail,
        files: fs.f_files,
        ffree: fs.f_ffree,
        bsize: small(fs.f_bsize),
        frsize: small(fs.f_frsize),
        namelen: small(fs.f_namemax),
    })
}

/// A file of the host: a name in an open directory, or what is open.
#[derive(Clone, Copy)]
pub(crate) enum Spot<'a> {
    /// The name in the directory.
    Name(&'a HostDir, &'a OsStr),
    /// What is open, maybe with `O_PATH`.
    Open(BorrowedFd<'a>),
    /// What is open for reading or writing.
    File(BorrowedFd<'a>),
}

/// A path that leads through `/proc` to an open file, or to a name in an open directory.
fn proc_path(fd: BorrowedFd<'_>, name: Option<&OsStr>) -> Vec<u8> {
    let mut path = format!("/proc/self/fd/{}", fd.as_raw_fd()).into_bytes();
    if let Some(name) = name {
        path.push(b'/');
        path.extend_from_slice(name.as_bytes());
    }
    path
}

pub(crate) fn attr_of(stat: &Stat) -> Attr {
    let time = |sec: i64, nsec: u64| Time { sec, nsec: u32::try_from(nsec).unwrap_or(0) };
    Attr {
        ino: stat.st_ino,
        mode: stat.st_mode,
        nlink: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: stat.st_rdev,
        size: stat.st_size.cast_unsigned(),
        blocks: stat.st_blocks.cast_unsigned(),
        blksize: u32::try_from(stat.st_blksize).unwrap_or(4096),
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
    }
}

/// What utimensat(2) takes; `None` leaves a time as it is.
fn stamps(atime: Option<SetTime>, mtime: Option<SetTime>) -> Timestamps {
    let stamp = |time| match time {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(SetTime::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        Some(SetTime::To(time)) => Timespec { tv_sec: time.sec, tv_nsec: i64::from(time.nsec) },
    };
    Timestamps { last_access: stamp(atime), last_modification: stamp(mtime) }
}

/// Grows a buffer until a call that fills one no longer says that it is too small.
fn growing(fill: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    let mut size = 256;
    loop {
        let mut buffer = vec![0; size];
        match fill(&mut buffer) {
            Ok(len) => {
                buffer.truncate(len);
                return Ok(buffer);
            }
            Err(Errno::RANGE) if size < 1 << 20 => size *= 8,
            Err(error) => return Err(error),
        }
    }
}

/// How a file is named in the calls for extended attributes, which know no directory.
enum Way<'a> {
    /// By a path whose last component may be a symbolic link, which is meant then.
    Itself(Vec<u8>),
    /// By a link of `/proc` to what is open.
    Through(Vec<u8>),
    Open(BorrowedFd<'a>),
}

impl<'a> Spot<'a> {
    pub(crate) fn stat(self) -> io::Result<Attr> {
        let stat = match self {
            Spot::Name(dir, name) => statat(&dir.0, name, AtFlags::SYMLINK_NOFOLLOW)?,
            Spot::Open(fd) | Spot::File(fd) => fstat(fd)?,
        };
        Ok(attr_of(&stat))
    }

    /// Opens it; of a name the last component is never followed.
    pub(crate) fn open(self, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        let fd = match self {
            Spot::Name(dir, name) => openat(&dir.0, name, flags | OFlags::NOFOLLOW, Mode::empty())?,
            Spot::Open(fd) | Spot::File(fd) => {
                openat(rustix::fs::CWD, proc_path(fd, None), flags, Mode::empty())?
            }
        };
        Ok(fd.into())
    }

    /// Sets permissions; not of a symbolic link, which has none.
    pub(crate) fn chmod(self, mode: u32) -> io::Result<()> {
        let (dir, name) = match self {
            Spot::Name(dir, name) => (dir.as_fd(), name.as_bytes()),
            Spot::Open(fd) => (fd, &b""[..]),
            Spot::File(fd) => return Ok(fchmod(fd, Mode::from_raw_mode(mode & 0o7777))?),
        };
        match sys::chmod_at(dir, name, mode & 0o7777) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => {}
            result => return result,
        }
        // A kernel that is older, or a filter that knows no such call.
        let held;
        let fd = match self {
            Spot::Open(fd) | Spot::File(fd) => fd,
            Spot::Name(..) => {
                held = self.open(OFlags::PATH)?;
                held.as_fd()
            }
        };
        let mode = Mode::from_raw_mode(mode & 0o7777);
        Ok(rustix::fs::chmodat(rustix::fs::CWD, proc_path(fd, None), mode, AtFlags::empty())?)
    }

    /// Sets the length of a regular file as truncate(2) does: the same length is no change.
    pub(crate) fn truncate(self, len: u64) -> io::Result<()> {
        let held;
        let fd = match self {
            Spot::Open(fd) | Spot::File(fd) => fd,
            Spot::Name(..) => {
                held = self.open(OFlags::PATH)?;
                held.as_fd()
            }
        };
        let len = i64::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        Ok(nix::unistd::truncate(proc_path(fd, None).as_slice(), len)?)
    }

    pub(crate) fn chown(self, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        match self {
            Spot::Name(dir, name) => chownat(&dir.0, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?,
            Spot::Open(fd) | Spot::File(fd) => chownat(fd, "", uid, gid, AtFlags::EMPTY_PATH)?,
        }
        Ok(())
    }

    pub(crate) fn set_times(
        self,
        atime: Option<SetTime>,
        mtime: Option<SetTime>,
    ) -> io::Result<()> {
        let stamps = stamps(atime, mtime);
        match self {
            Spot::Name(dir, name) => {
                utimensat(&dir.0, name, &stamps, AtFlags::SYMLINK_NOFOLLOW)?;
            }
            Spot::Open(fd) => match utimensat(fd, "", &stamps, AtFlags::EMPTY_PATH) {
                // Before Linux 5.8.
                Err(Errno::INVAL) => {
                    let path = proc_path(fd, None);
                    utimensat(rustix::fs::CWD, path, &stamps, AtFlags::empty())?;
                }
                result => result?,
            },
            Spot::File(fd) => futimens(fd, &stamps)?,
        }
        Ok(())
    }

    pub(crate) fn readlink(self) -> io::Result<OsString> {
        let target = match self {
            Spot::Name(dir, name) => readlinkat(&dir.0, name, Vec::new())?,
            Spot::Open(fd) | Spot::File(fd) => readlinkat(fd, "", Vec::new())?,
        };
        Ok(OsString::from_vec(target.into_bytes()))
    }

    /// How extended attributes of it are reached.
    fn way(self) -> Way<'a> {
        match self {
            Spot::Name(dir, name) => Way::Itself(proc_path(dir.0.as_fd(), Some(name))),
            Spot::Open(fd) => Way::Through(proc_path(fd, None)),
            Spot::File(fd) => Way::Open(fd),
        }
    }

    /// An extended attribute, with the error where there is none.
    pub(crate) fn get_xattr(self, key: &OsStr) -> io::Result<Vec<u8>> {
        let way = self.way();
        Ok(growing(|buffer| match &way {
            Way::Itself(path) => rustix::fs::lgetxattr(path, key, buffer),
            Way::Through(path) => rustix::fs::getxattr(path, key, buffer),
            Way::Open(fd) => rustix::fs::fgetxattr(fd, key, buffer),
        })?)
    }

    /// An extended attribute; `None` where there is none or can be none.
    pub(crate) fn xattr(self, key: &OsStr) -> io::Result<Option<Vec<u8>>> {
        match self.get_xattr(key) {
            Ok(value) => Ok(Some(value)),
            Err(e) => match e.raw_os_error() {
                Some(libc::ENODATA | libc::EOPNOTSUPP | libc::EPERM) => Ok(None),
                _ => Err(e),
            },
        }
    }

    /// The names, each with a NUL byte behind it.
    pub(crate) fn list_xattrs(self) -> io::Result<Vec<u8>> {
        let way = self.way();
        let list = growing(|buffer| match &way {
            Way::Itself(path) => rustix::fs::llistxattr(path, buffer),
            Way::Through(path) => rustix::fs::listxattr(path, buffer),
            Way::Open(fd) => rustix::fs::flistxattr(fd, buffer),
        });
        match list {
            Err(Errno::OPNOTSUPP) => Ok(Vec::new()),
            list => Ok(list?),
        }
    }

    pub(crate) fn set_xattr(self, key: &OsStr, value: &[u8], flags: i32) -> io::Result<()> {
        let flags = XattrFlags::from_bits_retain(flags.cast_unsigned());
        match self.way() {
            Way::Itself(path) => rustix::fs::lsetxattr(path, key, value, flags)?,
            Way::Through(path) => rustix::fs::setxattr(path, key, value, flags)?,
            Way::Open(fd) => rustix::fs::fsetxattr(fd, key, value, flags)?,
        }
        Ok(())
    }

    pub(crate) fn remove_xattr(self, key: &OsStr) -> io::Result<()> {
        match self.way() {
            Way::Itself(path) => rustix::fs::lremovexattr(path, key)?,
            Way::Through(path) => rustix::fs::removexattr(path, key)?,
            Way::Open(fd) => rustix::fs::fremovexattr(fd, key)?,
        }
        Ok(())
    }

    pub(crate) fn handle(self) -> io::Result<Option<FileHandle>> {
        let handle = match self {
            Spot::Name(dir, name) => sys::name_to_handle(dir.0.as_fd(), name.as_bytes()),
            Spot::Open(fd) | Spot::File(fd) => sys::name_to_handle(fd, b""),
        };
        match handle {
            Ok(handle) => Ok(Some(handle)),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// Splits what [`Spot::list_xattrs`] returns.
pub(crate) fn split_names(list: &[u8]) -> impl Iterator<Item = &OsStr> {
    list.split(|byte| *byte == 0).filter(|name| !name.is_empty()).map(OsStr::from_bytes)
}

/// An open directory of the host (`O_PATH`).
pub struct HostDir(OwnedFd);

impl From<OwnedFd> for HostDir {
    fn from(fd: OwnedFd) -> HostDir {
        HostDir(fd)
    }
}

impl AsFd for HostDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl HostDir {
    pub(crate) fn at<'a>(&'a self, name: &'a OsStr) -> Spot<'a> {
        Spot::Name(self, name)
    }

    pub(crate) fn this(&self) -> Spot<'_> {
        Spot::Open(self.0.as_fd())
    }

    fn spot<'a>(&'a self, name: Option<&'a OsStr>) -> Spot<'a> {
        name.map_or(self.this(), |name| self.at(name))
    }

    /// A directory in it.
    pub(crate) fn child(&self, name: &OsStr) -> io::Result<HostDir> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(HostDir(openat(&self.0, name, flags, Mode::empty())?))
    }

    /// The attributes of a name, `None` where there is none.
    pub(crate) fn look(&self, name: &OsStr) -> io::Result<Option<Attr>> {
        match statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(attr_of(&stat))),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) fn create(&self, name: &OsStr, flags: OFlags, mode: u32) -> io::Result<File> {
        let flags = flags
            | OFlags::CREATE
            | OFlags::EXCL
            | OFlags::NOFOLLOW
            | OFlags::CLOEXEC
            | OFlags::NOCTTY;
        Ok(openat(&self.0, name, flags, Mode::from_raw_mode(mode & 0o7777))?.into())
    }

    pub(crate) fn tmpfile(&self, flags: OFlags, mode: u32) -> io::Result<File> {
        let flags = flags | OFlags::TMPFILE | OFlags::CLOEXEC;
        Ok(openat(&self.0, ".", flags, Mode::from_raw_mode(mode & 0o7777))?.into())
    }

    pub(crate) fn mkdir(&self, name: &OsStr, mode: u32) -> io::Result<()> {
        Ok(mkdirat(&self.0, name, Mode::from_raw_mode(mode & 0o7777))?)
    }

    pub(crate) fn mknod(&self, name: &OsStr, mode: u32, rdev: u64) -> io::Result<()> {
        let (kind, mode) = (FileType::from_raw_mode(mode), Mode::from_raw_mode(mode & 0o7777));
        Ok(mknodat(&self.0, name, kind, mode, rdev)?)
    }

    pub(crate) fn symlink(&self, name: &OsStr, target: &OsStr) -> io::Result<()> {
        Ok(symlinkat(target, &self.0, name)?)
    }

    pub(crate) fn unlink(&self, name: &OsStr) -> io::Result<()> {
        Ok(unlinkat(&self.0, name, AtFlags::empty())?)
    }

    pub(crate) fn rmdir(&self, name: &OsStr) -> io::Result<()> {
        Ok(unlinkat(&self.0, name, AtFlags::REMOVEDIR)?)
    }

    /// Renames with the flags of renameat2(2).
    pub(crate) fn rename(
        &self,
        name: &OsStr,
        to: &HostDir,
        new: &OsStr,
        flags: u32,
    ) -> io::Result<()> {
        let flags = RenameFlags::from_bits_retain(flags);
        Ok(renameat_with(&self.0, name, &to.0, new, flags)?)
    }

    /// One more name for a file that is no directory.
    pub(crate) fn link(&self, of: Spot<'_>, name: &OsStr) -> io::Result<()> {
        match of {
            Spot::Name(dir, old) => linkat(&dir.0, old, &self.0, name, AtFlags::empty())?,
            Spot::Open(fd) | Spot::File(fd) => {
                let path = proc_path(fd, None);
                linkat(rustix::fs::CWD, path, &self.0, name, AtFlags::SYMLINK_FOLLOW)?;
            }
        }
        Ok(())
    }

    /// Makes its names durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(&self.0, ".", flags, Mode::empty())?;
        Ok(rustix::fs::fsync(fd)?)
    }

    /// Every name but `.` and `..`.
    pub(crate) fn names(&self) -> io::Result<Vec<DirEntry>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(&self.0, ".", flags, Mode::empty())?;
        let mut buffer = [MaybeUninit::uninit(); 32768];
        let mut entries = RawDir::new(fd, &mut buffer);
        let mut names = Vec::new();
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." {
                let kind = match entry.file_type() {
                    FileType::Unknown => 0,
                    kind => kind.as_raw_mode() & libc::S_IFMT,
                };
                names.push(DirEntry { name: name.to_owned(), ino: entry.ino(), kind });
            }
        }
        Ok(names)
    }
}

impl LayerDir for HostDir {
    fn attr(&self, name: Option<&OsStr>) -> io::Result<Option<Attr>> {
        match name {
            Some(name) => self.look(name),
            None => self.this().stat().map(Some),
        }
    }

    fn dir(&self, name: &OsStr) -> io::Result<Arc<dyn LayerDir>> {
        Ok(Arc::new(self.child(name)?))
    }

    fn entries(&self) -> io::Result<Vec<DirEntry>> {
        self.names()
    }

    fn open(&self, name: &OsStr) -> io::Result<Arc<dyn LayerFile>> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        // Reading a lower file is no access to it; but only its owner may ask for that.
        let file = match self.at(name).open(flags | OFlags::NOATIME) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => self.at(name).open(flags)?,
            file => file?,
        };
        Ok(Arc::new(HostFile(file)))
    }

    fn readlink(&self, name: &OsStr) -> io::Result<OsString> {
        self.at(name).readlink()
    }

    fn xattr(&self, name: Option<&OsStr>, key: &OsStr) -> io::Result<Option<Vec<u8>>> {
        match self.spot(name).get_xattr(key) {
            Ok(value) => Ok(Some(value)),
            Err(e) if e.raw_os_error() == Some(libc::ENODATA) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn xattrs(&self, name: Option<&OsStr>) -> io::Result<Vec<OsString>> {
        let list = self.spot(name).list_xattrs()?;
        Ok(split_names(&list).map(OsStr::to_owned).collect())
    }

    fn handle(&self, name: Option<&OsStr>) -> io::Result<Option<FileHandle>> {
        self.spot(name).handle()
    }
}

/// A file of the host, open for reading.
pub struct HostFile(File);

impl LayerFile for HostFile {
    fn attr(&self) -> io::Result<Attr> {
        Spot::Open(self.0.as_fd()).stat()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        read_full(&self.0, offset, buf)
    }

    fn seek(&self, offset: u64, whence: i32) -> io::Result<u64> {
        seek(&self.0, offset, whence)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

/// Reads until `buf` is full or the file ends.
pub(crate) fn read_full(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + done as u64) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) if done > 0 => break,
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// `SEEK_DATA` and `SEEK_HOLE`.
pub(crate) fn seek(file: &File, offset: u64, whence: i32) -> io::Result<u64> {
    let to = match whence {
        libc::SEEK_DATA => SeekFrom::Data(offset),
        libc::SEEK_HOLE => SeekFrom::Hole(offset),
        _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
    };
    Ok(rustix::fs::seek(file, to)?)
}
