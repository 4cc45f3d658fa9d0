//! What files hold: read, written, cut, allocated; holes found.

use std::io::IoSlice;
use std::sync::PoisonError;

use super::inode::{
    FLAG_APPEND, FLAG_EXTENTS, FLAG_IMMUTABLE, FLAG_INLINE, FLAG_VERITY, Inode, Moment,
};
use super::map::Stretch;
use super::map::extents::Extent;
use super::{Mounted, Tx, errno};
use crate::error::{Error, Result};

/// Bytes that one operation writes at most.
const PIECE: usize = 4 << 20;
/// Blocks that one operation allocates at most.
const STEP: u64 = 1 << 16;
/// How many stretches of a file are looked up at a time.
const STRETCHES: usize = 64;
/// Zeroes, for the edges of blocks.
static ZEROES: [u8; 65536] = [0; 65536];

/// What [`Mounted::allocate`] does with a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocation {
    /// Blocks for all of it; what is there stays.
    Reserve,
    /// A hole.
    Punch,
    /// Zeroes, with blocks for all of them.
    Zero,
}

/// What [`Mounted::seek`] looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seek {
    /// Something that was written.
    Data,
    /// What reads as zeroes because nothing was.
    Hole,
}

/// A stretch of contents to write, in one piece.
struct Write {
    place: u64,
    /// Zeroes before and after the bytes.
    before: usize,
    after: usize,
    /// Which of the bytes.
    from: usize,
    to: usize,
}

fn writable(inode: &Inode) -> Result<()> {
    if !inode.is_regular() {
        let number = if inode.is_directory() { libc::EISDIR } else { libc::EINVAL };
        return Err(errno(number, "not a regular file"));
    }
    if inode.has(FLAG_IMMUTABLE | FLAG_VERITY) {
        return Err(errno(libc::EPERM, "the file is immutable"));
    }
    match inode.has(FLAG_INLINE | super::inode::FLAG_ENCRYPT) {
        true => Err(errno(libc::EOPNOTSUPP, "encrypted and inline data are only read here")),
        false => Ok(()),
    }
}

impl Tx<'_> {
    /// Reads what a file holds; returns how much was there. For small files: nobody else gets on.
    pub fn read_file(&mut self, inode: &Inode, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let len = (buf.len() as u64).min(inode.size().saturating_sub(offset)) as usize;
        let buf = buf.get_mut(..len).unwrap_or_default();
        if inode.has(FLAG_INLINE) || inode.is_short_link() {
            let mut all = inode.map().to_vec();
            all.append(&mut self.inline_rest(inode));
            all.resize(inode.size().min(1 << 16) as usize, 0);
            let from = all.get(offset as usize..).unwrap_or_default();
            buf.fill(0);
            buf.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
            return Ok(len);
        }
        let size = self.fs.sb.block_size as u64;
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let stretch = self.stretch(inode, at / size)?;
            let (skip, most) = (at % size, stretch.len.saturating_mul(size));
            let run = (most - skip).min((len - done) as u64) as usize;
            let piece = buf.get_mut(done..done + run).unwrap_or_default();
            match stretch.place.filter(|_| stretch.written) {
                // A link's target and an attribute's value may be in memory only.
                Some(place) if !inode.is_regular() => {
                    let block = self.read(place)?;
                    let bytes = block.get(skip as usize..).unwrap_or_default();
                    piece.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
                }
                Some(place) => self.fs.part.read(place, skip, piece)?,
                None => piece.fill(0),
            }
            done += run;
        }
        Ok(len)
    }

    /// The stretches of a file from block `at` on, before block `end`.
    fn stretches(&mut self, inode: &Inode, at: u64, end: u64) -> Result<Vec<(u64, Stretch)>> {
        let (mut at, mut found) = (at, Vec::new());
        while at < end && found.len() < STRETCHES {
            let mut stretch = self.stretch(inode, at)?;
            stretch.len = stretch.len.min(end - at);
            found.push((at, stretch));
            at += stretch.len;
        }
        Ok(found)
    }

    /// Zeroes the bytes `from..to` of a file where something was written there.
    fn zero_edge(&mut self, inode: &Inode, from: u64, to: u64) -> Result<()> {
        let size = self.fs.sb.block_size as u64;
        if from >= to {
            return Ok(());
        }
        let stretch = self.stretch(inode, from / size)?;
        match stretch.place.filter(|_| stretch.written) {
            Some(place) => {
                let zeroes = ZEROES.get(..(to - from) as usize).unwrap_or(&ZEROES);
                self.fs.part.write(place, from % size, zeroes)
            }
            None => Ok(()),
        }
    }

    /// Zeroes what follows the end of a file in its last block, up to `to`.
    fn zero_tail(&mut self, inode: &Inode, to: u64) -> Result<()> {
        let (size, end) = (self.fs.sb.block_size as u64, inode.size());
        match end % size {
            0 => Ok(()),
            _ => self.zero_edge(inode, end, to.min(end.next_multiple_of(size))),
        }
    }

    /// Fails where a file cannot be as long as `end`.
    fn check_size(&self, inode: &Inode, end: u64) -> Result<()> {
        let most = self.most_blocks(inode).saturating_mul(self.fs.sb.block_size as u64);
        // Without a word from the superblock, others read the upper half as something else.
        let large = self.fs.sb.ro_compat & 0x2 != 0 || end <= i32::MAX as u64;
        match end <= most.min(i64::MAX as u64) && large {
            true => Ok(()),
            false => Err(errno(libc::EFBIG, "the file would be too large")),
        }
    }

    /// Makes a file ready to take bytes at `offset`; returns what to write where.
    fn place_bytes(&mut self, number: u32, offset: u64, len: usize) -> Result<Vec<Write>> {
        let size = self.fs.sb.block_size as u64;
        let mut inode = self.file(number)?;
        writable(&inode)?;
        let end = offset.checked_add(len as u64).ok_or_else(|| errno(libc::EFBIG, "too far"))?;
        self.check_size(&inode, end)?;
        if offset > inode.size() {
            self.zero_tail(&inode, offset)?;
        }
        let (mut at, last) = (offset / size, end.div_ceil(size));
        let mut writes: Vec<Write> = Vec::new();
        while at < last {
            let stretch = self.stretch(&inode, at)?;
            let want = stretch.len.min(last - at);
            let (place, run, new) = match (stretch.place, stretch.written) {
                (Some(place), true) => (place, want, false),
                (Some(place), false) => {
                    self.mark_written(&mut inode, at, place, want)?;
                    (place, want, true)
                }
                (None, _) => {
                    let (place, run) = self.grow(&mut inode, at, want, true)?;
                    (place, run, true)
                }
            };
            let (start, stop) = (at * size, (at + run) * size);
            let (from, to) = (start.max(offset), stop.min(end));
            let edge = |bytes: u64| if new { bytes as usize } else { 0 };
            let skip = if new { 0 } else { from - start };
            writes.push(Write {
                place: place * size + skip,
                before: edge(from - start),
                after: edge(stop - to),
                from: (from - offset) as usize,
                to: (to - offset) as usize,
            });
            at += run;
        }
        if end > inode.size() {
            inode.set_size(end);
        }
        let now = self.now;
        inode.set_time(Moment::Modified, now);
        inode.set_time(Moment::Changed, now);
        self.put_inode(&mut inode)?;
        Ok(writes)
    }
}

impl Mounted {
    /// Reads from a file; returns how many bytes were there.
    pub fn read(&self, number: u32, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let _guard = self.stripe(number).read().unwrap_or_else(PoisonError::into_inner);
        let size = self.sb.block_size as u64;
        let mut done = 0;
        loop {
            let at = offset.saturating_add(done as u64);
            let looked = self.look(|tx| {
                let inode = tx.file(number)?;
                if !inode.is_regular() {
                    let error = if inode.is_directory() { libc::EISDIR } else { libc::EINVAL };
                    return Err(errno(error, "not a regular file"));
                }
                if inode.has(super::inode::FLAG_ENCRYPT) {
                    return Err(errno(libc::ENOKEY, "the file is encrypted"));
                }
                let end = inode.size().min(offset.saturating_add(buf.len() as u64));
                if inode.has(FLAG_INLINE) {
                    done = tx.read_file(&inode, offset, buf)?;
                    return Ok(None);
                }
                match at < end {
                    true => Ok(Some((end, tx.stretches(&inode, at / size, end.div_ceil(size))?))),
                    false => Ok(None),
                }
            })?;
            let Some((end, stretches)) = looked else { return Ok(done) };
            for (block, stretch) in stretches {
                let at = offset + done as u64;
                let stop = end.min((block + stretch.len) * size);
                let piece = buf.get_mut(done..done + (stop - at) as usize).unwrap_or_default();
                match stretch.place.filter(|_| stretch.written) {
                    Some(place) => self.part.read(place + (at / size - block), at % size, piece)?,
                    None => piece.fill(0),
                }
                done += piece.len();
            }
        }
    }

    /// Writes all of `data` to a file at `offset`; returns how many bytes found room.
    pub fn write(&self, number: u32, offset: u64, data: &[u8]) -> Result<usize> {
        let _guard = self.stripe(number).write().unwrap_or_else(PoisonError::into_inner);
        let mut done = 0;
        for piece in data.chunks(PIECE) {
            match self.write_piece(number, offset.saturating_add(done as u64), piece) {
                Ok(()) => done += piece.len(),
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_piece(&self, number: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.writable()?;
        self.make_room()?;
        match self.write_once(number, offset, data) {
            Err(error) if self.may_find_space(&error) => {
                self.sync()?;
                self.write_once(number, offset, data)
            }
            result => result,
        }
    }

    fn write_once(&self, number: u32, offset: u64, data: &[u8]) -> Result<()> {
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let writes = self.attempt(|tx| tx.place_bytes(number, offset, data.len()))?;
        // From here on the metadata says that the bytes are there.
        self.fail(writes.iter().try_for_each(|write| self.write_out(write, data)))
    }

    fn write_out(&self, write: &Write, data: &[u8]) -> Result<()> {
        let size = self.sb.block_size as u64;
        let bytes = data.get(write.from..write.to).unwrap_or_default();
        let zeroes = |len: usize| IoSlice::new(ZEROES.get(..len).unwrap_or(&ZEROES));
        let all = [zeroes(write.before), IoSlice::new(bytes), zeroes(write.after)];
        let some: Vec<IoSlice<'_>> = all.into_iter().filter(|slice| !slice.is_empty()).collect();
        self.part.write_all(write.place / size, write.place % size, &some)
    }

    /// Sets the length of a file.
    pub(super) fn truncate(&self, number: u32, size: u64) -> Result<()> {
        let _guard = self.stripe(number).write().unwrap_or_else(PoisonError::into_inner);
        let block = self.sb.block_size as u64;
        let mut steps = false;
        self.change(|tx| {
            let mut inode = tx.file(number)?;
            writable(&inode)?;
            tx.check_size(&inode, size)?;
            if inode.has(FLAG_APPEND) {
                return Err(errno(libc::EPERM, "the file only grows"));
            }
            let old = inode.size();
            if size > old {
                tx.zero_tail(&inode, u64::MAX)?;
            }
            inode.set_size(size);
            if size < old {
                tx.zero_tail(&inode, u64::MAX)?;
            }
            let end = size.div_ceil(block);
            steps = old.div_ceil(block).saturating_sub(end) > STEP;
            if steps {
                tx.add_orphan(&mut inode);
            } else if size <= old {
                tx.unmap(&mut inode, end, u64::MAX)?;
            }
            let now = tx.now;
            inode.set_time(Moment::Modified, now);
            inode.set_time(Moment::Changed, now);
            tx.put_inode(&mut inode)
        })?;
        if !steps {
            return Ok(());
        }
        let end = size.div_ceil(block);
        self.cut(number, end)?;
        self.change(|tx| {
            let mut inode = tx.inode(number)?;
            tx.unmap(&mut inode, end, u64::MAX)?;
            tx.remove_orphan(&mut inode)?;
            tx.put_inode(&mut inode)
        })
    }

    /// Allocates, punches or zeroes `len` bytes of a file from `offset` on. With `keep_size` its
    /// length stays.
    pub fn allocate(
        &self,
        number: u32,
        offset: u64,
        len: u64,
        how: Allocation,
        keep_size: bool,
    ) -> Result<()> {
        let _guard = self.stripe(number).write().unwrap_or_else(PoisonError::into_inner);
        let end = offset.checked_add(len).filter(|end| *end <= i64::MAX as u64);
        let end = end.ok_or_else(|| errno(libc::EFBIG, "too far"))?;
        if len == 0 {
            return Err(errno(libc::EINVAL, "a range of no bytes"));
        }
        let size = self.sb.block_size as u64;
        let mut end = end;
        self.look(|tx| {
            let inode = tx.file(number)?;
            writable(&inode)?;
            if how == Allocation::Punch {
                // The last block goes whole, and what is reserved after it stays.
                let last = inode.size().next_multiple_of(size);
                end = if end >= inode.size() { last.max(offset) } else { end };
            }
            match how != Allocation::Punch && !inode.has(FLAG_EXTENTS) {
                true => Err(errno(libc::EOPNOTSUPP, "needs a file with extents")),
                false if how == Allocation::Punch => Ok(()),
                false => tx.check_size(&inode, end),
            }
        })?;
        if how != Allocation::Reserve {
            self.zero_edges(number, offset, end)?;
        }
        // Whole blocks for what is given back, all that are touched for what is allocated.
        let (from, to) = match how {
            Allocation::Reserve => (offset / size, end.div_ceil(size)),
            _ => (offset.div_ceil(size), end / size),
        };
        if how == Allocation::Punch {
            let most = self.look(|tx| {
                let inode = tx.file(number)?;
                Ok(tx.most_blocks(&inode))
            })?;
            self.punch(number, from, to.min(most))?;
        } else {
            self.reserve(number, from, to, how == Allocation::Zero)?;
            if how == Allocation::Zero {
                // The blocks at its edges are allocated too.
                self.reserve(number, offset / size, from, false)?;
                self.reserve(number, to, end.div_ceil(size), false)?;
            }
        }
        self.change(|tx| {
            let mut inode = tx.file(number)?;
            if !keep_size && how != Allocation::Punch && end > inode.size() {
                tx.zero_tail(&inode, u64::MAX)?;
                inode.set_size(end);
            }
            let now = tx.now;
            inode.set_time(Moment::Modified, now);
            inode.set_time(Moment::Changed, now);
            tx.put_inode(&mut inode)
        })
    }

    /// Zeroes what of `offset..end` is no whole block.
    fn zero_edges(&self, number: u32, offset: u64, end: u64) -> Result<()> {
        let size = self.sb.block_size as u64;
        if offset >= end {
            return Ok(());
        }
        self.change(|tx| {
            let inode = tx.file(number)?;
            let first = offset.next_multiple_of(size);
            if first >= end && offset / size == (end - 1) / size {
                return match end.is_multiple_of(size) && offset.is_multiple_of(size) {
                    true => Ok(()),
                    false => tx.zero_edge(&inode, offset, end),
                };
            }
            tx.zero_edge(&inode, offset, first.min(end))?;
            tx.zero_edge(&inode, end / size * size, end)
        })
    }

    fn punch(&self, number: u32, from: u64, to: u64) -> Result<()> {
        let mut at = from;
        while at < to {
            let next = to.min(at.saturating_add(STEP * 4));
            self.change(|tx| {
                let mut inode = tx.file(number)?;
                tx.unmap(&mut inode, at, next)?;
                tx.put_inode(&mut inode)
            })?;
            // A long hole is passed in one step.
            let hole = self.look(|tx| {
                let inode = tx.file(number)?;
                let stretch = tx.stretch(&inode, next)?;
                Ok(if stretch.place.is_none() { stretch.len } else { 0 })
            })?;
            at = next.saturating_add(hole);
        }
        Ok(())
    }

    /// Gives a file blocks for `from..to` that read as zeroes where there are none, and with
    /// `zero` where there are some.
    fn reserve(&self, number: u32, from: u64, to: u64, zero: bool) -> Result<()> {
        let mut at = from;
        while at < to {
            at = self.change(|tx| {
                let mut inode = tx.file(number)?;
                let stretch = tx.stretch(&inode, at)?;
                let want = stretch.len.min(to - at);
                let run = match stretch.place {
                    None => tx.grow(&mut inode, at, want, false)?.1,
                    Some(place) if zero && stretch.written => {
                        let run = want.min(u64::from(super::map::extents::LONGEST) - 1);
                        let (from, len) = (at as u32, run as u32);
                        let extent = Extent { at: from, len, place, written: false };
                        tx.map_extents(&mut inode, at..at + run, &[extent])?;
                        run
                    }
                    Some(_) => want,
                };
                tx.put_inode(&mut inode)?;
                Ok(at + run)
            })?;
        }
        Ok(())
    }

    /// The first byte from `offset` on that is data, or a hole.
    pub fn seek(&self, number: u32, offset: u64, what: Seek) -> Result<u64> {
        let size = self.sb.block_size as u64;
        let _guard = self.stripe(number).read().unwrap_or_else(PoisonError::into_inner);
        self.look(|tx| {
            let inode = tx.file(number)?;
            let none = || errno(libc::ENXIO, "nothing follows");
            let end = inode.size();
            if offset >= end {
                return Err(none());
            }
            if inode.has(FLAG_INLINE) {
                return Ok(if what == Seek::Data { offset } else { end });
            }
            let mut at = offset / size;
            while at * size < end {
                let stretch = tx.stretch(&inode, at)?;
                if stretch.written == (what == Seek::Data) {
                    return Ok(offset.max(at * size));
                }
                at = at.saturating_add(stretch.len);
                if at > end / size {
                    break;
                }
            }
            if what == Seek::Hole { Ok(end) } else { Err(none()) }
        })
    }

    /// Where the blocks of the journal's file count, for statistics.
    pub(super) fn journal_blocks(&self) -> u64 {
        match self.sb.journal_inode {
            0 => 0,
            number => self
                .look(|tx| Ok(tx.inode(number)?.size() / self.sb.block_size as u64))
                .unwrap_or(0),
        }
    }

    /// The target of a link.
    pub fn read_link(&self, number: u32) -> Result<Vec<u8>> {
        self.look(|tx| {
            let inode = tx.file(number)?;
            if inode.kind() != super::inode::SYMLINK {
                return Err(errno(libc::EINVAL, "not a symbolic link"));
            }
            if inode.size() > self.sb.block_size as u64 {
                return Err(Error::corrupt("ext4: the target of a link is too long"));
            }
            let mut target = vec![0; inode.size() as usize];
            tx.read_file(&inode, 0, &mut target)?;
            Ok(target)
        })
    }
}
