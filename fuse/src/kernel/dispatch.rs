//! One request in, one call of [`Files`], one reply out. Knows no device and no thread.

use std::io;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use rustix::fs::fstat;

use crate::attr::{SetAttr, SetTime};
use crate::files::{Access, Copy, Entry, Files, Keeping, Name, NewName, Opened, SetXattr, Write};
use crate::kernel::pipe::{self, Pipe};
use crate::kernel::wire::{
    Header, OUT_HEADER, Reader, Reply, decode_device, fattr, fopen, op, time,
};

/// The largest read or write, and the largest reply but a directory's.
pub(crate) const MAX_REQUEST: usize = 1 << 20;
/// The most that is copied for one request, in bytes; the program asks for the rest. Until it is answered it
/// cannot be killed, and a thread answers nobody else.
const MOST_COPIED: u64 = 16 << 20;

/// What a request comes to.
pub(crate) enum Answer {
    /// The reply is in the buffer.
    Reply,
    /// The reply is in the pipe, with so many bytes of a file.
    Piped(usize),
    /// The kernel waits for none.
    Nothing,
}

/// Answers requests for a tree.
pub(crate) struct Dispatch<'a> {
    pub(crate) files: &'a dyn Files,
    pub(crate) keeping: Keeping,
}

fn error(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

impl Dispatch<'_> {
    /// Answers one request; an error is what the program is told.
    pub(crate) fn answer(
        &self,
        head: &Header,
        body: Reader<'_>,
        out: &mut Reply,
        pipe: &mut Pipe,
    ) -> Answer {
        if head.opcode == op::READ
            && let Some(len) = self.read_piped(head, body, pipe)
        {
            return Answer::Piped(len);
        }
        let work = || match head.opcode {
            op::LOOKUP..=op::READLINK => self.inode(head, body, out),
            op::SYMLINK..=op::LINK | op::RENAME2 => self.names(head, body, out),
            op::OPEN | op::CREATE | op::TMPFILE => self.open(head, body, out),
            op::READDIR => self.readdir(head, body, out),
            op::READDIRPLUS => self.readdir_plus(head, body, out),
            op::SETXATTR..=op::REMOVEXATTR => self.xattr(head, body, out),
            _ => self.contents(head, body, out),
        };
        if matches!(head.opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT) {
            let forget = || self.forget(head, body);
            let _ = catch_unwind(AssertUnwindSafe(forget));
            return Answer::Nothing;
        }
        let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(error(libc::EIO)));
        match result {
            Ok(()) => {
                out.finish(head.unique, 0);
            }
            Err(e) => {
                out.truncate(0);
                let number = e.raw_os_error().filter(|number| (1..=511).contains(number));
                out.finish(head.unique, number.unwrap_or(libc::EIO));
            }
        }
        Answer::Reply
    }

    fn forget(&self, head: &Header, mut body: Reader<'_>) -> io::Result<()> {
        match head.opcode {
            op::FORGET => self.files.forget(head.node, body.u64()?),
            op::BATCH_FORGET => {
                let count = body.u32()?;
                body.u32()?;
                for _ in 0..count {
                    self.files.forget(body.u64()?, body.u64()?);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn inode(&self, head: &Header, mut body: Reader<'_>, out: &mut Reply) -> io::Result<()> {
        match head.opcode {
            op::LOOKUP => {
                let found = self.files.lookup(head.node, body.name()?)?;
                self.entry(found.as_ref(), out);
            }
            op::GETATTR => {
                let by_handle = body.u32()? & 1 != 0;
                body.u32()?;
                let handle = body.u64()?;
                let attr = self.files.getattr(head.node, by_handle.then_some(handle))?;
                out.attr_out(&attr, self.keep(head.node));
            }
            op::SETATTR => {
                let (handle, change) = set_attr(body)?;
                let attr = self.files.setattr(head.caller, head.node, handle, &change)?;
                out.attr_out(&attr, self.keep(head.node));
            }
            op::READLINK => {
                let target = self.files.readlink(head.node)?;
                out.bytes(target.as_encoded_bytes());
            }
            _ => return Err(error(libc::ENOSYS)),
        }
        Ok(())
    }

    fn entry(&self, entry: Option<&Entry>, out: &mut Reply) {
        let keep = entry.map_or(Duration::ZERO, |entry| self.keep(entry.node));
        out.entry(entry, self.keeping.ttl, keep);
    }

    /// How long the kernel may keep the attributes of a node.
    fn keep(&self, node: u64) -> Duration {
        if self.files.may_keep(node) { self.keeping.ttl } else { Duration::ZERO }
    }

    fn names(&self, head: &Header, mut body: Reader<'_>, out: &mut Reply) -> io::Result<()> {
        let (parent, caller) = (head.node, head.caller);
        let entry = match head.opcode {
            op::SYMLINK => {
                let name = body.component()?;
                let target = body.name()?;
                let new = NewName { caller, parent, name, mode: libc::S_IFLNK | 0o777, umask: 0 };
                self.files.symlink(&new, target)?
            }
            op::MKNOD => {
                let (mode, rdev, umask) = (body.u32()?, body.u32()?, body.u32()?);
                body.u32()?;
                let new = NewName { caller, parent, name: body.component()?, mode, umask };
                self.files.mknod(&new, decode_device(rdev))?
            }
            op::MKDIR => {
                let (mode, umask) = (body.u32()? & 0o7777 | libc::S_IFDIR, body.u32()?);
                let new = NewName { caller, parent, name: body.component()?, mode, umask };
                self.files.mkdir(&new)?
            }
            op::LINK => {
                let node = body.u64()?;
                self.files.link(node, Name { parent, name: body.component()? })?
            }
            op::UNLINK => {
                return self.files.unlink(Name { parent, name: body.component()? });
            }
            op::RMDIR => return self.files.rmdir(Name { parent, name: body.component()? }),
            op::RENAME | op::RENAME2 => {
                let directory = body.u64()?;
                let flags = if head.opcode == op::RENAME2 { body.u64()? as u32 } else { 0 };
                let from = Name { parent, name: body.component()? };
                let to = Name { parent: directory, name: body.component()? };
                return self.files.rename(head.caller, from, to, flags);
            }
            _ => return Err(error(libc::ENOSYS)),
        };
        self.entry(Some(&entry), out);
        Ok(())
    }

    fn open(&self, head: &Header, mut body: Reader<'_>, out: &mut Reply) -> io::Result<()> {
        if head.opcode == op::OPEN {
            let (flags, how) = (body.u32()?.cast_signed(), body.u32()?);
            let opened = self.files.open(head.caller, head.node, flags, how & 1 != 0)?;
            opened_out(&opened, out);
            return Ok(());
        }
        let (flags, mode, umask) = (body.u32()?.cast_signed(), body.u32()?, body.u32()?);
        body.u32()?;
        let mode = mode & 0o7777 | libc::S_IFREG;
        let (caller, parent) = (head.caller, head.node);
        let (entry, opened) = if head.opcode == op::TMPFILE {
            let new = NewName { caller, parent, name: "".as_ref(), mode, umask };
            self.files.tmpfile(&new, flags)?
        } else {
            let new = NewName { caller, parent, name: body.component()?, mode, umask };
            self.files.create(&new, flags)?
        };
        self.entry(Some(&entry), out);
        opened_out(&opened, out);
        Ok(())
    }

    fn readdir(&self, head: &Header, mut body: Reader<'_>, out: &mut Reply) -> io::Result<()> {
        let (_, offset, size) = (body.u64()?, body.u64()?, body.u32()? as usize);
        self.files.readdir(head.node, offset, &mut |entry, place| {
            let before = out.len();
            out.dirent(entry.ino, place, entry.kind, &entry.name);
            let fits = out.len() <= size;
            if !fits {
                out.truncate(before);
            }
            fits
        })
    }

    fn readdir_plus(&self, head: &Header, mut body: Reader<'_>, out: &mut Reply) -> io::Result<()> {
        let (_, offset, size) = (body.u64()?, body.u64()?, body.u32()? as usize);
        self.files.readdir(head.node, offset, &mut |entry, place| {
            // struct fuse_entry_out and struct fuse_dirent.
            let len = 128 + 24 + entry.name.len().next_multiple_of(8);
            if out.len() + len > size {
                return false;
            }
            let dots = entry.name == "." || entry.name == "..";
            // What cannot be looked at is told by name alone; who asks for it gets the error.
            let look = || self.files.lookup(head.node, &entry.name).ok().flatten();
            let found = if dots { None } else { look() };
            self.entry(found.as_ref(), out);
            let ino = found.map_or(entry.ino, |found| found.attr.ino);
            out.dirent(ino, place, entry.kind, &entry.name);
            true
        })
    }

    fn xattr(&self, head: &Header, mut body: Reader<'_>, out: &mut Reply) -> io::Result<()> {
        match head.opcode {
            op::SETXATTR => {
                let (size, flags, how) = (body.u32()? as usize, body.u32()?, body.u32()?);
                body.u32()?;
                let name = body.name()?;
                let (value, flags) = (body.bytes(size)?, flags.cast_signed());
                let set = SetXattr { value, flags, kill_sgid: how & 1 != 0 };
                return self.files.setxattr(head.node, name, &set);
            }
            op::REMOVEXATTR => return self.files.removexattr(head.node, body.name()?),
            _ => {}
        }
        let size = body.u32()? as usize;
        body.u32()?;
        let value = match head.opcode {
            op::GETXATTR => self.files.getxattr(head.node, body.name()?)?,
            _ => self.files.listxattr(head.caller, head.node)?,
        };
        if size == 0 {
            out.u32(u32::try_from(value.len()).map_err(|_| error(libc::E2BIG))?).u32(0);
        } else if value.len() > size {
            return Err(error(libc::ERANGE));
        } else {
            out.bytes(&value);
        }
        Ok(())
    }

    /// Has the pipe take what is read, where that is much and stands in a file of the host; says how much.
    fn read_piped(&self, head: &Header, mut body: Reader<'_>, pipe: &mut Pipe) -> Option<usize> {
        let (handle, offset) = (body.u64().ok()?, body.u64().ok()?);
        let size = usize::try_from(body.u32().ok()?).ok().filter(|size| *size >= pipe::LEAST)?;
        let mut piped = None;
        let mut take = |file: BorrowedFd<'_>| {
            let behind = fstat(file)?.st_size.cast_unsigned().saturating_sub(offset);
            let len = usize::try_from(behind).unwrap_or(usize::MAX).min(size);
            if piped.is_none() && pipe.fill(head.unique, file, offset, len) {
                piped = Some(len);
            }
            Ok(())
        };
        // Why there is none, whoever reads is told.
        let _ = catch_unwind(AssertUnwindSafe(|| self.files.lend(handle, &mut take)));
        piped
    }

    fn contents(&self, head: &Header, mut body: Reader<'_>, out: &mut Reply) -> io::Result<()> {
        match head.opcode {
            op::READ => {
                let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()? as usize);
                let buf = out.room(size.min(MAX_REQUEST));
                let len = self.files.read(handle, offset, buf)?;
                out.truncate(len);
            }
            op::WRITE => {
                let (handle, offset) = (body.u64()?, body.u64()?);
                let (size, how) = (body.u32()? as usize, body.u32()?);
                body.bytes(16)?;
                let (data, kill_privileges) = (body.bytes(size)?, how & 4 != 0);
                let len = self
                    .files
                    .write(handle, &Write { offset, data, caller: head.caller, kill_privileges })?;
                out.u32(u32::try_from(len).unwrap_or(0)).u32(0);
            }
            op::RELEASE => self.files.release(body.u64()?),
            op::FSYNC => {
                let (handle, how) = (body.u64()?, body.u32()?);
                self.files.fsync(handle, how & 1 != 0)?;
            }
            op::FSYNCDIR => {
                let (_, how) = (body.u64()?, body.u32()?);
                self.files.fsyncdir(head.node, how & 1 != 0)?;
            }
            op::STATFS => {
                out.statfs(&self.files.statfs(head.node)?);
            }
            op::FALLOCATE => {
                let (handle, offset, len) = (body.u64()?, body.u64()?, body.u64()?);
                let mode = body.u32()?.cast_signed();
                self.files.fallocate(head.caller, handle, mode, offset, len)?;
            }
            op::LSEEK => {
                let (handle, offset, whence) = (body.u64()?, body.u64()?, body.u32()?);
                out.u64(self.files.lseek(handle, offset, whence.cast_signed())?);
            }
            op::COPY_FILE_RANGE => {
                let from = (body.u64()?, body.u64()?);
                body.u64()?;
                let to = (body.u64()?, body.u64()?);
                let len = body.u64()?.min(MOST_COPIED);
                let len =
                    self.files.copy_file_range(&Copy { caller: head.caller, from, to, len })?;
                out.u32(u32::try_from(len).unwrap_or(0)).u32(0);
            }
            op::DESTROY => {}
            // FLUSH and OPENDIR among them: the kernel never asks again.
            _ => return Err(error(libc::ENOSYS)),
        }
        Ok(())
    }
}

/// `struct fuse_open_out`.
fn opened_out(opened: &Opened, out: &mut Reply) {
    let (flags, backing) = match &opened.access {
        Access::Cached => (fopen::KEEP_CACHE, 0),
        Access::Refreshed => (0, 0),
        Access::Direct => (fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES, 0),
        Access::Backed(backing) => (fopen::PASSTHROUGH, backing.number()),
    };
    out.u64(opened.handle).u32(flags | fopen::NOFLUSH).u32(backing);
}

fn set_attr(mut body: Reader<'_>) -> io::Result<(Option<u64>, SetAttr)> {
    let valid = body.u32()?;
    body.u32()?;
    let (handle, size, _) = (body.u64()?, body.u64()?, body.u64()?);
    let secs = [body.u64()?, body.u64()?, body.u64()?];
    let nanos = [body.u32()?, body.u32()?, body.u32()?];
    let mode = body.u32()?;
    body.u32()?;
    let (uid, gid) = (body.u32()?, body.u32()?);
    let has = |bit| valid & bit != 0;
    let set = |bit, now, i: usize| match (has(bit), has(now)) {
        (true, false) => Some(SetTime::To(time(secs[i], nanos[i]))),
        (true, true) => Some(SetTime::Now),
        (false, _) => None,
    };
    let change = SetAttr {
        mode: has(fattr::MODE).then_some(mode & 0o7777),
        uid: has(fattr::UID).then_some(uid),
        gid: has(fattr::GID).then_some(gid),
        size: has(fattr::SIZE).then_some(size),
        atime: set(fattr::ATIME, fattr::ATIME_NOW, 0),
        mtime: set(fattr::MTIME, fattr::MTIME_NOW, 1),
        ctime: has(fattr::CTIME).then(|| time(secs[2], nanos[2])),
        kill_privileges: has(fattr::KILL_SUIDGID),
    };
    Ok((has(fattr::FH).then_some(handle), change))
}

/// The largest reply that a directory's reading may come to.
pub(crate) const REPLY_ROOM: usize = OUT_HEADER + MAX_REQUEST;
