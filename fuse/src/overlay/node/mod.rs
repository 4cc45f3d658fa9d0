//! The files and directories of an overlay that the kernel knows or that are in use: what of
//! each stands in the upper layer, what in lower ones, and under which names. Knows no request.
//!
//! Locks are taken in this order: a directory's `names` (parents before children, else by number),
//! a node's state (children before parents), the table.

pub(crate) mod listing;
pub(crate) mod recent;
pub(crate) mod table;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::host::{HostDir, Spot};
use crate::kernel::Backing;
use crate::layer::{Layer, LayerDir};
use listing::Listing;
use recent::{Kept, Recent};

/// A file system that layers stand on, and an inode in it.
pub(crate) type Inode = (u16, u64);

/// The number of the upper layer's file system; lower layers on the same one have it, too.
pub(crate) const UPPER_DEVICE: u16 = 0;

/// A directory of a lower layer.
pub(crate) struct LowerDir {
    /// Which layer, 0 for the uppermost.
    pub(crate) layer: u16,
    /// Where it stands; the layer's root stands nowhere.
    place: Option<(Arc<LowerDir>, Box<OsStr>)>,
    open: Arc<Kept<dyn LayerDir>>,
    /// Whether whiteouts that are names, or attributes of files, are in it.
    pub(crate) whiteouts: Tri,
}

/// A thing that is found out once: yes, no, or not known yet.
///
/// The two lowest bits say what is known, the others how often that was set or forgotten: what was looked
/// up before is not kept after that.
#[derive(Default)]
pub(crate) struct Tri(AtomicU32);

impl Tri {
    const KNOWN: u32 = 3;

    pub(crate) fn get(&self) -> Option<bool> {
        Tri::known(self.0.load(Ordering::Acquire))
    }

    /// What is known, or else what `look` finds.
    pub(crate) fn find(&self, look: impl FnOnce() -> io::Result<bool>) -> io::Result<bool> {
        let before = self.0.load(Ordering::Acquire);
        if let Some(known) = Tri::known(before) {
            return Ok(known);
        }
        let found = look()?;
        let after = before | Tri::word(found);
        let _ = self.0.compare_exchange(before, after, Ordering::AcqRel, Ordering::Relaxed);
        Ok(found)
    }

    pub(crate) fn set(&self, value: bool) {
        self.replace(Tri::word(value));
    }

    pub(crate) fn forget(&self) {
        self.replace(0);
    }

    fn replace(&self, word: u32) {
        let next = |before: u32| Some((before & !Tri::KNOWN).wrapping_add(Tri::KNOWN + 1) | word);
        // It is never refused.
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Relaxed, next);
    }

    fn word(value: bool) -> u32 {
        1 + u32::from(value)
    }

    fn known(word: u32) -> Option<bool> {
        match word & Tri::KNOWN {
            0 => None,
            known => Some(known == 2),
        }
    }
}

impl LowerDir {
    pub(crate) fn root(layer: u16, of: &dyn Layer) -> io::Result<Arc<LowerDir>> {
        let open = Kept::new(Some(of.root()?));
        Ok(Arc::new(LowerDir { layer, place: None, open, whiteouts: Tri::default() }))
    }

    pub(crate) fn child(self: &Arc<Self>, name: &OsStr) -> Arc<LowerDir> {
        Arc::new(LowerDir {
            layer: self.layer,
            place: Some((self.clone(), name.into())),
            open: Kept::new(None),
            whiteouts: Tri::default(),
        })
    }

    /// The directory it stands in, and its name there.
    pub(crate) fn beside(&self) -> Option<(Arc<LowerDir>, Box<OsStr>)> {
        self.place.clone()
    }

    pub(crate) fn get(&self, recent: &Recent) -> io::Result<Arc<dyn LayerDir>> {
        self.open.get(recent, || match &self.place {
            Some((parent, name)) => parent.get(recent)?.dir(name),
            // The root is never closed.
            None => Err(io::Error::from_raw_os_error(libc::EIO)),
        })
    }
}

/// A file of a lower layer that is no directory.
#[derive(Clone)]
pub(crate) struct LowerFile {
    pub(crate) dir: Arc<LowerDir>,
    pub(crate) name: Box<OsStr>,
}

impl LowerFile {
    /// Where it stands in its layer.
    pub(crate) fn path(&self) -> PathBuf {
        let mut names = vec![self.name.clone()];
        let mut place = self.dir.beside();
        while let Some((dir, name)) = place {
            names.push(name);
            place = dir.beside();
        }
        names.iter().rev().map(AsRef::<OsStr>::as_ref).collect()
    }
}

/// A name of a node.
pub(crate) struct Alias {
    pub(crate) parent: Arc<Node>,
    pub(crate) name: Arc<OsStr>,
    /// Whether the name stands in the upper layer.
    pub(crate) upper: bool,
}

/// A file or directory.
pub(crate) struct Node {
    pub(crate) id: u64,
    /// One of the `S_IF*`.
    pub(crate) kind: u32,
    /// What stat(2) shows.
    pub(crate) ino: u64,
    /// Of a directory.
    pub(crate) dir: Option<Box<Dir>>,
    /// Whether it stands in the upper layer; never goes back. Set with the state locked.
    upper: AtomicBool,
    state: Mutex<State>,
}

/// What a directory has besides.
pub(crate) struct Dir {
    /// The lower directories that are merged into it, uppermost first.
    pub(crate) lowers: Vec<Arc<LowerDir>>,
    pub(crate) open: Arc<Kept<HostDir>>,
    /// Held for writing while a name in it is made or removed.
    names: RwLock<()>,
    pub(crate) listing: Mutex<Option<Listing>>,
    /// Whether whiteouts that are names are in the upper directory.
    pub(crate) whiteouts: Tri,
    /// Whether files with an origin are in the upper directory.
    pub(crate) impure: Tri,
    /// Whether what is made in it inherits an ACL.
    pub(crate) default_acl: Tri,
    /// Whether what is made in it gets its group.
    pub(crate) set_gid: Tri,
}

impl Dir {
    pub(crate) fn new(lowers: Vec<Arc<LowerDir>>, open: Option<Arc<HostDir>>) -> Box<Dir> {
        Box::new(Dir {
            lowers,
            open: Kept::new(open),
            names: RwLock::default(),
            listing: Mutex::default(),
            whiteouts: Tri::default(),
            impure: Tri::default(),
            default_acl: Tri::default(),
            set_gid: Tri::default(),
        })
    }

    /// Held while names in it are looked up.
    pub(crate) fn reading(&self) -> RwLockReadGuard<'_, ()> {
        self.names.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held while a name in it is made or removed.
    pub(crate) fn changing(&self) -> RwLockWriteGuard<'_, ()> {
        self.names.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn listing(&self) -> MutexGuard<'_, Option<Listing>> {
        self.listing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What changes about a node.
#[derive(Default)]
pub(crate) struct State {
    /// Its names that are known; none once it is removed.
    pub(crate) names: Vec<Alias>,
    /// The upper file, where no name leads to it.
    pub(crate) orphan: Option<Arc<OwnedFd>>,
    /// The lower file, or the one that this was copied up from.
    pub(crate) lower: Option<LowerFile>,
    /// The lower file that has the contents, where the upper or lower one has attributes only.
    pub(crate) data: Option<LowerFile>,
    /// The number of links of a file in the index, and its name there.
    pub(crate) index: Option<Index>,
    /// Under which inodes it stands in the table.
    pub(crate) inodes: Vec<Inode>,
    /// Whether its last name was removed.
    pub(crate) removed: bool,
    /// Whether it is known to have no `security.capability`: the kernel asks for it before each
    /// first write and each change of owner.
    pub(crate) incapable: bool,
    /// How it is open.
    pub(crate) access: Opens,
}

/// How a file is open: the kernel does not mix its own pages with a file in their place.
#[derive(Default)]
pub(crate) struct Opens {
    /// Openings through the kernel's pages.
    pub(crate) cached: u32,
    /// Openings in which the kernel uses the upper file itself.
    pub(crate) backed: u32,
    /// Those of them that may change it in memory (mmap(2)), of which nobody is told.
    pub(crate) mappers: u32,
    /// That file.
    pub(crate) backing: Option<Arc<Backing>>,
    /// What it is in the place of a lower file.
    pub(crate) lent: Option<Lent>,
    /// Whether pages of the kernel's may be older than the file.
    pub(crate) stale: bool,
    /// Whether the kernel was given the contents; `None` before the first who reads the file has opened it.
    pub(crate) given: Option<bool>,
}

/// A lower file that is open in its layer's stand-in ([`stand_in`](super::stand_in)) for the kernel.
pub(crate) struct Lent {
    pub(crate) file: File,
    /// The number of the layer.
    pub(crate) layer: usize,
    /// What its copy is called in the directory to work in, once there is one that has no place yet.
    pub(crate) copy: Option<OsString>,
}

impl Opens {
    /// Whether the kernel has all that a lower file holds, or reads it by itself: then it need not be opened.
    pub(crate) fn spares_opening(&self) -> bool {
        self.given == Some(true) || self.lent.is_some()
    }
}

/// A file that has several names of which some may not have been copied up.
pub(crate) struct Index {
    /// Names in the overlay.
    pub(crate) links: u32,
    /// The name in the index.
    pub(crate) name: Box<OsStr>,
}

/// A file in the upper layer, reached by what does not move while it is held.
pub(crate) enum Held {
    Name(Arc<HostDir>, Arc<OsStr>),
    Open(Arc<OwnedFd>),
    Dir(Arc<HostDir>),
}

impl Held {
    pub(crate) fn spot(&self) -> Spot<'_> {
        match self {
            Held::Name(dir, name) => Spot::Name(dir, name),
            Held::Open(fd) => Spot::Open(std::os::fd::AsFd::as_fd(fd)),
            Held::Dir(dir) => dir.this(),
        }
    }
}

/// What a new node is made of.
pub(crate) struct Fresh {
    pub(crate) kind: u32,
    pub(crate) ino: u64,
    pub(crate) upper: bool,
    pub(crate) dir: Option<Box<Dir>>,
    pub(crate) state: State,
}

impl Node {
    pub(crate) fn is_dir(&self) -> bool {
        self.dir.is_some()
    }

    pub(crate) fn directory(&self) -> io::Result<&Dir> {
        self.dir.as_deref().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOTDIR))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn has_upper(&self) -> bool {
        self.upper.load(Ordering::Acquire)
    }

    /// To be called with the state locked.
    pub(crate) fn set_upper(&self) {
        self.upper.store(true, Ordering::Release);
    }

    /// The upper directory; the node must have one.
    pub(crate) fn upper_dir(&self, recent: &Recent) -> io::Result<Arc<HostDir>> {
        let dir = self.directory()?;
        dir.open.get(recent, || {
            let state = self.lock();
            let alias = state.names.first().ok_or_else(gone)?;
            Ok(Arc::new(alias.parent.upper_dir(recent)?.child(&alias.name)?))
        })
    }

    /// The upper file. What is returned is good as long as `state` is locked.
    pub(crate) fn upper(&self, state: &State, recent: &Recent) -> io::Result<Held> {
        if let Some(fd) = &state.orphan {
            return Ok(Held::Open(fd.clone()));
        }
        if let Some(dir) = &self.dir {
            let open = dir.open.get(recent, || {
                let alias = state.names.first().ok_or_else(gone)?;
                Ok(Arc::new(alias.parent.upper_dir(recent)?.child(&alias.name)?))
            })?;
            return Ok(Held::Dir(open));
        }
        let alias = state.names.iter().find(|alias| alias.upper).ok_or_else(gone)?;
        Ok(Held::Name(alias.parent.upper_dir(recent)?, alias.name.clone()))
    }
}

fn gone() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_looked_up_before_a_change_is_not_kept_after_it() {
        let tri = Tri::default();
        let changed = tri.find(|| {
            tri.set(true);
            Ok(false)
        });
        assert!(!changed.unwrap());
        assert_eq!(tri.get(), Some(true));
        tri.forget();
        let forgotten = tri.find(|| {
            tri.forget();
            Ok(true)
        });
        assert!(forgotten.unwrap());
        assert_eq!(tri.get(), None);
        assert!(!tri.find(|| Ok(false)).unwrap());
        assert_eq!(tri.get(), Some(false));
    }
}
