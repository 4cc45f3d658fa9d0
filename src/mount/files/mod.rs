//! The files in a disk, served over FUSE: requests of the kernel on one side, a file system in user
//! space on the other. Knows no disk and no image format.
//!
//! A node is an inode's number, but for the root's, and a handle is the inode and how it was
//! opened: nothing is kept for either but counts. Who may do what, the kernel decides; it keeps
//! written bytes for a while, and whoever looks for holes in a file that is being written has them
//! written out first.

mod copy;
mod privilege;
mod tree;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use vdisk_fuse::attr::{Attr, SetAttr};
use vdisk_fuse::files::{Caller, Entry, Files, NewName, ROOT};
use vdisk_fuse::kernel::Kernel;

use super::layer;
use super::volume::to_io;
use crate::error::{Error, Result};
use crate::filesystem::ext4::mounted::{self, Attributes, Mounted, New};

/// How long changes may wait for a commit that nobody asks for.
const COMMIT: Duration = Duration::from_secs(5);
/// Set in a handle that may write, and in one that may read.
const WRITES: u64 = 1 << 32;
const READS: u64 = 1 << 33;

/// The files in a disk.
pub struct DiskFiles {
    fs: Arc<Mounted>,
    kernel: OnceLock<Kernel>,
    /// Files that are open for writing, and how often.
    writers: Mutex<HashMap<u32, u64>>,
    /// Counts lookups.
    lookups: AtomicUsize,
    /// Whether the kernel can be asked to forget files.
    prunes: AtomicBool,
    /// Requests that wait for the kernel's written bytes, and how many may.
    waiting: AtomicUsize,
    most_waiting: usize,
    committer: Mutex<Option<JoinHandle<()>>>,
    stop: Arc<Stop>,
    failed: Arc<Mutex<Option<String>>>,
    /// Whoever is the owner is shown as root.
    all_root: bool,
}

#[derive(Default)]
struct Stop {
    asked: Mutex<bool>,
    wake: Condvar,
    changed: AtomicBool,
}

impl DiskFiles {
    /// The files in `fs`, to be served by `threads` threads.
    pub fn new(fs: Arc<Mounted>, threads: usize) -> DiskFiles {
        DiskFiles {
            fs,
            kernel: OnceLock::new(),
            writers: Mutex::default(),
            lookups: AtomicUsize::new(0),
            prunes: AtomicBool::new(true),
            waiting: AtomicUsize::new(0),
            // Somebody has to take the bytes that the others wait for.
            most_waiting: threads.saturating_sub(2),
            committer: Mutex::new(None),
            stop: Arc::default(),
            failed: Arc::default(),
            all_root: false,
        }
    }

    /// Shows root as every file's owner and group: for a kernel that knows nobody else. The disk
    /// keeps the owners that there are.
    pub fn all_root(self) -> DiskFiles {
        DiskFiles { all_root: true, ..self }
    }

    /// Gives a file to another owner, as chown(2) does; who is not given stays.
    ///
    /// # Errors
    /// What chown(2) would fail with.
    pub fn give(&self, inode: u32, user: Option<u32>, group: Option<u32>) -> io::Result<()> {
        let change = SetAttr { uid: user, gid: group, kill_privileges: true, ..SetAttr::default() };
        self.setattr(Caller::default(), node(inode), None, &change)?;
        if let Some(kernel) = self.kernel.get() {
            // What the kernel does not know it keeps nothing of.
            let _ = kernel.forget_attributes(node(inode));
        }
        Ok(())
    }

    /// Fails where not everything could be written since the mount was made.
    pub fn check(&self) -> Result<()> {
        match lock(&self.failed).as_ref() {
            None => Ok(()),
            Some(text) => Err(Error::new(
                crate::ErrorKind::Io,
                format!("not everything could be written to the disk: {text}"),
            )),
        }
    }

    /// Called with each lookup: what the kernel knows and nobody uses is forgotten, oldest first, once
    /// it is much. The kernel itself forgets only when the machine runs out of memory.
    fn bound(&self) {
        /// Files that are known at least.
        const MANY: usize = 50_000;
        const EVERY: usize = 256;
        let now = self.lookups.fetch_add(1, Ordering::Relaxed).is_multiple_of(EVERY);
        if !now || !self.prunes.load(Ordering::Relaxed) {
            return;
        }
        let Some(kernel) = self.kernel.get() else { return };
        let oldest = self.fs.longest_held(MANY, 4 * EVERY);
        let nodes: Vec<u64> = oldest.into_iter().map(node).filter(|node| *node != ROOT).collect();
        if !nodes.is_empty() && kernel.prune(&nodes).is_err() {
            self.prunes.store(false, Ordering::Relaxed);
        }
    }

    /// What a request comes to; what fails on the disk itself is remembered.
    fn done<T>(&self, result: Result<T>) -> io::Result<T> {
        result.map_err(|error| {
            if error.raw_os_error().is_none() {
                lock(&self.failed).get_or_insert_with(|| error.to_string());
            }
            number(&error)
        })
    }

    fn entry(&self, known: &Attributes) -> Entry {
        Entry {
            node: node(known.inode),
            generation: known.generation.into(),
            attr: self.attr(known),
        }
    }

    fn attr(&self, known: &Attributes) -> Attr {
        let attr = layer::attr(known, self.fs.block_size());
        if self.all_root { Attr { uid: 0, gid: 0, ..attr } } else { attr }
    }

    /// What a request says of a new file.
    fn new_file<'a>(new: &NewName<'_>, device: (u32, u32), target: &'a [u8]) -> New<'a> {
        let Caller { uid, gid, .. } = new.caller;
        New { mode: new.mode as u16, umask: new.umask as u16, uid, gid, device, target }
    }

    fn open_handle(&self, inode: u32, flags: i32) -> u64 {
        self.fs.hold(inode, 1);
        let how = flags & libc::O_ACCMODE;
        let (writes, reads) = (how != libc::O_RDONLY, how != libc::O_WRONLY);
        if writes {
            *lock(&self.writers).entry(inode).or_insert(0) += 1;
        }
        u64::from(inode) | if writes { WRITES } else { 0 } | if reads { READS } else { 0 }
    }

    fn close_handle(&self, handle: u64) {
        let inode = inode_of(handle);
        if handle & WRITES != 0 {
            let mut writers = lock(&self.writers);
            if let Some(count) = writers.get_mut(&inode) {
                *count -= 1;
                if *count == 0 {
                    writers.remove(&inode);
                }
            }
        }
        // Nobody is left to tell; the next who opens the file system does what failed here.
        let _ = self.done(self.fs.release(inode, 1));
    }

    /// Has the kernel hand over what it keeps of a file that is written. False where too many
    /// wait for that already.
    fn write_out(&self, inode: u32) -> bool {
        if !lock(&self.writers).contains_key(&inode) {
            return true;
        }
        let Some(kernel) = self.kernel.get() else { return false };
        let may = self.waiting.fetch_add(1, Ordering::AcqRel) < self.most_waiting;
        let done = may && kernel.write_out(node(inode)).is_ok();
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        done
    }

    /// Commits now and then.
    fn start_committer(&self) {
        if self.fs.read_only() {
            return;
        }
        let (fs, stop, failed) = (self.fs.clone(), self.stop.clone(), self.failed.clone());
        let work = move || {
            let mut asked = lock(&stop.asked);
            while !*asked {
                let waited = stop.wake.wait_timeout(asked, COMMIT);
                asked = waited.unwrap_or_else(PoisonError::into_inner).0;
                if !*asked && stop.changed.swap(false, Ordering::AcqRel) {
                    drop(asked);
                    if let Err(error) = fs.sync() {
                        lock(&failed).get_or_insert_with(|| error.to_string());
                    }
                    asked = lock(&stop.asked);
                }
            }
        };
        let thread = std::thread::Builder::new().name("committer".into()).spawn(work);
        // Without it, changes wait for whoever asks for them to last.
        *lock(&self.committer) = thread.ok();
    }

    fn stop_committer(&self) {
        *lock(&self.stop.asked) = true;
        self.stop.wake.notify_all();
        if let Some(thread) = lock(&self.committer).take() {
            let _ = thread.join();
        }
    }

    /// Notes that there is something to commit.
    fn changed(&self) {
        self.stop.changed.store(true, Ordering::Release);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The inode that is open by a handle.
fn inode_of(handle: u64) -> u32 {
    handle as u32
}

/// The inode that a node stands for; 0, which is none, for a number that no node has.
fn inode(node: u64) -> u32 {
    if node == ROOT { mounted::ROOT } else { u32::try_from(node).unwrap_or(0) }
}

fn node(inode: u32) -> u64 {
    if inode == mounted::ROOT { ROOT } else { inode.into() }
}

/// What the program is told.
pub(super) fn number(error: &Error) -> io::Error {
    error.raw_os_error().map_or_else(|| to_io(error), io::Error::from_raw_os_error)
}
