//! Open files of an overlay. One that was opened for reading while its file stood in a lower layer
//! goes on in the upper one once the file has been copied up.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustix::fs::{FallocateFlags, OFlags, StatVfsMountFlags, fstatvfs};

use super::Overlay;
use super::node::{Lent, Node, State};
use crate::files::{Access, Caller, Copy, Opened, TakeFile, Write};
use crate::host::{Spot, read_full, seek};
use crate::kernel::Backing;
use crate::layer::LayerFile;

/// The flags of open(2) that count for the file in the layer.
const KEPT: i32 = libc::O_ACCMODE | libc::O_DSYNC | libc::O_SYNC | libc::O_TRUNC;

/// Those of `flags` that count for a new file in the layer.
pub(crate) fn kept(flags: i32) -> OFlags {
    OFlags::from_bits_retain((flags & KEPT & !libc::O_TRUNC).cast_unsigned())
}

/// Where an open file's bytes are.
#[derive(Clone)]
enum Real {
    Upper(Arc<File>),
    Lower(Arc<dyn LayerFile>),
}

/// An open file.
struct Open {
    node: Arc<Node>,
    /// Nothing yet where the kernel was given a lower file's contents before, or reads it by itself: whoever
    /// reads that asks for nothing.
    real: RwLock<Option<Real>>,
    writable: bool,
    /// Whether it can be changed in memory: mmap(2) asks for reading, too.
    mapper: bool,
    /// Whether the kernel uses the upper file itself.
    backed: bool,
}

/// All open files, by number.
#[derive(Default)]
pub(crate) struct Table(Mutex<Slots>);

#[derive(Default)]
struct Slots {
    open: Vec<Option<Arc<Open>>>,
    free: Vec<usize>,
}

/// Up to here a lower file's contents are handed to the kernel as it is opened, in bytes; larger ones it reads by
/// itself where it can.
const SMALL: usize = 128 << 10;

thread_local! {
    /// For such contents.
    static CONTENTS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Whether a file opened so can be changed in memory.
fn is_mapper(flags: i32) -> bool {
    flags & libc::O_ACCMODE == libc::O_RDWR
}

/// Whether to read a file leaves its times as they are: the kernel reads it as any program would, and
/// a lower layer is not to change.
fn keeps_times(file: BorrowedFd<'_>) -> bool {
    let keeping = StatVfsMountFlags::RDONLY | StatVfsMountFlags::NOATIME;
    fstatvfs(file).is_ok_and(|fs| fs.f_flag.intersects(keeping))
}

fn bad() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

impl Table {
    fn insert(&self, open: Open) -> u64 {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let open = Some(Arc::new(open));
        let place = match slots.free.pop() {
            Some(place) => place,
            None => {
                slots.open.push(None);
                slots.open.len() - 1
            }
        };
        if let Some(slot) = slots.open.get_mut(place) {
            *slot = open;
        }
        place as u64
    }

    fn get(&self, handle: u64) -> io::Result<Arc<Open>> {
        let slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let place = usize::try_from(handle).map_err(|_| bad())?;
        slots.open.get(place).cloned().flatten().ok_or_else(bad)
    }

    fn remove(&self, handle: u64) -> Option<Arc<Open>> {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let place = usize::try_from(handle).ok()?;
        let open = slots.open.get_mut(place)?.take()?;
        slots.free.push(place);
        Some(open)
    }

    /// The file behind an opening for writing.
    pub(crate) fn upper_writable(&self, handle: u64) -> Option<Arc<File>> {
        let open = self.get(handle).ok().filter(|open| open.writable)?;
        match open.real() {
            Some(Real::Upper(file)) => Some(file),
            Some(Real::Lower(_)) | None => None,
        }
    }
}

impl Open {
    fn real(&self) -> Option<Real> {
        self.real.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Overlay {
    pub(crate) fn open_node(
        &self,
        caller: Caller,
        node: &Arc<Node>,
        flags: i32,
        kill_privileges: bool,
    ) -> io::Result<Opened> {
        let cut = flags & libc::O_TRUNC != 0;
        let writable = flags & libc::O_ACCMODE != libc::O_RDONLY;
        let mut made = None;
        if writable || cut {
            made = self.copy_up_open(node, if cut { 0 } else { u64::MAX })?;
        }
        let mut state = node.lock();
        let real = match made {
            Some(file) if flags & KEPT & !libc::O_ACCMODE == 0 => Some(Real::Upper(Arc::new(file))),
            None if state.access.spares_opening() && !node.has_upper() => None,
            _ => Some(self.real(node, &state, flags & KEPT)?),
        };
        if cut && kill_privileges {
            self.kill_privileges(caller, self.held(node, &state)?.spot())?;
        }
        let opened = self.opened(node, &mut state, real, flags);
        if is_mapper(flags)
            && matches!(opened.access, Access::Backed(_))
            && let Some(kernel) = self.kernel.get()
        {
            // From here on they may change without a request.
            let _ = kernel.forget_attributes(node.id);
        }
        Ok(opened)
    }

    fn opened(
        &self,
        node: &Arc<Node>,
        state: &mut State,
        real: Option<Real>,
        flags: i32,
    ) -> Opened {
        let (writable, mapper) = (flags & libc::O_ACCMODE != libc::O_RDONLY, is_mapper(flags));
        let access = self.access(state, real.as_ref(), mapper);
        let backed = matches!(access, Access::Backed(_));
        if !writable && matches!(access, Access::Cached) && flags & libc::O_DIRECT == 0 {
            self.give_contents(node, state, real.as_ref());
        }
        // Nobody asks for the bytes of one that is lent, or seldom: it takes no second descriptor.
        let real =
            real.filter(|real| matches!(real, Real::Upper(_)) || state.access.lent.is_none());
        let open = Open { node: node.clone(), real: RwLock::new(real), writable, mapper, backed };
        Opened { handle: self.open.insert(open), access }
    }

    /// How the kernel is to reach the bytes: by itself where it can.
    fn access(&self, state: &mut State, real: Option<&Real>, mapper: bool) -> Access {
        if state.access.cached == 0 && state.access.backing.is_none() {
            state.access.backing = real.and_then(|real| self.back(state, real));
        }
        let opens = &mut state.access;
        if let Some(backing) = &opens.backing {
            opens.backed += 1;
            opens.mappers += u32::from(mapper);
            opens.stale = true;
            return Access::Backed(backing.clone());
        }
        opens.cached += 1;
        if std::mem::take(&mut opens.stale) { Access::Refreshed } else { Access::Cached }
    }

    /// A file for the kernel to use by itself. All openings of ours must have the same one in its place, and
    /// whoever reads what somebody then changes is to see the change: an upper file stays the same for good, a
    /// lower one where nothing is ever copied up. In the place of others there are stand-ins.
    fn back(&self, state: &mut State, real: &Real) -> Option<Arc<Backing>> {
        let kernel = self.kernel.get()?;
        let lower = match real {
            Real::Upper(file) => return kernel.back(file.as_fd()).ok(),
            Real::Lower(file) => file,
        };
        let Some(upper) = &self.upper else {
            return kernel.back(lower.fd().filter(|fd| keeps_times(*fd))?).ok();
        };
        let of = state.lower.as_ref().filter(|_| state.data.is_none())?;
        let layer = usize::from(of.dir.layer);
        let stand_in = upper.stand_in(layer).filter(|stand_in| stand_in.lends())?;
        let attr = lower.attr().ok().filter(|attr| attr.size > SMALL as u64)?;
        let file = stand_in.open(&of.path(), &attr).ok()?;
        match kernel.back(file.as_fd()) {
            Ok(backing) => {
                state.access.lent = Some(Lent { file, layer, copy: None });
                Some(backing)
            }
            Err(_) => {
                stand_in.refuse();
                None
            }
        }
    }

    /// A file that was just made in the upper layer.
    pub(crate) fn opened_upper(&self, node: &Arc<Node>, file: File, flags: i32) -> Opened {
        self.opened(node, &mut node.lock(), Some(Real::Upper(Arc::new(file))), flags)
    }

    /// Hands the contents of a small lower file to the kernel before the first who opens it can
    /// ask for them: most who open a file read it. Nobody else has it open, and nobody can open it
    /// meanwhile: its state is locked.
    fn give_contents(&self, node: &Node, state: &mut State, real: Option<&Real>) {
        let (Some(Real::Lower(file)), Some(kernel)) = (real, self.kernel.get()) else { return };
        if state.access.given.is_some() || state.access.cached != 1 || state.data.is_some() {
            return;
        }
        state.access.given = Some(false);
        let Ok(size) = file.attr().map(|attr| attr.size) else { return };
        let Some(size) = usize::try_from(size).ok().filter(|size| (1..=SMALL).contains(size))
        else {
            return;
        };
        CONTENTS.with_borrow_mut(|buffer| {
            buffer.resize(SMALL, 0);
            let Some(place) = buffer.get_mut(..size) else { return };
            if file.read_at(0, place).is_ok_and(|len| len == size) {
                // What was not taken is asked for.
                state.access.given = Some(kernel.store(node.id, 0, place).is_ok());
            }
        });
    }

    fn real(&self, node: &Node, state: &State, flags: i32) -> io::Result<Real> {
        if let Some(data) = &state.data {
            return Ok(Real::Lower(data.dir.get(&self.recent)?.open(&data.name)?));
        }
        if node.has_upper() {
            let flags = OFlags::from_bits_retain(flags.cast_unsigned());
            let file = self.held(node, state)?.spot().open(flags)?;
            return Ok(Real::Upper(Arc::new(file)));
        }
        let lower = state.lower.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::EIO))?;
        Ok(Real::Lower(lower.dir.get(&self.recent)?.open(&lower.name)?))
    }

    /// Where the bytes of an open file are now.
    fn current(&self, open: &Open) -> io::Result<Real> {
        match open.real() {
            Some(real @ Real::Upper(_)) => return Ok(real),
            Some(real @ Real::Lower(_)) if !open.node.has_upper() => return Ok(real),
            Some(Real::Lower(_)) | None => {}
        }
        let state = open.node.lock();
        let fresh = self.real(&open.node, &state, libc::O_RDONLY)?;
        *open.real.write().unwrap_or_else(PoisonError::into_inner) = Some(fresh.clone());
        Ok(fresh)
    }

    /// The file that an opening for writing writes to.
    fn writable(&self, handle: u64) -> io::Result<Arc<File>> {
        self.open.upper_writable(handle).ok_or_else(bad)
    }

    pub(crate) fn read_open(&self, handle: u64, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        match self.current(self.open.get(handle)?.as_ref())? {
            Real::Upper(file) => read_full(&file, offset, buf),
            Real::Lower(file) => file.read_at(offset, buf),
        }
    }

    pub(crate) fn lend_open(&self, handle: u64, take: &mut TakeFile<'_>) -> io::Result<()> {
        match self.current(self.open.get(handle)?.as_ref())? {
            Real::Upper(file) => take(file.as_fd()),
            Real::Lower(file) => file.fd().map_or(Ok(()), take),
        }
    }

    pub(crate) fn write_open(&self, handle: u64, write: &Write<'_>) -> io::Result<usize> {
        let file = self.writable(handle)?;
        let mut done = 0;
        while let Some(rest) = write.data.get(done..).filter(|rest| !rest.is_empty()) {
            match file.write_at(rest, write.offset + done as u64) {
                Ok(0) => break,
                Ok(len) => done += len,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) if done > 0 => break,
                Err(e) => return Err(e),
            }
        }
        if write.kill_privileges {
            self.kill_privileges(write.caller, Spot::Open(file.as_fd()))?;
        }
        Ok(done)
    }

    pub(crate) fn release_open(&self, handle: u64) {
        let Some(open) = self.open.remove(handle) else { return };
        let mut state = open.node.lock();
        let opens = &mut state.access;
        if open.backed {
            opens.backed = opens.backed.saturating_sub(1);
            opens.mappers = opens.mappers.saturating_sub(u32::from(open.mapper));
        } else {
            opens.cached = opens.cached.saturating_sub(1);
        }
        if opens.backed == 0 {
            opens.backing = None;
            if let Some(upper) = &self.upper
                && let Some(copy) = opens.lent.take().and_then(|lent| lent.copy)
            {
                // One that could not be put in its place.
                let _ = upper.work.unlink(&copy);
            }
        }
    }

    pub(crate) fn sync_open(&self, handle: u64, data_only: bool) -> io::Result<()> {
        match self.current(self.open.get(handle)?.as_ref())? {
            Real::Upper(file) if data_only => Ok(rustix::fs::fdatasync(&*file)?),
            Real::Upper(file) => Ok(rustix::fs::fsync(&*file)?),
            // Nobody has changed it.
            Real::Lower(_) => Ok(()),
        }
    }

    pub(crate) fn allocate(
        &self,
        caller: Caller,
        handle: u64,
        mode: i32,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        let file = self.writable(handle)?;
        rustix::fs::fallocate(&*file, mode, offset, len)?;
        self.modified(caller, &file)
    }

    /// After a change of contents of which the kernel does not say what the caller may keep.
    fn modified(&self, caller: Caller, file: &File) -> io::Result<()> {
        let spot = Spot::Open(file.as_fd());
        let set_id = spot.stat()?.mode & (libc::S_ISUID | libc::S_ISGID) != 0;
        if set_id && !caller.keeps_set_id() { self.kill_privileges(caller, spot) } else { Ok(()) }
    }

    pub(crate) fn seek_open(&self, handle: u64, offset: u64, whence: i32) -> io::Result<u64> {
        match self.current(self.open.get(handle)?.as_ref())? {
            Real::Upper(file) => seek(&file, offset, whence),
            Real::Lower(file) => file.seek(offset, whence),
        }
    }

    pub(crate) fn copy_open(&self, copy: &Copy) -> io::Result<u64> {
        let to = self.writable(copy.to.0)?;
        let (mut read, mut write) = (copy.from.1, copy.to.1);
        let len = usize::try_from(copy.len).unwrap_or(usize::MAX);
        let mut between = |from: BorrowedFd<'_>| {
            rustix::fs::copy_file_range(from, Some(&mut read), &*to, Some(&mut write), len)
        };
        let copied = match self.current(self.open.get(copy.from.0)?.as_ref())? {
            Real::Upper(file) => between(file.as_fd())?,
            Real::Lower(file) => match file.fd() {
                Some(fd) => between(fd)?,
                None => return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
            },
        };
        self.modified(copy.caller, &to)?;
        Ok(copied as u64)
    }
}
