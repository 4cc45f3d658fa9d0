//! The log of a VHDX: finding the entries that must still take effect, and giving them effect in
//! memory. [MS-VHDX] 2.3.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::guid::{Guid, RawGuid};
use super::header::{Header, check_sum};
use super::overlay::{Overlay, UPDATE};
use crate::error::{Error, Result};
use crate::formats::fields;
use crate::storage::Storage;

/// What an entry begins with: section 2.3.1.1.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    signature: [u8; 4],
    checksum: U32,
    entry_length: U32,
    tail: U32,
    sequence_number: U64,
    descriptor_count: U32,
    reserved: U32,
    log_guid: RawGuid,
    flushed_file_offset: U64,
    last_file_offset: U64,
}

/// A zero descriptor or a data descriptor: sections 2.3.1.2 and 2.3.1.3.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawDescriptor {
    signature: [u8; 4],
    /// The last bytes of the data; nothing in a zero descriptor.
    trailing_bytes: [u8; 4],
    /// The first bytes of the data, or the length of the zeroes.
    leading_bytes: [u8; 8],
    file_offset: U64,
    sequence_number: U64,
}

/// The rest of the data of one descriptor: section 2.3.1.4.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawDataSector {
    signature: [u8; 4],
    sequence_high: U32,
    data: [u8; 4084],
    sequence_low: U32,
}

const SECTOR: u64 = UPDATE;
const ENTRY_HEADER: u64 = size_of::<RawEntry>() as u64;
const DESCRIPTOR: u64 = size_of::<RawDescriptor>() as u64;
const _: () = assert!(ENTRY_HEADER == 64 && DESCRIPTOR == 32);
const _: () = assert!(size_of::<RawDataSector>() as u64 == SECTOR);
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
        let raw: &RawEntry = fields::structure(&head, self.base + at)?;
        let entry = Entry {
            at,
            len: raw.entry_length.get().into(),
            tail: raw.tail.get().into(),
            sequence: raw.sequence_number.get(),
            descriptors: raw.descriptor_count.get().into(),
            flushed: raw.flushed_file_offset.get(),
            last: raw.last_file_offset.get(),
        };
        let plausible = raw.signature == *b"loge"
            && Guid::from(raw.log_guid) == self.id
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
        let base = self.base + entry.at;
        let bad = |at: u64| {
            Error::corrupt("a descriptor of the log is damaged")
                .at_offset(self.base + entry.at + at)
        };
        let mut updates = Vec::new();
        let mut data = entry.data();
        for n in 0..entry.descriptors {
            let at = ENTRY_HEADER + n * DESCRIPTOR;
            let raw: &RawDescriptor = fields::structure_at(whole, at as usize, base)?;
            let target = raw.file_offset.get();
            if raw.sequence_number != entry.sequence || !target.is_multiple_of(SECTOR) {
                return Err(bad(at));
            }
            match &raw.signature {
                b"zero" => {
                    let len = u64::from_le_bytes(raw.leading_bytes);
                    if !len.is_multiple_of(SECTOR) {
                        return Err(bad(at));
                    }
                    updates.push(Update::Zero { target, len });
                }
                b"desc" => {
                    let sector: &RawDataSector = fields::structure_at(whole, data as usize, base)?;
                    let (high, low) = (sector.sequence_high.get(), sector.sequence_low.get());
                    if sector.signature != *b"data"
                        || u64::from(high) << 32 | u64::from(low) != entry.sequence
                    {
                        return Err(bad(data));
                    }
                    let parts = [&raw.leading_bytes[..], &sector.data, &raw.trailing_bytes];
                    updates.push(Update::Data { target, bytes: parts.concat().into() });
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
