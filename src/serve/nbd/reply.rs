//! Replies to requests, simple and in parts. It knows sockets, and no disk.

use std::io::{IoSlice, Write};

use super::export::Gone;
use crate::error::{Error, ErrorKind};
use crate::nbd::stream::write_all;
use crate::nbd::wire::{self, chunk, error};

/// The longest text of an error that is told, in bytes.
const MAX_TEXT: usize = 1024;

/// Why a request fails: the protocol's number, and words for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// One of [`error`].
    pub code: u32,
    /// What failed.
    pub text: String,
}

impl Failure {
    /// A failure with these words.
    pub fn new(code: u32, text: impl Into<String>) -> Failure {
        Failure { code, text: text.into() }
    }
}

impl From<Error> for Failure {
    /// Paths on this host are not the client's business.
    fn from(e: Error) -> Failure {
        let code = match e.kind() {
            ErrorKind::ReadOnly | ErrorKind::Sealed | ErrorKind::Denied => error::PERM,
            ErrorKind::NoSpace => error::NOSPC,
            ErrorKind::Invalid => error::INVAL,
            ErrorKind::Unsupported => error::NOTSUP,
            _ => error::IO,
        };
        Failure::new(code, e.message())
    }
}

/// A part of a reply.
#[derive(Debug, Clone, Copy)]
pub enum Part<'a> {
    /// Bytes of the disk, at least one, from an offset on.
    Data(u64, &'a [u8]),
    /// Zeroes, at least one, from an offset on.
    Hole(u64, u32),
    /// Stretches in a metadata context, at least one: their lengths and flags.
    Status(u32, &'a [(u32, u32)]),
}

/// Writes a reply without parts: success, or a failure. The bytes of a read follow.
pub fn simple(stream: &mut impl Write, cookie: u64, code: u32) -> Result<(), Gone> {
    Ok(stream.write_all(&simple_head(cookie, code))?)
}

/// Writes a reply without parts, and bytes of a read with it.
pub fn simple_data(stream: &mut impl Write, cookie: u64, data: &[u8]) -> Result<(), Gone> {
    write_both(stream, &simple_head(cookie, 0), data)
}

/// Writes more bytes of a read.
pub fn data(stream: &mut impl Write, data: &[u8]) -> Result<(), Gone> {
    Ok(stream.write_all(data)?)
}

fn simple_head(cookie: u64, code: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&wire::SIMPLE_REPLY.to_be_bytes());
    bytes[4..8].copy_from_slice(&code.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// Writes a part of a reply, the last one where `done`.
pub fn part(stream: &mut impl Write, cookie: u64, part: Part<'_>, done: bool) -> Result<(), Gone> {
    match part {
        Part::Data(offset, data) => {
            let head = head(cookie, chunk::DATA, data.len() + 8, done);
            write_both(stream, &[&head[..], &offset.to_be_bytes()].concat(), data)
        }
        Part::Hole(offset, len) => {
            let head = head(cookie, chunk::HOLE, 12, done);
            let bytes = [&head[..], &offset.to_be_bytes(), &len.to_be_bytes()].concat();
            Ok(stream.write_all(&bytes)?)
        }
        Part::Status(context, stretches) => {
            let mut bytes = context.to_be_bytes().to_vec();
            for (len, flags) in stretches {
                bytes.extend(len.to_be_bytes());
                bytes.extend(flags.to_be_bytes());
            }
            let head = head(cookie, chunk::BLOCK_STATUS, bytes.len(), done);
            write_both(stream, &head, &bytes)
        }
    }
}

/// Writes the end of a reply in parts: nothing is wrong.
pub fn end(stream: &mut impl Write, cookie: u64) -> Result<(), Gone> {
    Ok(stream.write_all(&head(cookie, chunk::NONE, 0, true))?)
}

/// Writes a failure as the last part of a reply.
pub fn failed(stream: &mut impl Write, cookie: u64, failure: &Failure) -> Result<(), Gone> {
    let end = failure.text.floor_char_boundary(MAX_TEXT);
    let text = &failure.text.as_bytes()[..end];
    let mut bytes = failure.code.to_be_bytes().to_vec();
    bytes.extend((text.len() as u16).to_be_bytes());
    bytes.extend(text);
    let head = head(cookie, chunk::ERROR, bytes.len(), true);
    write_both(stream, &head, &bytes)
}

fn head(cookie: u64, kind: u16, len: usize, done: bool) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..4].copy_from_slice(&wire::STRUCTURED_REPLY.to_be_bytes());
    bytes[4..6].copy_from_slice(&if done { chunk::DONE } else { 0 }.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    // Parts are pieces of what fits into memory: far below 4 GiB.
    bytes[16..].copy_from_slice(&(len as u32).to_be_bytes());
    bytes
}

/// Writes both, with one call where the socket takes it.
fn write_both(stream: &mut impl Write, head: &[u8], data: &[u8]) -> Result<(), Gone> {
    Ok(write_all(stream, &mut [IoSlice::new(head), IoSlice::new(data)])?)
}
