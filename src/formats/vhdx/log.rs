//! The log of a VHDX: finding the entries that must still take effect, and giving them effect in
//! memory. [MS-VHDX] 2.3.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::guid::Guid;
use super::header::{Header, check_sum};
use super::overlay::{Overlay, UPDATE};
use crate::error::{Error, Result};
use crate::formats::fields::{self, Fields};
use crate::storage::Storage;

const SECTOR: u64 = UPDATE;
const ENTRY_HEADER: u64 = 64;
const DESCRIPTOR: u64 = 32;
/// A log this long is damage: Hyper-V and QEMU make logs of 1 MiB. Bounds what is kept in memory.
const MAX_LOG: u64 = 64 << 20;
/// How many times over the log's bytes are checked: bounds the time for entries made to overlap.
const MAX_PASSES: u64 = 8;

/// The file with its log replayed. `storage` itself when there is nothing to replay.
pub(super) fn replay(storage: Arc<dyn Storage>, header: &Header) -> Result<Arc<dyn Storage>> {
    if header.log_id == Guid(0) {
        return Ok(storage);
    }
    let (log, sequence) = Log::read(&storage, header)?;
    let mut overlay = Overlay::new(storage)?;
    for entry in &sequence {
        log.apply(entry, &mut overlay)?;
    }
    if let Some(head) = sequence.last() {
        overlay.extend(head.last);
    }
    Ok(Arc::new(overlay))
}

/// Gives the log effect in the file itself. The log stays in force: what is written here is written
/// again where this ends too early.
pub(super) fn write(storage: &Arc<dyn Storage>, header: &Header) -> Result<()> {
    let (log, sequence) = Log::read(storage, header)?;
    for entry in &sequence {
        for update in log.updates(entry, &log.ring(entry.at, entry.len))? {
            match update {
                Update::Zero { target, len } => storage.write_zeroes(target, len)?,
                Update::Data { target, bytes } => storage.write_all_at(target, &bytes)?,
            }
        }
    }
    if let Some(head) = sequence.last()
        && storage.len()? < head.last
    {
        storage.set_len(head.last)?;
    }
    storage.sync()
}

/// A ring of entries.
struct Log {
    bytes: Vec<u8>,
    /// Where it stands in the file.
    base: u64,
    id: Guid,
    /// Bytes whose checksum was computed.
    checked: u64,
    /// What stands at an offset, for those that were looked at.
    known: HashMap<u64, Option<Entry>>,
}

/// A whole entry's header. Offsets count from the log's beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    at: u64,
    len: u64,
    tail: u64,
    sequence: u64,
    descriptors: u64,
    /// The file is at least this long, or was cut off.
    flushed: u64,
    /// The file must become at least this long.
    last: u64,
}

impl Log {
    /// The log, and its entries that must take effect, oldest first.
    fn read(storage: &Arc<dyn Storage>, header: &Header) -> Result<(Log, Vec<Entry>)> {
        let (base, len) = header.log;
        if len > MAX_LOG {
            return Err(Error::unsupported(format!("a log of {len} bytes")).at_offset(base));
        }
        let bytes = fields::read(storage, base, len, "the log")?;
        let mut log = Log { bytes, base, id: header.log_id, checked: 0, known: HashMap::new() };
        let sequence = log.active()?;
        let file = storage.len()?;
        if let Some(head) = sequence.last() {
            if file < head.flushed {
                return Err(Error::corrupt(format!(
                    "the file was cut off: {file} bytes, and its log vouches for {}",
                    head.flushed
                ))
                .at_offset(base + head.at));
            }
            if head.last > i64::MAX as u64 {
                return Err(Error::corrupt("the log gives the file an impossible length")
                    .at_offset(base + head.at));
            }
        }
        Ok((log, sequence))
    }

    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// `len` bytes from `at`, which may run over the ring's end.
    fn ring(&self, at: u64, len: u64) -> Vec<u8> {
        let (_, later) = self.bytes.split_at_checked(at as usize).unwrap_or_default();
        let mut bytes = later.get(..len as usize).unwrap_or(later).to_vec();
        let over = len as usize - bytes.len();
        bytes.extend_from_slice(self.bytes.get(..over).unwrap_or_default());
        bytes
    }

    /// The newest complete sequence, oldest entry first: section 2.3.3.
    fn active(&mut self) -> Result<Vec<Entry>> {
        let mut active: Vec<Entry> = Vec::new();
        let mut tail = 0;
        // What follows an entry of an incomplete sequence is no more complete without it.
        let mut dead = HashSet::new();
        while tail < self.len() {
            if dead.contains(&tail) {
                tail += SECTOR;
                continue;
            }
            let sequence = self.sequence(tail)?;
            let newest = |s: &[Entry]| s.last().map_or(0, |entry| entry.sequence);
            let valid = sequence.last().and_then(|head| {
                // It begins with the entry that its head names as the oldest.
                sequence.iter().position(|entry| entry.at == head.tail)
            });
            match (valid, sequence.last()) {
                (Some(first), Some(head)) => {
                    let next = head.at + head.len;
                    if newest(&sequence) > newest(&active) {
                        active = sequence.get(first..).unwrap_or_default().to_vec();
                    }
                    // Over the ring's end, everything has been looked at.
                    if next <= tail || next >= self.len() {
                        break;
                    }
                    tail = next;
                }
                _ => {
                    dead.extend(sequence.iter().map(|entry| entry.at));
                    tail += SECTOR;
                }
            }
        }
        if active.is_empty() {
            return Err(Error::corrupt("the log is in use, but holds no complete entry")
                .at_offset(self.base));
        }
        Ok(active)
    }

    /// The entries from `tail` on, as far as each follows the one before.
    fn sequence(&mut self, tail: u64) -> Result<Vec<Entry>> {
        let mut sequence: Vec<Entry> = Vec::new();
        let (mut at, mut total) = (tail, 0);
        while let Some(entry) = self.entry(at)? {
            let follows = sequence
                .last()
                .is_none_or(|last| last.sequence.checked_add(1) == Some(entry.sequence));
            total += entry.len;
            if !follows || total > self.len() {
                break;
            }
            at = (at + entry.len) % self.len();
            sequence.push(entry);
        }
        Ok(sequence)
    }

    /// The entry at `at`, if a whole one stands there.
    fn entry(&mut self, at: u64) -> Result<Option<Entry>> {
        if let Some(known) = self.known.get(&at) {
            return Ok(known.clone());
        }
        let entry = self.parse(at)?;
        self.known.insert(at, entry.clone());
        Ok(entry)
    }

    fn parse(&mut self, at: u64) -> Result<Option<Entry>> {
        let head = self.ring(at, ENTRY_HEADER);
        let fields = Fields::new(&head, self.base + at);
        let entry = Entry {
            at,
            len: fields.le32(8)?.into(),
            tail: fields.le32(12)?.into(),
            sequence: fields.le64(16)?,
            descriptors: fields.le32(24)?.into(),
            flushed: fields.le64(48)?,
            last: fields.le64(56)?,
        };
        let plausible = fields.bytes(0, 4)? == b"loge"
            && Guid::from_bytes(fields.array(32)?) == self.id
            && entry.sequence != 0
            && entry.len != 0
            && entry.len.is_multiple_of(SECTOR)
            && entry.len <= self.len()
            && entry.tail.is_multiple_of(SECTOR)
            && entry.data() <= entry.len;
        if !plausible {
            return Ok(None);
        }
        self.checked += entry.len;
        if self.checked > self.len() * MAX_PASSES {
            return Err(Error::corrupt("the entries of the log overlap").at_offset(self.base + at));
        }
        let whole = self.ring(at, entry.len);
        let sound = check_sum(&whole, b"loge", at).is_ok() && self.updates(&entry, &whole).is_ok();
        Ok(sound.then_some(entry))
    }

    /// The entry's descriptors, each checked against the entry's sequence number.
    fn updates(&self, entry: &Entry, whole: &[u8]) -> Result<Vec<Update>> {
        let fields = Fields::new(whole, self.base + entry.at);
        let bad = |at: u64| {
            Error::corrupt("a descriptor of the log is damaged")
                .at_offset(self.base + entry.at + at)
        };
        let mut updates = Vec::new();
        let mut data = entry.data();
        for n in 0..entry.descriptors {
            let at = ENTRY_HEADER + n * DESCRIPTOR;
            let d = at as usize;
            let target = fields.le64(d + 16)?;
            if fields.le64(d + 24)? != entry.sequence || target % SECTOR != 0 {
                return Err(bad(at));
            }
            match fields.bytes(d, 4)? {
                b"zero" => {
                    let len = fields.le64(d + 8)?;
                    if len % SECTOR != 0 {
                        return Err(bad(at));
                    }
                    updates.push(Update::Zero { target, len });
                }
                b"desc" => {
                    let sector = fields.bytes(data as usize, SECTOR as usize)?;
                    let sector = Fields::new(sector, self.base + entry.at + data);
                    let high = u64::from(sector.le32(4)?) << 32;
                    if sector.bytes(0, 4)? != b"data"
                        || high | u64::from(sector.le32(4092)?) != entry.sequence
                    {
                        return Err(bad(data));
                    }
                    let mut bytes = fields.bytes(d + 8, 8)?.to_vec();
                    bytes.extend_from_slice(sector.bytes(8, 4084)?);
                    bytes.extend_from_slice(fields.bytes(d + 4, 4)?);
                    updates.push(Update::Data { target, bytes: bytes.into() });
                    data += SECTOR;
                }
                _ => return Err(bad(at)),
            }
        }
        if data > entry.len { Err(bad(0)) } else { Ok(updates) }
    }

    fn apply(&self, entry: &Entry, overlay: &mut Overlay) -> Result<()> {
        for update in self.updates(entry, &self.ring(entry.at, entry.len))? {
            match update {
                Update::Zero { target, len } => overlay.zero(target, len),
                Update::Data { target, bytes } => overlay.put(target, bytes),
            }
            .map_err(|e| e.at_offset(self.base + entry.at))?;
        }
        Ok(())
    }
}

impl Entry {
    /// Where the data sectors begin, behind the sectors with descriptors.
    fn data(&self) -> u64 {
        (ENTRY_HEADER + self.descriptors * DESCRIPTOR).next_multiple_of(SECTOR)
    }
}

enum Update {
    Zero { target: u64, len: u64 },
    Data { target: u64, bytes: Arc<[u8]> },
}
