//! What a tree of files tells about a file, in the words of stat(2). Knows no FUSE and no layer.

use std::ffi::OsString;

/// A point in time. Before 1970 `sec` is negative; `nsec` always counts forward, below 10^9.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time {
    /// Seconds since 1970.
    pub sec: i64,
    /// Nanoseconds on top.
    pub nsec: u32,
}

/// The attributes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attr {
    /// The number that stat(2) shows: the same for every name of a file, and after a remount.
    pub ino: u64,
    /// Type and permissions (`S_IFMT | 0o7777`).
    pub mode: u32,
    /// Number of names.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The device that a device node stands for, as `makedev(3)` gives it.
    pub rdev: u64,
    /// Bytes.
    pub size: u64,
    /// Stored units of 512 bytes.
    pub blocks: u64,
    /// The preferred unit of I/O in bytes.
    pub blksize: u32,
    /// Last access.
    pub atime: Time,
    /// Last change of the contents.
    pub mtime: Time,
    /// Last change of the file.
    pub ctime: Time,
}

impl Attr {
    /// The type alone: one of the `S_IF*`.
    pub fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.kind() == libc::S_IFDIR
    }

    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        self.kind() == libc::S_IFREG
    }
}

/// What a time is set to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    /// The time of the call.
    Now,
    /// This one.
    To(Time),
}

/// A change of attributes: what is `None` stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SetAttr {
    /// Permissions (`0o7777`).
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Bytes: cut, or grown with a hole.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last change of the contents.
    pub mtime: Option<SetTime>,
    /// Last change of the file; only a kernel that caches writes sends it.
    pub ctime: Option<Time>,
    /// With `size` or an owner: set-user-id and set-group-id bits go, as after a write by one
    /// without `CAP_FSETID`.
    pub kill_privileges: bool,
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name.
    pub name: OsString,
    /// As [`Attr::ino`]; 0 where it is not known without looking at the file.
    pub ino: u64,
    /// One of the `S_IF*`, or 0 where it is not known.
    pub kind: u32,
}

/// The attributes of a file system, as statvfs(3) gives them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StatFs {
    /// Size in units of `frsize`.
    pub blocks: u64,
    /// Free units.
    pub bfree: u64,
    /// Free units for ordinary users.
    pub bavail: u64,
    /// Number of files there can be.
    pub files: u64,
    /// Number of files that can still be made.
    pub ffree: u64,
    /// The preferred unit of I/O in bytes.
    pub bsize: u32,
    /// The unit in bytes.
    pub frsize: u32,
    /// The longest name in bytes.
    pub namelen: u32,
}
