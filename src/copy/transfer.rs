//! Writing what one disk holds into another, by several threads.
//!
//! Parts are read side by side and written one after the other: the target grows in the order of the
//! disk. What is read from, and which parts of it, is the caller's to say.

use std::io::IoSlice;

use crate::block::BlockDevice;
use crate::chain::Chain;
use crate::copy::queue;
use crate::error::Error;

/// The most stretches in one part.
const MAX_STRETCHES: usize = 64;

/// A stretch of the disk that the target is to show as well.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    at: u64,
    len: u64,
    /// It reads as zeroes and is not read.
    zero: bool,
}

/// What one thread reads and then writes: a few stretches, in order.
#[derive(Debug)]
pub struct Part {
    stretches: Vec<Stretch>,
    data: u64,
    room: u64,
}

impl Part {
    /// An empty part that takes up to `room` bytes of data.
    pub fn new(room: u64) -> Part {
        Part { stretches: Vec::new(), data: 0, room }
    }

    /// Whether nothing more goes into it.
    pub fn is_full(&self) -> bool {
        self.data >= self.room || self.stretches.len() >= MAX_STRETCHES
    }

    /// Takes as much of `len` bytes of data at `at` as there is room for, and says how much.
    pub fn add_data(&mut self, at: u64, len: u64) -> u64 {
        let len = len.min(self.room - self.data);
        self.data += len;
        self.stretches.push(Stretch { at, len, zero: false });
        len
    }

    /// Takes `len` bytes of zeroes at `at`: all of them.
    pub fn add_zeroes(&mut self, at: u64, len: u64) -> u64 {
        self.stretches.push(Stretch { at, len, zero: true });
        len
    }

    /// Bytes of data in it.
    pub fn data(&self) -> u64 {
        self.data
    }

    /// The part, unless nothing is in it.
    pub fn filled(self) -> Option<Part> {
        (!self.stretches.is_empty()).then_some(self)
    }
}

/// Writes each part that `next` names into `target`; `read` reads a stretch of data of the source.
/// The target is not flushed.
///
/// # Errors
/// The first in the order of the parts; what comes before it is written, and nothing after it.
pub fn transfer<E: Send>(
    target: &Chain,
    threads: usize,
    next: impl FnMut() -> Result<Option<Part>, E> + Send,
    read: impl Fn(u64, &mut [u8]) -> Result<(), E> + Sync,
    failed: impl Fn(Error) -> E + Sync,
) -> Result<(), E> {
    let read = |part: Part, buf: &mut Vec<u8>| {
        buf.resize(buf.len().max(part.data as usize), 0);
        let mut rest = &mut buf[..];
        for data in part.stretches.iter().filter(|s| !s.zero) {
            let (here, behind) = rest.split_at_mut(data.len as usize);
            read(data.at, here)?;
            rest = behind;
        }
        Ok(part)
    };
    queue::run(threads, next, read, |part, buf| {
        let mut rest = buf;
        for Stretch { at, len, zero } in part.stretches {
            if zero {
                target.write_zeroes(at, len, true).map_err(&failed)?;
                continue;
            }
            let (here, behind) = rest.split_at(len as usize);
            target.write_at(at, &[IoSlice::new(here)]).map_err(&failed)?;
            rest = behind;
        }
        Ok(())
    })
}
