//! The bitmap directory: which bitmaps there are, and where their tables stand.
//!
//! It knows no bit of any bitmap. Specification: qcow2, "Bitmaps extension", "Bitmap directory".

use byteorder::{BigEndian, ByteOrder};

use crate::error::{Error, Result};
use crate::qcow2::extension::BITMAPS;
use crate::qcow2::header::{Header, autoclear};
use crate::storage::Storage;

/// The bitmap was not stored when its last writer stopped: its bits mean nothing.
pub(in crate::qcow2) const IN_USE: u32 = 1;
/// The bitmap is to be kept right by whoever writes to the disk.
pub(super) const AUTO: u32 = 1 << 1;
/// Extra data that is not understood does no harm.
const EXTRA_COMPATIBLE: u32 = 1 << 2;
/// The only type: dirty tracking.
pub(super) const DIRTY_TRACKING: u8 = 1;
/// The most bitmaps of an image.
pub(super) const MAX_BITMAPS: usize = 65535;
/// The longest name, in bytes.
pub(super) const MAX_NAME: usize = 1023;
/// The largest directory, in bytes.
const MAX_DIRECTORY: u64 = 64 << 20;
/// The most entries of all bitmaps' tables together: what they take in memory is bounded.
pub(super) const MAX_TABLES: u64 = 4 << 20;
/// Bytes of an entry before extra data and name.
const FIXED: usize = 24;
/// Bytes of the header extension.
const EXTENSION: usize = 24;

/// One bitmap, as the directory has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::qcow2) struct Entry {
    pub table_offset: u64,
    /// Entries of its table.
    pub table_size: u32,
    pub flags: u32,
    pub kind: u8,
    pub granularity_bits: u8,
    pub extra: Vec<u8>,
    pub name: Vec<u8>,
    /// Where in the file the entry stands.
    pub place: u64,
}

impl Entry {
    pub fn is(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    pub fn is_named(&self, name: &str) -> bool {
        self.name == name.as_bytes()
    }

    /// Where in the file its flags stand.
    pub fn flags_place(&self) -> u64 {
        self.place + 12
    }
}

/// Where the directory stands, and its length in bytes; `None` where no bitmap is valid.
pub(in crate::qcow2) fn place(header: &Header) -> Option<(u64, u64)> {
    let valid = header.version >= 3 && header.autoclear & autoclear::BITMAPS != 0;
    let data = header.extension(BITMAPS).filter(|data| valid && data.len() >= EXTENSION)?;
    Some((BigEndian::read_u64(&data[16..]), BigEndian::read_u64(&data[8..])))
}

/// Reads the directory. Bitmaps that other programs may have made stale are not in it.
pub(in crate::qcow2) fn read(storage: &dyn Storage, header: &Header) -> Result<Vec<Entry>> {
    let Some((offset, len)) = place(header) else { return Ok(Vec::new()) };
    let bad = |message: &str, at: u64| Err(Error::corrupt(message).at_offset(at));
    if len > MAX_DIRECTORY || offset.checked_add(len).is_none_or(|end| end > (1 << 56)) {
        return bad("the bitmap directory is too large", offset);
    }
    if offset + len > storage.len()? {
        return bad("the bitmap directory lies past the end of the file", offset);
    }
    let mut bytes = vec![0; len as usize];
    storage.read_exact_at(offset, &mut bytes)?;
    let mut entries = Vec::new();
    let (mut at, mut tables) = (0, 0);
    while at < bytes.len() {
        let place = offset + at as u64;
        let Some(fixed) = bytes.get(at..at + FIXED) else {
            return bad("a bitmap directory entry is cut short", place);
        };
        let extra = BigEndian::read_u32(&fixed[20..]) as usize;
        let name = usize::from(BigEndian::read_u16(&fixed[18..]));
        let rest = at + FIXED..(at + FIXED).saturating_add(extra).saturating_add(name);
        let Some(rest) = bytes.get(rest) else {
            return bad("a bitmap directory entry is cut short", place);
        };
        if name == 0 || name > MAX_NAME || entries.len() >= MAX_BITMAPS {
            return bad("a bitmap directory entry is not valid", place);
        }
        let entry = Entry {
            table_offset: BigEndian::read_u64(fixed),
            table_size: BigEndian::read_u32(&fixed[8..]),
            flags: BigEndian::read_u32(&fixed[12..]),
            kind: fixed[16],
            granularity_bits: fixed[17],
            extra: rest[..extra].to_vec(),
            name: rest[extra..].to_vec(),
            place,
        };
        let unknown = entry.flags & !(IN_USE | AUTO | EXTRA_COMPATIBLE) != 0
            || !entry.extra.is_empty() && !entry.is(EXTRA_COMPATIBLE)
            || entry.kind != DIRTY_TRACKING
            || !(9..=31).contains(&entry.granularity_bits);
        if unknown {
            let name = String::from_utf8_lossy(&entry.name);
            return bad(&format!("Bitmap '{name}' doesn't satisfy the constraints"), place);
        }
        tables += u64::from(entry.table_size);
        if tables > MAX_TABLES {
            return bad("the bitmaps' tables are too large", place);
        }
        entries.push(entry);
        at = (at + FIXED + extra + name).next_multiple_of(8);
    }
    Ok(entries)
}

/// The directory's bytes.
pub(in crate::qcow2) fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        let mut fixed = [0; FIXED];
        BigEndian::write_u64(&mut fixed, entry.table_offset);
        BigEndian::write_u32(&mut fixed[8..], entry.table_size);
        BigEndian::write_u32(&mut fixed[12..], entry.flags);
        (fixed[16], fixed[17]) = (entry.kind, entry.granularity_bits);
        BigEndian::write_u16(&mut fixed[18..], entry.name.len() as u16);
        BigEndian::write_u32(&mut fixed[20..], entry.extra.len() as u32);
        for bytes in [&fixed[..], &entry.extra, &entry.name] {
            out.extend_from_slice(bytes);
        }
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out
}

/// The header extension for a directory of `count` bitmaps.
pub(in crate::qcow2) fn extension(count: usize, offset: u64, len: u64) -> Vec<u8> {
    let mut data = vec![0; EXTENSION];
    BigEndian::write_u32(&mut data, count as u32);
    BigEndian::write_u64(&mut data[8..], len);
    BigEndian::write_u64(&mut data[16..], offset);
    data
}
