//! The requests of one client, several at a time.
//!
//! A few threads share the socket: one reads a request and lets the next one read before it carries
//! its own out. Where a client waits for each answer and the disk answers at once, one thread does
//! both: to wake another takes longer than the request. A request that is under way costs a thread and at most [`PIECE`] bytes, and who sends
//! faster than the disk takes it waits in the socket.

use std::io::{BufRead, BufReader, IoSlice, Read};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use super::contexts::Contexts;
use super::export::{Export, Gone};
use super::handshake::Terms;
use super::reply::Failure;
use super::request;
use crate::block::BlockDevice;
use crate::nbd::stream::Stream;
use crate::nbd::wire::{self, REQUEST_LEN, Request, command};

/// Requests of one client that are carried out at a time.
const THREADS: usize = 8;
/// Bytes that are read or written at once.
pub(super) const PIECE: usize = 2 << 20;
/// A thread keeps no more memory than this for its next request.
const KEPT: usize = 256 << 10;
/// A request for no more bytes than this is small.
const SMALL: u32 = 64 << 10;
/// A small request that takes less is quick.
const QUICK: Duration = Duration::from_micros(100);
/// After so many quick ones the next one is expected to be quick too.
const TRUST: u32 = 32;

/// A connection after its handshake.
pub struct Connection<'a> {
    pub(super) stream: &'a Stream,
    pub(super) device: &'a dyn BlockDevice,
    pub(super) contexts: &'a Contexts,
    pub(super) terms: Terms,
    stopping: &'a AtomicBool,
    reader: Mutex<Reader<'a>>,
    /// Held while a reply, or one part of it, is written.
    pub(super) writer: Mutex<()>,
    /// Threads, and those of them that wait for a request.
    threads: AtomicUsize,
    idle: AtomicUsize,
    /// Small requests since the last one that was not quick.
    quick: AtomicU32,
    /// Something was written that no flush has followed.
    pub(super) unflushed: AtomicBool,
}

struct Reader<'a> {
    from: BufReader<&'a Stream>,
    /// Nothing is read any more.
    over: bool,
}

/// A request whose bytes, if it has any, have been taken off the socket.
pub(super) struct Taken {
    pub(super) request: Request,
    /// Where the bytes in the buffer belong; those before have been written.
    pub(super) offset: u64,
    /// How it failed already.
    pub(super) failed: Option<Failure>,
}

impl Taken {
    fn is_small(&self) -> bool {
        let Request { command, flags, len, .. } = self.request;
        matches!(command, command::READ | command::WRITE) && flags & wire::FUA == 0 && len <= SMALL
    }
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
        export: &'a Export,
        terms: Terms,
        stopping: &'a AtomicBool,
    ) -> Connection<'a> {
        let from = BufReader::with_capacity(32 << 10, stream);
        Connection {
            stream,
            device: &*export.device,
            contexts: &export.contexts,
            terms,
            stopping,
            reader: Mutex::new(Reader { from, over: false }),
            writer: Mutex::default(),
            threads: AtomicUsize::new(1),
            idle: AtomicUsize::new(0),
            quick: AtomicU32::new(0),
            unflushed: AtomicBool::new(false),
        }
    }

    /// Serves the client until it leaves and all that it asked for is done. What it wrote is durable
    /// then: nobody else may come for a long time, and tables that were changed are in memory alone.
    pub fn serve(&self) {
        thread::scope(|scope| self.work(scope));
        if self.unflushed.load(Ordering::SeqCst) {
            // There is nobody to be told; the next flush fails as well.
            let _ = self.flush();
        }
    }

    fn work<'s>(&'s self, scope: &'s Scope<'s, '_>) {
        let _alarm = Alarm(self.stream);
        let mut buffer = Vec::new();
        loop {
            let done = match self.next(scope, &mut buffer) {
                Ok(Some(taken)) => self.carry_out_timed(taken, &mut buffer),
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

    /// Takes the next request off the socket that others may be read beside; `None` where no more
    /// comes.
    fn next<'s>(
        &'s self,
        scope: &'s Scope<'s, '_>,
        buffer: &mut Vec<u8>,
    ) -> Result<Option<Taken>, Gone> {
        self.idle.fetch_add(1, Ordering::SeqCst);
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        self.idle.fetch_sub(1, Ordering::SeqCst);
        while !reader.over && !self.stopping.load(Ordering::SeqCst) {
            let taken = match self.take(&mut reader.from, buffer) {
                Ok(Some(taken)) => taken,
                end => {
                    reader.over = true;
                    return end;
                }
            };
            if !self.is_alone(&taken, &reader) {
                self.let_another_read(scope);
                return Ok(Some(taken));
            }
            let done = self.carry_out_timed(taken, buffer);
            reader.over = done.is_err();
            done?;
        }
        Ok(None)
    }

    /// Whether nothing else waits to be read, and nothing is likely to wait long if this request is
    /// carried out first.
    fn is_alone(&self, taken: &Taken, reader: &Reader<'_>) -> bool {
        let alike = taken.is_small() && self.quick.load(Ordering::Relaxed) >= TRUST;
        if !alike || !reader.from.buffer().is_empty() {
            return false;
        }
        !self.stream.has_more()
    }

    fn carry_out_timed(&self, taken: Taken, buffer: &mut Vec<u8>) -> Result<(), Gone> {
        if !taken.is_small() {
            return self.carry_out(taken, buffer);
        }
        let began = Instant::now();
        let done = self.carry_out(taken, buffer);
        match began.elapsed() < QUICK {
            true => self.quick.fetch_add(1, Ordering::Relaxed),
            false => self.quick.swap(0, Ordering::Relaxed),
        };
        done
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
                self.unflushed.store(true, Ordering::SeqCst);
                taken.failed = written.err().map(Failure::from);
            }
            // A request that is refused may have any offset.
            taken.offset = taken.offset.wrapping_add(now as u64);
        }
    }
}
