//! What is read of a file of the host, on its way to the kernel without a copy here: the pages of the file
//! themselves go through a pipe (splice(2)). Each worker has one.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::{Errno, write};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use crate::kernel::wire::{OUT_HEADER, header};

/// Less is copied: it takes no longer.
pub(crate) const LEAST: usize = 64 << 10;
/// As much as everybody may have, in bytes: pipe(7). A page of it is the header's.
const SIZE: usize = 1 << 20;
const PAGE: usize = 4096;
/// What surely fits in bytes: what begins or ends within a page takes that page as well.
pub(crate) const MOST: usize = SIZE - 2 * PAGE;

/// A pipe, empty between requests.
#[derive(Debug, Default)]
pub(crate) enum Pipe {
    /// There has been no need for it.
    #[default]
    None,
    Ready(Ends),
    /// There can be none that would do.
    Unusable,
}

#[derive(Debug)]
pub(crate) struct Ends {
    out: OwnedFd,
    into: OwnedFd,
}

impl Ends {
    fn new() -> io::Result<Ends> {
        // What does not fit is not waited for.
        let (out, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        fcntl_setpipe_size(&into, SIZE)?;
        Ok(Ends { out, into })
    }

    /// Takes a reply's header and `len` bytes of `file`. Not always all: then it is of no use any more.
    fn fill(&self, unique: u64, file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<bool> {
        let header = header(unique, 0, OUT_HEADER + len);
        if write(&self.into, &header)? != header.len() {
            return Ok(false);
        }
        let (mut from, mut left) = (offset, len);
        while left > 0 {
            match splice(file, Some(&mut from), &self.into, None, left, SpliceFlags::NONBLOCK) {
                Ok(0) => return Ok(false),
                Ok(taken) => left -= taken,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }
}

impl Pipe {
    /// Takes the reply to a reading of `len` bytes at `offset` of `file`. False where it cannot: nothing has
    /// been said to the kernel, and the bytes have to be copied.
    pub(crate) fn fill(
        &mut self,
        unique: u64,
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
    ) -> bool {
        if !(LEAST..=MOST).contains(&len) {
            return false;
        }
        if let Pipe::None = self {
            *self = Ends::new().map_or(Pipe::Unusable, Pipe::Ready);
        }
        let Pipe::Ready(ends) = self else { return false };
        if ends.fill(unique, file, offset, len).is_ok_and(|all| all) {
            return true;
        }
        // With what is in it. Not for good: another file, or the same a moment later, may be of another kind.
        *self = Pipe::None;
        false
    }

    /// Hands over what [`fill`](Pipe::fill) has taken, `len` bytes of a file.
    pub(crate) fn send(&mut self, device: BorrowedFd<'_>, len: usize) {
        let Pipe::Ready(ends) = self else { return };
        let whole = OUT_HEADER + len;
        let sent = splice(&ends.out, None, device, None, whole, SpliceFlags::empty());
        if sent != Ok(whole) {
            // Whoever asked may be gone. What is left in it belongs to no other reply.
            *self = Pipe::None;
        }
    }
}
