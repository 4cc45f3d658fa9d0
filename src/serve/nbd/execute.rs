//! What a request does to the disk, and what it is answered.
//!
//! It knows no thread. Ranges have been checked when it is called; a disk that shrank meanwhile fails.

use std::io::{IoSlice, IoSliceMut};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::connection::{Connection, PIECE, Taken};
use super::export::Gone;
use super::reply::{self, Failure, Part};
use crate::block::BlockStatus;
use crate::nbd::wire::{self, Request, command, error};

/// Bytes that are zeroed or discarded at once: a snapshot waits no longer than for that.
const STEP: u64 = 64 << 20;
/// The most stretches in one answer about block status.
const MAX_STRETCHES: usize = 4096;
/// The least read that is looked at for holes first.
const SPARSE: usize = 64 << 10;
/// A read with more holes than this is answered with all its bytes.
const MAX_RUNS: usize = 8;

impl Connection<'_> {
    /// Carries out a request and answers it; `buffer` has what it writes, or takes what it reads.
    pub(super) fn carry_out(&self, taken: Taken, buffer: &mut Vec<u8>) -> Result<(), Gone> {
        let Taken { request, offset, failed } = taken;
        if let Some(failure) = failed {
            return self.answer(&request, Err(failure));
        }
        let writes =
            matches!(request.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        let done = match request.command {
            command::READ if self.terms.structured => return self.read_parts(&request, buffer),
            command::READ => return self.read_simple(&request, buffer),
            command::BLOCK_STATUS => return self.block_status(&request),
            command::CACHE => self.warm(&request, buffer),
            command::WRITE => {
                self.device.write_at(offset, &[IoSlice::new(buffer)]).map_err(Failure::from)
            }
            command::FLUSH => self.flush(),
            command::TRIM => self.in_steps(&request, |at, len| self.device.discard(at, len)),
            command::WRITE_ZEROES => {
                let may_unmap = request.flags & wire::NO_HOLE == 0;
                self.in_steps(&request, |at, len| self.device.write_zeroes(at, len, may_unmap))
            }
            _ => Err(Failure::new(error::INVAL, "this command is not known here")),
        };
        if writes {
            // Afterwards: a flush that came meanwhile may have missed it.
            self.unflushed.store(true, Ordering::SeqCst);
        }
        let durable = writes && request.flags & wire::FUA != 0;
        self.answer(&request, if durable { done.and_then(|()| self.flush()) } else { done })
    }

    /// Writes the one reply to a request that brings no bytes.
    fn answer(&self, request: &Request, done: Result<(), Failure>) -> Result<(), Gone> {
        let _alone = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stream = self.stream;
        match done {
            Ok(()) => reply::simple(&mut stream, request.cookie, 0),
            Err(failure) if self.terms.structured => {
                reply::failed(&mut stream, request.cookie, &failure)
            }
            Err(failure) => reply::simple(&mut stream, request.cookie, failure.code),
        }
    }

    fn part(&self, request: &Request, part: Part<'_>, done: bool) -> Result<(), Gone> {
        let _alone = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        reply::part(&mut &*self.stream, request.cookie, part, done)
    }

    pub(super) fn flush(&self) -> Result<(), Failure> {
        if self.device.read_only() {
            return Ok(());
        }
        self.unflushed.store(false, Ordering::SeqCst);
        let done = self.device.flush();
        self.unflushed.fetch_or(done.is_err(), Ordering::SeqCst);
        Ok(done?)
    }

    fn in_steps(
        &self,
        request: &Request,
        mut step: impl FnMut(u64, u64) -> crate::Result<()>,
    ) -> Result<(), Failure> {
        let (mut at, end) = (request.offset, request.offset + u64::from(request.len));
        while at < end {
            let len = (end - at).min(STEP);
            step(at, len)?;
            at += len;
        }
        Ok(())
    }

    /// Reads a range into the memory of the host, and gives it to nobody.
    fn warm(&self, request: &Request, buffer: &mut Vec<u8>) -> Result<(), Failure> {
        let (mut at, end) = (request.offset, request.offset + u64::from(request.len));
        while at < end {
            let len = (end - at).min(PIECE as u64);
            self.fill(at, len as usize, buffer)?;
            at += len;
        }
        Ok(())
    }

    fn fill(&self, at: u64, len: usize, buffer: &mut Vec<u8>) -> Result<(), Failure> {
        buffer.resize(len, 0);
        Ok(self.device.read_at(at, &mut [IoSliceMut::new(buffer)])?)
    }

    /// Answers a read with one reply. A failure after its begin can be told by hanging up alone.
    fn read_simple(&self, request: &Request, buffer: &mut Vec<u8>) -> Result<(), Gone> {
        let len = request.len as usize;
        let first = len.min(PIECE);
        if let Err(failure) = self.fill(request.offset, first, buffer) {
            return self.answer(request, Err(failure));
        }
        let _alone = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stream = self.stream;
        reply::simple_data(&mut stream, request.cookie, buffer)?;
        let mut done = first;
        while done < len {
            let now = (len - done).min(PIECE);
            self.fill(request.offset + done as u64, now, buffer).map_err(|_| Gone)?;
            reply::data(&mut stream, buffer)?;
            done += now;
        }
        Ok(())
    }

    /// Answers a read with a reply in parts.
    fn read_parts(&self, request: &Request, buffer: &mut Vec<u8>) -> Result<(), Gone> {
        let len = request.len as usize;
        if len == 0 {
            return self.end(request);
        }
        let whole = request.flags & wire::DF != 0;
        if whole && len > PIECE {
            let text = format!("{PIECE} bytes are the most in one part");
            return self.answer(request, Err(Failure::new(error::OVERFLOW, text)));
        }
        let mut done = 0;
        while done < len {
            let now = (len - done).min(PIECE);
            let at = request.offset + done as u64;
            done += now;
            for (at, now, status) in self.runs(at, now, whole) {
                let last = done == len && at + now as u64 == request.offset + len as u64;
                if status == BlockStatus::Zero {
                    self.part(request, Part::Hole(at, now as u32), last)?;
                    continue;
                }
                if let Err(failure) = self.fill(at, now, buffer) {
                    return self.answer(request, Err(failure));
                }
                self.part(request, Part::Data(at, buffer), last)?;
            }
        }
        Ok(())
    }

    fn end(&self, request: &Request) -> Result<(), Gone> {
        let _alone = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        reply::end(&mut &*self.stream, request.cookie)
    }

    /// A range as runs of data and holes, where it is worth it; else as one of data.
    fn runs(&self, at: u64, len: usize, whole: bool) -> Vec<(u64, usize, BlockStatus)> {
        let data = vec![(at, len, BlockStatus::Data)];
        if whole || len < SPARSE {
            return data;
        }
        // A failure shows when the bytes are read.
        let found = self.device.extents(at, len as u64, MAX_RUNS).unwrap_or_default();
        if found.iter().map(|e| e.len).sum::<u64>() != len as u64 {
            return data;
        }
        found.iter().map(|e| (e.offset, e.len as usize, e.status)).collect()
    }

    /// Answers in each context that was chosen.
    fn block_status(&self, request: &Request) -> Result<(), Gone> {
        let limit = if request.flags & wire::REQ_ONE != 0 { 1 } else { MAX_STRETCHES };
        let mut ids = self.terms.contexts.ids().peekable();
        while let Some(id) = ids.next() {
            let range = request.offset..request.offset.saturating_add(request.len.into());
            match self.contexts.stretches(id, self.device, range, limit) {
                Ok(found) => {
                    self.part(request, Part::Status(id, &found), ids.peek().is_none())?;
                }
                Err(e) => return self.answer(request, Err(e.into())),
            }
        }
        Ok(())
    }
}
