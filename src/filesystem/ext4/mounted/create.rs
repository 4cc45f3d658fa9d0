//! New files: with a name, or without one yet.

use super::directory::{MAX_NAME, Target, kind_of};
use super::inode::{
    BLOCK, CHARACTER, DIRECTORY, FIFO, FLAG_EXTENTS, FLAG_INLINE, FLAGS_INHERITED, Inode, Moment,
    REGULAR, SHORT_LINK, SOCKET, SYMLINK, TYPE_MASK,
};
use super::map::extents;
use super::{Mounted, Tx, errno};
use crate::error::Result;

const SET_GROUP: u16 = 0o2000;
const RO_COMPAT_DIR_NLINK: u32 = 0x20;
/// Names that a file can have, and directories in a directory.
const MAX_LINKS: u16 = 65000;

/// What a new file is to be.
#[derive(Debug, Clone, Copy, Default)]
pub struct New<'a> {
    /// Type and permissions, as `st_mode`.
    pub mode: u16,
    /// Permissions that it does not get unless the directory's access list says so.
    pub umask: u16,
    /// The owner.
    pub uid: u32,
    /// The owning group, unless the directory says another.
    pub gid: u32,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// The target of a symbolic link.
    pub target: &'a [u8],
}

impl Tx<'_> {
    /// A directory that is there and can be changed.
    pub fn parent_directory(&mut self, number: u32) -> Result<Inode> {
        let inode = self.file(number)?;
        if !inode.is_directory() {
            return Err(errno(libc::ENOTDIR, "not a directory"));
        }
        if inode.links() == 0 {
            return Err(errno(libc::ENOENT, "the directory was deleted"));
        }
        if inode.has(super::inode::FLAG_IMMUTABLE) {
            return Err(errno(libc::EPERM, "the directory is immutable"));
        }
        self.writable_directory(&inode)?;
        Ok(inode)
    }

    /// Fails where that cannot be a new name in a directory.
    pub fn check_new_name(&mut self, directory: &Inode, name: &[u8]) -> Result<()> {
        check_name(name)?;
        match self.find(directory, name)? {
            Some(_) => Err(errno(libc::EEXIST, "the name is taken")),
            None => Ok(()),
        }
    }

    /// Notes that the names in a directory changed, and stores its inode.
    pub fn touch_directory(&mut self, directory: &mut Inode) -> Result<()> {
        let now = self.now;
        directory.set_time(Moment::Modified, now);
        directory.set_time(Moment::Changed, now);
        self.put_inode(directory)
    }

    /// One more directory in a directory. The inode is not stored.
    pub fn add_child(&self, directory: &mut Inode) -> Result<()> {
        match directory.links() {
            // So many that they are not counted any more.
            1 => Ok(()),
            links if links < MAX_LINKS - 1 => {
                directory.set_links(links + 1);
                Ok(())
            }
            _ if self.fs.sb.ro_compat & RO_COMPAT_DIR_NLINK != 0 => {
                directory.set_links(1);
                Ok(())
            }
            _ => Err(errno(libc::EMLINK, "too many directories in one")),
        }
    }

    /// One directory less. The inode is not stored.
    pub fn remove_child(&self, directory: &mut Inode) {
        if directory.links() > 2 {
            directory.set_links(directory.links() - 1);
        }
    }

    /// One more name of a file. The inode is not stored.
    pub fn add_link(&self, inode: &mut Inode) -> Result<()> {
        match inode.links() < MAX_LINKS {
            true => {
                inode.set_links(inode.links() + 1);
                Ok(())
            }
            false => Err(errno(libc::EMLINK, "too many names of one file")),
        }
    }

    /// Makes the inode of a new file in `parent`, without a name yet, and stores it.
    pub fn make(&mut self, parent: &Inode, new: &New<'_>) -> Result<Inode> {
        let kind = new.mode & TYPE_MASK;
        let number = self.allocate_inode(parent.number, kind == DIRECTORY)?;
        let mut inode = self.new_inode(number, new.mode);
        let sticky = parent.mode() & SET_GROUP != 0;
        inode.set_owner(new.uid, if sticky { parent.gid() } else { new.gid });
        if sticky && kind == DIRECTORY {
            inode.set_mode(inode.mode() | SET_GROUP);
        }
        let inherited = parent.flags() & FLAGS_INHERITED;
        let mask = match kind {
            DIRECTORY => u32::MAX,
            REGULAR => !(0x1_0000),
            // Of other files, only that they are not dumped and not noted as read.
            _ => 0x40 | 0x80,
        };
        inode.set_flags(inherited & mask);
        inode.set_links(1);
        match kind {
            BLOCK | CHARACTER => inode.set_device(new.device.0, new.device.1),
            FIFO | SOCKET => {}
            SYMLINK => self.set_target(&mut inode, new.target)?,
            REGULAR | DIRECTORY => {
                if self.fs.has_extents() {
                    inode.set_flags(inode.flags() | FLAG_EXTENTS);
                    extents::clear(inode.map_mut());
                }
                if kind == DIRECTORY {
                    inode.set_links(2);
                    self.fill_first(&mut inode, parent.number)?;
                }
            }
            _ => return Err(errno(libc::EINVAL, "no such kind of file")),
        }
        if kind != SYMLINK {
            self.inherit_list(parent, &mut inode, new.umask)?;
        }
        self.put_inode(&mut inode)?;
        Ok(inode)
    }

    fn set_target(&mut self, inode: &mut Inode, target: &[u8]) -> Result<()> {
        inode.set_mode(SYMLINK | 0o777);
        let size = self.fs.sb.block_size;
        if target.is_empty() {
            return Err(errno(libc::ENOENT, "a link to nothing"));
        }
        if target.len() >= size.min(libc::PATH_MAX as usize) {
            return Err(errno(libc::ENAMETOOLONG, "the target is too long"));
        }
        if target.len() <= SHORT_LINK {
            super::super::bytes::put(inode.map_mut(), 0, target);
            inode.set_size(target.len() as u64);
            return Ok(());
        }
        if self.fs.has_extents() {
            inode.set_flags(inode.flags() | FLAG_EXTENTS);
            extents::clear(inode.map_mut());
        }
        // It has a map from the first byte that does not fit into it.
        inode.set_size(target.len() as u64);
        let (place, _) = self.grow(inode, 0, 1, true)?;
        let block = self.st.blocks.fresh(place)?;
        super::super::bytes::put(block, 0, target);
        Ok(())
    }
}

/// Fails where that cannot be a name.
pub fn check_name(name: &[u8]) -> Result<()> {
    match name {
        b"" => Err(errno(libc::ENOENT, "an empty name")),
        b"." | b".." => Err(errno(libc::EEXIST, "the name is taken")),
        name if name.len() > MAX_NAME => Err(errno(libc::ENAMETOOLONG, "the name is too long")),
        name if name.contains(&0) || name.contains(&b'/') => {
            Err(errno(libc::EINVAL, "no file can have that name"))
        }
        _ => Ok(()),
    }
}

impl Mounted {
    /// Makes a file; returns the number of its inode.
    pub fn create(&self, directory: u32, name: &[u8], new: &New<'_>) -> Result<u32> {
        self.change(|tx| {
            let mut parent = tx.parent_directory(directory)?;
            tx.check_new_name(&parent, name)?;
            let is_directory = new.mode & TYPE_MASK == DIRECTORY;
            if is_directory {
                tx.add_child(&mut parent)?;
            }
            let inode = tx.make(&parent, new)?;
            tx.add(&mut parent, name, Target { inode: inode.number, kind: kind_of(new.mode) })?;
            tx.touch_directory(&mut parent)?;
            Ok(inode.number)
        })
    }

    /// Makes a file without a name, as `O_TMPFILE` does; returns the number of its inode, which is
    /// [held](Mounted::hold) once.
    pub fn create_unnamed(&self, directory: u32, new: &New<'_>) -> Result<u32> {
        let number = self.change(|tx| {
            let parent = tx.parent_directory(directory)?;
            let mut inode = tx.make(&parent, new)?;
            inode.set_links(0);
            tx.add_orphan(&mut inode);
            tx.put_inode(&mut inode)?;
            Ok(inode.number)
        })?;
        self.hold(number, 1);
        Ok(number)
    }

    /// Gives a file one more name.
    pub fn link(&self, number: u32, directory: u32, name: &[u8]) -> Result<()> {
        self.change(|tx| {
            let mut parent = tx.parent_directory(directory)?;
            let mut inode = tx.file(number)?;
            if inode.is_directory() || inode.has(super::inode::FLAG_IMMUTABLE) {
                return Err(errno(libc::EPERM, "the file cannot have another name"));
            }
            tx.check_new_name(&parent, name)?;
            if inode.links() == 0 {
                tx.remove_orphan(&mut inode)?;
            }
            tx.add_link(&mut inode)?;
            let now = tx.now;
            inode.set_time(Moment::Changed, now);
            tx.put_inode(&mut inode)?;
            tx.add(&mut parent, name, Target::of(&inode))?;
            tx.touch_directory(&mut parent)
        })
    }

    /// Whether a file's contents stand in its inode.
    pub fn is_inline(&self, number: u32) -> Result<bool> {
        self.look(|tx| Ok(tx.file(number)?.has(FLAG_INLINE)))
    }
}
