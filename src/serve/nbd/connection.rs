//! The requests of one client, several at a time.
//!
//! A few threads share the socket: one reads a request and lets the next one read before it carries
//! its own out. A request that is under way costs a thread and at most [`PIECE`] bytes, and who sends
//! faster than the disk takes it waits in the socket.

use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Read};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Scope};

use super::handshake::{ALLOCATION_ID, Terms};
use super::reply::{self, Failure, Part};
use super::{Gone, request};
use crate::block::{BlockDevice, BlockStatus};
use crate::nbd::stream::Stream;
use crate::nbd::wire::{self, REQUEST_LEN, Request, command, error};

/// Requests of one client that are carried out at a time.
const THREADS: usize = 8;
/// Bytes that are read or written at once.
const PIECE: usize = 2 << 20;
/// A thread keeps no more memory than this for its next request.
const KEPT: usize = 256 << 10;
/// Bytes that are zeroed or discarded at once: a snapshot waits no longer than for that.
const STEP: u64 = 64 << 20;
/// The most stretches in one answer about block status.
const MAX_STRETCHES: usize = 4096;
/// The least read that is looked at for holes first.
const SPARSE: usize = 64 << 10;
/// A read with more holes than this is answered with all its bytes.
const MAX_RUNS: usize = 8;

/// A connection after its handshake.
pub struct Connection<'a> {
    stream: &'a Stream,
    device: &'a dyn BlockDevice,
    terms: Terms,
    stopping: &'a AtomicBool,
    reader: Mutex<Reader<'a>>,
    /// Held while a reply, or one part of it, is written.
    writer: Mutex<()>,
    /// Threads, and those of them that wait for a request.
    threads: AtomicUsize,
    idle: AtomicUsize,
}

struct Reader<'a> {
    from: BufReader<&'a Stream>,
    /// Nothing is read any more.
    over: bool,
}

/// A request whose bytes, if it has any, have been taken off the socket.
struct Taken {
    request: Request,
    /// Where the bytes in the buffer belong; those before have been written.
    offset: u64,
    /// How it failed already.
    failed: Option<Failure>,
}

/// Lets the client know when a thread dies of a panic, rather than let it wait for ever.
struct Alarm<'a>(&'a Stream);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let _ = self.0.shutdown(Shutdown::Both);
        }
    }
}

impl<'a> Connection<'a> {
    /// A connection that ends soon when `stopping` is set and the socket is shut down for reading.
    pub fn new(
        stream: &'a Stream,
        device: &'a dyn BlockDevice,
        terms: Terms,
        stopping: &'a AtomicBool,
    ) -> Connection<'a> {
        let from = BufReader::with_capacity(32 << 10, stream);
        Connection {
            stream,
            device,
            terms,
            stopping,
            reader: Mutex::new(Reader { from, over: false }),
            writer: Mutex::default(),
            threads: AtomicUsize::new(1),
            idle: AtomicUsize::new(0),
        }
    }

    /// Serves the client until it leaves and all that it asked for is done.
    pub fn serve(&self) {
        thread::scope(|scope| self.work(scope));
    }

    fn work<'s>(&'s self, scope: &'s Scope<'s, '_>) {
        let _alarm = Alarm(self.stream);
        let mut buffer = Vec::new();
        loop {
            let done = match self.next(scope, &mut buffer) {
                Ok(Some(taken)) => self.carry_out(taken, &mut buffer),
                Ok(None) => return,
                Err(gone) => Err(gone),
            };
            if done.is_err() {
                return self.hang_up();
            }
            if buffer.capacity() > KEPT {
                buffer = Vec::new();
            }
        }
    }

    /// Wakes the threads that read and write. A server that stops itself lets replies that are on
    /// their way arrive.
    fn hang_up(&self) {
        if !self.stopping.load(Ordering::SeqCst) {
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }

    /// Takes the next request off the socket; `None` where no more comes.
    fn next<'s>(
        &'s self,
        scope: &'s Scope<'s, '_>,
        buffer: &mut Vec<u8>,
    ) -> Result<Option<Taken>, Gone> {
        self.idle.fetch_add(1, Ordering::SeqCst);
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        self.idle.fetch_sub(1, Ordering::SeqCst);
        if reader.over || self.stopping.load(Ordering::SeqCst) {
            return Ok(None);
        }
        let taken = self.take(&mut reader.from, buffer);
        reader.over = !matches!(taken, Ok(Some(_)));
        if !reader.over {
            self.let_another_read(scope);
        }
        taken
    }

    /// Sees to it that somebody reads while this thread is at work.
    fn let_another_read<'s>(&'s self, scope: &'s Scope<'s, '_>) {
        if self.idle.load(Ordering::SeqCst) > 0 || self.threads.load(Ordering::SeqCst) >= THREADS {
            return;
        }
        // Only the one who reads is here: nobody else adds threads.
        self.threads.fetch_add(1, Ordering::SeqCst);
        let thread = thread::Builder::new().name("nbd".into());
        if thread.spawn_scoped(scope, || self.work(scope)).is_err() {
            self.threads.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn take(&self, from: &mut impl BufRead, buffer: &mut Vec<u8>) -> Result<Option<Taken>, Gone> {
        if from.fill_buf()?.is_empty() {
            return Ok(None);
        }
        let mut bytes = [0; REQUEST_LEN];
        from.read_exact(&mut bytes)?;
        let request = Request::decode(&bytes).ok_or(Gone)?;
        if request.command == command::DISCONNECT {
            return Ok(None);
        }
        let failed = request::check(&request, self.terms, self.device).err();
        let mut taken = Taken { request, offset: request.offset, failed };
        if request.command == command::WRITE {
            self.take_bytes(&mut taken, from, buffer)?;
        }
        Ok(Some(taken))
    }

    /// Takes what is to be written off the socket, and writes all of it but the last piece.
    fn take_bytes(
        &self,
        taken: &mut Taken,
        from: &mut impl Read,
        buffer: &mut Vec<u8>,
    ) -> Result<(), Gone> {
        let mut left = taken.request.len as usize;
        loop {
            let now = left.min(PIECE);
            buffer.resize(now, 0);
            from.read_exact(buffer)?;
            left -= now;
            if left == 0 {
                return Ok(());
            }
            if taken.failed.is_none() {
                let written = self.device.write_at(taken.offset, &[IoSlice::new(buffer)]);
                taken.failed = written.err().map(Failure::from);
            }
            // A request that is refused may have any offset.
            taken.offset = taken.offset.wrapping_add(now as u64);
        }
    }

    fn carry_out(&self, taken: Taken, buffer: &mut Vec<u8>) -> Result<(), Gone> {
        let Taken { request, offset, failed } = taken;
        if let Some(failure) = failed {
            return self.answer(&request, Err(failure));
        }
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
        let writes =
            matches!(request.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
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

    fn flush(&self) -> Result<(), Failure> {
        if self.device.read_only() {
            return Ok(());
        }
        Ok(self.device.flush()?)
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

    /// Answers where there is data, in the context `base:allocation`.
    fn block_status(&self, request: &Request) -> Result<(), Gone> {
        let limit = if request.flags & wire::REQ_ONE != 0 { 1 } else { MAX_STRETCHES };
        let found = match self.device.extents(request.offset, u64::from(request.len), limit) {
            Ok(found) => found,
            Err(e) => return self.answer(request, Err(e.into())),
        };
        let stretches: Vec<(u32, u32)> = found
            .iter()
            .map(|extent| {
                let flags = match extent.status {
                    BlockStatus::Data => 0,
                    BlockStatus::Zero => wire::STATE_HOLE | wire::STATE_ZERO,
                };
                // They lie in the range that was asked for, which has less than 4 GiB.
                (extent.len as u32, flags)
            })
            .collect();
        self.part(request, Part::Status(ALLOCATION_ID, &stretches), true)
    }
}
