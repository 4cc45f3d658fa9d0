//! The bitmap directory: which bitmaps there are, and where their tables stand.
//!
//! It knows no bit of any bitmap. Specification: qcow2, "Bitmaps extension", "Bitmap directory".

use std::mem::offset_of;

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, Result};
use crate::qcow2::header::extension::BITMAPS;
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

/// An entry as it stands in the file, before its extra data and name.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(in crate::qcow2) struct Fixed {
    pub bitmap_table_offset: U64,
    pub bitmap_table_size: U32,
    flags: U32,
    bitmap_type: u8,
    granularity_bits: u8,
    name_size: U16,
    extra_data_size: U32,
}

/// The header extension.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Extension {
    nb_bitmaps: U32,
    reserved: U32,
    bitmap_directory_size: U64,
    bitmap_directory_offset: U64,
}

/// Bytes of an entry before extra data and name.
const FIXED: usize = size_of::<Fixed>();
const _: () = assert!(FIXED == 24 && size_of::<Extension>() == 24);

impl Fixed {
    /// The fixed part of the entry at the beginning of `bytes`, and the bytes of the whole entry without
    /// padding; `None` where not even that is there.
    pub fn read(bytes: &[u8]) -> Option<(&Fixed, usize)> {
        let (fixed, _) = Fixed::ref_from_prefix(bytes).ok()?;
        let len = FIXED.saturating_add(fixed.extra()).saturating_add(fixed.name());
        Some((fixed, len))
    }

    fn extra(&self) -> usize {
        self.extra_data_size.get() as usize
    }

    fn name(&self) -> usize {
        self.name_size.get().into()
    }
}

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
        self.place + offset_of!(Fixed, flags) as u64
    }
}

/// Where the directory stands, and its length in bytes; `None` where no bitmap is valid.
pub(in crate::qcow2) fn place(header: &Header) -> Option<(u64, u64)> {
    let valid = header.version >= 3 && header.autoclear & autoclear::BITMAPS != 0;
    recorded(header).filter(|_| valid)
}

/// The same, whether or not it is valid; `None` where none is recorded.
pub(in crate::qcow2) fn recorded(header: &Header) -> Option<(u64, u64)> {
    let (found, _) = Extension::ref_from_prefix(header.extension(BITMAPS)?).ok()?;
    Some((found.bitmap_directory_offset.get(), found.bitmap_directory_size.get()))
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
        let here = bytes.get(at..).unwrap_or_default();
        let found = Fixed::read(here);
        let Some((fixed, len, names)) =
            found.and_then(|(fixed, len)| Some((fixed, len, here.get(FIXED..len)?)))
        else {
            return bad("a bitmap directory entry is cut short", place);
        };
        let (extra, name) = (fixed.extra(), fixed.name());
        if name == 0 || name > MAX_NAME || entries.len() >= MAX_BITMAPS {
            return bad("a bitmap directory entry is not valid", place);
        }
        let entry = Entry {
            table_offset: fixed.bitmap_table_offset.get(),
            table_size: fixed.bitmap_table_size.get(),
            flags: fixed.flags.get(),
            kind: fixed.bitmap_type,
            granularity_bits: fixed.granularity_bits,
            extra: names[..extra].to_vec(),
            name: names[extra..].to_vec(),
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
        at = (at + len).next_multiple_of(8);
    }
    Ok(entries)
}

/// The directory's bytes.
pub(in crate::qcow2) fn encode<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        let fixed = Fixed {
            bitmap_table_offset: entry.table_offset.into(),
            bitmap_table_size: entry.table_size.into(),
            flags: entry.flags.into(),
            bitmap_type: entry.kind,
            granularity_bits: entry.granularity_bits,
            name_size: (entry.name.len() as u16).into(),
            extra_data_size: (entry.extra.len() as u32).into(),
        };
        for bytes in [fixed.as_bytes(), &entry.extra, &entry.name] {
            out.extend_from_slice(bytes);
        }
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out
}

/// The header extension for a directory of `count` bitmaps.
pub(in crate::qcow2) fn extension(count: usize, offset: u64, len: u64) -> Vec<u8> {
    let extension = Extension {
        nb_bitmaps: (count as u32).into(),
        reserved: 0.into(),
        bitmap_directory_size: len.into(),
        bitmap_directory_offset: offset.into(),
    };
    extension.as_bytes().to_vec()
}
