//! An ext2, ext3 or ext4 file system that is in use: read and written, without the kernel.
//!
//! Knows a [`BlockDevice`](crate::block::BlockDevice), no layer, no FUSE and no path. Files are named by the numbers of their
//! inodes.
//!
//! **Order.** An operation changes blocks of metadata in memory, whole or not at all. Contents are
//! written to their places at once. A commit first waits for the writes under way, then makes
//! contents and journal durable, then the commit block: what a crash leaves is the state after
//! some operation, with the contents that belong to it. Nobody is given a block before the commit
//! that freed it is durable.
//!
//! **Locks**, in this order: a file's stripe, the log, the gate, the state. Whoever writes contents
//! is inside the gate from the allocation to the last byte; a commit closes it to take its batch.
//!
//! The crates there are (rust-fs-ext4, lwext4 and its bindings) were tried first: they commit each
//! call by itself behind four barriers, search directories from their begin, cannot write the maps
//! of ext2 and ext3, and know no file that is open and has no name. What is needed of the format
//! to write it is little more than what it takes to read it, and that is here already.

mod access;
mod attributes;
mod create;
mod directory;
mod file;
mod format;
mod group;
mod inode;
mod map;
mod names;
mod open;
mod orphan;
mod part;
mod stat;
mod state;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock};

use super::inode::Time;
use super::superblock::Superblock;
use crate::error::{Error, ErrorKind, Result};

use part::Part;
use state::State;
use state::blocks::Block;
use state::log::Log;

pub use access::Need;
pub use create::New;
pub use file::{Allocation, Seek};
pub use format::grow::{grow, growable};
pub use format::{Format, format};
pub use names::{Name, Onto, Place};
pub use open::Options;
pub use stat::{Attributes, Change, Statistics};

/// The root directory.
pub const ROOT: u32 = super::ROOT;

const RO_COMPAT_GROUP_CHECKSUMS: u32 = 0x10;
const RO_COMPAT_CHECKSUMS: u32 = 0x400;
const COMPAT_INDEXES: u32 = 0x20;
const INCOMPAT_KINDS: u32 = 0x2;
const INCOMPAT_EXTENTS: u32 = 0x40;
/// Files of which the contents are locked together.
const STRIPES: usize = 64;

/// A file system in use.
pub struct Mounted {
    part: Part,
    sb: Superblock,
    read_only: bool,
    clock: Clock,
    state: Mutex<State>,
    /// Told when changes may go on.
    thawed: Condvar,
    log: Mutex<Option<Log>>,
    /// Held shared while contents are written, alone while a commit takes its batch.
    gate: RwLock<()>,
    stripes: Vec<RwLock<()>>,
    /// How often a file is held by whoever serves it.
    held: Mutex<orphan::Held>,
    failed: AtomicBool,
    generation: AtomicU32,
}

/// One operation on the metadata.
struct Tx<'a> {
    fs: &'a Mounted,
    st: &'a mut State,
    now: Time,
}

impl Tx<'_> {
    fn read(&mut self, block: u64) -> Result<Block> {
        self.st.blocks.read(&self.fs.part, block)
    }

    fn edit(&mut self, block: u64) -> Result<&mut Vec<u8>> {
        self.st.blocks.edit(&self.fs.part, block)
    }
}

/// A failure that programs know by that number.
pub fn errno(number: i32, text: &str) -> Error {
    let kind = match number {
        libc::ENOENT => ErrorKind::NotFound,
        libc::EEXIST => ErrorKind::Exists,
        libc::EROFS => ErrorKind::ReadOnly,
        libc::ENOSPC => ErrorKind::NoSpace,
        _ => ErrorKind::Invalid,
    };
    Error::new(kind, text).with_os_error(number)
}

fn no_space() -> Error {
    errno(libc::ENOSPC, "no space is left in the file system")
}

/// Where times and generations come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Clock {
    /// The host's clock; generations that no other use of the file system gave.
    #[default]
    Host,
    /// It always is the same moment, and generations count from a given one: the same operations on the same file
    /// system leave the same bytes.
    Fixed {
        /// Seconds since 1970.
        seconds: i64,
        /// What the generations of new files begin with.
        generation: u32,
    },
}

impl Clock {
    /// Now, as inodes say it.
    fn now(self) -> Time {
        match self {
            Clock::Fixed { seconds, .. } => (seconds, 0),
            Clock::Host => {
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                now.map_or((0, 0), |now| {
                    (i64::try_from(now.as_secs()).unwrap_or(i64::MAX), now.subsec_nanos())
                })
            }
        }
    }
}

impl Mounted {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stripe(&self, inode: u32) -> &RwLock<()> {
        // The number of stripes is not 0.
        &self.stripes[inode as usize % self.stripes.len()]
    }

    fn has_checksums(&self) -> bool {
        self.sb.ro_compat & RO_COMPAT_CHECKSUMS != 0
    }

    fn has_group_checksums(&self) -> bool {
        self.sb.ro_compat & (RO_COMPAT_CHECKSUMS | RO_COMPAT_GROUP_CHECKSUMS) != 0
    }

    fn has_indexes(&self) -> bool {
        self.sb.compat & COMPAT_INDEXES != 0
    }

    fn has_kinds(&self) -> bool {
        self.sb.incompat & INCOMPAT_KINDS != 0
    }

    fn has_extents(&self) -> bool {
        self.sb.incompat & INCOMPAT_EXTENTS != 0
    }

    /// A number for a new file that others with the same inode did not have.
    fn next_generation(&self) -> u32 {
        self.generation.fetch_add(0x9e37_79b9, Ordering::Relaxed)
    }

    /// Where the blocks of a file had best begin: in the group of its inode.
    fn goal_of(&self, inode: u32) -> u64 {
        let group = u64::from(inode.saturating_sub(1) / self.sb.inodes_per_group);
        self.sb.first_data_block + group * self.sb.blocks_per_group
    }

    /// Whether every change fails.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The file system's id.
    pub fn uuid(&self) -> [u8; 16] {
        self.sb.uuid
    }

    /// The size of a block in bytes.
    pub fn block_size(&self) -> u32 {
        self.sb.block_size as u32
    }

    /// Fails where nothing can be changed.
    fn writable(&self) -> Result<()> {
        if self.read_only {
            return Err(errno(libc::EROFS, "the file system is mounted for reading only"));
        }
        match self.failed.load(Ordering::Acquire) {
            true => Err(Error::new(
                ErrorKind::Poisoned,
                "an earlier write failed; mount the file system again",
            )
            .with_os_error(libc::EIO)),
            false => Ok(()),
        }
    }

    /// Nothing more is written: what is in memory and what is on the disk have parted.
    fn fail<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.failed.store(true, Ordering::Release);
        }
        result
    }

    /// Looks at metadata.
    fn look<T>(&self, work: impl FnOnce(&mut Tx<'_>) -> Result<T>) -> Result<T> {
        let mut state = self.state();
        work(&mut Tx { fs: self, st: &mut state, now: (0, 0) })
    }

    /// Changes metadata, whole or not at all.
    fn attempt<T>(&self, work: impl FnOnce(&mut Tx<'_>) -> Result<T>) -> Result<T> {
        let mut state = self.state_to_change();
        let counts = state.counts;
        let result = work(&mut Tx { fs: self, st: &mut state, now: self.clock.now() });
        match result {
            Ok(_) => state.blocks.keep(),
            Err(_) => {
                state.blocks.take_back();
                state.counts = counts;
            }
        }
        result
    }

    /// Changes metadata once there is room for it: in the journal, and on the disk as far as a
    /// commit can make it.
    fn change<T>(&self, mut work: impl FnMut(&mut Tx<'_>) -> Result<T>) -> Result<T> {
        self.writable()?;
        self.make_room()?;
        match self.attempt(&mut work) {
            Err(error) if self.may_find_space(&error) => {
                self.sync()?;
                self.attempt(&mut work)
            }
            result => result,
        }
    }

    /// Whether what failed for want of space may succeed after a commit.
    fn may_find_space(&self, error: &Error) -> bool {
        error.kind() == ErrorKind::NoSpace && self.state().frees_are_pending()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Whoever wants to know how it went calls `close`.
        if !self.read_only && !self.failed.load(Ordering::Acquire) {
            let _ = self.at_rest(|| ());
        }
    }
}
