//! A writable tree of files as the kernel-facing side sees it: what the overlay is, and what the
//! files in a disk are. Knows no FUSE wire format.
//!
//! Who may do what is decided before: the mount has `default_permissions` and POSIX ACLs, so the
//! kernel asks only for what the caller may do by mode, owner and ACL. It also holds a
//! directory's lock during every change of its names, takes set-group-id away from a new file's
//! mode where the caller may not set it, and keeps flock(2) and fcntl(2) locks by itself.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, OnceLock};

use crate::attr::{Attr, DirEntry, SetAttr, StatFs};
use crate::kernel::{Backing, Kernel};

/// The node of the root directory.
pub const ROOT: u64 = 1;

/// A node that the kernel now knows: it counts one lookup, see [`Files::forget`].
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// The node's number. Every name of a file leads to the same node while the kernel knows it.
    pub node: u64,
    /// Tells two files apart that had the same node number one after the other.
    pub generation: u64,
    /// Its attributes.
    pub attr: Attr,
}

/// On whose behalf a request is made.
#[derive(Debug, Clone, Copy, Default)]
pub struct Caller {
    /// User: owner of what is made.
    pub uid: u32,
    /// Group: of what is made, unless the directory gives its own (set-group-id).
    pub gid: u32,
    /// Process; 0 where it stands in a namespace that we do not see.
    pub pid: u32,
}

impl Caller {
    /// Whether the caller is in a group.
    pub fn is_in_group(&self, gid: u32) -> bool {
        let groups = || {
            let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
            let words = status.lines().find_map(|line| line.strip_prefix("Groups:"))?;
            Some(words.split_ascii_whitespace().any(|word| word.parse() == Ok(gid)))
        };
        self.gid == gid || groups().unwrap_or(false)
    }

    /// Whether the caller has a capability where we have ours.
    fn has(&self, capability: u32) -> bool {
        let seen = match WITNESS.get() {
            Some(witness) => witness(self.pid, capability),
            None => has_capability(self.pid, capability),
        };
        seen.unwrap_or(self.uid == 0)
    }

    /// Whether the caller has `CAP_SYS_ADMIN`.
    pub fn is_administrator(&self) -> bool {
        self.has(21)
    }

    /// Whether a file keeps set-user-id and set-group-id through this caller's changes of its
    /// contents (`CAP_FSETID`): for those of which the kernel does not say so itself.
    pub fn keeps_set_id(&self) -> bool {
        self.has(4)
    }

    /// The permissions that a file in group `gid` keeps after a change of its contents by this
    /// caller, who has no `CAP_FSETID`. Set-group-id without execution for the group, a mark for
    /// locks, goes only where the caller is not in the group.
    pub fn without_privileges(&self, mode: u32, gid: u32) -> u32 {
        let sgid = mode & libc::S_ISGID != 0;
        if sgid && (mode & libc::S_IXGRP != 0 || !self.is_in_group(gid)) {
            return mode & !(libc::S_ISUID | libc::S_ISGID);
        }
        mode & !libc::S_ISUID
    }
}

/// Says whether a process has a capability; `None` where it does not see that.
pub type Witness = Box<dyn Fn(u32, u32) -> Option<bool> + Send + Sync>;

static WITNESS: OnceLock<Witness> = OnceLock::new();

/// From now on `witness` says what the callers of this process can do: for one that sees no other process.
pub fn ask_of_callers(witness: Witness) {
    // Who could answer first does.
    let _ = WITNESS.set(witness);
}

/// Whether the process `pid` has a capability in the user namespace that this one is in; `None` where there is
/// no such process, or none that is seen.
pub fn has_capability(pid: u32, capability: u32) -> Option<bool> {
    let space = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/user")).ok();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let word = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = word.and_then(|word| u64::from_str_radix(word.trim(), 16).ok());
    let has = capabilities.is_some_and(|bits| bits.checked_shr(capability).unwrap_or(0) & 1 != 0);
    let own = space("self");
    Some(has && own.is_some() && space(&pid.to_string()) == own)
}

/// A name to be made.
#[derive(Debug, Clone, Copy)]
pub struct NewName<'a> {
    /// On whose behalf.
    pub caller: Caller,
    /// The directory.
    pub parent: u64,
    /// One component; neither empty nor `.` nor `..`, without `/`; empty for a file without a
    /// name ([`Files::tmpfile`]).
    pub name: &'a OsStr,
    /// Type and permissions as the program asked for them.
    pub mode: u32,
    /// To be taken from the permissions where the directory has no default ACL.
    pub umask: u32,
}

/// A name, old or new.
#[derive(Debug, Clone, Copy)]
pub struct Name<'a> {
    /// The directory.
    pub parent: u64,
    /// One component.
    pub name: &'a OsStr,
}

/// An open file.
#[derive(Debug, Clone, Default)]
pub struct Opened {
    /// The tree's number for it.
    pub handle: u64,
    /// How the kernel reaches its bytes.
    pub access: Access,
}

/// How the kernel reaches the bytes of an open file. The trees must see to it that all files
/// open at a time on one node are either `Cached` or `Refreshed`, or `Direct` and `Backed` by the same file.
#[derive(Debug, Clone, Default)]
pub enum Access {
    /// Through its page cache, which stays true from one opening to the next.
    #[default]
    Cached,
    /// Through its page cache, of which nothing from before is true.
    Refreshed,
    /// By requests only.
    Direct,
    /// By itself, in this file of another file system: `read`, `write` and `mmap` make no
    /// requests. The kernel opens it anew with the flags of the opening.
    Backed(Arc<Backing>),
}

/// A write.
#[derive(Debug, Clone, Copy)]
pub struct Write<'a> {
    /// Where.
    pub offset: u64,
    /// What.
    pub data: &'a [u8],
    /// Who writes.
    pub caller: Caller,
    /// The writer may not keep set-user-id and set-group-id bits on the file. (File capabilities
    /// go with every write.)
    pub kill_privileges: bool,
}

/// A copy of bytes from one open file to another.
#[derive(Debug, Clone, Copy)]
pub struct Copy {
    /// Who copies.
    pub caller: Caller,
    /// The open file to read, and from where.
    pub from: (u64, u64),
    /// The open file to write, and from where.
    pub to: (u64, u64),
    /// Bytes.
    pub len: u64,
}

/// Looks at a file of the host.
pub type TakeFile<'a> = dyn FnMut(BorrowedFd<'_>) -> io::Result<()> + 'a;

/// A writable tree of files, for many threads at once. Object-safe.
///
/// Nodes are numbers that the tree gives out; [`ROOT`] is the root's. An error's
/// [`raw_os_error`](io::Error::raw_os_error) is what the program is told, an error without one is
/// `EIO`. A panic is `EIO` for one request. What a tree cannot do at all it refuses with
/// `EOPNOTSUPP`, as the defaults here do.
pub trait Files: Send + Sync {
    /// The mount stands; `kernel` is whom the tree may speak to.
    fn start(&self, kernel: Kernel) {
        let _ = kernel;
    }

    /// Called first in each thread that will make requests.
    ///
    /// # Errors
    /// End the thread, and with it the serving.
    fn thread(&self) -> io::Result<()> {
        Ok(())
    }

    /// Looks `name` up in a directory (also `.` and `..` where somebody exports the mount over
    /// NFS). `None` where there is no such name, which the kernel then remembers.
    fn lookup(&self, parent: u64, name: &OsStr) -> io::Result<Option<Entry>>;

    /// The kernel forgets `count` of the lookups of `node`; at 0 it no longer knows the node.
    /// A node without a name lives until then, and until its last open file is closed. At the end
    /// of a mount the kernel may forget nothing.
    fn forget(&self, node: u64, count: u64);

    /// The attributes, of the open file where one is named.
    fn getattr(&self, node: u64, handle: Option<u64>) -> io::Result<Attr>;

    /// Whether the kernel may keep the attributes of a node: not while programs write to it without
    /// the kernel-facing side being asked ([`Access::Backed`]).
    fn may_keep(&self, node: u64) -> bool {
        let _ = node;
        true
    }

    /// Changes attributes, all or none as far as one can tell, and returns what is then.
    /// A change of owner takes set-user-id, set-group-id and file capabilities as chown(2) does.
    /// A change of nothing says that the caller is about to change the contents in a way that
    /// takes set-user-id and set-group-id.
    fn setattr(
        &self,
        caller: Caller,
        node: u64,
        handle: Option<u64>,
        change: &SetAttr,
    ) -> io::Result<Attr>;

    /// The target of a symbolic link.
    fn readlink(&self, node: u64) -> io::Result<OsString>;

    /// Makes a regular file, device, pipe or socket.
    fn mknod(&self, new: &NewName<'_>, rdev: u64) -> io::Result<Entry>;

    /// Makes a directory.
    fn mkdir(&self, new: &NewName<'_>) -> io::Result<Entry>;

    /// Makes a symbolic link.
    fn symlink(&self, new: &NewName<'_>, target: &OsStr) -> io::Result<Entry>;

    /// Gives `node`, which is no directory and may have no name, one more name.
    fn link(&self, node: u64, to: Name<'_>) -> io::Result<Entry>;

    /// Removes a name that is no directory's.
    fn unlink(&self, name: Name<'_>) -> io::Result<()>;

    /// Removes an empty directory.
    fn rmdir(&self, name: Name<'_>) -> io::Result<()>;

    /// Renames, with the flags of renameat2(2) (`RENAME_NOREPLACE`, `_EXCHANGE`, `_WHITEOUT`: what is
    /// left at the old name is the caller's).
    fn rename(&self, caller: Caller, from: Name<'_>, to: Name<'_>, flags: u32) -> io::Result<()>;

    /// Opens a regular file with the flags of open(2), `O_TRUNC` among them (without `O_CREAT`,
    /// `O_EXCL`, `O_NOCTTY`). `kill_privileges` as in [`Write`], for `O_TRUNC`.
    fn open(
        &self,
        caller: Caller,
        node: u64,
        flags: i32,
        kill_privileges: bool,
    ) -> io::Result<Opened>;

    /// Makes and opens a regular file in one step. The name is free, as far as the kernel knows.
    fn create(&self, new: &NewName<'_>, flags: i32) -> io::Result<(Entry, Opened)>;

    /// Makes and opens a regular file without a name (`O_TMPFILE`); with `O_EXCL` it never gets
    /// one. `new.name` is empty.
    fn tmpfile(&self, new: &NewName<'_>, flags: i32) -> io::Result<(Entry, Opened)> {
        let _ = (new, flags);
        Err(unsupported())
    }

    /// Reads into `buf`, which may be larger than asked for by the program; short only at the
    /// end of the file.
    fn read(&self, handle: u64, offset: u64, buf: &mut [u8]) -> io::Result<usize>;

    /// Shows `take` the file of the host that has the bytes of an open file now, at the same places, where one
    /// has: much that is read goes from there to the kernel without a copy here.
    ///
    /// # Errors
    /// What `take` returned, or why it is not known. What is read then is asked for by [`read`](Files::read).
    fn lend(&self, handle: u64, take: &mut TakeFile<'_>) -> io::Result<()> {
        let _ = (handle, take);
        Ok(())
    }

    /// Writes all, or says how much.
    fn write(&self, handle: u64, write: &Write<'_>) -> io::Result<usize>;

    /// Closes an open file for good.
    fn release(&self, handle: u64);

    /// Makes an open file durable; only what is needed to read it back where `data_only`.
    fn fsync(&self, handle: u64, data_only: bool) -> io::Result<()>;

    /// Makes the names in a directory durable.
    fn fsyncdir(&self, node: u64, data_only: bool) -> io::Result<()>;

    /// Hands the names of a directory to `add` from after the one whose place is `offset` (0 for
    /// the first) until `add` says that no more fit; each with its own place. `.` and `..` are
    /// among them. A place stays good while the directory changes: what is neither made nor
    /// removed in between is told exactly once.
    fn readdir(
        &self,
        node: u64,
        offset: u64,
        add: &mut dyn FnMut(&DirEntry, u64) -> bool,
    ) -> io::Result<()>;

    /// The attributes of the file system that new bytes in `node` go to.
    fn statfs(&self, node: u64) -> io::Result<StatFs>;

    /// An extended attribute, `ENODATA` where there is none. ACLs are `system.posix_acl_*`.
    fn getxattr(&self, node: u64, name: &OsStr) -> io::Result<Vec<u8>>;

    /// The names of all extended attributes that the caller may see (`trusted.*` is for root),
    /// each with a NUL byte behind it.
    fn listxattr(&self, caller: Caller, node: u64) -> io::Result<Vec<u8>>;

    /// Sets an extended attribute with the flags of setxattr(2). Where `kill_sgid`, an access
    /// ACL takes set-group-id away.
    fn setxattr(&self, node: u64, name: &OsStr, set: &SetXattr<'_>) -> io::Result<()>;

    /// Removes an extended attribute.
    fn removexattr(&self, node: u64, name: &OsStr) -> io::Result<()>;

    /// fallocate(2), with its modes. The caller may not be one who keeps set-user-id, as for a
    /// write, see [`Caller::keeps_set_id`].
    fn fallocate(
        &self,
        caller: Caller,
        handle: u64,
        mode: i32,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        let _ = (caller, handle, mode, offset, len);
        Err(unsupported())
    }

    /// `SEEK_DATA` and `SEEK_HOLE` of lseek(2).
    fn lseek(&self, handle: u64, offset: u64, whence: i32) -> io::Result<u64>;

    /// Copies bytes between open files, or says how many; `EOPNOTSUPP` makes the kernel read and
    /// write.
    fn copy_file_range(&self, copy: &Copy) -> io::Result<u64> {
        let _ = copy;
        Err(unsupported())
    }

    /// How many file systems may be stacked with ours on top of what the kernel uses in the place of our files
    /// ([`Kernel::back`](crate::kernel::Kernel::back)): 1 where those stand on no other, or 2, on which the
    /// kernel lays no more.
    fn backing_depth(&self) -> u32 {
        1
    }

    /// The mount is gone: nothing comes any more.
    fn end(&self) {}
}

/// A value for an extended attribute.
#[derive(Debug, Clone, Copy)]
pub struct SetXattr<'a> {
    /// The value.
    pub value: &'a [u8],
    /// `XATTR_CREATE`, `XATTR_REPLACE` or 0.
    pub flags: i32,
    /// Whether an access ACL takes set-group-id away.
    pub kill_sgid: bool,
}

/// What the kernel may keep of a tree, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keeping {
    /// How long names and attributes stay true without asking: long where nobody else writes.
    pub ttl: std::time::Duration,
    /// Whether the kernel keeps written bytes (and sizes and times) and writes them back later.
    pub writeback: bool,
}

fn unsupported() -> io::Error {
    io::Error::from_raw_os_error(libc::EOPNOTSUPP)
}
