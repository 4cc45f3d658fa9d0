//! An open export: requests to a server, one at a time, cut and aligned as the server needs them.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Target;
use super::handshake::{self, Export, send_all};
use super::replies::{self, Wanted};
use super::stream::{Hasty, Stream};
use super::wire::{self, Request, command, flag};
use crate::addr::Unit;
use crate::block::{check_range, total, total_mut, window, window_mut};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;

/// How long a server may take until all is agreed on.
const HANDSHAKE: Duration = Duration::from_secs(30);
/// How long it may take to answer a request: to flush can take a slow disk minutes.
const REPLY: Duration = Duration::from_secs(600);
/// Bytes that are zeroed or asked about at once.
const MAX_RANGE: u64 = 1 << 30;
/// Zeroes that are written at once where a server cannot be told to.
const ZEROES: u64 = 1 << 20;

/// The context of QEMU's servers that tells depths: 0 for nothing, 1 for their first layer.
const DEPTH: &str = "qemu:allocation-depth";

/// What a server says about a stretch of its export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// Bytes that are alike.
    pub len: u64,
    /// Bytes are stored for it; in another context than `base:allocation`: its first flag is clear.
    pub stored: bool,
    /// It reads as zeroes; in another context: its second flag is set.
    pub zero: bool,
}

/// An export of a server, for many threads at once.
pub struct Client {
    export: Export,
    unit: Unit,
    /// Whether the context tells how deep in its chain the server finds what it has.
    tells_depth: bool,
    connection: Mutex<Connection>,
    /// What the server last said of its stretches; forgotten when anything is written.
    known: Mutex<Known>,
    /// Held while a part of a block is written, which the rest of it is read for.
    blocks: Mutex<()>,
}

struct Connection {
    stream: Stream,
    cookie: u64,
    /// What was said is not understood: nothing that follows can be.
    broken: bool,
}

/// Stretches, lengths and flags, from an offset on without gaps.
#[derive(Default)]
struct Known {
    start: u64,
    stretches: VecDeque<(u64, u32)>,
}

impl Known {
    /// The bytes from `at` on that are alike, and their flags.
    fn find(&mut self, at: u64) -> Option<(u64, u32)> {
        let mut skip = at.checked_sub(self.start)?;
        while let Some((len, flags)) = self.stretches.front().copied() {
            if skip < len {
                return Some((len - skip, flags));
            }
            self.stretches.pop_front();
            self.start += len;
            skip -= len;
        }
        None
    }
}

impl Client {
    /// Connects to `target`.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`] where the export is to be written and cannot be; [`ErrorKind::Denied`]
    /// where the server, or this client, is not the one that it should be.
    pub fn connect(target: &Target, write: bool) -> Result<Client> {
        let side = target.side()?;
        let stream = target.address.connect()?;
        let no_timeout = |e| Error::io("the socket takes no timeout", e);
        let export = handshake::negotiate(&mut Hasty::new(&stream, HANDSHAKE), target, side)?;
        stream.set_patience(Some(REPLY)).map_err(no_timeout)?;
        if write && export.flags & flag::READ_ONLY != 0 {
            // The words are the host's for what is not permitted, as other clients say it.
            let message = "Could not open image: Permission denied";
            return Err(Error::new(ErrorKind::ReadOnly, message));
        }
        let unit = Unit::from_bytes(u64::from(export.min_block)).unwrap_or(Unit::from_bits(0));
        Ok(Client {
            export,
            unit,
            tells_depth: target.context.as_deref() == Some(DEPTH),
            connection: Mutex::new(Connection { stream, cookie: 0, broken: false }),
            known: Mutex::default(),
            blocks: Mutex::new(()),
        })
    }

    /// The export's size in bytes.
    pub fn size(&self) -> u64 {
        self.export.size
    }

    /// The stretch at `at`, at most `len` bytes, which is not 0; the range is within the export.
    pub fn stretch(&self, at: u64, len: u64) -> Result<Stretch> {
        check_range(at, len, self.size())?;
        let Some(context) = self.export.context else {
            return Ok(Stretch { len, stored: true, zero: false });
        };
        let mut known = lock(&self.known);
        let (size, flags) = match known.find(at) {
            Some(found) => found,
            None => {
                *known = self.ask(context, at, len)?;
                known.find(at).ok_or_else(|| Error::corrupt("block status of something else"))?
            }
        };
        Ok(Stretch {
            len: size.min(len),
            stored: flags & wire::STATE_HOLE == 0,
            zero: flags & wire::STATE_ZERO != 0,
        })
    }

    /// What the server says of the stretches from `at` on.
    fn ask(&self, context: u32, at: u64, len: u64) -> Result<Known> {
        let start = self.unit.floor(at);
        let len = (self.unit.ceil(at + len) - start).min(MAX_RANGE);
        let mut found = Vec::new();
        let request = request(command::BLOCK_STATUS, 0, start, len);
        self.exchange(request, &[], Wanted::Stretches(context, &mut found))?;
        let mut known = Known { start, ..Known::default() };
        let mut left = self.size() - start;
        for (len, flags) in found {
            let len = u64::from(len).min(left);
            left -= len;
            // All depths below the first one count as one, which fits the flags of other contexts.
            let flags = if self.tells_depth { flags.min(2) } else { flags };
            match known.stretches.back_mut() {
                Some(last) if last.1 == flags => last.0 += len,
                _ if len > 0 => known.stretches.push_back((len, flags)),
                _ => {}
            }
        }
        Ok(known)
    }

    /// Sends a request with its bytes and waits for the reply.
    fn exchange(
        &self,
        mut request: Request,
        bufs: &[IoSlice<'_>],
        wanted: Wanted<'_>,
    ) -> Result<()> {
        let mut connection = lock(&self.connection);
        if connection.broken {
            return Err(Error::new(ErrorKind::Io, "the connection to the server was lost"));
        }
        connection.cookie += 1;
        request.cookie = connection.cookie;
        let mut stream = &connection.stream;
        let sent = send_all(&mut stream, &request.encode(), bufs);
        let structured = self.export.structured;
        match sent.and_then(|()| replies::read(&mut stream, request.cookie, structured, wanted)) {
            Ok(done) => done.map_err(|e| e.at_offset(request.offset)),
            Err(e) => {
                connection.broken = true;
                Err(e)
            }
        }
    }

    /// Bytes of one read or write: a multiple of the least unit.
    fn step(&self) -> u64 {
        self.unit.floor(u64::from(self.export.max_block)).max(self.unit.bytes())
    }

    fn read_whole(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let request = request(command::READ, 0, at, buf.len() as u64);
        self.exchange(request, &[], Wanted::Bytes(at, buf))
    }

    fn write_whole(&self, at: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.exchange(request(command::WRITE, 0, at, total(bufs)), bufs, Wanted::Done)
    }

    /// Writes bytes that are a part of one block.
    fn write_part(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let _alone = lock(&self.blocks);
        let start = self.unit.floor(at);
        let mut whole = vec![0; self.unit.bytes() as usize];
        self.read_whole(start, &mut whole)?;
        let skip = (at - start) as usize;
        whole[skip..skip + bytes.len()].copy_from_slice(bytes);
        self.write_whole(start, &[IoSlice::new(&whole)])
    }

    fn zero(&self, at: u64, len: u64, flags: u16) -> Result<()> {
        check_range(at, len, self.size())?;
        let (start, end) = (self.unit.ceil(at), self.unit.floor(at + len));
        if self.export.flags & flag::WRITE_ZEROES == 0 || start >= end {
            return self.zero_bytes(at, len);
        }
        self.zero_bytes(at, start - at)?;
        let mut from = start;
        while from < end {
            let now = (end - from).min(MAX_RANGE);
            let request = request(command::WRITE_ZEROES, flags, from, now);
            self.exchange(request, &[], Wanted::Done)?;
            from += now;
        }
        self.forget();
        self.zero_bytes(end, at + len - end)
    }

    fn zero_bytes(&self, at: u64, len: u64) -> Result<()> {
        let zeroes = vec![0; len.min(ZEROES) as usize];
        let mut done = 0;
        while done < len {
            let part = &zeroes[..(len - done).min(ZEROES) as usize];
            self.write_at(at + done, &[IoSlice::new(part)])?;
            done += part.len() as u64;
        }
        Ok(())
    }

    /// What was said of stretches holds no more.
    fn forget(&self) {
        *lock(&self.known) = Known::default();
    }
}

fn request(command: u16, flags: u16, offset: u64, len: u64) -> Request {
    // Callers cut what they ask for to less than 4 GiB.
    Request { flags, command, cookie: 0, offset, len: len as u32 }
}

impl Drop for Client {
    fn drop(&mut self) {
        let connection = self.connection.get_mut().unwrap_or_else(PoisonError::into_inner);
        let goodbye = request(command::DISCONNECT, 0, 0, 0);
        // The server notices either way.
        let _ = send_all(&mut &connection.stream, &goodbye.encode(), &[]);
        connection.stream.close();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Storage for Client {
    fn len(&self) -> Result<u64> {
        Ok(self.size())
    }

    /// An export keeps its size: one that is to be shorter keeps what lies behind.
    fn set_len(&self, len: u64) -> Result<()> {
        if len > self.size() {
            return Err(Error::new(ErrorKind::NoSpace, "Cannot grow NBD nodes"));
        }
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        true
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let len = total_mut(bufs);
        check_range(offset, len, self.size())?;
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let start = self.unit.floor(at);
            let now = (len - done).min(self.step() - (at - start));
            let end = self.unit.ceil(at + now);
            let mut parts = window_mut(bufs, done, now);
            if let ([one], true) = (&mut parts[..], (start, end) == (at, at + now)) {
                self.read_whole(at, one)?;
            } else {
                let mut whole = vec![0; (end - start) as usize];
                self.read_whole(start, &mut whole)?;
                let mut from = &whole[(at - start) as usize..];
                for part in &mut parts {
                    let (here, rest) = from.split_at(part.len());
                    part.copy_from_slice(here);
                    from = rest;
                }
            }
            done += now;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        let len = total(bufs);
        check_range(offset, len, self.size())?;
        let mut done = 0;
        while done < len {
            let (at, left) = (offset + done, len - done);
            let whole = self.unit.floor(left.min(self.step()));
            done += if self.unit.aligned(at) && whole > 0 {
                self.write_whole(at, &window(bufs, done, whole))?;
                whole
            } else {
                let part = left.min(self.unit.ceil(at + 1) - at);
                let bytes: Vec<u8> =
                    window(bufs, done, part).iter().flat_map(|b| b.iter().copied()).collect();
                self.write_part(at, &bytes)?;
                part
            };
        }
        self.forget();
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.zero(offset, len.min(self.size().saturating_sub(offset)), 0)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.zero(offset, len, wire::NO_HOLE)
    }

    fn sync(&self) -> Result<()> {
        if self.export.flags & flag::FLUSH == 0 {
            return Ok(());
        }
        self.exchange(request(command::FLUSH, 0, 0, 0), &[], Wanted::Done)
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        let mut at = offset;
        while at < self.size() {
            let stretch = self.stretch(at, self.size() - at)?;
            if !stretch.zero {
                return Ok(Some((at, at + stretch.len)));
            }
            at += stretch.len;
        }
        Ok(None)
    }
}
