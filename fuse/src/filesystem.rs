//! The file system: FUSE requests on one side, a [`Tree`] of volumes on the other.
//!
//! A volume is a file of fixed size: it cannot be truncated, extended, renamed or removed.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags,
    ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use nix::unistd::{getgid, getuid};

use crate::server::Caching;
use crate::tree::{Kind, Node, Tree};
use crate::volume::Volume;

/// The largest request: what the kernel's default page limit for one request allows.
const MAX_REQUEST: u32 = 1 << 20;
/// Requests that the kernel may have under way without a waiting caller (readahead, writeback,
/// asynchronous direct I/O). The kernel's default of 12 starves a loop device's queue.
const MAX_BACKGROUND: u16 = 64;
/// How long the kernel may believe names that stay, and attributes: a size can grow.
const TTL: Duration = Duration::from_secs(1);

thread_local! {
    /// What a worker reads into: one allocation for its life, not one for every request.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Serves a tree.
pub(crate) struct VolumeFs {
    tree: Arc<Tree>,
    caching: Caching,
    started: SystemTime,
}

/// Runs `work`; a panic in a volume is an I/O error of one request, not a worker less.
fn guarded<T>(work: impl FnOnce() -> io::Result<T>) -> Result<T, Errno> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|_| Errno::EIO)?.map_err(errno)
}

fn errno(error: io::Error) -> Errno {
    match error.raw_os_error() {
        Some(number) => Errno::from_i32(number),
        None => Errno::EIO,
    }
}

impl VolumeFs {
    pub(crate) fn new(tree: Arc<Tree>, caching: Caching) -> VolumeFs {
        VolumeFs { tree, caching, started: SystemTime::now() }
    }

    fn node(&self, ino: INodeNo) -> Result<Arc<Node>, Errno> {
        self.tree.node(ino.0).ok_or(Errno::ENOENT)
    }

    fn volume(&self, ino: INodeNo) -> Result<Arc<dyn Volume>, Errno> {
        match &self.node(ino)?.kind {
            Kind::File(volume) => Ok(volume.clone()),
            Kind::Directory(_) => Err(Errno::EISDIR),
        }
    }

    fn writable(&self, ino: INodeNo) -> Result<Arc<dyn Volume>, Errno> {
        let volume = self.volume(ino)?;
        if volume.read_only() { Err(Errno::EROFS) } else { Ok(volume) }
    }

    fn attr(&self, ino: INodeNo) -> Result<FileAttr, Errno> {
        self.attr_of(ino, &*self.node(ino)?)
    }

    fn attr_of(&self, ino: INodeNo, node: &Node) -> Result<FileAttr, Errno> {
        let (size, kind, perm, nlink, blksize) = match &node.kind {
            Kind::File(volume) => {
                let perm = if volume.read_only() { 0o400 } else { 0o600 };
                (volume.size(), FileType::RegularFile, perm, 1, volume.block_size())
            }
            Kind::Directory(_) => (0, FileType::Directory, 0o500, 2, 4096),
        };
        Ok(FileAttr {
            ino,
            size,
            // One short of full: cp and tar look for holes only where blocks are missing, and
            // to count what is really stored would be a walk over all of the disk's tables.
            blocks: (size / 512).saturating_sub(1),
            atime: self.started,
            mtime: self.started,
            ctime: self.started,
            crtime: self.started,
            kind,
            perm,
            nlink,
            uid: getuid().as_raw(),
            gid: getgid().as_raw(),
            rdev: 0,
            blksize,
            flags: 0,
        })
    }

    fn open_file(&self, ino: INodeNo, flags: OpenFlags) -> Result<FopenFlags, Errno> {
        let writes = flags.acc_mode() != OpenAccMode::O_RDONLY;
        let volume = if writes { self.writable(ino)? } else { self.volume(ino)? };
        guarded(|| volume.opened())?;
        if writes {
            self.node(ino)?.writers.fetch_add(1, Ordering::AcqRel);
        }
        Ok(match self.caching {
            Caching::None => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
            // Nobody but this file system writes to the volumes, so what is cached stays true.
            Caching::WriteBack => FopenFlags::FOPEN_KEEP_CACHE,
        })
    }

    /// The part of a request that lies within the volume.
    fn clip(volume: &dyn Volume, offset: u64, len: u64) -> u64 {
        len.min(volume.size().saturating_sub(offset))
    }

    fn write_file(&self, ino: INodeNo, offset: u64, data: &[u8]) -> Result<u32, Errno> {
        let volume = self.writable(ino)?;
        let len = Self::clip(&*volume, offset, data.len() as u64) as usize;
        if len == 0 && !data.is_empty() {
            return Err(Errno::ENOSPC);
        }
        guarded(|| volume.write_at(offset, &data[..len]))?;
        u32::try_from(len).map_err(|_| Errno::EINVAL)
    }

    fn allocate(&self, ino: INodeNo, offset: u64, len: u64, mode: i32) -> Result<(), Errno> {
        let volume = self.writable(ino)?;
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let end = offset.checked_add(len).ok_or(Errno::EINVAL)?;
        if end > volume.size() && !keep_size {
            return Err(Errno::ENOSPC);
        }
        let len = Self::clip(&*volume, offset, len);
        let may_unmap = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            libc::FALLOC_FL_PUNCH_HOLE if keep_size => true,
            libc::FALLOC_FL_ZERO_RANGE => false,
            _ => return Err(Errno::EOPNOTSUPP),
        };
        if len == 0 { Ok(()) } else { guarded(|| volume.write_zeroes(offset, len, may_unmap)) }
    }

    fn seek(&self, ino: INodeNo, offset: i64, whence: i32) -> Result<i64, Errno> {
        let volume = self.volume(ino)?;
        let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
        let size = volume.size();
        if offset >= size {
            return Err(Errno::ENXIO);
        }
        // While somebody may write, the kernel can hold written pages that no volume knows of:
        // to call their place a hole would lose them in a sparse copy.
        let dirty = self.caching == Caching::WriteBack
            && self.node(ino)?.writers.load(Ordering::Acquire) > 0;
        let data = if dirty { Some((offset, size)) } else { guarded(|| volume.next_data(offset))? };
        let found = match (whence, data) {
            (libc::SEEK_DATA, Some((start, _))) => start.max(offset),
            (libc::SEEK_DATA, None) => return Err(Errno::ENXIO),
            (libc::SEEK_HOLE, Some((start, end))) if start <= offset => end.min(size),
            (libc::SEEK_HOLE, _) => offset,
            _ => return Err(Errno::EINVAL),
        };
        i64::try_from(found).map_err(|_| Errno::EOVERFLOW)
    }

    fn list(&self, ino: INodeNo, offset: u64, reply: &mut ReplyDirectory) -> Result<(), Errno> {
        let node = self.node(ino)?;
        let names = node.names().ok_or(Errno::ENOTDIR)?;
        let dots = [(OsStr::new("."), ino.0), (OsStr::new(".."), node.parent)];
        let entries = dots.into_iter().chain(names.iter().map(|(n, i)| (n.as_os_str(), *i)));
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        for (place, (name, number)) in entries.enumerate().skip(skip) {
            let kind = match self.node(INodeNo(number))?.kind {
                Kind::Directory(_) => FileType::Directory,
                Kind::File(_) => FileType::RegularFile,
            };
            if reply.add(INodeNo(number), place as u64 + 1, kind, name) {
                break;
            }
        }
        Ok(())
    }
}

/// Answers a request that returns nothing.
fn answer(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

impl Filesystem for VolumeFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each of these is a matter of speed: an older kernel goes without.
        let _ = config.set_max_write(MAX_REQUEST);
        if let Err(most) = config.set_max_readahead(MAX_REQUEST) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        let _ = config.add_capabilities(InitFlags::FUSE_PARALLEL_DIROPS);
        if self.caching == Caching::WriteBack {
            let _ = config.add_capabilities(InitFlags::FUSE_WRITEBACK_CACHE);
        }
        Ok(())
    }

    fn destroy(&mut self) {
        for volume in self.tree.volumes().iter().filter(|volume| !volume.read_only()) {
            // Whoever needs to know flushes for himself; this is for a server left to itself.
            let _ = guarded(|| volume.flush());
        }
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.tree.child(parent.0, name).ok_or(Errno::ENOENT).and_then(|number| {
            let node = self.node(INodeNo(number))?;
            let ttl = if node.passing { Duration::ZERO } else { TTL };
            Ok((ttl, self.attr_of(INodeNo(number), &node)?))
        });
        match found {
            Ok((ttl, attr)) => reply.entry(&ttl, &attr, Generation(0)),
            Err(errno) => reply.error(errno),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(ino) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match self.attr(ino) {
            Ok(attr) if size.is_some_and(|size| size != attr.size) => reply.error(Errno::EPERM),
            Ok(_) if mode.is_some() || uid.is_some() || gid.is_some() => reply.error(Errno::EPERM),
            // Times are the kernel's own business here; nothing keeps them.
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(errno) => reply.error(errno),
        }
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EPERM);
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.open_file(ino, flags) {
            Ok(how) => reply.opened(FileHandle(0), how),
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let volume = match self.volume(ino) {
            Ok(volume) => volume,
            Err(errno) => return reply.error(errno),
        };
        let len = Self::clip(&*volume, offset, size.into()) as usize;
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < len {
                buffer.resize(len, 0);
            }
            match guarded(|| volume.read_at(offset, &mut buffer[..len])) {
                Ok(()) => reply.data(&buffer[..len]),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.write_file(ino, offset, data) {
            Ok(len) => reply.written(len),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // A close makes nothing durable, as with any file.
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        flags: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        if flags.acc_mode() != OpenAccMode::O_RDONLY
            && let Ok(node) = self.node(ino)
        {
            node.writers.fetch_sub(1, Ordering::AcqRel);
        }
        if let Ok(volume) = self.volume(ino) {
            let _ = guarded(|| {
                volume.closed();
                Ok(())
            });
        }
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let result = self.volume(ino).and_then(|volume| guarded(|| volume.flush()));
        answer(reply, result);
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        match self.list(ino, offset, &mut reply) {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        // A loop device takes the block size as the unit in which it may discard.
        let (mut size, mut unit) = (0u64, 4096u32);
        for volume in self.tree.volumes() {
            size = size.saturating_add(volume.size());
            unit = unit.max(volume.block_size());
        }
        let blocks = size.div_ceil(u64::from(unit));
        reply.statfs(blocks, 0, 0, self.tree.len() as u64, 0, unit, 255, unit);
    }

    fn access(&self, _: &Request, ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        let asked = |node: Arc<Node>| match &node.kind {
            Kind::File(volume) if volume.read_only() && mask.contains(AccessFlags::W_OK) => {
                Err(Errno::EROFS)
            }
            _ => Ok(()),
        };
        answer(reply, self.node(ino).and_then(asked));
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        answer(reply, self.allocate(ino, offset, length, mode));
    }

    fn lseek(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        match self.seek(ino, offset, whence) {
            Ok(found) => reply.offset(found),
            Err(errno) => reply.error(errno),
        }
    }
}
