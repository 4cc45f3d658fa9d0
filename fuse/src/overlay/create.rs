//! New files and directories. What takes the place of a whiteout is made in the work directory and
//! exchanged for it in one step.

use std::cell::Cell;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{Mode, OFlags};

use super::marks::{hidden_by, is_whiteout, whiteout_name};
use super::node::UPPER_DEVICE;
use super::node::{Alias, Dir, Fresh, Node, State};
use super::{Overlay, Upper};
use crate::attr::Attr;
use crate::files::{Entry, NewName, Opened};
use crate::host::{HostDir, Spot};

const RENAME_EXCHANGE: u32 = libc::RENAME_EXCHANGE;
const DEFAULT_ACL: &str = "system.posix_acl_default";

thread_local! {
    /// This thread's file mode creation mask, as far as it was set here.
    static UMASK: Cell<Option<u32>> = const { Cell::new(None) };
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// From here on this thread has a file mode creation mask of its own: the layer's file system then
/// does for a new file just what it would for the program itself, default ACLs among it.
pub(crate) fn own_umask() -> io::Result<()> {
    Ok(unshare(CloneFlags::CLONE_FS)?)
}

fn set_umask(umask: u32) {
    UMASK.with(|last| {
        if last.get() != Some(umask) {
            rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
            last.set(Some(umask));
        }
    });
}

/// Where a new file is being made.
struct Place<'a> {
    parent: &'a Arc<Node>,
    upper: &'a Upper,
    dir: Arc<HostDir>,
    new: &'a NewName<'a>,
}

impl Overlay {
    /// Whether an upper directory gives its group to what is made in it.
    fn gives_group(&self, parent: &Node, dir: &HostDir) -> io::Result<bool> {
        let look = || Ok(dir.this().stat()?.mode & libc::S_ISGID != 0);
        parent.directory()?.set_gid.find(look)
    }

    /// Makes a name with `make`, which gets a directory, a name and the permissions, and makes
    /// the node. The parent's names are locked by the caller.
    fn make<T>(
        &self,
        parent: &Arc<Node>,
        new: &NewName<'_>,
        make: &dyn Fn(&HostDir, &OsStr, u32) -> io::Result<T>,
    ) -> io::Result<(Arc<Node>, Attr, T)> {
        let place = self.place(parent, new)?;
        set_umask(new.umask);
        let (attr, made) = match make(&place.dir, new.name, new.mode) {
            Ok(made) => (self.own(&place, place.dir.at(new.name))?, made),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let attr = place.dir.look(new.name)?;
                if !attr.is_some_and(|attr| is_whiteout(&attr)) {
                    return Err(e);
                }
                self.make_over_whiteout(&place, make)?
            }
            Err(e) => return Err(e),
        };
        self.unhide(&place, &attr)?;
        Ok((self.made(parent, new.name, &attr), attr, made))
    }

    fn place<'a>(&'a self, parent: &'a Arc<Node>, new: &'a NewName<'a>) -> io::Result<Place<'a>> {
        let upper = self.upper()?;
        if new.name.len() > 255 {
            return Err(errno(libc::ENAMETOOLONG));
        }
        if hidden_by(new.name).is_some() {
            return Err(errno(libc::EINVAL));
        }
        if parent.lock().removed {
            return Err(errno(libc::ENOENT));
        }
        self.copy_up(parent)?;
        Ok(Place { parent, upper, dir: parent.upper_dir(&self.recent)?, new })
    }

    /// Gives a new file to whom it belongs and returns its attributes.
    fn own(&self, place: &Place<'_>, spot: Spot<'_>) -> io::Result<Attr> {
        let attr = spot.stat()?;
        let gid = match self.gives_group(place.parent, &place.dir)? {
            true => place.dir.this().stat()?.gid,
            false => place.new.caller.gid,
        };
        let uid = place.new.caller.uid;
        if (attr.uid, attr.gid) == (uid, gid) {
            return Ok(attr);
        }
        self.give(spot, uid, gid)?;
        if attr.mode & (libc::S_ISUID | libc::S_ISGID) != 0 && !attr.is_dir() {
            // A change of owner has taken them away.
            spot.chmod(attr.mode)?;
        }
        spot.stat()
    }

    /// Makes it in the work directory, as it would become in its place, and puts it there.
    fn make_over_whiteout<T>(
        &self,
        place: &Place<'_>,
        make: &dyn Fn(&HostDir, &OsStr, u32) -> io::Result<T>,
    ) -> io::Result<(Attr, T)> {
        let (upper, new) = (place.upper, place.new);
        let temporary = upper.temporary();
        let acl = match self.inherits_acl(place.parent, place.dir.this())? {
            true => place.dir.this().xattr(OsStr::new(DEFAULT_ACL))?,
            false => None,
        };
        // Only a directory gives its default ACL to what is made in it.
        let yard = match acl {
            None => None,
            Some(acl) => {
                let name = upper.temporary();
                upper.work.mkdir(&name, 0o700)?;
                let yard = upper.work.child(&name)?;
                yard.this().chmod(0o700)?;
                yard.this().set_xattr(OsStr::new(DEFAULT_ACL), &acl, 0)?;
                Some((yard, name))
            }
        };
        let from = yard.as_ref().map_or(&upper.work, |(yard, _)| yard);
        let put = || -> io::Result<(Attr, T)> {
            let made = make(from, &temporary, new.mode)?;
            let spot = from.at(&temporary);
            let mut attr = self.own(place, spot)?;
            if attr.is_dir() {
                if self.gives_group(place.parent, &place.dir)? {
                    attr.mode |= libc::S_ISGID;
                    spot.chmod(attr.mode)?;
                }
                self.mark(spot, &self.words.opaque, b"y")?;
                from.rename(&temporary, &place.dir, new.name, RENAME_EXCHANGE)?;
                from.unlink(&temporary)?;
            } else {
                from.rename(&temporary, &place.dir, new.name, 0)?;
            }
            Ok((attr, made))
        };
        let result = put().inspect_err(|_| {
            let _ = from.unlink(&temporary).or_else(|_| from.rmdir(&temporary));
        });
        if let Some((_, name)) = &yard {
            // What stays is cleared with the next mount.
            let _ = upper.work.rmdir(name);
        }
        result
    }

    /// Takes a whiteout that is a name away from beside a new file.
    fn unhide(&self, place: &Place<'_>, attr: &Attr) -> io::Result<()> {
        let dir = place.parent.directory()?;
        if dir.lowers.is_empty() || !self.hidden_in_upper(dir, &place.dir, place.new.name)? {
            return Ok(());
        }
        if attr.is_dir() {
            self.mark(place.dir.at(place.new.name), &self.words.opaque, b"y")?;
        }
        place.dir.unlink(&whiteout_name(place.new.name))
    }

    /// The node of a name that was just made.
    fn made(&self, parent: &Arc<Node>, name: &OsStr, attr: &Attr) -> Arc<Node> {
        let shared: Arc<OsStr> = name.into();
        let alias = Alias { parent: parent.clone(), name: shared, upper: true };
        let ino = Self::number(UPPER_DEVICE, attr.ino);
        let fresh = Fresh {
            kind: attr.kind(),
            ino,
            upper: true,
            dir: attr.is_dir().then(|| Dir::new(Vec::new(), None)),
            state: State { names: vec![alias], incapable: true, ..State::default() },
        };
        self.nodes.remove_name(parent.id, name);
        self.listed(parent, name, ino, attr.kind());
        self.insert(fresh, 1)
    }

    /// Notes a new name in what is kept of the directory's names.
    pub(crate) fn listed(&self, parent: &Node, name: &OsStr, ino: u64, kind: u32) {
        if let Some(dir) = &parent.dir
            && let Some(listing) = dir.listing().as_mut()
        {
            listing.insert(self.nodes.hash(parent.id, name), name, ino, kind);
        }
    }

    /// Notes that a name is gone.
    pub(crate) fn unlisted(&self, parent: &Node, name: &OsStr) {
        if let Some(dir) = &parent.dir
            && let Some(listing) = dir.listing().as_mut()
        {
            listing.remove(self.nodes.hash(parent.id, name), name);
        }
    }

    fn entry_of(node: &Node, mut attr: Attr) -> Entry {
        attr.ino = node.ino;
        Entry { node: node.id, generation: 0, attr }
    }

    pub(crate) fn make_node(&self, new: &NewName<'_>, rdev: u64) -> io::Result<Entry> {
        if new.mode & libc::S_IFMT == libc::S_IFCHR && rdev == 0 {
            // It would be a whiteout.
            return Err(errno(libc::EPERM));
        }
        let parent = self.nodes.get(new.parent)?;
        let _names = parent.directory()?.changing();
        let kind = new.mode & libc::S_IFMT;
        let make = |dir: &HostDir, name: &OsStr, mode: u32| match kind {
            libc::S_IFREG => dir.create(name, OFlags::WRONLY, mode).map(drop),
            _ => dir.mknod(name, kind | (mode & 0o7777), rdev),
        };
        let (node, attr, ()) = self.make(&parent, new, &make)?;
        Ok(Self::entry_of(&node, attr))
    }

    pub(crate) fn make_directory(&self, new: &NewName<'_>) -> io::Result<Entry> {
        let parent = self.nodes.get(new.parent)?;
        let _names = parent.directory()?.changing();
        let make = |dir: &HostDir, name: &OsStr, mode: u32| dir.mkdir(name, mode);
        let (node, attr, ()) = self.make(&parent, new, &make)?;
        Ok(Self::entry_of(&node, attr))
    }

    pub(crate) fn make_symlink(&self, new: &NewName<'_>, target: &OsStr) -> io::Result<Entry> {
        let parent = self.nodes.get(new.parent)?;
        let _names = parent.directory()?.changing();
        let make = |dir: &HostDir, name: &OsStr, _: u32| dir.symlink(name, target);
        let (node, attr, ()) = self.make(&parent, new, &make)?;
        Ok(Self::entry_of(&node, attr))
    }

    pub(crate) fn make_open(&self, new: &NewName<'_>, flags: i32) -> io::Result<(Entry, Opened)> {
        let parent = self.nodes.get(new.parent)?;
        let _names = parent.directory()?.changing();
        let how = super::open::kept(flags);
        let make = |dir: &HostDir, name: &OsStr, mode: u32| dir.create(name, how, mode);
        let (node, attr, file) = self.make(&parent, new, &make)?;
        Ok((Self::entry_of(&node, attr), self.opened_upper(&node, file, flags)))
    }

    pub(crate) fn make_unnamed(
        &self,
        new: &NewName<'_>,
        flags: i32,
    ) -> io::Result<(Entry, Opened)> {
        let parent = self.nodes.get(new.parent)?;
        let _names = parent.directory()?.reading();
        let place = self.place(&parent, new)?;
        set_umask(new.umask);
        let once = OFlags::from_bits_retain(flags.cast_unsigned()) & OFlags::EXCL;
        let file: File = place.dir.tmpfile(super::open::kept(flags) | once, new.mode)?;
        let attr = self.own(&place, Spot::Open(file.as_fd()))?;
        let fresh = Fresh {
            kind: libc::S_IFREG,
            ino: Self::number(UPPER_DEVICE, attr.ino),
            upper: true,
            dir: None,
            state: State { orphan: Some(Arc::new(file.try_clone()?.into())), ..State::default() },
        };
        let node = self.insert(fresh, 1);
        Ok((Self::entry_of(&node, attr), self.opened_upper(&node, file, flags)))
    }
}
