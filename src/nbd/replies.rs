//! What servers answer to requests: simple replies, and structured ones in parts.

use std::io::Read;

use super::handshake::receive;
use super::wire::{self, Fields, chunk};
use crate::error::{Error, Result};

/// The longest list of stretches, or text of an error, that is read.
const MAX_PAYLOAD: u32 = 1 << 20;
/// The most parts of one reply: no server needs more.
const MAX_PARTS: u64 = 1 << 20;

/// What a request is about, and where its answer goes.
pub enum Wanted<'a> {
    /// Only whether it was done.
    Done,
    /// Bytes from an offset on.
    Bytes(u64, &'a mut [u8]),
    /// The stretches of a context, by its number: lengths and flags.
    Stretches(u32, &'a mut Vec<(u32, u32)>),
}

/// Reads the reply to the request with `cookie`.
///
/// # Errors
/// What the server reports carries the host's error number and leaves the connection as good as it
/// was: the inner result. The outer one is a connection that is of no use any more.
pub fn read(
    stream: &mut impl Read,
    cookie: u64,
    structured: bool,
    mut wanted: Wanted<'_>,
) -> Result<Result<()>> {
    let mut failed: Option<Error> = None;
    let mut missing = match &wanted {
        Wanted::Bytes(_, bytes) => bytes.len() as u64,
        _ => 0,
    };
    for _ in 0..MAX_PARTS {
        let mut magic = [0; 4];
        receive(stream, &mut magic)?;
        match u32::from_be_bytes(magic) {
            wire::SIMPLE_REPLY => return simple(stream, cookie, structured, wanted),
            wire::STRUCTURED_REPLY if structured => {}
            other => return Err(Error::corrupt(format!("a reply that begins with {other:#x}"))),
        }
        let head = Head::read(stream, cookie)?;
        match head.kind {
            chunk::NONE if head.len == 0 && head.is_last() => {}
            chunk::DATA | chunk::HOLE => {
                let len = bytes_part(stream, &head, &mut wanted)?;
                let left = missing.checked_sub(len);
                missing = left.ok_or_else(|| Error::corrupt("more bytes than were asked for"))?;
            }
            chunk::BLOCK_STATUS => stretches_part(stream, &head, &mut wanted)?,
            kind if kind >= chunk::ERRORS => {
                let error = error_part(stream, &head)?;
                failed.get_or_insert(error);
            }
            kind => return Err(Error::corrupt(format!("a part of type {kind} in a reply"))),
        }
        if !head.is_last() {
            continue;
        }
        return match (failed, &wanted) {
            (Some(error), _) => Ok(Err(error)),
            (None, Wanted::Stretches(_, found)) if found.is_empty() => {
                Err(Error::corrupt("no block status in the reply to a request for it"))
            }
            (None, _) if missing > 0 => Err(Error::corrupt("fewer bytes than were asked for")),
            (None, _) => Ok(Ok(())),
        };
    }
    Err(Error::corrupt("a reply in too many parts"))
}

fn simple(
    stream: &mut impl Read,
    cookie: u64,
    structured: bool,
    wanted: Wanted<'_>,
) -> Result<Result<()>> {
    let mut rest = [0; 12];
    receive(stream, &mut rest)?;
    let mut fields = Fields(&rest);
    let (Some(code), Some(about)) = (fields.u32(), fields.u64()) else { return Err(short()) };
    if about != cookie {
        return Err(Error::corrupt("a reply to another request"));
    }
    if code != 0 {
        return Ok(Err(reported(code, "the server failed")));
    }
    match wanted {
        Wanted::Done => {}
        Wanted::Bytes(_, bytes) if !structured => receive(stream, bytes)?,
        Wanted::Bytes(..) => return Err(Error::corrupt("a simple reply to a read")),
        Wanted::Stretches(..) => {
            return Err(Error::corrupt("a simple reply to a request for block status"));
        }
    }
    Ok(Ok(()))
}

/// What each part of a structured reply begins with, behind the magic.
struct Head {
    flags: u16,
    kind: u16,
    len: u32,
}

impl Head {
    fn read(stream: &mut impl Read, cookie: u64) -> Result<Head> {
        let mut bytes = [0; 16];
        receive(stream, &mut bytes)?;
        let mut fields = Fields(&bytes);
        let parts = (fields.u16(), fields.u16(), fields.u64(), fields.u32());
        let (Some(flags), Some(kind), Some(about), Some(len)) = parts else {
            return Err(short());
        };
        if about != cookie {
            return Err(Error::corrupt("a reply to another request"));
        }
        Ok(Head { flags, kind, len })
    }

    fn is_last(&self) -> bool {
        self.flags & chunk::DONE != 0
    }
}

/// Takes a part with bytes, or a hole; returns how many bytes of the answer it was.
fn bytes_part(stream: &mut impl Read, head: &Head, wanted: &mut Wanted<'_>) -> Result<u64> {
    let Wanted::Bytes(start, bytes) = wanted else {
        return Err(Error::corrupt("bytes in the reply to a request for none"));
    };
    let is_hole = head.kind == chunk::HOLE;
    if head.len < 9 || (is_hole && head.len != 12) {
        return Err(Error::corrupt(format!("a part of {} bytes in a reply", head.len)));
    }
    let mut begin = [0; 12];
    let begin = &mut begin[..if is_hole { 12 } else { 8 }];
    receive(stream, begin)?;
    let mut fields = Fields(begin);
    let at = fields.u64().and_then(|at| at.checked_sub(*start));
    let len = if is_hole { fields.u32().unwrap_or(0) } else { head.len - 8 };
    let place = at
        .and_then(|at| usize::try_from(at).ok())
        .and_then(|at| bytes.get_mut(at..at.checked_add(len as usize)?))
        .filter(|place| !place.is_empty());
    let place = place.ok_or_else(|| Error::corrupt("bytes that were not asked for"))?;
    if is_hole {
        place.fill(0);
    } else {
        receive(stream, place)?;
    }
    Ok(u64::from(len))
}

fn stretches_part(stream: &mut impl Read, head: &Head, wanted: &mut Wanted<'_>) -> Result<()> {
    let Wanted::Stretches(context, found) = wanted else {
        return Err(Error::corrupt("block status in the reply to another request"));
    };
    let payload = payload(stream, head)?;
    let mut fields = Fields(&payload);
    if fields.u32() != Some(*context) || !found.is_empty() || payload.len() % 8 != 4 {
        return Err(Error::corrupt("block status that was not asked for"));
    }
    while let (Some(len), Some(flags)) = (fields.u32(), fields.u32()) {
        if len == 0 {
            return Err(Error::corrupt("block status of no bytes"));
        }
        found.push((len, flags));
    }
    Ok(())
}

fn error_part(stream: &mut impl Read, head: &Head) -> Result<Error> {
    let payload = payload(stream, head)?;
    let mut fields = Fields(&payload);
    let (Some(code), Some(len)) = (fields.u32(), fields.u16()) else { return Err(short()) };
    let text = fields.rest();
    let text = text.get(..usize::from(len)).ok_or_else(short)?;
    let text = String::from_utf8_lossy(text);
    Ok(reported(code, if text.is_empty() { "the server failed" } else { &text }))
}

fn payload(stream: &mut impl Read, head: &Head) -> Result<Vec<u8>> {
    if head.len > MAX_PAYLOAD {
        return Err(Error::corrupt(format!("a part of {} bytes in a reply", head.len)));
    }
    let mut bytes = vec![0; head.len as usize];
    receive(stream, &mut bytes)?;
    Ok(bytes)
}

fn reported(code: u32, text: &str) -> Error {
    Error::io(text, std::io::Error::from_raw_os_error(wire::errno(code)))
}

fn short() -> Error {
    Error::corrupt("the server sent less than belongs to what it says")
}
