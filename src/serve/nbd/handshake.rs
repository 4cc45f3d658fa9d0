//! Agreeing with a client on an export, from the server's side: the fixed newstyle handshake.
//!
//! It reads a disk's properties, and none of its bytes. What was agreed on in plain may be another's
//! words: it is forgotten when TLS begins.

use std::io::{Read, Write};

use super::contexts::{Chosen, means};
use super::export::{Export, Gone, Tls};
use crate::nbd::stream::{Hasty, Plain};
use crate::nbd::tls::Side;
use crate::nbd::wire::{self, Fields, flag, option, reply};

/// The longest option that is read. Names have 4096 bytes at most, and queries are short.
const MAX_OPTION: u32 = 64 << 10;
/// The most options of one client.
const MAX_OPTIONS: usize = 1024;
/// The most bytes of one read or write, as it is told.
pub(super) const MAX_BLOCK: u32 = 32 << 20;
/// The largest unit that is told as the best one.
const MAX_PREFERRED: u32 = 1 << 20;
/// The least, which file systems use.
const MIN_PREFERRED: u32 = 4096;

/// What was agreed on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Terms {
    /// Replies have parts.
    pub structured: bool,
    /// The metadata contexts that were chosen.
    pub contexts: Chosen,
}

/// Haggles on a fresh connection. `None` where the client leaves in good order.
pub fn negotiate(stream: Hasty<'_>, export: &Export, tls: &Tls) -> Result<Option<Terms>, Gone> {
    let mut session = Session { stream, export, tls, terms: Terms::default(), no_zeroes: false };
    let greeting = [
        &wire::GREETING.to_be_bytes()[..],
        &wire::HAVE_OPTIONS.to_be_bytes(),
        &(wire::FIXED | wire::NO_ZEROES).to_be_bytes(),
    ];
    session.send(&greeting.concat())?;
    let flags = u32::from_be_bytes(session.receive()?);
    if flags & !u32::from(wire::FIXED | wire::NO_ZEROES) != 0 {
        return Err(Gone);
    }
    session.no_zeroes = flags & u32::from(wire::NO_ZEROES) != 0;
    let fixed = flags & u32::from(wire::FIXED) != 0;
    for _ in 0..MAX_OPTIONS {
        let head: [u8; 16] = session.receive()?;
        let mut fields = Fields(&head);
        let parts = (fields.u64(), fields.u32(), fields.u32());
        let (Some(wire::HAVE_OPTIONS), Some(number), Some(len)) = parts else { return Err(Gone) };
        // One that speaks no fixed newstyle understands no reply.
        if len > MAX_OPTION || !fixed && number != option::EXPORT_NAME {
            return Err(Gone);
        }
        let mut data = vec![0; len as usize];
        session.stream.read_exact(&mut data)?;
        match session.answer(number, &data)? {
            Next::Option => {}
            Next::Requests => return Ok(Some(session.terms)),
            Next::Nothing => return Ok(None),
        }
    }
    Err(Gone)
}

/// What follows an option.
enum Next {
    Option,
    Requests,
    Nothing,
}

struct Session<'a> {
    stream: Hasty<'a>,
    export: &'a Export,
    tls: &'a Tls,
    terms: Terms,
    no_zeroes: bool,
}

impl Session<'_> {
    fn send(&mut self, bytes: &[u8]) -> Result<(), Gone> {
        Ok(self.stream.write_all(bytes)?)
    }

    fn receive<const N: usize>(&mut self) -> Result<[u8; N], Gone> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn reply(&mut self, number: u32, code: u32, data: &[u8]) -> Result<Next, Gone> {
        self.send(&wire::option_reply_bytes(number, code, data))?;
        Ok(Next::Option)
    }

    fn refuse(&mut self, number: u32, code: u32, why: &str) -> Result<Next, Gone> {
        self.reply(number, code, why.as_bytes())
    }

    fn answer(&mut self, number: u32, data: &[u8]) -> Result<Next, Gone> {
        let is_plain = matches!(self.tls, Tls::Required(_)) && !self.stream.is_secure();
        match number {
            // To this one there is no refusal but the end.
            option::EXPORT_NAME if is_plain => Err(Gone),
            number if is_plain && !matches!(number, option::ABORT | option::STARTTLS) => {
                self.refuse(number, reply::TLS, "this server asks for TLS first")
            }
            option::STARTTLS => self.start_tls(data),
            option::EXPORT_NAME => self.export_name(data),
            option::ABORT => {
                // The client need not wait for that.
                let _ = self.reply(number, reply::ACK, &[]);
                Ok(Next::Nothing)
            }
            option::LIST | option::STRUCTURED_REPLY if !data.is_empty() => {
                self.refuse(number, reply::INVALID, "this option has no data")
            }
            option::LIST => {
                let name = wire::counted(&self.export.name);
                self.reply(number, reply::SERVER, &name)?;
                self.reply(number, reply::ACK, &[])
            }
            option::STRUCTURED_REPLY => {
                self.terms.structured = true;
                self.reply(number, reply::ACK, &[])
            }
            option::INFO | option::GO => self.tell(number, data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(number, data),
            _ => self.refuse(number, reply::UNSUPPORTED, "this option is not known here"),
        }
    }

    fn start_tls(&mut self, data: &[u8]) -> Result<Next, Gone> {
        let number = option::STARTTLS;
        let (Tls::Offered(own) | Tls::Required(own)) = self.tls else {
            return self.refuse(number, reply::POLICY, "this server has no TLS");
        };
        if self.stream.is_secure() {
            return self.refuse(number, reply::INVALID, "TLS has begun already");
        }
        if !data.is_empty() {
            return self.refuse(number, reply::INVALID, "this option has no data");
        }
        self.reply(number, reply::ACK, &[])?;
        self.stream.secure(Side::Server(own.config()))?;
        self.terms = Terms::default();
        Ok(Next::Option)
    }

    fn is_ours(&self, name: &[u8]) -> bool {
        name == self.export.name.as_bytes()
    }

    fn flags(&self) -> u16 {
        let common = flag::HAS_FLAGS | flag::FLUSH | flag::FUA | flag::MULTI_CONN | flag::CACHE;
        let writing = match self.export.device.read_only() {
            true => flag::READ_ONLY,
            false => flag::TRIM | flag::WRITE_ZEROES,
        };
        common | writing | if self.terms.structured { flag::DF } else { 0 }
    }

    /// The old way, to which there is no refusal but the end.
    fn export_name(&mut self, name: &[u8]) -> Result<Next, Gone> {
        if !self.is_ours(name) {
            return Err(Gone);
        }
        let mut bytes = self.export.device.size().to_be_bytes().to_vec();
        bytes.extend(self.flags().to_be_bytes());
        if !self.no_zeroes {
            bytes.extend([0; 124]);
        }
        self.send(&bytes)?;
        Ok(Next::Requests)
    }

    fn unknown(&mut self, number: u32) -> Result<Next, Gone> {
        let text = match self.export.name.as_str() {
            "" => "there is no export of that name: the only one has no name".to_owned(),
            name => format!("there is no export of that name: the only one is '{name}'"),
        };
        self.refuse(number, reply::UNKNOWN, &text)
    }

    /// Tells about the export, and with [`option::GO`] gives it.
    fn tell(&mut self, number: u32, data: &[u8]) -> Result<Next, Gone> {
        let Some((name, wanted)) = export_and_infos(data) else {
            return self.refuse(number, reply::INVALID, "this option is not well-formed");
        };
        if !self.is_ours(name) {
            return self.unknown(number);
        }
        let info = |kind: u16, rest: &[u8]| [&kind.to_be_bytes()[..], rest].concat();
        let size = self.export.device.size().to_be_bytes();
        let known = [&size[..], &self.flags().to_be_bytes()].concat();
        self.reply(number, reply::INFO, &info(wire::INFO_EXPORT, &known))?;
        let preferred = self.export.device.block_size().clamp(MIN_PREFERRED, MAX_PREFERRED);
        let sizes = [1, preferred, MAX_BLOCK].map(u32::to_be_bytes).concat();
        self.reply(number, reply::INFO, &info(wire::INFO_BLOCK_SIZE, &sizes))?;
        let texts = [
            (wire::INFO_NAME, &self.export.name),
            (wire::INFO_DESCRIPTION, &self.export.description),
        ];
        for (kind, text) in texts {
            if wanted.contains(&kind) {
                self.reply(number, reply::INFO, &info(kind, text.as_bytes()))?;
            }
        }
        self.reply(number, reply::ACK, &[])?;
        Ok(if number == option::GO { Next::Requests } else { Next::Option })
    }

    /// Lists metadata contexts, or chooses among them.
    fn contexts(&mut self, number: u32, data: &[u8]) -> Result<Next, Gone> {
        let choosing = number == option::SET_META_CONTEXT;
        if choosing {
            self.terms.contexts = Chosen::default();
        }
        if !self.terms.structured {
            let text = "metadata contexts need structured replies, which come first";
            return self.refuse(number, reply::INVALID, text);
        }
        let Some((name, queries)) = export_and_queries(data) else {
            return self.refuse(number, reply::INVALID, "this option is not well-formed");
        };
        if !self.is_ours(name) {
            return self.unknown(number);
        }
        for (id, context) in self.export.contexts.all() {
            // Who lists and asks for nothing is told of all.
            let asked = queries.iter().any(|query| means(query, &context, !choosing));
            if !asked && (choosing || !queries.is_empty()) {
                continue;
            }
            if choosing {
                self.terms.contexts.add(id);
            }
            let context = [&id.to_be_bytes()[..], context.as_bytes()].concat();
            self.reply(number, reply::META_CONTEXT, &context)?;
        }
        self.reply(number, reply::ACK, &[])
    }
}

/// An export's name, and what is wanted to be known of it.
fn export_and_infos(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.counted()?;
    let count = fields.u16()?;
    let wanted: Vec<u16> = (0..count).map_while(|_| fields.u16()).collect();
    (wanted.len() == usize::from(count) && fields.rest().is_empty()).then_some((name, wanted))
}

/// An export's name, and queries for metadata contexts.
fn export_and_queries(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut fields = Fields(data);
    let name = fields.counted()?;
    let count = fields.u32()?;
    let mut queries = Vec::new();
    // Each has four bytes at least: the option's length bounds their number.
    for _ in 0..count {
        queries.push(fields.counted()?);
    }
    fields.rest().is_empty().then_some((name, queries))
}
