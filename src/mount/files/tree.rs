//! Each request of the kernel, as a call of the file system.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::{SystemTime, UNIX_EPOCH};

use vdisk_fuse::attr::{Attr, DirEntry, SetAttr, SetTime, StatFs};
use vdisk_fuse::files::{
    Access, Caller, Copy, Entry, Files, Name, NewName, Opened, SetXattr, Write,
};
use vdisk_fuse::kernel::Kernel;

use super::super::layer::stat_fs;
use super::privilege::{without, without_after_chown};
use super::{DiskFiles, READS, inode, inode_of};
use crate::error::Result;
use crate::filesystem::ext4::mounted::{Allocation, Change, Need, New, Onto, Place, Seek};

/// Names that are asked for at a time.
const LISTED: usize = 256;
const SET_GROUP: u16 = 0o2000;

fn refused(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

fn now() -> (i64, u32) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (i64::try_from(now.as_secs()).unwrap_or(i64::MAX), now.subsec_nanos())
}

fn opened(handle: u64) -> Opened {
    Opened { handle, access: Access::Cached }
}

impl DiskFiles {
    fn made(&self, number: u32) -> io::Result<Entry> {
        self.fs.hold(number, 1);
        self.changed();
        let known = self.done(self.fs.attributes(number))?;
        Ok(self.entry(&known))
    }

    fn make(&self, new: &NewName<'_>, device: (u32, u32), target: &[u8]) -> io::Result<Entry> {
        let file = DiskFiles::new_file(new, device, target);
        let number = self.fs.create(inode(new.parent), new.name.as_bytes(), &file);
        self.made(self.done(number)?)
    }

    fn change(&self, caller: Caller, number: u32, change: &SetAttr) -> Result<Attr> {
        let time = |time: Option<SetTime>| match time {
            Some(SetTime::Now) => Some(now()),
            Some(SetTime::To(time)) => Some((time.sec, time.nsec)),
            None => None,
        };
        let chowns = change.uid.is_some() || change.gid.is_some();
        if chowns || change.size.is_some() {
            self.drop_privileges(number, None)?;
        }
        let mut mode = change.mode.map(|mode| mode as u16);
        if change.kill_privileges {
            let known = self.fs.attributes(number)?;
            let old = known.mode;
            let whole = mode.map_or(old, |mode| old & 0o170_000 | mode & 0o7777);
            let left = match chowns {
                true => without_after_chown(caller, whole, known.gid),
                false => without(caller, whole, known.gid),
            };
            if left != old {
                mode = Some(left);
            }
        }
        let change = Change {
            mode,
            uid: change.uid,
            gid: change.gid,
            size: change.size,
            accessed: time(change.atime),
            modified: time(change.mtime),
            changed: change.ctime.map(|time| (time.sec, time.nsec)),
        };
        Ok(self.attr(&self.fs.set_attributes(number, &change)?))
    }
}

impl Files for DiskFiles {
    fn start(&self, kernel: Kernel) {
        // It is told once.
        let _ = self.kernel.set(kernel);
        self.start_committer();
    }

    fn lookup(&self, parent: u64, name: &OsStr) -> io::Result<Option<Entry>> {
        let found = self.fs.lookup_held(inode(parent), name.as_bytes());
        self.bound();
        Ok(self.done(found)?.map(|known| self.entry(&known)))
    }

    fn forget(&self, node: u64, count: u64) {
        let _ = self.done(self.fs.release(inode(node), count));
    }

    fn getattr(&self, node: u64, _: Option<u64>) -> io::Result<Attr> {
        let known = self.done(self.fs.attributes(inode(node)))?;
        Ok(self.attr(&known))
    }

    fn setattr(
        &self,
        caller: Caller,
        node: u64,
        _: Option<u64>,
        change: &SetAttr,
    ) -> io::Result<Attr> {
        self.changed();
        self.done(self.change(caller, inode(node), change))
    }

    fn readlink(&self, node: u64) -> io::Result<OsString> {
        Ok(OsString::from_vec(self.done(self.fs.read_link(inode(node)))?))
    }

    fn mknod(&self, new: &NewName<'_>, rdev: u64) -> io::Result<Entry> {
        self.make(new, (libc::major(rdev), libc::minor(rdev)), &[])
    }

    fn mkdir(&self, new: &NewName<'_>) -> io::Result<Entry> {
        self.make(new, (0, 0), &[])
    }

    fn symlink(&self, new: &NewName<'_>, target: &OsStr) -> io::Result<Entry> {
        self.make(new, (0, 0), target.as_bytes())
    }

    fn link(&self, node: u64, to: Name<'_>) -> io::Result<Entry> {
        let number = inode(node);
        self.done(self.fs.link(number, inode(to.parent), to.name.as_bytes()))?;
        self.made(number)
    }

    fn unlink(&self, name: Name<'_>) -> io::Result<()> {
        self.changed();
        self.done(self.fs.unlink(inode(name.parent), name.name.as_bytes()))
    }

    fn rmdir(&self, name: Name<'_>) -> io::Result<()> {
        self.changed();
        self.done(self.fs.remove_directory(inode(name.parent), name.name.as_bytes()))
    }

    fn rename(&self, caller: Caller, from: Name<'_>, to: Name<'_>, flags: u32) -> io::Result<()> {
        let onto = match flags & !libc::RENAME_WHITEOUT {
            0 => Onto::Replace,
            libc::RENAME_NOREPLACE => Onto::Free,
            // Nothing is left where a name was that has another file's now.
            libc::RENAME_EXCHANGE if flags == libc::RENAME_EXCHANGE => Onto::Exchange,
            _ => return Err(refused(libc::EINVAL)),
        };
        self.changed();
        let old = Place::new(inode(from.parent), from.name.as_bytes());
        let new = Place::new(inode(to.parent), to.name.as_bytes());
        let mode = libc::S_IFCHR as u16;
        let whiteout = New { mode, uid: caller.uid, gid: caller.gid, ..New::default() };
        let left = (flags & libc::RENAME_WHITEOUT != 0).then_some(&whiteout);
        self.done(self.fs.rename_leaving(old, new, onto, left))
    }

    fn open(
        &self,
        caller: Caller,
        node: u64,
        flags: i32,
        kill_privileges: bool,
    ) -> io::Result<Opened> {
        let number = inode(node);
        if flags & libc::O_TRUNC != 0 {
            let change = SetAttr { size: Some(0), kill_privileges, ..SetAttr::default() };
            self.changed();
            self.done(self.change(caller, number, &change))?;
        }
        Ok(opened(self.open_handle(number, flags)))
    }

    fn create(&self, new: &NewName<'_>, flags: i32) -> io::Result<(Entry, Opened)> {
        let entry = self.make(new, (0, 0), &[])?;
        Ok((entry, opened(self.open_handle(inode(entry.node), flags))))
    }

    fn tmpfile(&self, new: &NewName<'_>, flags: i32) -> io::Result<(Entry, Opened)> {
        let file = DiskFiles::new_file(new, (0, 0), &[]);
        let number = self.done(self.fs.create_unnamed(inode(new.parent), &file))?;
        self.changed();
        let known = self.done(self.fs.attributes(number))?;
        Ok((self.entry(&known), opened(self.open_handle(number, flags))))
    }

    fn read(&self, handle: u64, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let number = inode_of(handle);
        let len = self.done(self.fs.read(number, offset, buf))?;
        // For who only writes, the kernel reads what stands around it.
        let reads = len > 0 && handle & READS != 0;
        if reads && self.done(self.fs.note_access(number))? {
            self.changed();
        }
        Ok(len)
    }

    fn write(&self, handle: u64, write: &Write<'_>) -> io::Result<usize> {
        let number = inode_of(handle);
        self.changed();
        let killed = write.kill_privileges.then_some(write.caller);
        self.done(self.drop_privileges(number, killed))?;
        self.done(self.fs.write(number, write.offset, write.data))
    }

    fn release(&self, handle: u64) {
        self.close_handle(handle);
    }

    fn fsync(&self, _: u64, data_only: bool) -> io::Result<()> {
        self.done(if data_only { self.fs.sync_data() } else { self.fs.sync() })
    }

    fn fsyncdir(&self, _: u64, _: bool) -> io::Result<()> {
        self.done(self.fs.sync())
    }

    fn readdir(
        &self,
        node: u64,
        offset: u64,
        add: &mut dyn FnMut(&DirEntry, u64) -> bool,
    ) -> io::Result<()> {
        let mut after = offset;
        loop {
            let names = self.done(self.fs.list(inode(node), after, LISTED))?;
            let Some(last) = names.last() else { return Ok(()) };
            after = last.next;
            for name in names {
                let next = name.next;
                let (ino, kind) = (name.inode.into(), name.kind.into());
                let entry = DirEntry { name: OsString::from_vec(name.name), ino, kind };
                if !add(&entry, next) {
                    return Ok(());
                }
            }
        }
    }

    fn statfs(&self, _: u64) -> io::Result<StatFs> {
        Ok(stat_fs(&self.fs))
    }

    fn getxattr(&self, node: u64, name: &OsStr) -> io::Result<Vec<u8>> {
        let value = self.done(self.fs.attribute(inode(node), name.as_bytes()))?;
        value.ok_or_else(|| refused(libc::ENODATA))
    }

    fn listxattr(&self, caller: Caller, node: u64) -> io::Result<Vec<u8>> {
        let names = self.done(self.fs.attribute_names(inode(node)))?;
        let all =
            names.iter().all(|name| !name.starts_with(b"trusted.")) || caller.is_administrator();
        let seen = names.iter().filter(|name| all || !name.starts_with(b"trusted."));
        Ok(seen.flat_map(|name| name.iter().copied().chain([0])).collect())
    }

    fn setxattr(&self, node: u64, name: &OsStr, set: &SetXattr<'_>) -> io::Result<()> {
        let need = match set.flags {
            libc::XATTR_CREATE => Need::New,
            libc::XATTR_REPLACE => Need::Old,
            _ => Need::Either,
        };
        let number = inode(node);
        self.changed();
        self.done(self.fs.set_attribute(number, name.as_bytes(), Some(set.value), need))?;
        if set.kill_sgid {
            let mode = self.done(self.fs.attributes(number))?.mode;
            if mode & SET_GROUP != 0 {
                let change = Change { mode: Some(mode & !SET_GROUP), ..Change::default() };
                self.done(self.fs.set_attributes(number, &change))?;
            }
        }
        Ok(())
    }

    fn removexattr(&self, node: u64, name: &OsStr) -> io::Result<()> {
        self.changed();
        self.done(self.fs.set_attribute(inode(node), name.as_bytes(), None, Need::Either))
    }

    fn fallocate(
        &self,
        caller: Caller,
        handle: u64,
        mode: i32,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        let keep = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let how = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            0 => Allocation::Reserve,
            libc::FALLOC_FL_PUNCH_HOLE if keep => Allocation::Punch,
            libc::FALLOC_FL_ZERO_RANGE => Allocation::Zero,
            _ => return Err(refused(libc::EOPNOTSUPP)),
        };
        self.changed();
        let number = inode_of(handle);
        self.done(self.drop_privileges_of(number, caller))?;
        self.done(self.fs.allocate(number, offset, len, how, keep))
    }

    fn lseek(&self, handle: u64, offset: u64, whence: i32) -> io::Result<u64> {
        let what = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            _ => return Err(refused(libc::EINVAL)),
        };
        let number = inode_of(handle);
        if self.write_out(number) {
            return self.done(self.fs.seek(number, offset, what));
        }
        // What the kernel keeps is not known here: all may be data.
        let size = self.done(self.fs.attributes(number))?.size;
        match (offset < size, what) {
            (false, _) => Err(refused(libc::ENXIO)),
            (true, Seek::Data) => Ok(offset),
            (true, Seek::Hole) => Ok(size),
        }
    }

    fn copy_file_range(&self, copy: &Copy) -> io::Result<u64> {
        self.copy(copy)
    }

    fn end(&self) {
        self.stop_committer();
        let _ = self.done(self.fs.close());
    }
}
