//! A tar stream, one file after the other: ustar, PAX and GNU headers, sparse files in all their forms.
//!
//! Knows no disk and no image. What comes in was made by somebody else: what is kept in memory is bounded, and no
//! number is believed.

use std::io::Read;

use tar_core::parse::{Limits, ParseEvent, ParsedEntry, Parser};
use tar_core::{EntryType, PaxExtensions};

use crate::error::{Error, ErrorKind, Result};

const BLOCK: usize = 512;
/// Bytes of headers that one file may have.
const MAX_HEADERS: usize = 4 << 20;
const XATTR: &[u8] = b"SCHILY.xattr.";

/// What kind of file an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file; its contents follow.
    File,
    /// A directory.
    Directory,
    /// A symbolic link to that.
    Symlink(Vec<u8>),
    /// Another name of a file of the archive, or of what it is put on.
    Link(Vec<u8>),
    /// A character device, by its numbers.
    Character(u32, u32),
    /// A block device, by its numbers.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// A file in the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its path, as it stands there.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permissions.
    pub mode: u16,
    /// Its owner's number.
    pub uid: u32,
    /// Its group's number.
    pub gid: u32,
    /// When it was changed: seconds and nanoseconds since 1970.
    pub modified: (i64, u32),
    /// Its size in bytes, holes included.
    pub size: u64,
    /// Extended attributes.
    pub attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A stretch of a file's contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    offset: u64,
    len: u64,
}

/// A tar stream.
pub struct Archive<R> {
    input: R,
    parser: Parser,
    /// What was read of headers and not used yet.
    ahead: Vec<u8>,
    /// Bytes of the last entry in the stream that were not taken, with what fills its last block.
    left: u64,
    /// What of the last entry's contents is in the stream, where it is not all.
    stretches: Option<Vec<Stretch>>,
    size: u64,
    /// Bytes of the stream that were taken so far.
    at: u64,
}

fn damaged(what: impl std::fmt::Display) -> Error {
    Error::corrupt(format!("the archive is damaged: {what}"))
}

impl<R: Read> Archive<R> {
    /// The archive that is read from `input`.
    pub fn new(input: R) -> Archive<R> {
        let limits = Limits {
            max_metadata_size: MAX_HEADERS as u32 / 2,
            max_path_len: Some(libc::PATH_MAX as u32),
            ..Limits::default()
        };
        let mut parser = Parser::new(limits);
        // It takes a time before 1970 for an error; times are read here. Of other numbers that are none, those of the
        // header proper count, as with other programs.
        parser.set_ignore_pax_errors(true);
        Archive { input, parser, ahead: Vec::new(), left: 0, stretches: None, size: 0, at: 0 }
    }

    /// Where in the stream the contents of the file that was found last stand, in bytes from its begin; of a sparse
    /// file, its first stretch.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// The next file; what was not read of the one before is passed over. `None` at the end.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where this is no tar, or ends too early.
    pub fn next(&mut self) -> Result<Option<Entry>> {
        self.skip(self.left)?;
        self.left = 0;
        loop {
            match self.parser.parse(&self.ahead).map_err(damaged)? {
                ParseEvent::NeedData { min_bytes } => {
                    let have = self.ahead.len();
                    if min_bytes > MAX_HEADERS {
                        return Err(damaged("the headers of a file are too long"));
                    }
                    // Some programs end an archive without the blocks of zeroes.
                    if !self.fill(min_bytes.max(have + 1).next_multiple_of(BLOCK))? && have == 0 {
                        return Ok(None);
                    }
                }
                ParseEvent::End { .. } => return Ok(None),
                ParseEvent::GlobalExtensions { consumed, .. } => {
                    self.ahead.drain(..consumed);
                }
                ParseEvent::Entry { consumed, entry } => {
                    let (stored, done) = (entry.size, resolve(&entry, entry.size)?);
                    self.ahead.drain(..consumed);
                    if let Some(found) = self.begin(done, stored, None)? {
                        return Ok(Some(found));
                    }
                }
                ParseEvent::SparseEntry { consumed, entry, sparse_map, real_size } => {
                    let map =
                        sparse_map.iter().map(|s| Stretch { offset: s.offset, len: s.length });
                    let map = map.collect();
                    let (stored, done) = (entry.size, resolve(&entry, real_size)?);
                    self.ahead.drain(..consumed);
                    if let Some(found) = self.begin(done, stored, Some(map))? {
                        return Ok(Some(found));
                    }
                }
            }
        }
    }

    /// An entry of which `stored` bytes stand in the stream; `None` for one that is no file.
    fn begin(
        &mut self,
        entry: Option<Entry>,
        stored: u64,
        map: Option<Vec<Stretch>>,
    ) -> Result<Option<Entry>> {
        if !self.ahead.is_empty() {
            return Err(damaged("a header is followed by none"));
        }
        let padded = stored.checked_next_multiple_of(BLOCK as u64);
        self.left = padded.ok_or_else(|| damaged("a size is not believable"))?;
        let Some(entry) = entry else {
            self.skip(self.left)?;
            self.left = 0;
            return Ok(None);
        };
        let fits = map.as_ref().is_none_or(|map| {
            let sum = map.iter().try_fold(0u64, |sum, s| sum.checked_add(s.len));
            let mut at = 0;
            let ordered = map.iter().all(|s| {
                let fine = s.offset >= at && s.offset.checked_add(s.len).is_some();
                at = s.offset.saturating_add(s.len);
                fine
            });
            ordered && at <= entry.size && sum.is_some_and(|sum| sum <= stored)
        });
        if !fits {
            return Err(damaged("the map of a sparse file is not believable"));
        }
        (self.stretches, self.size) = (map, if entry.kind == Kind::File { stored } else { 0 });
        Ok(Some(entry))
    }

    /// Gives the contents of the file that was found last to `take`, a piece and its offset at a time; what is
    /// left out reads as zeroes.
    pub fn contents(&mut self, mut take: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let whole = vec![Stretch { offset: 0, len: self.size }];
        let stretches = self.stretches.take().unwrap_or(whole);
        let mut buffer = vec![0; 256 << 10];
        for Stretch { mut offset, mut len } in stretches {
            while len > 0 {
                let piece = buffer.len().min(usize::try_from(len).unwrap_or(usize::MAX));
                let piece = buffer.get_mut(..piece).unwrap_or_default();
                self.input.read_exact(piece).map_err(failed)?;
                self.at += piece.len() as u64;
                self.left = self.left.saturating_sub(piece.len() as u64);
                take(offset, piece)?;
                offset += piece.len() as u64;
                len -= piece.len() as u64;
            }
        }
        self.size = 0;
        Ok(())
    }

    /// What comes behind the archive's end is read, too: digests speak for all of it.
    pub fn finish(mut self) -> Result<()> {
        std::io::copy(&mut self.input, &mut std::io::sink()).map(drop).map_err(failed)
    }

    /// Reads headers until `want` bytes are there; `false` where the stream ends before.
    fn fill(&mut self, want: usize) -> Result<bool> {
        let have = self.ahead.len();
        self.ahead.resize(want.max(have), 0);
        let mut at = have;
        while at < want {
            let rest = self.ahead.get_mut(at..want).unwrap_or_default();
            match self.input.read(rest) {
                Ok(0) if at == 0 => {
                    self.ahead.clear();
                    return Ok(false);
                }
                Ok(0) => return Err(damaged("it ends in a header")),
                Ok(read) => {
                    at += read;
                    self.at += read as u64;
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(failed(e)),
            }
        }
        Ok(true)
    }

    fn skip(&mut self, len: u64) -> Result<()> {
        let skipped = std::io::copy(&mut self.input.by_ref().take(len), &mut std::io::sink());
        match skipped.map_err(failed)? {
            all if all == len => {
                self.at += len;
                Ok(())
            }
            _ => Err(damaged("it ends in a file")),
        }
    }
}

fn failed(error: std::io::Error) -> Error {
    let text = format!("the archive could not be read: {error}");
    match error.kind() {
        std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof => Error::corrupt(text),
        _ => Error::io("the archive could not be read", error),
    }
}

/// What a header says; `None` for what is no file.
fn resolve(entry: &ParsedEntry<'_>, size: u64) -> Result<Option<Entry>> {
    let path = String::from_utf8_lossy(&entry.path).into_owned();
    let at = |error: Error| Error::new(error.kind(), format!("{path}: {}", error.message()));
    let target = || match &entry.link_target {
        Some(target) if !target.is_empty() => Ok(target.to_vec()),
        _ => Err(at(damaged("a link leads nowhere"))),
    };
    let device = || (entry.dev_major.unwrap_or(0), entry.dev_minor.unwrap_or(0));
    let kind = match entry.entry_type {
        EntryType::Regular | EntryType::Continuous | EntryType::GnuSparse => {
            // Before POSIX a name with a slash at its end was a directory.
            if entry.path.ends_with(b"/") { Kind::Directory } else { Kind::File }
        }
        EntryType::Directory => Kind::Directory,
        EntryType::Symlink => Kind::Symlink(target()?),
        EntryType::Link => Kind::Link(target()?),
        EntryType::Char => Kind::Character(device().0, device().1),
        EntryType::Block => Kind::Block(device().0, device().1),
        EntryType::Fifo => Kind::Fifo,
        EntryType::Other(_) if entry.header.entry_type().as_byte() == b'V' => return Ok(None),
        other => {
            let text = format!("{path}: entries of type {other:?} are not known");
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
    };
    let number = |value: u64| {
        u32::try_from(value).map_err(|_| at(damaged(format!("the owner {value} is none"))))
    };
    let (attributes, modified) = extensions(entry).map_err(at)?;
    Ok(Some(Entry {
        path: entry.path.to_vec(),
        mode: (entry.mode & 0o7777) as u16,
        uid: number(entry.uid)?,
        gid: number(entry.gid)?,
        modified: modified.unwrap_or((i64::try_from(entry.mtime).unwrap_or(0), 0)),
        size: if kind == Kind::File { size } else { 0 },
        kind,
        attributes,
    }))
}

type Attributes = Vec<(Vec<u8>, Vec<u8>)>;

/// Attributes, and the time with its fraction, from the records that PAX has for them.
fn extensions(entry: &ParsedEntry<'_>) -> Result<(Attributes, Option<(i64, u32)>)> {
    let (mut attributes, mut modified) = (Vec::new(), None);
    for record in PaxExtensions::new(entry.pax.unwrap_or_default()) {
        let record = record.map_err(damaged)?;
        if let Some(name) = record.key_bytes().strip_prefix(XATTR) {
            attributes.push((name.to_vec(), record.value_bytes().to_vec()));
        } else if record.key_bytes() == b"mtime" {
            modified = moment(record.value_bytes());
        }
    }
    Ok((attributes, modified))
}

/// `1700000000.5`, or before 1970 `-1.25`: the fraction counts away from 0.
fn moment(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    match whole.starts_with('-') && nanoseconds > 0 {
        true => Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds)),
        false => Some((seconds, nanoseconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_before_1970_have_fractions_too() {
        assert_eq!(moment(b"12"), Some((12, 0)));
        assert_eq!(moment(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(moment(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(moment(b"-0.000000001"), Some((-1, 999_999_999)));
        assert_eq!(moment(b"12.1234567899"), Some((12, 123_456_789)));
        assert_eq!(moment(b"x"), None);
        assert_eq!(moment(b"1.x"), None);
    }

    #[test]
    fn what_is_no_archive_is_an_error_and_an_empty_stream_is_empty() {
        assert!(Archive::new(&[1u8; 2048][..]).next().is_err());
        assert!(Archive::new(&[1u8; 100][..]).next().is_err());
        assert!(Archive::new(&[][..]).next().unwrap().is_none());
        assert!(Archive::new(&[0u8; 1024][..]).next().unwrap().is_none());
    }
}
