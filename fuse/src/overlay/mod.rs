//! An overlay: lower layers that nobody changes, one upper directory that takes all changes, and
//! what a program sees of both as one tree. What is written into the upper layer has the form
//! that the kernel's overlayfs writes and reads.
//!
//! The layers are ours alone while the overlay is served: nobody else may change them.

mod attributes;
mod copy_up;
mod create;
mod enter;
mod files;
mod link;
mod list;
mod lookup;
pub mod marks;
mod node;
mod open;
mod owners;
mod remove;
mod rename;
mod stand_in;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags};

use crate::host::{HostDir, HostLayer};
use crate::kernel::Kernel;
use crate::layer::Layer;
use crate::mount::{detached_pair, is_host_root};
use copy_up::order::Order;
use marks::Words;
use node::recent::Recent;
use node::table::Table;
use node::{Dir, Fresh, LowerDir, State, Tri, UPPER_DEVICE};
use stand_in::{StandIn, StandIns};

/// The most lower layers.
pub const MAX_LOWERS: usize = 500;

/// What an overlay is made of.
pub struct Layers {
    /// Uppermost first; at least one, at most [`MAX_LOWERS`].
    pub lowers: Vec<Arc<dyn Layer>>,
    /// What takes all changes. `None` for an overlay that cannot be changed.
    pub upper: Option<UpperDirs>,
    /// Whether the overlay's own attributes are `user.overlay.*`; `None` where that depends on
    /// whether this process may set `trusted.overlay.*`.
    pub user_xattrs: Option<bool>,
}

/// The directory that takes all changes, and one on the same file system to work in, which belongs to this upper
/// directory alone. Nothing in them has been looked at.
pub struct UpperDirs {
    upper: HostLayer,
    work: HostLayer,
    work_path: PathBuf,
    stand_ins: Option<StandIns>,
}

/// How the kernel is to read large lower files by itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lending {
    /// Whether the overlay's own attributes are `user.overlay.*`.
    pub user_xattrs: bool,
    /// Whether what is written need not last: nothing is synced then, whoever asks for it.
    pub volatile: bool,
}

/// One lower layer.
struct Lower {
    layer: Arc<dyn Layer>,
    /// The number of its file system.
    device: u16,
    root: Arc<LowerDir>,
    /// Whether its files can be shared with the upper layer, byte for byte.
    clones: Tri,
}

/// The upper layer.
pub(crate) struct Upper {
    layer: HostLayer,
    /// Where files are made before they go to their place.
    work: HostDir,
    /// Upper files by what they were copied up from; `None` where that cannot be kept.
    index: Option<HostDir>,
    /// Whether device nodes can be made, to be whiteouts.
    devices: bool,
    /// Whether the overlay's own attributes can be set.
    xattrs: bool,
    /// Whether files can be made there without a name.
    unnamed: Tri,
    /// To whom belongs what is made in `work`; `None` where that depends.
    owner: Option<(u32, u32)>,
    /// What it takes that a copy is on the disk before its name.
    order: Order,
    /// What lower files are open in for the kernel.
    stand_ins: Option<StandIns>,
    /// Numbers for names in `work`.
    next: AtomicU64,
    /// Locked as long as the overlay is served.
    _lock: File,
}

/// An overlay, served as a tree of files.
pub struct Overlay {
    words: Words,
    lowers: Vec<Lower>,
    upper: Option<Upper>,
    nodes: Table,
    recent: Recent,
    open: open::Table,
    kernel: OnceLock<Kernel>,
    /// Counts lookups.
    lookups: AtomicU64,
    /// Whether the kernel can be asked to forget nodes.
    prunes: AtomicBool,
    /// Whether what is copied up is made durable before it is seen.
    durable: AtomicBool,
    /// Whether owners are noted beside the files.
    notes_owners: AtomicBool,
    /// Whether anything may have been changed.
    touched: AtomicBool,
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text.to_owned())
}

impl UpperDirs {
    /// Opens both. They keep what they stand on from being unmounted until all is durable there, which is after
    /// the overlay itself has been unmounted. Of what is in memory only nothing is ever durable: that can be
    /// unmounted at once.
    ///
    /// # Errors
    /// Where one of them is no directory, or cannot be opened.
    pub fn open(upper: &Path, work: &Path) -> io::Result<UpperDirs> {
        const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
        let dirs = UpperDirs {
            upper: HostLayer::open(upper)?,
            work: HostLayer::open(work)?,
            work_path: work.to_path_buf(),
            stand_ins: None,
        };
        let kind = rustix::fs::fstatfs(dirs.upper.directory().as_fd())?.f_type as u64;
        if IN_MEMORY.contains(&kind)
            && let Ok([upper, work]) = detached_pair(upper, work)
        {
            let (upper, work) = (HostLayer::of(upper)?, HostLayer::of(work)?);
            return Ok(UpperDirs { upper, work, ..dirs });
        }
        Ok(dirs)
    }

    /// Lets the kernel read large files of the lower layer at `lower` by itself: of number `number`, uppermost
    /// first, and in which nothing is mounted. To be called before the overlay is made.
    ///
    /// The kernel's overlayfs cannot be laid over the overlay then, which is too deep for it.
    ///
    /// # Errors
    /// Where it cannot: for one who is not the superuser of the host, before Linux 6.13, and for layers that
    /// the kernel's overlayfs does not take. The overlay is as good without.
    pub fn lend(&mut self, number: usize, lower: &Path, lending: Lending) -> io::Result<()> {
        if !is_host_root() {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        let stand_ins = match &mut self.stand_ins {
            Some(stand_ins) => stand_ins,
            None => {
                let new = StandIns::new(&self.work_path, self.work.directory())?;
                self.stand_ins.insert(new)
            }
        };
        stand_ins.add(number, lower, lending)
    }

    /// The roots of what lower files are open in: they are opened there, for reading and for writing, and
    /// for others to run.
    pub fn stand_ins(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.stand_ins.iter().flat_map(StandIns::roots)
    }
}

impl Overlay {
    /// Puts layers together. `descriptors` says how many directories may be kept open.
    ///
    /// # Errors
    /// Where a layer is missing, where the upper directory and the one to work in are not on one
    /// file system, and where another overlay uses them.
    pub fn new(layers: Layers, descriptors: usize) -> io::Result<Overlay> {
        if layers.lowers.is_empty() || layers.lowers.len() > MAX_LOWERS {
            return Err(invalid("an overlay has 1 to 500 lower layers"));
        }
        let upper = match layers.upper {
            Some(dirs) => Some(Upper::open(dirs, layers.user_xattrs)?),
            None => None,
        };
        let user = layers.user_xattrs.unwrap_or_else(|| match &upper {
            Some((_, user)) => *user,
            None => !rustix::process::geteuid().is_root(),
        });
        let upper = upper.map(|(upper, _)| upper);
        let mut devices: Vec<u64> = upper.iter().map(|upper| upper.layer.device()).collect();
        if devices.is_empty() {
            devices.push(u64::MAX);
        }
        let mut lowers = Vec::new();
        for (number, layer) in layers.lowers.into_iter().enumerate() {
            let device = layer.device();
            let place = devices.iter().position(|known| *known == device).unwrap_or_else(|| {
                devices.push(device);
                devices.len() - 1
            });
            let number = u16::try_from(number).map_err(io::Error::other)?;
            let root = LowerDir::root(number, layer.as_ref())?;
            let device = u16::try_from(place).map_err(io::Error::other)?;
            lowers.push(Lower { layer, device, root, clones: Tri::default() });
        }
        let nodes = Table::new(root(&lowers, upper.as_ref())?);
        Ok(Overlay {
            words: Words::new(user),
            lowers,
            upper,
            nodes,
            recent: Recent::new(descriptors.max(16)),
            open: open::Table::default(),
            kernel: OnceLock::new(),
            lookups: AtomicU64::new(0),
            prunes: AtomicBool::new(true),
            durable: AtomicBool::new(true),
            notes_owners: AtomicBool::new(false),
            touched: AtomicBool::new(false),
        })
    }

    /// Copies up without waiting until it is durable, and does not wait for that at the end: for what
    /// may be lost with the machine.
    pub fn set_volatile(&self) {
        self.durable.store(false, Ordering::Relaxed);
    }

    /// How many files and directories are kept in memory.
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Called with each lookup: what the kernel knows and nobody uses is forgotten, oldest first,
    /// once it is much. The kernel itself forgets only when the machine runs out of memory.
    fn bound(&self) {
        /// Nodes that are kept at least: some 20 MiB.
        const MANY: usize = 24_000;
        const EVERY: u64 = 256;
        if !self.lookups.fetch_add(1, Ordering::Relaxed).is_multiple_of(EVERY)
            || !self.prunes.load(Ordering::Relaxed)
            || self.nodes.len() <= MANY
        {
            return;
        }
        let Some(kernel) = self.kernel.get() else { return };
        if kernel.prune(&self.nodes.oldest(4 * EVERY as usize)).is_err() {
            self.prunes.store(false, Ordering::Relaxed);
        }
    }

    /// The upper layer, to change something in it.
    fn upper(&self) -> io::Result<&Upper> {
        self.touched.store(true, Ordering::Relaxed);
        self.upper.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::EROFS))
    }
}

fn root(lowers: &[Lower], upper: Option<&Upper>) -> io::Result<Fresh> {
    let top = lowers.first().ok_or_else(|| invalid("no lower layer"))?;
    let attr = top.layer.root()?.attr(None)?.unwrap_or_default();
    let open = match upper {
        // A descriptor of its own: that of the layer is for other uses.
        Some(upper) => Some(Arc::new(upper.layer.directory().child(OsStr::new("."))?)),
        None => None,
    };
    let dirs = lowers.iter().map(|lower| lower.root.clone()).collect();
    Ok(Fresh {
        kind: libc::S_IFDIR,
        ino: Overlay::number(top.device, attr.ino),
        upper: upper.is_some(),
        dir: Some(Dir::new(dirs, open)),
        state: State::default(),
    })
}

impl Upper {
    /// Opens the upper layer, clears what a crash has left in its work directory, and finds out
    /// what its file system can do. Also returns whether its attributes are any user's.
    fn open(dirs: UpperDirs, user: Option<bool>) -> io::Result<(Upper, bool)> {
        let UpperDirs { upper: layer, work: base, stand_ins, .. } = dirs;
        if base.device() != layer.device() {
            return Err(invalid("the work directory is not on the upper directory's file system"));
        }
        let lock = base.directory().this().open(OFlags::RDONLY | OFlags::DIRECTORY)?;
        take(&lock)?;
        let made = |name: &str| -> io::Result<HostDir> {
            let name = OsStr::new(name);
            match base.directory().mkdir(name, 0o700) {
                // The kernel's own has no permissions at all.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    let _ = base.directory().at(name).chmod(0o700);
                }
                result => result?,
            }
            base.directory().child(name)
        };
        let (work, index) = (made("work")?, made("index")?);
        clear(&work, 0)?;
        let stand_ins = match stand_ins {
            Some(stand_ins) if stand_ins.stand()? => Some(stand_ins),
            _ => None,
        };
        stand_in::clear_others(base.directory(), stand_ins.as_ref())?;
        let mut upper = Upper {
            layer,
            work,
            index: None,
            devices: false,
            xattrs: false,
            unnamed: Tri::default(),
            owner: None,
            order: Order::of(lock.as_fd()),
            stand_ins,
            next: AtomicU64::new(0),
            _lock: lock,
        };
        let given = upper.work.this().stat()?.mode & libc::S_ISGID != 0;
        let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        upper.owner = (!given).then_some(own);
        let user = upper.probe(user);
        if upper.xattrs && upper.work.this().handle()?.is_some() {
            upper.index = Some(index);
        }
        Ok((upper, user))
    }

    /// Finds out what can be made; returns whether attributes are any user's.
    fn probe(&mut self, user: Option<bool>) -> bool {
        let name = OsStr::new("#probe");
        self.devices = self.work.mknod(name, libc::S_IFCHR, 0).is_ok();
        let _ = self.work.unlink(name);
        let mut works = |user| {
            let key = Words::new(user).opaque;
            let file = self.work.this();
            let works = file.set_xattr(&key, b"y", 0).is_ok() && file.remove_xattr(&key).is_ok();
            self.xattrs = works;
            works
        };
        match user {
            Some(user) => {
                works(user);
                user
            }
            None => !works(false) && (works(true) || !rustix::process::geteuid().is_root()),
        }
    }

    /// What the files of a lower layer are open in for the kernel.
    fn stand_in(&self, layer: usize) -> Option<&StandIn> {
        self.stand_ins.as_ref()?.get(layer)
    }

    /// A name in the work directory that nobody uses.
    fn temporary(&self) -> OsString {
        format!("#{:x}", self.next.fetch_add(1, Ordering::Relaxed)).into()
    }
}

/// How long an overlay that was unmounted may take until it is durable and gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// Locks a work directory.
fn take(dir: &File) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        match rustix::fs::flock(dir, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let text = "another overlay uses this upper directory";
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
            }
            result => return Ok(result?),
        }
    }
}

/// The deepest tree that is cleared away.
const DEEPEST: u32 = 100;

/// Removes everything in a directory.
fn clear(dir: &HostDir, depth: u32) -> io::Result<()> {
    for entry in dir.names()? {
        if dir.unlink(&entry.name).is_ok() {
            continue;
        }
        if depth < DEEPEST
            && let Ok(child) = dir.child(&entry.name)
        {
            clear(&child, depth + 1)?;
        }
        dir.rmdir(&entry.name)?;
    }
    Ok(())
}

impl Overlay {
    /// Everything in the upper layer is durable after this. Which files were written the kernel
    /// does not say, as it writes them by itself: the whole file system is asked to, as at the end
    /// of the kernel's overlayfs. A volatile overlay, and one that was only read, asks for nothing.
    fn sync(&self) -> io::Result<()> {
        let due = self.durable.load(Ordering::Relaxed) && self.touched.load(Ordering::Relaxed);
        if let Some(upper) = self.upper.as_ref().filter(|_| due) {
            let root = upper.layer.directory().this().open(OFlags::RDONLY | OFlags::DIRECTORY)?;
            rustix::fs::syncfs(root.as_fd())?;
        }
        Ok(())
    }
}
