//! Random calls on files, made alike in two directories that should behave as one: what a program
//! is told must be the same in both. Whose directories these are is the caller's affair.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::unistd::{setfsgid, setfsuid};
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, FlockOperation, Gid, Mode, OFlags, RenameFlags,
    SeekFrom, Timespec, Timestamps, Uid, XattrFlags,
};

use crate::dice::Dice;
use crate::same_tree::xattr_names;

/// The ordinary user that some calls are made as.
const SOMEBODY: u32 = 1234;
/// Open files at a time.
const FDS: usize = 6;

/// A call.
#[derive(Debug, Clone)]
pub enum Call {
    /// The next calls are somebody's, or the superuser's again.
    As(u32, u32),
    Umask(u32),
    Open(usize, PathBuf, u32, u32),
    Tmpfile(usize, PathBuf, u32),
    LinkFd(usize, PathBuf),
    Close(usize),
    Write(usize, u64, Vec<u8>),
    Append(usize, Vec<u8>),
    Read(usize, u64, usize),
    StatFd(usize),
    TruncateFd(usize, u64),
    ChmodFd(usize, u32),
    TimesFd(usize, i64),
    Allocate(usize, u32, u64, u64),
    Seek(usize, u64, bool),
    CopyRange(usize, usize, u64, u64, usize),
    Sync(usize, bool),
    Lock(usize, bool),
    XattrFd(usize, &'static str, Vec<u8>),
    Map(usize, u64, Vec<u8>),
    Mkdir(PathBuf, u32),
    Rmdir(PathBuf),
    Unlink(PathBuf),
    Rename(PathBuf, PathBuf, u32),
    Link(PathBuf, PathBuf),
    Symlink(PathBuf, PathBuf),
    Mknod(PathBuf, u32, u64),
    Chmod(PathBuf, u32),
    Chown(PathBuf, Option<u32>, Option<u32>),
    Truncate(PathBuf, u64),
    Times(PathBuf, i64),
    SetXattr(PathBuf, &'static str, Vec<u8>, u32),
    GetXattr(PathBuf, &'static str),
    ListXattr(PathBuf),
    RemoveXattr(PathBuf, &'static str),
    Acl(PathBuf, bool, u16),
    Stat(PathBuf),
    Readlink(PathBuf),
    List(PathBuf),
    ReadAll(PathBuf),
    WriteAll(PathBuf, Vec<u8>),
    Access(PathBuf, u32),
}

const XATTRS: [&str; 6] = [
    "user.a",
    "user.long",
    "trusted.b",
    "security.capability",
    "trusted.overlay.x",
    "user.overlay.y",
];

impl Call {
    /// A random one.
    pub fn random(dice: &mut Dice) -> Call {
        let fd = dice.below(FDS as u64) as usize;
        match dice.below(100) {
            0 | 1 => match dice.below(3) {
                0 => Call::As(SOMEBODY, SOMEBODY),
                _ => Call::As(0, 0),
            },
            2 => Call::Umask(*dice.pick(&[0o22, 0o77, 0, 0o27])),
            3..=12 => Call::open(dice, fd),
            13 => Call::Tmpfile(fd, dice.path(), dice.mode()),
            14 => Call::LinkFd(fd, dice.path()),
            15 => Call::Close(fd),
            16..=21 => Call::Write(fd, dice.offset(), dice.bytes()),
            22 => Call::Append(fd, dice.bytes()),
            23..=26 => Call::Read(fd, dice.offset(), dice.below(100_000) as usize),
            27 | 28 => Call::StatFd(fd),
            29 => Call::TruncateFd(fd, dice.offset()),
            30 => Call::ChmodFd(fd, dice.mode()),
            31 => Call::TimesFd(fd, dice.below(2_000_000_000) as i64 - 500_000_000),
            32 | 33 => {
                let how = *dice.pick(&[0, 1, 3, 3, 0x10, 0x11]);
                Call::Allocate(fd, how, dice.offset(), 1 + dice.offset())
            }
            34 | 35 => Call::Seek(fd, dice.offset(), dice.one_in(2)),
            36 => {
                let other = dice.below(FDS as u64) as usize;
                Call::CopyRange(
                    fd,
                    other,
                    dice.offset(),
                    dice.offset(),
                    dice.below(50_000) as usize,
                )
            }
            37 => Call::Sync(fd, dice.one_in(2)),
            38 => Call::Lock(fd, dice.one_in(2)),
            39 => Call::XattrFd(
                fd,
                dice.pick::<&str>(&XATTRS),
                dice.bytes()[..].iter().take(60).copied().collect(),
            ),
            40 => Call::Map(fd, dice.below(5) * 4096, dice.bytes()),
            41..=45 => Call::Mkdir(dice.path(), dice.mode() | 0o700),
            46 | 47 => Call::Rmdir(dice.path()),
            48..=51 => Call::Unlink(dice.path()),
            52..=59 => Call::Rename(dice.path(), dice.path(), *dice.pick(&[0, 0, 0, 1, 2, 4])),
            60..=63 => Call::Link(dice.path(), dice.path()),
            64 | 65 => Call::Symlink(dice.path(), dice.path()),
            66 => {
                let kind =
                    *dice.pick(&[libc::S_IFIFO, libc::S_IFCHR, libc::S_IFSOCK, libc::S_IFREG]);
                Call::Mknod(dice.path(), kind | dice.mode() & 0o777, *dice.pick(&[0, 0x103, 0x501]))
            }
            67 | 68 => Call::Chmod(dice.path(), dice.mode()),
            69 | 70 => {
                let id =
                    |dice: &mut Dice| *dice.pick(&[None, Some(0), Some(SOMEBODY), Some(77_777)]);
                // Nobody's call to change nothing is answered by the caller's side of FUSE.
                Call::Chown(dice.path(), Some(*dice.pick(&[0, SOMEBODY, 77_777])), id(dice))
            }
            71 => Call::Truncate(dice.path(), dice.offset()),
            72 | 73 => Call::Times(dice.path(), dice.below(2_000_000_000) as i64 - 500_000_000),
            74 | 75 => {
                let value = dice.bytes().into_iter().take(40).collect();
                Call::SetXattr(
                    dice.path(),
                    dice.pick::<&str>(&XATTRS),
                    value,
                    *dice.pick(&[0, 0, 1, 2]),
                )
            }
            76 => Call::GetXattr(dice.path(), dice.pick::<&str>(&XATTRS)),
            77 => Call::ListXattr(dice.path()),
            78 => Call::RemoveXattr(dice.path(), dice.pick::<&str>(&XATTRS)),
            79 => Call::Acl(dice.path(), dice.one_in(2), dice.below(8) as u16),
            80..=84 => Call::Stat(dice.path()),
            85 => Call::Readlink(dice.path()),
            86..=89 => Call::List(dice.path().parent().unwrap_or(Path::new("")).to_owned()),
            90..=93 => Call::ReadAll(dice.path()),
            94..=97 => Call::WriteAll(dice.path(), dice.bytes()),
            _ => Call::Access(dice.path(), dice.below(8) as u32),
        }
    }

    fn open(dice: &mut Dice, fd: usize) -> Call {
        let mut flags = *dice.pick(&[libc::O_RDONLY, libc::O_RDWR, libc::O_RDWR, libc::O_WRONLY]);
        let extra = [
            (2, libc::O_CREAT),
            (6, libc::O_EXCL),
            (5, libc::O_TRUNC),
            (6, libc::O_APPEND),
            (9, libc::O_DIRECTORY),
            (6, libc::O_NOFOLLOW),
            (20, libc::O_PATH),
            (20, libc::O_DSYNC),
        ];
        for (of, flag) in extra {
            if dice.one_in(of) {
                flags |= flag;
            }
        }
        if flags & libc::O_CREAT == 0 {
            flags &= !libc::O_EXCL;
        }
        Call::Open(fd, dice.path(), flags as u32 | libc::O_NONBLOCK as u32, dice.mode())
    }
}

/// One of the two directories, and what is open in it.
pub struct Side {
    root: PathBuf,
    fds: Vec<Option<OwnedFd>>,
    /// Times from here on are the clock's, not a call's.
    started: i64,
}

pub fn told<T: std::fmt::Debug>(result: rustix::io::Result<T>) -> String {
    match result {
        Ok(value) => format!("{value:?}"),
        Err(error) => format!("errno {}", error.raw_os_error()),
    }
}

fn as_io<T: std::fmt::Debug>(result: io::Result<T>) -> String {
    match result {
        Ok(value) => format!("{value:?}"),
        Err(error) => match error.raw_os_error() {
            Some(number) => format!("errno {number}"),
            None => format!("{error}"),
        },
    }
}

/// A short word for bytes that tells them apart.
pub fn digest(bytes: &[u8]) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in bytes {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    }
    format!("{} bytes {hash:016x}", bytes.len())
}

fn time(sec: i64) -> Timestamps {
    let at = |sec, tv_nsec| Timespec { tv_sec: sec, tv_nsec };
    Timestamps { last_access: at(sec + 5, 7), last_modification: at(sec, 123_456_789) }
}

impl Side {
    /// The directory, with nothing open.
    pub fn new(root: &Path, started: i64) -> Side {
        Side { root: root.to_owned(), fds: (0..FDS).map(|_| None).collect(), started }
    }

    fn at(&self, path: &Path) -> PathBuf {
        self.root.join(path)
    }

    fn fd(&self, fd: usize) -> rustix::io::Result<&OwnedFd> {
        self.fds[fd].as_ref().ok_or(rustix::io::Errno::BADF)
    }

    fn is_removed(&self, fd: usize) -> bool {
        self.fd(fd).is_ok_and(|fd| {
            let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(fd));
            fs::read_link(link).is_ok_and(|to| to.to_string_lossy().ends_with(" (deleted)"))
        })
    }

    fn file(&self, fd: usize) -> io::Result<File> {
        Ok(self.fd(fd)?.try_clone()?.into())
    }

    pub fn stat(&self, meta: &fs::Metadata) -> String {
        let kind = meta.mode() & libc::S_IFMT;
        let size = if kind == libc::S_IFDIR { 0 } else { meta.size() };
        let nlink = if kind == libc::S_IFDIR { 0 } else { meta.nlink() };
        let mtime = match meta.mtime() {
            now if now >= self.started => "now".to_owned(),
            then => format!("{then}.{}", meta.mtime_nsec()),
        };
        let (mode, uid, gid, rdev) = (meta.mode(), meta.uid(), meta.gid(), meta.rdev());
        format!("{mode:o} {nlink} {uid}:{gid} {rdev:x} {size} {mtime}")
    }

    /// Makes the call and says what came of it.
    pub fn make(&mut self, call: &Call) -> String {
        match call {
            Call::As(uid, gid) => {
                // Back to the superuser first: nobody else may change.
                setfsuid(0.into());
                setfsgid((*gid).into());
                setfsuid((*uid).into());
                String::new()
            }
            Call::Umask(mask) => {
                rustix::process::umask(Mode::from_raw_mode(*mask));
                String::new()
            }
            Call::Open(fd, path, flags, mode) => {
                let flags = OFlags::from_bits_retain(*flags) | OFlags::CLOEXEC;
                let mode = Mode::from_raw_mode(*mode);
                let opened = rustix::fs::openat(CWD, self.at(path), flags | OFlags::CLOEXEC, mode);
                let said = told(opened.as_ref().map(|_| ()).map_err(|e| *e));
                self.fds[*fd] = opened.ok();
                said
            }
            Call::Tmpfile(fd, path, mode) => {
                let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
                let mode = Mode::from_raw_mode(*mode);
                let opened = rustix::fs::openat(CWD, self.at(path), flags | OFlags::CLOEXEC, mode);
                let said = told(opened.as_ref().map(|_| ()).map_err(|e| *e));
                self.fds[*fd] = opened.ok();
                said
            }
            Call::LinkFd(fd, path) => told(self.fd(*fd).and_then(|fd| {
                let from = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(fd));
                rustix::fs::linkat(CWD, from, CWD, self.at(path), AtFlags::SYMLINK_FOLLOW)
            })),
            Call::Close(fd) => {
                self.fds[*fd] = None;
                String::new()
            }
            Call::Write(..)
            | Call::Append(..)
            | Call::Read(..)
            | Call::TruncateFd(..)
            | Call::Allocate(..)
            | Call::Seek(..)
            | Call::CopyRange(..)
            | Call::Sync(..)
            | Call::Map(..) => self.contents(call),
            Call::StatFd(fd) => {
                as_io(self.file(*fd).and_then(|file| file.metadata()).map(|meta| self.stat(&meta)))
            }
            // The kernel's overlayfs gives a removed lower file its name back when its attributes
            // are changed.
            Call::ChmodFd(fd, _) | Call::TimesFd(fd, _) | Call::XattrFd(fd, ..)
                if self.is_removed(*fd) =>
            {
                String::new()
            }
            Call::ChmodFd(fd, mode) => {
                told(self.fd(*fd).and_then(|fd| rustix::fs::fchmod(fd, Mode::from_raw_mode(*mode))))
            }
            Call::TimesFd(fd, sec) => {
                told(self.fd(*fd).and_then(|fd| rustix::fs::futimens(fd, &time(*sec))))
            }
            Call::Lock(fd, shared) => {
                let how = match shared {
                    true => FlockOperation::NonBlockingLockShared,
                    false => FlockOperation::NonBlockingLockExclusive,
                };
                told(self.fd(*fd).and_then(|fd| rustix::fs::flock(fd, how)))
            }
            Call::XattrFd(fd, key, value) => told(
                self.fd(*fd)
                    .and_then(|fd| rustix::fs::fsetxattr(fd, *key, value, XattrFlags::empty())),
            ),
            Call::SetXattr(..)
            | Call::GetXattr(..)
            | Call::ListXattr(..)
            | Call::RemoveXattr(..)
            | Call::Acl(..) => self.attributes(call),
            _ => self.names(call),
        }
    }

    fn contents(&mut self, call: &Call) -> String {
        match call {
            Call::Write(fd, offset, bytes) => {
                as_io(self.file(*fd).and_then(|file| file.write_all_at(bytes, *offset)))
            }
            Call::Append(fd, bytes) => as_io(self.file(*fd).and_then(|file| {
                let end = file.metadata()?.size();
                file.write_all_at(bytes, end)
            })),
            Call::Read(fd, offset, len) => {
                let mut bytes = vec![0; *len];
                let read = self.file(*fd).and_then(|file| file.read_at(&mut bytes, *offset));
                as_io(read.map(|len| digest(&bytes[..len])))
            }
            Call::TruncateFd(fd, len) => {
                told(self.fd(*fd).and_then(|fd| rustix::fs::ftruncate(fd, *len)))
            }
            Call::Allocate(fd, mode, offset, len) => {
                let mode = FallocateFlags::from_bits_retain(*mode);
                told(self.fd(*fd).and_then(|fd| rustix::fs::fallocate(fd, mode, *offset, *len)))
            }
            Call::Seek(fd, offset, data) => {
                let to = if *data { SeekFrom::Data(*offset) } else { SeekFrom::Hole(*offset) };
                told(self.fd(*fd).and_then(|fd| {
                    // What a directory answers is its file system's own affair.
                    match FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) {
                        FileType::RegularFile => rustix::fs::seek(fd, to),
                        _ => Ok(0),
                    }
                }))
            }
            Call::CopyRange(from, to, read, write, len) => {
                let (mut read, mut write) = (*read, *write);
                let copied = self.fd(*from).and_then(|from| {
                    let to = self.fd(*to)?;
                    let (read, write) = (Some(&mut read), Some(&mut write));
                    rustix::fs::copy_file_range(from, read, to, write, *len)
                });
                told(copied)
            }
            Call::Sync(fd, data) => told(self.fd(*fd).and_then(|fd| match data {
                true => rustix::fs::fdatasync(fd),
                false => rustix::fs::fsync(fd),
            })),
            Call::Map(fd, offset, bytes) => {
                told(self.fd(*fd).and_then(|fd| map(fd, *offset, bytes)))
            }
            _ => String::new(),
        }
    }

    fn attributes(&mut self, call: &Call) -> String {
        match call {
            Call::SetXattr(path, key, value, flags) => {
                let flags = XattrFlags::from_bits_retain(*flags);
                told(rustix::fs::lsetxattr(self.at(path), *key, value, flags))
            }
            Call::GetXattr(path, key) => {
                let mut value = [0u8; 4096];
                let len = rustix::fs::lgetxattr(self.at(path), *key, &mut value[..]);
                told(len.map(|len| value[..len].to_vec()))
            }
            Call::ListXattr(path) => told(xattr_names(&self.at(path))),
            Call::RemoveXattr(path, key) => told(rustix::fs::lremovexattr(self.at(path), *key)),
            Call::Acl(path, default, bits) => {
                let key =
                    if *default { "system.posix_acl_default" } else { "system.posix_acl_access" };
                let value = acl(*bits);
                told(rustix::fs::setxattr(self.at(path), key, &value, XattrFlags::empty()))
            }
            _ => String::new(),
        }
    }

    fn names(&mut self, call: &Call) -> String {
        let raw = Mode::from_raw_mode;
        match call {
            Call::Mkdir(path, mode) => told(rustix::fs::mkdirat(CWD, self.at(path), raw(*mode))),
            Call::Rmdir(path) => told(rustix::fs::unlinkat(CWD, self.at(path), AtFlags::REMOVEDIR)),
            Call::Unlink(path) => told(rustix::fs::unlinkat(CWD, self.at(path), AtFlags::empty())),
            Call::Rename(from, to, flags) => {
                let flags = RenameFlags::from_bits_retain(*flags);
                told(rustix::fs::renameat_with(CWD, self.at(from), CWD, self.at(to), flags))
            }
            Call::Link(from, to) => {
                let flags = AtFlags::empty();
                told(rustix::fs::linkat(CWD, self.at(from), CWD, self.at(to), flags))
            }
            Call::Symlink(target, path) => told(rustix::fs::symlinkat(target, CWD, self.at(path))),
            Call::Mknod(path, mode, rdev) => {
                let kind = FileType::from_raw_mode(*mode);
                told(rustix::fs::mknodat(CWD, self.at(path), kind, raw(*mode & 0o7777), *rdev))
            }
            Call::Chmod(path, mode) => {
                told(rustix::fs::chmodat(CWD, self.at(path), raw(*mode), AtFlags::empty()))
            }
            Call::Chown(path, uid, gid) => {
                let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                told(rustix::fs::chownat(CWD, self.at(path), uid, gid, flags))
            }
            Call::Truncate(path, len) => told(
                nix::unistd::truncate(&self.at(path), *len as i64)
                    .map_err(|e| rustix::io::Errno::from_raw_os_error(e as i32)),
            ),
            Call::Times(path, sec) => {
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                told(rustix::fs::utimensat(CWD, self.at(path), &time(*sec), flags))
            }
            Call::Stat(path) => {
                as_io(fs::symlink_metadata(self.at(path)).map(|meta| self.stat(&meta)))
            }
            Call::Readlink(path) => as_io(fs::read_link(self.at(path))),
            Call::List(path) => as_io(fs::read_dir(self.at(path)).and_then(|entries| {
                let mut names = Vec::new();
                for entry in entries {
                    let entry = entry?;
                    names.push((entry.file_name(), entry.file_type()?));
                }
                names.sort_by(|a, b| a.0.cmp(&b.0));
                Ok(names)
            })),
            Call::ReadAll(path) => as_io(self.read_all(path)),
            Call::WriteAll(path, bytes) => as_io(self.write_all(path, bytes)),
            Call::Access(path, mode) => told(rustix::fs::accessat(
                CWD,
                self.at(path),
                rustix::fs::Access::from_bits_retain(*mode),
                AtFlags::EACCESS,
            )),
            _ => String::new(),
        }
    }

    /// Without waiting at a pipe.
    fn read_all(&self, path: &Path) -> io::Result<String> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file: File =
            rustix::fs::openat(CWD, self.at(path), flags | OFlags::CLOEXEC, Mode::empty())?.into();
        if !file.metadata()?.is_file() {
            return Ok("no file".into());
        }
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut &file, &mut bytes)?;
        Ok(digest(&bytes))
    }

    fn write_all(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let flags =
            OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::CREATE | OFlags::TRUNC;
        let mode = Mode::from_raw_mode(0o664);
        let file: File =
            rustix::fs::openat(CWD, self.at(path), flags | OFlags::CLOEXEC, mode)?.into();
        if file.metadata()?.is_file() { io::Write::write_all(&mut &file, bytes) } else { Ok(()) }
    }
}

/// Writes through a shared mapping of what there is of the file, and reads it back.
fn map(fd: &OwnedFd, offset: u64, bytes: &[u8]) -> rustix::io::Result<String> {
    use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};
    let size = rustix::fs::fstat(fd)?.st_size as u64;
    let len = size.saturating_sub(offset).min(bytes.len() as u64) as usize;
    if len == 0 {
        return Ok("nothing there".into());
    }
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address that the kernel chooses, of `len` bytes that exist in
    // the file: nobody else cuts it in this test. It is unmapped before this function ends.
    unsafe {
        let at = mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, fd.as_fd(), offset)?;
        let seen = std::slice::from_raw_parts_mut(at.cast::<u8>(), len);
        let before = digest(seen);
        seen.copy_from_slice(&bytes[..len]);
        let synced = msync(at, len, MsyncFlags::SYNC);
        munmap(at, len)?;
        synced?;
        // Some file systems take this for a change of the file, and some do not.
        let _ = rustix::fs::futimens(fd, &time(1_234_567_890));
        Ok(before)
    }
}

/// A POSIX ACL as its extended attribute holds it: one user more than the permissions know.
fn acl(bits: u16) -> Vec<u8> {
    let mut value = 2u32.to_le_bytes().to_vec();
    let nobody = u32::MAX;
    let entries = [
        (1, 7, nobody),
        (2, bits, SOMEBODY),
        (4, 5, nobody),
        (0x10, 7, nobody),
        (0x20, bits & 4, nobody),
    ];
    for (tag, perm, id) in entries {
        value.extend_from_slice(&u16::to_le_bytes(tag));
        value.extend_from_slice(&u16::to_le_bytes(perm));
        value.extend_from_slice(&u32::to_le_bytes(id));
    }
    value
}
