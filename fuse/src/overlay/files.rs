//! The overlay as a served tree of files: every request goes to where it is done.

use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::Arc;

use super::node::Node;
use super::stand_in::StandIns;
use super::{Overlay, create};
use crate::attr::{Attr, DirEntry, SetAttr, StatFs};
use crate::files::{Caller, Copy, Entry, Files, Name, NewName, Opened, SetXattr, TakeFile, Write};
use crate::kernel::Kernel;

impl Files for Overlay {
    fn start(&self, kernel: Kernel) {
        let _ = self.kernel.set(kernel);
    }

    fn thread(&self) -> io::Result<()> {
        create::own_umask()
    }

    fn lookup(&self, parent: u64, name: &OsStr) -> io::Result<Option<Entry>> {
        let parent = self.nodes.get(parent)?;
        let node = match name.as_encoded_bytes() {
            b"." => Some(self.counted(&parent)),
            b".." => {
                let above = parent.lock().names.first().map(|alias| alias.parent.clone());
                Some(self.counted(&above.unwrap_or_else(|| parent.clone())))
            }
            _ => {
                let _names = parent.directory()?.reading();
                let found = self.child_and_attr(&parent, name, 1)?;
                if let Some((node, Some(attr))) = found {
                    self.bound();
                    return Ok(Some(Entry { node: node.id, generation: 0, attr }));
                }
                found.map(|(node, _)| node)
            }
        };
        let Some(node) = node else { return Ok(None) };
        self.bound();
        match self.attr(&node) {
            Ok(attr) => Ok(Some(Entry { node: node.id, generation: 0, attr })),
            Err(e) => {
                self.nodes.forget(node.id, 1);
                Err(e)
            }
        }
    }

    fn forget(&self, node: u64, count: u64) {
        self.nodes.forget(node, count);
    }

    fn getattr(&self, node: u64, _: Option<u64>) -> io::Result<Attr> {
        self.attr(&*self.nodes.get(node)?)
    }

    fn may_keep(&self, node: u64) -> bool {
        self.nodes.get(node).is_ok_and(|node| node.lock().access.mappers == 0)
    }

    fn setattr(
        &self,
        caller: Caller,
        node: u64,
        handle: Option<u64>,
        change: &SetAttr,
    ) -> io::Result<Attr> {
        self.change(caller, &self.nodes.get(node)?, handle, change)
    }

    fn readlink(&self, node: u64) -> io::Result<OsString> {
        self.target(&*self.nodes.get(node)?)
    }

    fn mknod(&self, new: &NewName<'_>, rdev: u64) -> io::Result<Entry> {
        self.make_node(new, rdev)
    }

    fn mkdir(&self, new: &NewName<'_>) -> io::Result<Entry> {
        self.make_directory(new)
    }

    fn symlink(&self, new: &NewName<'_>, target: &OsStr) -> io::Result<Entry> {
        self.make_symlink(new, target)
    }

    fn link(&self, node: u64, to: Name<'_>) -> io::Result<Entry> {
        self.make_link(node, to)
    }

    fn unlink(&self, name: Name<'_>) -> io::Result<()> {
        self.remove_file(name)
    }

    fn rmdir(&self, name: Name<'_>) -> io::Result<()> {
        self.remove_directory(name)
    }

    fn rename(&self, _: Caller, from: Name<'_>, to: Name<'_>, flags: u32) -> io::Result<()> {
        self.rename_name(from, to, flags)
    }

    fn open(
        &self,
        caller: Caller,
        node: u64,
        flags: i32,
        kill_privileges: bool,
    ) -> io::Result<Opened> {
        self.open_node(caller, &self.nodes.get(node)?, flags, kill_privileges)
    }

    fn create(&self, new: &NewName<'_>, flags: i32) -> io::Result<(Entry, Opened)> {
        self.make_open(new, flags)
    }

    fn tmpfile(&self, new: &NewName<'_>, flags: i32) -> io::Result<(Entry, Opened)> {
        self.make_unnamed(new, flags)
    }

    fn read(&self, handle: u64, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.read_open(handle, offset, buf)
    }

    fn lend(&self, handle: u64, take: &mut TakeFile<'_>) -> io::Result<()> {
        self.lend_open(handle, take)
    }

    fn write(&self, handle: u64, write: &Write<'_>) -> io::Result<usize> {
        self.write_open(handle, write)
    }

    fn release(&self, handle: u64) {
        self.release_open(handle);
    }

    fn fsync(&self, handle: u64, data_only: bool) -> io::Result<()> {
        self.sync_open(handle, data_only)
    }

    fn fsyncdir(&self, node: u64, _: bool) -> io::Result<()> {
        let node = self.nodes.get(node)?;
        if node.has_upper() { node.upper_dir(&self.recent)?.sync() } else { Ok(()) }
    }

    fn readdir(
        &self,
        node: u64,
        offset: u64,
        add: &mut dyn FnMut(&DirEntry, u64) -> bool,
    ) -> io::Result<()> {
        let node = self.nodes.get(node)?;
        self.read_names(&node, offset, add)
    }

    fn statfs(&self, _: u64) -> io::Result<StatFs> {
        self.file_system()
    }

    fn getxattr(&self, node: u64, name: &OsStr) -> io::Result<Vec<u8>> {
        self.xattr(&*self.nodes.get(node)?, name)
    }

    fn listxattr(&self, caller: Caller, node: u64) -> io::Result<Vec<u8>> {
        self.xattrs(caller, &*self.nodes.get(node)?)
    }

    fn setxattr(&self, node: u64, name: &OsStr, set: &SetXattr<'_>) -> io::Result<()> {
        self.set_xattr(&self.nodes.get(node)?, name, set)
    }

    fn removexattr(&self, node: u64, name: &OsStr) -> io::Result<()> {
        self.remove_xattr(&self.nodes.get(node)?, name)
    }

    fn fallocate(
        &self,
        caller: Caller,
        handle: u64,
        mode: i32,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        self.allocate(caller, handle, mode, offset, len)
    }

    fn lseek(&self, handle: u64, offset: u64, whence: i32) -> io::Result<u64> {
        self.seek_open(handle, offset, whence)
    }

    fn copy_file_range(&self, copy: &Copy) -> io::Result<u64> {
        self.copy_open(copy)
    }

    fn backing_depth(&self) -> u32 {
        let stand_ins = self.upper.as_ref().and_then(|upper| upper.stand_ins.as_ref());
        1 + u32::from(stand_ins.is_some_and(StandIns::any))
    }

    fn end(&self) {
        // The last words of a mount; whoever waits for its end waits for this.
        let _ = self.sync();
        if let Some(stand_ins) = self.upper.as_ref().and_then(|upper| upper.stand_ins.as_ref()) {
            let _ = stand_ins.clear();
        }
    }
}

impl Overlay {
    fn counted(&self, node: &Arc<Node>) -> Arc<Node> {
        self.nodes.count(node, 1);
        node.clone()
    }
}
