//! The protocol's numbers, and how they stand in bytes: big-endian, without padding. It knows no
//! socket and no state.

/// What a server greets with.
pub const GREETING: u64 = 0x4e42_444d_4147_4943;
/// What follows where options can be haggled over; also begins each option.
pub const HAVE_OPTIONS: u64 = 0x4948_4156_454f_5054;
/// What begins each reply to an option.
pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

/// Flag of the handshake, both ways: unknown options are refused, not answered by hanging up.
pub const FIXED: u16 = 1;
/// Flag of the handshake, both ways: no 124 zeroes at its end.
pub const NO_ZEROES: u16 = 1 << 1;

/// Options.
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;

    /// An option's name.
    pub fn name(number: u32) -> &'static str {
        match number {
            EXPORT_NAME => "export name",
            ABORT => "abort",
            LIST => "list",
            STARTTLS => "starttls",
            INFO => "info",
            GO => "go",
            STRUCTURED_REPLY => "structured reply",
            LIST_META_CONTEXT => "list meta context",
            SET_META_CONTEXT => "set meta context",
            _ => "<unknown>",
        }
    }
}

/// Replies to options.
pub mod reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    /// The bit that all errors have.
    pub const ERROR: u32 = 1 << 31;
    pub const UNSUPPORTED: u32 = ERROR + 1;
    pub const POLICY: u32 = ERROR + 2;
    pub const INVALID: u32 = ERROR + 3;
    pub const PLATFORM: u32 = ERROR + 4;
    pub const TLS: u32 = ERROR + 5;
    pub const UNKNOWN: u32 = ERROR + 6;
    pub const SHUTDOWN: u32 = ERROR + 7;
    pub const BLOCK_SIZE: u32 = ERROR + 8;
}

/// Information about an export: its size and flags.
pub const INFO_EXPORT: u16 = 0;
/// Information about an export: its name.
pub const INFO_NAME: u16 = 1;
/// Information about an export: words for people.
pub const INFO_DESCRIPTION: u16 = 2;
/// Information about an export: the units of requests.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Flags of an export.
pub mod flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const FLUSH: u16 = 1 << 2;
    pub const FUA: u16 = 1 << 3;
    pub const TRIM: u16 = 1 << 5;
    pub const WRITE_ZEROES: u16 = 1 << 6;
    /// Reads can be asked for in one part.
    pub const DF: u16 = 1 << 7;
    /// A flush on one connection covers what was answered on all of them.
    pub const MULTI_CONN: u16 = 1 << 8;
    pub const CACHE: u16 = 1 << 10;
}

/// Requests.
pub mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISCONNECT: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flag of any request: answer it when what it wrote is durable.
pub const FUA: u16 = 1;
/// Flag of a request to write zeroes: keep the space.
pub const NO_HOLE: u16 = 1 << 1;
/// Flag of a read: answer it in one part.
pub const DF: u16 = 1 << 2;
/// Flag of a request for block status: one stretch is enough.
pub const REQ_ONE: u16 = 1 << 3;

const REQUEST: u32 = 0x2560_9513;
/// What begins a reply without parts.
pub const SIMPLE_REPLY: u32 = 0x6744_6698;
/// What begins each part of a structured reply.
pub const STRUCTURED_REPLY: u32 = 0x668e_33ef;

/// Parts of structured replies.
pub mod chunk {
    /// Flag: the last part.
    pub const DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const DATA: u16 = 1;
    pub const HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    /// All types from this on are errors.
    pub const ERRORS: u16 = 1 << 15;
    pub const ERROR: u16 = ERRORS + 1;
}

/// Flag of a stretch in the context `base:allocation`: nothing is stored. In other contexts: marked.
pub const STATE_HOLE: u32 = 1;
/// Flag of a stretch in the context `base:allocation`: it reads as zeroes.
pub const STATE_ZERO: u32 = 1 << 1;

/// Bytes of a [`Request`].
pub const REQUEST_LEN: usize = 28;

/// A request to a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub len: u32,
}

impl Request {
    /// Its bytes.
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut bytes = [0; REQUEST_LEN];
        bytes[..4].copy_from_slice(&REQUEST.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }

    /// The request in these bytes; `None` where they begin as none does.
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Option<Request> {
        let mut fields = Fields(bytes);
        (fields.u32()? == REQUEST).then_some(())?;
        Some(Request {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            len: fields.u32()?,
        })
    }
}

/// The bytes of a reply to an option.
pub fn option_reply_bytes(option: u32, code: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(20 + data.len());
    bytes.extend(OPTION_REPLY.to_be_bytes());
    bytes.extend(option.to_be_bytes());
    bytes.extend(code.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The bytes of an option.
pub fn option_bytes(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16 + data.len());
    bytes.extend(HAVE_OPTIONS.to_be_bytes());
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// A text with its length before it.
pub fn counted(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

/// Numbers out of bytes, one after the other.
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (now, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*now)
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_be_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }

    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (now, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(now)
    }

    /// Bytes with their length before them, as [`counted`] puts them.
    pub fn counted(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()?;
        self.bytes(usize::try_from(len).ok()?)
    }

    /// What is left.
    pub fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// The protocol's error numbers.
pub mod error {
    pub const PERM: u32 = 1;
    pub const IO: u32 = 5;
    pub const NOMEM: u32 = 12;
    pub const INVAL: u32 = 22;
    pub const NOSPC: u32 = 28;
    pub const OVERFLOW: u32 = 75;
    pub const NOTSUP: u32 = 95;
    pub const SHUTDOWN: u32 = 108;
}

/// The host's error number for one of the protocol's.
pub fn errno(number: u32) -> i32 {
    use nix::libc;
    match number {
        error::PERM => libc::EPERM,
        error::IO => libc::EIO,
        error::NOMEM => libc::ENOMEM,
        error::NOSPC => libc::ENOSPC,
        error::OVERFLOW => libc::EOVERFLOW,
        error::NOTSUP => libc::EOPNOTSUPP,
        error::SHUTDOWN => libc::ESHUTDOWN,
        _ => libc::EINVAL,
    }
}
