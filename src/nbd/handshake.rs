//! Agreeing with a server on an export: the fixed newstyle handshake.

use std::io::{self, IoSlice, Read, Write};

use super::Target;
use super::stream::{Plain, write_all};
use super::tls::{self, Side};
use super::wire::{self, Fields, option, reply};
use crate::error::{Error, ErrorKind, Result};

/// The longest reply to an option that is read.
const MAX_REPLY: u32 = 64 << 10;
/// The longest name of an export.
const MAX_NAME: usize = 4096;
/// The most replies to one option.
const MAX_REPLIES: usize = 4096;
/// Bytes of one read or write, unless the server wants less.
const MAX_BLOCK: u32 = 32 << 20;
/// The largest least unit of requests.
const MAX_UNIT: u32 = 64 << 10;
/// The context that says where there is data.
const ALLOCATION: &str = "base:allocation";

/// What was agreed on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Export {
    /// Its size in bytes.
    pub size: u64,
    /// What it can: [`wire::flag`].
    pub flags: u16,
    /// The least unit of requests, in bytes.
    pub min_block: u32,
    /// The most bytes that are read or written at once.
    pub max_block: u32,
    /// Replies have parts.
    pub structured: bool,
    /// The number of the metadata context, where the server knows it.
    pub context: Option<u32>,
}

/// Haggles on a fresh connection, with TLS before all else where `side` says so.
///
/// # Errors
/// [`ErrorKind::NotFound`] where there is no such export; [`ErrorKind::Unsupported`] for what this
/// client does not speak; [`ErrorKind::Corrupt`] for what no server may say; [`ErrorKind::Denied`]
/// where one end does not prove who it is.
pub fn negotiate(stream: &mut impl Plain, target: &Target, side: Option<Side>) -> Result<Export> {
    let name = target.export.as_deref().unwrap_or_default();
    if name.len() > MAX_NAME {
        return Err(Error::invalid("export name too long to send to server"));
    }
    let greeting = u64::from_be_bytes(number(stream)?);
    if greeting != wire::GREETING {
        return Err(Error::corrupt(format!("Bad initial magic received: 0x{greeting:016x}")));
    }
    if u64::from_be_bytes(number(stream)?) != wire::HAVE_OPTIONS {
        let message = "Server speaks the protocol without options, which is not supported";
        return Err(Error::unsupported(message));
    }
    let answer = u16::from_be_bytes(number(stream)?) & (wire::FIXED | wire::NO_ZEROES);
    send(stream, &u32::from(answer).to_be_bytes())?;
    let mut session = Session { stream, no_zeroes: answer & wire::NO_ZEROES != 0 };
    if let Some(side) = side {
        session.start_tls(answer & wire::FIXED != 0, side)?;
    }
    let mut export = Export { min_block: 1, max_block: MAX_BLOCK, ..Export::default() };
    if answer & wire::FIXED != 0 {
        export.structured = session.ask(option::STRUCTURED_REPLY, &[], |_, _| Ok(()))?.is_ok();
        if export.structured {
            let context = target.context.as_deref().unwrap_or(ALLOCATION);
            export.context = session.context(name, context)?;
        }
        if session.go(name, &mut export)? {
            return checked(export, target);
        }
    }
    session.export_name(name, &mut export)?;
    checked(export, target)
}

fn checked(export: Export, target: &Target) -> Result<Export> {
    if i64::try_from(export.size).is_err() {
        return Err(Error::corrupt(format!("an export of {} bytes", export.size)));
    }
    let fits = export.min_block.is_power_of_two() && export.min_block <= MAX_UNIT;
    if !fits || export.max_block < export.min_block {
        return Err(Error::corrupt(format!(
            "blocks of {} to {} bytes are no block sizes",
            export.min_block, export.max_block
        )));
    }
    if !export.size.is_multiple_of(u64::from(export.min_block)) {
        return Err(Error::corrupt(format!(
            "export length {} is not multiple of minimum block size {}",
            export.size, export.min_block
        )));
    }
    if target.context.is_some() && export.context.is_none() {
        // The words are the host's for a bad argument, as other clients say it.
        return Err(Error::invalid("Could not open image: Invalid argument"));
    }
    Ok(export)
}

/// A server's refusal of an option.
struct Refused {
    code: u32,
    said: String,
}

impl Refused {
    fn error(&self, number: u32) -> Error {
        let option = format!("option {number} ({})", option::name(number));
        let (kind, text) = match self.code {
            reply::UNKNOWN => (ErrorKind::NotFound, "Requested export not available".to_owned()),
            reply::POLICY => (ErrorKind::Denied, format!("Denied by server for {option}")),
            reply::INVALID => (ErrorKind::Invalid, format!("Invalid parameters for {option}")),
            reply::PLATFORM => {
                (ErrorKind::Unsupported, format!("Server lacks support for {option}"))
            }
            reply::TLS => {
                let text = format!("TLS negotiation required before {option}");
                (ErrorKind::Unsupported, text + "\nDid you forget a valid tls-creds?")
            }
            reply::SHUTDOWN => (ErrorKind::Io, format!("Server shutting down before {option}")),
            reply::BLOCK_SIZE => {
                (ErrorKind::Unsupported, format!("Server requires INFO_BLOCK_SIZE for {option}"))
            }
            code => (
                ErrorKind::Unsupported,
                format!("Unknown error code {code:#x} when asking for {option}"),
            ),
        };
        let said = match self.said.as_str() {
            "" => String::new(),
            said => format!("\nserver reported: {said}"),
        };
        Error::new(kind, text + &said)
    }
}

struct Session<'a, S> {
    stream: &'a mut S,
    no_zeroes: bool,
}

impl<S: Plain> Session<'_, S> {
    /// Begins TLS. Nothing was said before that, so that nothing of what others may have said counts.
    fn start_tls(&mut self, is_fixed: bool, side: Side) -> Result<()> {
        let without = || Error::unsupported("Server does not support the option 5 (starttls)");
        if !is_fixed {
            return Err(without());
        }
        let only = |_, _: &[u8]| Err(Error::corrupt("Unexpected reply to 'starttls'"));
        match self.ask(option::STARTTLS, &[], only)? {
            Ok(()) => self.stream.secure(side).map_err(lost),
            Err(refused) if refused.code == reply::UNSUPPORTED => Err(without()),
            Err(refused) => Err(refused.error(option::STARTTLS)),
        }
    }

    /// Sends an option and hands its replies to `each`, up to the last one.
    fn ask(
        &mut self,
        option: u32,
        data: &[u8],
        mut each: impl FnMut(u32, &[u8]) -> Result<()>,
    ) -> Result<std::result::Result<(), Refused>> {
        self.send_option(option, data)?;
        for _ in 0..MAX_REPLIES {
            let head: [u8; 20] = number(self.stream)?;
            let mut fields = Fields(&head);
            let parts = (fields.u64(), fields.u32(), fields.u32(), fields.u32());
            let (Some(magic), Some(about), Some(code), Some(len)) = parts else {
                return Err(short());
            };
            if magic != wire::OPTION_REPLY || about != option {
                return Err(Error::corrupt("Unexpected option reply"));
            }
            if len > MAX_REPLY {
                return Err(Error::corrupt(format!(
                    "server replied with {len} bytes to an option"
                )));
            }
            let mut bytes = vec![0; len as usize];
            receive(self.stream, &mut bytes)?;
            match code {
                reply::ACK => return Ok(Ok(())),
                code if code & reply::ERROR != 0 => {
                    let said = String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned();
                    return Ok(Err(Refused { code, said }));
                }
                code => each(code, &bytes)?,
            }
        }
        Err(Error::corrupt("server does not come to an end of its replies to an option"))
    }

    /// A server that hangs up may have said why.
    fn send_option(&mut self, option: u32, data: &[u8]) -> Result<()> {
        send(self.stream, &wire::option_bytes(option, data)).map_err(|e| {
            match self.stream.read(&mut [0; 1]).map_err(lost) {
                Err(said) if said.kind() == ErrorKind::Denied => said,
                _ => e,
            }
        })
    }

    /// Asks for the metadata context `wanted`; its number, where the server knows it.
    fn context(&mut self, export: &str, wanted: &str) -> Result<Option<u32>> {
        let queries = [&1u32.to_be_bytes()[..], &wire::counted(wanted)].concat();
        let data = [wire::counted(export), queries].concat();
        let mut found = None;
        let asked = self.ask(option::SET_META_CONTEXT, &data, |code, bytes| {
            let mut fields = Fields(bytes);
            let number = fields.u32().filter(|_| code == reply::META_CONTEXT);
            let number = number.ok_or_else(|| Error::corrupt("Unexpected reply for a context"))?;
            if fields.rest() == wanted.as_bytes() {
                found = Some(number);
            }
            Ok(())
        })?;
        // A server without contexts refuses; everything counts as data then.
        Ok(found.filter(|_| asked.is_ok()))
    }

    /// Asks for the export; `false` where the server does not know how to answer that.
    fn go(&mut self, name: &str, export: &mut Export) -> Result<bool> {
        let mut data = wire::counted(name);
        data.extend(1u16.to_be_bytes());
        data.extend(wire::INFO_BLOCK_SIZE.to_be_bytes());
        let mut known = false;
        let asked = self.ask(option::GO, &data, |code, bytes| {
            if code != reply::INFO {
                return Err(Error::corrupt(format!("Unexpected reply type {code:#x} to 'go'")));
            }
            let mut fields = Fields(bytes);
            match fields.u16().ok_or_else(short)? {
                wire::INFO_EXPORT => {
                    export.size = fields.u64().ok_or_else(short)?;
                    export.flags = fields.u16().ok_or_else(short)?;
                    known = true;
                }
                wire::INFO_BLOCK_SIZE => {
                    export.min_block = fields.u32().ok_or_else(short)?;
                    fields.u32().ok_or_else(short)?;
                    export.max_block = fields.u32().ok_or_else(short)?.min(MAX_BLOCK);
                }
                _ => {}
            }
            Ok(())
        })?;
        match asked {
            Ok(()) if known => Ok(true),
            Ok(()) => Err(Error::corrupt("server did not say the export's size")),
            Err(refused) if refused.code == reply::UNSUPPORTED => Ok(false),
            Err(refused) => Err(refused.error(option::GO)),
        }
    }

    /// Asks for the export the old way, to which there is no refusal but the end.
    fn export_name(&mut self, name: &str, export: &mut Export) -> Result<()> {
        self.send_option(option::EXPORT_NAME, name.as_bytes())?;
        let bytes: [u8; 10] = number(self.stream)?;
        let mut fields = Fields(&bytes);
        export.size = fields.u64().ok_or_else(short)?;
        export.flags = fields.u16().ok_or_else(short)?;
        if !self.no_zeroes {
            number::<124>(self.stream)?;
        }
        Ok(())
    }
}

fn short() -> Error {
    Error::corrupt("the server sent less than belongs to what it says")
}

/// Writes all of `bytes`.
fn send(stream: &mut impl Write, bytes: &[u8]) -> Result<()> {
    stream.write_all(bytes).map_err(lost)
}

/// Writes all of `head` and `bufs`, with one call where the socket takes it.
pub(super) fn send_all(stream: &mut impl Write, head: &[u8], bufs: &[IoSlice<'_>]) -> Result<()> {
    let mut all: Vec<IoSlice<'_>> =
        [head].into_iter().chain(bufs.iter().map(|b| &**b)).map(IoSlice::new).collect();
    write_all(stream, &mut all).map_err(lost)
}

/// Fills `bytes`.
pub(super) fn receive(stream: &mut impl Read, bytes: &mut [u8]) -> Result<()> {
    stream.read_exact(bytes).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => Error::new(
            ErrorKind::Io,
            "Failed to read data: Unexpected end-of-file before all data were read",
        ),
        _ => lost(e),
    })
}

/// Why nothing can be said or heard any more.
fn lost(e: io::Error) -> Error {
    if let Some(text) = tls::words(&e) {
        return Error::new(ErrorKind::Denied, text);
    }
    match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => silent(),
        _ => Error::io("the connection to the server was lost", e),
    }
}

fn silent() -> Error {
    Error::new(ErrorKind::Io, "the server does not answer")
}

fn number<const N: usize>(stream: &mut impl Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    receive(stream, &mut bytes)?;
    Ok(bytes)
}
