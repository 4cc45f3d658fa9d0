//! Copy-up: a lower file or directory comes to stand in the upper layer before it is changed. A
//! copy is made whole in the work directory and then takes its place by one rename.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::marks::Origin;
use super::node::UPPER_DEVICE;
use super::node::{Alias, Held, Index, LowerDir, LowerFile, Node, State, Tri};
use super::{Overlay, Upper};
use crate::attr::{Attr, SetTime};
use crate::host::{HostDir, Spot, split_names};
use crate::layer::{LayerDir, LayerFile};

/// How much of a file is read at a time where the kernel cannot copy it alone.
const CHUNK: usize = 1 << 20;

/// Up to here a file's holes are looked for only in front of its data: what is copied is then just
/// what the kernel's overlayfs copies, hole for hole, and in one go.
const SMALL: u64 = 1 << 20;

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// What a copy is made of.
struct Source<'a> {
    dir: Arc<dyn LayerDir>,
    /// `None` for the directory itself.
    name: Option<Box<OsStr>>,
    attr: Attr,
    origin: Option<Origin>,
    /// How many bytes of it are wanted.
    len: u64,
    /// Whether its file system may share bytes with the upper one.
    clones: &'a Tri,
}

impl Overlay {
    /// Sees to it that a node stands in the upper layer, with all its contents.
    pub(crate) fn copy_up(&self, node: &Arc<Node>) -> io::Result<()> {
        self.copy_up_until(node, u64::MAX)
    }

    /// As [`copy_up`](Overlay::copy_up), but of a regular file's contents only the first `len`
    /// bytes need come along: the rest is about to be cut off.
    pub(crate) fn copy_up_until(&self, node: &Arc<Node>, len: u64) -> io::Result<()> {
        self.copy_up_open(node, len).map(drop)
    }

    /// The same; returns the upper file, open for reading and writing, where it has just been made.
    pub(crate) fn copy_up_open(&self, node: &Arc<Node>, len: u64) -> io::Result<Option<File>> {
        let upper = self.upper()?;
        if node.has_upper() {
            return self.complete(node, len).map(|()| None);
        }
        let parent = node.lock().names.first().map(|alias| alias.parent.clone());
        if let Some(parent) = &parent {
            self.copy_up(parent)?;
        }
        let mut state = node.lock();
        if node.has_upper() {
            drop(state);
            return self.complete(node, len).map(|()| None);
        }
        let made = match node.is_dir() {
            true => self.copy_directory(upper, node, &state).map(|()| None)?,
            false => self.copy_file(upper, node, &mut state, len)?,
        };
        node.set_upper();
        Ok(made)
    }

    fn source(&self, dir: &LowerDir, name: Option<&OsStr>, len: u64) -> io::Result<Source<'_>> {
        let get = dir.get(&self.recent)?;
        let attr = get.attr(name)?.ok_or_else(|| errno(libc::ENOENT))?;
        let lower = self.lowers.get(usize::from(dir.layer)).ok_or_else(|| errno(libc::EIO))?;
        let origin = get.handle(name)?;
        let origin = origin.map(|handle| Origin { uuid: lower.layer.uuid(), handle });
        let (name, clones) = (name.map(Into::into), &lower.clones);
        Ok(Source { dir: get, name, attr, origin, len, clones })
    }

    fn copy_directory(&self, upper: &Upper, node: &Node, state: &State) -> io::Result<()> {
        let lower = node.directory()?.lowers.first().ok_or_else(|| errno(libc::EIO))?;
        let source = self.source(lower, None, 0)?;
        let Some(alias) = state.names.first() else {
            // Removed while somebody stands in it: it gets no name any more.
            let temporary = upper.temporary();
            upper.work.mkdir(&temporary, 0o700)?;
            let copied = self.copy_attributes(upper.work.at(&temporary), &source, None);
            node.directory()?.open.pin(Arc::new(upper.work.child(&temporary)?));
            upper.work.rmdir(&temporary)?;
            return copied;
        };
        let place = alias.parent.upper_dir(&self.recent)?;
        let temporary = upper.temporary();
        upper.work.mkdir(&temporary, 0o700)?;
        let made = || {
            self.copy_attributes(upper.work.at(&temporary), &source, None)?;
            self.put(upper, &temporary, &alias.parent, &place, &alias.name, &source)
        };
        made().inspect_err(|_| {
            let _ = upper.work.rmdir(&temporary);
        })
    }

    fn copy_file(
        &self,
        upper: &Upper,
        node: &Arc<Node>,
        state: &mut State,
        len: u64,
    ) -> io::Result<Option<File>> {
        let lower = state.lower.clone().ok_or_else(|| errno(libc::EIO))?;
        let source = self.source(&lower.dir, Some(&lower.name), len)?;
        let temporary = upper.temporary();
        let result = self.copy_to(upper, &temporary, &source, state.data.as_ref());
        let result = result.and_then(|made| {
            match state.names.first() {
                Some(_) => self.put_file(upper, node, state, &temporary, &source)?,
                None => {
                    // Removed while somebody has it open: it gets no name any more.
                    let fd = upper.work.at(&temporary).open(OFlags::PATH)?;
                    upper.work.unlink(&temporary)?;
                    state.orphan = Some(Arc::new(fd.into()));
                }
            }
            Ok(made)
        });
        result.inspect_err(|_| {
            let _ = upper.work.unlink(&temporary);
        })
    }

    /// Makes the copy of a file that is no directory; a regular one is returned open.
    fn copy_to(
        &self,
        upper: &Upper,
        name: &OsStr,
        source: &Source<'_>,
        data: Option<&LowerFile>,
    ) -> io::Result<Option<File>> {
        let own = source.name.as_deref().unwrap_or_default();
        match source.attr.kind() {
            libc::S_IFREG => {
                let to = upper.work.create(name, OFlags::RDWR, 0o600)?;
                let len = source.len.min(source.attr.size);
                // Of nothing, nothing is missing.
                let (mut open, mut copied) = (None, Copied::Shared);
                if len > 0 {
                    let from = match data {
                        Some(file) => file.dir.get(&self.recent)?.open(&file.name)?,
                        None => source.dir.open(own)?,
                    };
                    copied = copy_data(from.as_ref(), &to, len, source.clones)?;
                    if copied != Copied::Until(len) {
                        rustix::fs::ftruncate(&to, len)?;
                    }
                    open = data.is_none().then_some(from);
                }
                // By the open files: their directories need not be looked at again.
                self.copy_attributes(Spot::File(to.as_fd()), source, open.as_deref())?;
                self.settle(upper, &to, copied)?;
                return Ok(Some(to));
            }
            libc::S_IFLNK => upper.work.symlink(name, &source.dir.readlink(own)?)?,
            _ => upper.work.mknod(name, source.attr.mode & !0o7777 | 0o600, source.attr.rdev)?,
        }
        self.copy_attributes(upper.work.at(name), source, None).map(|()| None)
    }

    /// Sees to it that no crash shows a copy without what was copied. What two files share is on the
    /// disk: the file system sees to that.
    fn settle(&self, upper: &Upper, to: &File, copied: Copied) -> io::Result<()> {
        if copied == Copied::Shared || !self.durable.load(Ordering::Relaxed) {
            return Ok(());
        }
        upper.order.keep(to)
    }

    /// Owner, permissions, attributes, times: in the order in which none takes another back. `open`
    /// is the source, where it is open.
    fn copy_attributes(
        &self,
        to: Spot<'_>,
        source: &Source<'_>,
        open: Option<&dyn LayerFile>,
    ) -> io::Result<()> {
        let attr = &source.attr;
        if self.upper()?.owner != Some((attr.uid, attr.gid)) {
            self.give(to, attr.uid, attr.gid)?;
        }
        if attr.kind() != libc::S_IFLNK {
            to.chmod(attr.mode)?;
            self.note_mode(to)?;
        }
        let name = source.name.as_deref();
        let keys = match open.and_then(LayerFile::fd) {
            Some(fd) => {
                let list = Spot::File(fd).list_xattrs()?;
                split_names(&list).map(OsStr::to_owned).collect()
            }
            None => source.dir.xattrs(name)?,
        };
        for key in keys {
            if self.words.private(&key) {
                continue;
            }
            let Some(value) = source.dir.xattr(name, &key)? else { continue };
            match to.set_xattr(&key, &value, 0) {
                // What this user may not set, or this file system not keep, stays behind.
                Err(e) if may_stay(&key, &e) => {}
                result => result?,
            }
        }
        if let Some(value) = source.origin.as_ref().and_then(Origin::value) {
            self.mark(to, &self.words.origin, &value)?;
        }
        to.set_times(Some(SetTime::To(attr.atime)), Some(SetTime::To(attr.mtime)))
    }

    /// Sets one of the overlay's own attributes, where there can be any.
    pub(crate) fn mark(&self, to: Spot<'_>, key: &OsStr, value: &[u8]) -> io::Result<()> {
        if !self.upper()?.xattrs {
            return Ok(());
        }
        match to.set_xattr(key, value, 0) {
            // `user.*` is for regular files and directories only.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP)) => Ok(()),
            result => result,
        }
    }

    /// Sets the owner. One who may not give files away keeps them: all files of an ordinary
    /// user's overlay belong to him.
    pub(crate) fn give(&self, to: Spot<'_>, uid: u32, gid: u32) -> io::Result<()> {
        if self.notes_owners() {
            // Nothing is noted of a file that has just been made.
            return if (uid, gid) == (0, 0) { Ok(()) } else { self.note(to, uid, gid) };
        }
        match to.chown(Some(uid), Some(gid)) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EINVAL)) => {
                match rustix::process::geteuid().is_root() {
                    true => Err(e),
                    false => Ok(()),
                }
            }
            result => result,
        }
    }

    /// Puts a finished copy in its place, and leaves the directory's times as they were.
    fn put(
        &self,
        upper: &Upper,
        temporary: &OsStr,
        parent: &Node,
        place: &HostDir,
        name: &OsStr,
        source: &Source<'_>,
    ) -> io::Result<()> {
        let times = place.this().stat()?;
        if source.origin.is_some() {
            self.set_impure(parent, place)?;
        }
        upper.work.rename(temporary, place, name, 0)?;
        place.this().set_times(Some(SetTime::To(times.atime)), Some(SetTime::To(times.mtime)))
    }

    /// Notes that files with an origin stand in a directory.
    pub(crate) fn set_impure(&self, parent: &Node, place: &HostDir) -> io::Result<()> {
        let dir = parent.directory()?;
        if dir.impure.get() != Some(true) {
            self.mark(place.this(), &self.words.impure, b"y")?;
            dir.impure.set(true);
        }
        Ok(())
    }

    fn put_file(
        &self,
        upper: &Upper,
        node: &Arc<Node>,
        state: &mut State,
        temporary: &OsStr,
        source: &Source<'_>,
    ) -> io::Result<()> {
        let name = source.origin.as_ref().and_then(Origin::index_name);
        let linked = source.attr.nlink > 1 && source.name.is_some();
        let (index, name) = match (&upper.index, name) {
            (Some(index), Some(name)) if linked => (index, name),
            _ => {
                let alias = state.names.first_mut().ok_or_else(|| errno(libc::ENOENT))?;
                let place = alias.parent.upper_dir(&self.recent)?;
                self.put(upper, temporary, &alias.parent, &place, &alias.name, source)?;
                alias.upper = true;
                return Ok(());
            }
        };
        let copy = upper.work.at(temporary).stat()?;
        // As the kernel's overlayfs: into the index first, then to its place as a link of that.
        let links = source.attr.nlink;
        self.mark(upper.work.at(temporary), &self.words.nlink, b"L+0")?;
        upper.work.rename(temporary, index, &name, 0)?;
        state.index = Some(Index { links, name: name.as_os_str().into() });
        state.orphan = Some(Arc::new(index.at(&name).open(OFlags::PATH)?.into()));
        self.nodes.add_inode(node, state, (UPPER_DEVICE, copy.ino));
        self.link_up(node, state, 0)
    }

    /// Gives a file that stands in the index one more of its names in the upper layer.
    pub(crate) fn link_up(
        &self,
        node: &Arc<Node>,
        state: &mut State,
        which: usize,
    ) -> io::Result<()> {
        let held = self.held(node, state)?;
        let Some(alias) = state.names.get_mut(which) else { return Ok(()) };
        if alias.upper {
            return Ok(());
        }
        self.copy_up(&alias.parent)?;
        let place = alias.parent.upper_dir(&self.recent)?;
        let times = place.this().stat()?;
        self.set_impure(&alias.parent, &place)?;
        // Against the lower file's number, which does not change with the link.
        if let (Some(index), Some(lower)) = (&state.index, &state.lower) {
            let attr = lower.dir.get(&self.recent)?.attr(Some(&lower.name))?;
            let lower = attr.map_or(index.links, |attr| attr.nlink);
            let kept = format!("L{:+}", i64::from(index.links) - i64::from(lower));
            self.mark(held.spot(), &self.words.nlink, kept.as_bytes())?;
        }
        place.link(held.spot(), &alias.name)?;
        alias.upper = true;
        self.keep_links(node, state)?;
        place.this().set_times(Some(SetTime::To(times.atime)), Some(SetTime::To(times.mtime)))
    }

    /// The upper file, see [`Node::upper`].
    pub(crate) fn held(&self, node: &Node, state: &State) -> io::Result<Held> {
        node.upper(state, &self.recent)
    }

    /// Brings the contents of an upper file along that has only attributes so far.
    fn complete(&self, node: &Arc<Node>, len: u64) -> io::Result<()> {
        if node.is_dir() {
            return Ok(());
        }
        let mut state = node.lock();
        let Some(data) = state.data.clone() else { return Ok(()) };
        let held = self.held(node, &state)?;
        let attr = held.spot().stat()?;
        let to = held.spot().open(OFlags::WRONLY)?;
        let len = len.min(attr.size);
        if len > 0 {
            let from = data.dir.get(&self.recent)?.open(&data.name)?;
            let copied = copy_data(from.as_ref(), &to, len, &Tri::default())?;
            self.settle(self.upper()?, &to, copied)?;
        }
        let spot = Spot::Open(to.as_fd());
        spot.set_times(Some(SetTime::To(attr.atime)), Some(SetTime::To(attr.mtime)))?;
        spot.remove_xattr(&self.words.metacopy)?;
        state.data = None;
        Ok(())
    }

    /// Which of a node's names this is.
    pub(crate) fn which(state: &State, parent: &Node, name: &OsStr) -> Option<usize> {
        let same = |alias: &Alias| alias.parent.id == parent.id && *alias.name == *name;
        state.names.iter().position(same)
    }
}

/// Whether an attribute may be left behind where it could not be set.
fn may_stay(key: &OsStr, error: &io::Error) -> bool {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => true,
        Some(libc::EPERM) => {
            let key = key.as_encoded_bytes();
            key.starts_with(b"trusted.") || key.starts_with(b"security.")
        }
        _ => false,
    }
}

/// What came of copying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Copied {
    /// The whole file, which may be longer than was asked for: both share the same bytes.
    Shared,
    /// What there is, up to where the last data ends.
    Until(u64),
}

/// Copies the first `len` bytes, holes as holes. `clones` keeps whether the two file systems can share
/// bytes.
fn copy_data(from: &dyn LayerFile, to: &File, len: u64, clones: &Tri) -> io::Result<Copied> {
    if clones.get() != Some(false)
        && let Some(fd) = from.fd()
    {
        match rustix::fs::ioctl_ficlone(to, fd) {
            Ok(()) => return Ok(Copied::Shared),
            Err(Errno::OPNOTSUPP | Errno::XDEV) => clones.set(false),
            Err(_) => {}
        }
    }
    if len <= SMALL {
        let start = match from.seek(0, libc::SEEK_DATA) {
            Ok(start) => start.min(len),
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return Ok(Copied::Until(0)),
            // A file system that knows no holes.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => 0,
            Err(e) => return Err(e),
        };
        copy_range(from, to, start, len)?;
        return Ok(Copied::Until(len));
    }
    // Where the next hole is first: most files have none, and that is all there is to ask then.
    let (mut at, mut end) = (0, hole(from, 0, len)?);
    loop {
        if end > at {
            copy_range(from, to, at, end)?;
        }
        if end >= len {
            return Ok(Copied::Until(end));
        }
        let start = match from.seek(end, libc::SEEK_DATA) {
            Ok(start) if start > end && start < len => start,
            Ok(start) if start >= len => return Ok(Copied::Until(end)),
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return Ok(Copied::Until(end)),
            // Nothing is certain: as data, then.
            _ => {
                copy_range(from, to, end, len)?;
                return Ok(Copied::Until(len));
            }
        };
        (at, end) = (start, hole(from, start, len)?);
    }
}

/// Where the first hole from `at` on begins, `len` where there is none before.
fn hole(from: &dyn LayerFile, at: u64, len: u64) -> io::Result<u64> {
    match from.seek(at, libc::SEEK_HOLE) {
        Ok(hole) => Ok(hole.clamp(at, len)),
        // A file system that knows no holes.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENXIO | libc::EINVAL)) => Ok(len),
        Err(e) => Err(e),
    }
}

fn copy_range(from: &dyn LayerFile, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut at = start;
    if let Some(fd) = from.fd() {
        while at < end {
            let want = usize::try_from(end - at).unwrap_or(usize::MAX).min(1 << 30);
            let (mut source, mut target) = (at, at);
            match rustix::fs::copy_file_range(fd, Some(&mut source), to, Some(&mut target), want) {
                Ok(0) => return Ok(()),
                Ok(len) => at += len as u64,
                // Not between these two: byte by byte, then.
                Err(_) if at == start => break,
                Err(e) => return Err(e.into()),
            }
        }
    }
    let mut buffer = vec![0; CHUNK.min(usize::try_from(end - at).unwrap_or(CHUNK))];
    while at < end {
        let want = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
        let Some(part) = buffer.get_mut(..want) else { break };
        let len = from.read_at(at, part)?;
        if len == 0 {
            break;
        }
        to.write_all_at(part.get(..len).unwrap_or_default(), at)?;
        at += len as u64;
    }
    Ok(())
}
