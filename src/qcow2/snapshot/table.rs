//! The table of internal snapshots: its bytes, and the limits on them.
//!
//! What this engine does not know in an entry is kept byte for byte. It knows no L2 table and no
//! refcount. Specification: qcow2, "Snapshots".

use std::borrow::Cow;
use std::mem::offset_of;

use nix::libc::EFBIG;
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, Result};
use crate::qcow2::header::{Header, MAX_SNAPSHOTS};
use crate::storage::Storage;

/// The largest snapshot table, in bytes.
const MAX_TABLE: u64 = 64 << 20;
/// The most extra data that an entry may have, in bytes.
const MAX_EXTRA: u32 = 1024;

/// An entry as it stands in the file, before its extra data, id and name.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Fixed {
    l1_table_offset: U64,
    l1_size: U32,
    id_str_size: U16,
    name_size: U16,
    date_sec: U32,
    date_nsec: U32,
    vm_clock_nsec: U64,
    vm_state_size: U32,
    extra_data_size: U32,
}

/// The extra data that this engine knows.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Extra {
    vm_state_size: U64,
    disk_size: U64,
    icount: U64,
}

/// Bytes of an entry before its extra data.
const FIXED: usize = size_of::<Fixed>();
/// Bytes of the extra data that this engine knows.
const KNOWN: usize = size_of::<Extra>();
const _: () = assert!(FIXED == 40 && KNOWN == 24);

/// The extra data that version 3 demands: all but the icount.
const V3_EXTRA: u32 = 16;
/// What stands for "no icount".
const NO_ICOUNT: u64 = u64::MAX;

/// One internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Host offset of its L1 table.
    pub l1_offset: u64,
    /// Entries of its L1 table.
    pub l1_size: u32,
    pub(super) id: Vec<u8>,
    pub(super) name: Vec<u8>,
    /// When it was taken: seconds since 1970.
    pub seconds: u32,
    /// When it was taken: nanoseconds of the second.
    pub nanoseconds: u32,
    /// How long the guest had been running, in nanoseconds.
    pub vm_clock: u64,
    /// Bytes of VM state, stored past the disk's end; 0 for none.
    pub vm_state_size: u64,
    /// The disk's size in bytes when it was taken; `None` in short entries of version 2, where it
    /// is the image's.
    pub disk_size: Option<u64>,
    /// Instructions that the guest had executed, where they were counted.
    pub icount: Option<u64>,
    /// Bytes of extra data in the file.
    pub(super) extra_len: u32,
    /// Extra data that this engine does not know.
    pub(super) unknown: Vec<u8>,
}

impl Snapshot {
    /// The id: unique in the image, a number as QEMU makes them. It ends at the first zero byte.
    pub fn id(&self) -> Cow<'_, str> {
        text(&self.id)
    }

    /// The name: not always unique, and possibly empty. It ends at the first zero byte.
    pub fn name(&self) -> Cow<'_, str> {
        text(&self.name)
    }

    /// Whether the entry lacks extra data that version 3 demands.
    pub fn is_incomplete(&self) -> bool {
        self.extra_len < V3_EXTRA
    }

    /// Bytes of the entry in the file, without padding.
    fn len(&self) -> u64 {
        FIXED as u64 + u64::from(self.extra_len) + (self.id.len() + self.name.len()) as u64
    }

    /// The entry with all extra data, padded to 8 bytes.
    fn encode(&self) -> Vec<u8> {
        let fixed = Fixed {
            l1_table_offset: self.l1_offset.into(),
            l1_size: self.l1_size.into(),
            id_str_size: (self.id.len() as u16).into(),
            name_size: (self.name.len() as u16).into(),
            date_sec: self.seconds.into(),
            date_nsec: self.nanoseconds.into(),
            vm_clock_nsec: self.vm_clock.into(),
            vm_state_size: u32::try_from(self.vm_state_size).unwrap_or(0).into(),
            extra_data_size: ((KNOWN + self.unknown.len()) as u32).into(),
        };
        let extra = Extra {
            vm_state_size: self.vm_state_size.into(),
            disk_size: self.disk_size.unwrap_or(0).into(),
            icount: self.icount.unwrap_or(NO_ICOUNT).into(),
        };
        let mut out = Vec::new();
        for bytes in [fixed.as_bytes(), extra.as_bytes(), &self.unknown, &self.id, &self.name] {
            out.extend_from_slice(bytes);
        }
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }
}

/// The snapshots, and the bytes that their table takes in the file.
#[derive(Debug, Clone, Default)]
pub(in crate::qcow2) struct Table {
    pub snapshots: Vec<Snapshot>,
    pub len: u64,
    /// What had to be left out to make sense of the table; empty unless that was allowed.
    pub discarded: Vec<String>,
    /// Entries that lost extra data.
    pub shortened: u64,
    /// Snapshots at the end that were left out.
    pub overhanging: u64,
}

impl Table {
    /// Reads the table.
    pub fn read(storage: &dyn Storage, header: &Header) -> Result<Table> {
        Table::read_with(storage, header, false)
    }

    /// Reads the table; leaves out what is over the limits, and says so.
    pub fn read_mending(storage: &dyn Storage, header: &Header) -> Result<Table> {
        Table::read_with(storage, header, true)
    }

    fn read_with(storage: &dyn Storage, header: &Header, mend: bool) -> Result<Table> {
        let mut table = Table::default();
        let mut count = header.snapshots;
        if count > MAX_SNAPSHOTS {
            if !mend {
                return Err(too_big("Snapshot table too large"));
            }
            let over = count - MAX_SNAPSHOTS;
            table.discarded.push(format!("Discarding {over} overhanging snapshots"));
            table.overhanging = over.into();
            count = MAX_SNAPSHOTS;
        }
        // What is left out does not count.
        let mut kept: u64 = 0;
        for index in 0..count {
            let start = table.len.next_multiple_of(8);
            let at = header.snapshots_offset.saturating_add(start);
            let mut snapshot = read_entry(storage, at, index, mend)?;
            let end = start + snapshot.len();
            if snapshot.extra_len > MAX_EXTRA {
                table.discarded.push(format!(
                    "Discarding too much extra metadata in snapshot table entry {index} ({} > {MAX_EXTRA})",
                    snapshot.extra_len
                ));
                snapshot.extra_len = MAX_EXTRA;
                table.shortened += 1;
            }
            kept = kept.next_multiple_of(8) + snapshot.len();
            if kept > MAX_TABLE || end > i32::MAX as u64 {
                if !mend {
                    return Err(overhanging(header.snapshots - index));
                }
                table.overhanging += u64::from(count - index);
                table.discarded.push(format!(
                    "Discarding {} overhanging snapshots (snapshot table is too big)",
                    count - index
                ));
                break;
            }
            table.len = end;
            snapshot.disk_size = snapshot.disk_size.or(Some(header.size));
            table.snapshots.push(snapshot);
        }
        Ok(table)
    }

    /// The bytes of a table with these snapshots.
    ///
    /// # Errors
    /// With `EFBIG` where it is larger than the format allows.
    pub fn encode(snapshots: &[Snapshot]) -> Result<Vec<u8>> {
        if snapshots.len() > MAX_SNAPSHOTS as usize {
            return Err(too_big("an image has 65536 snapshots at most"));
        }
        let bytes: Vec<u8> = snapshots.iter().flat_map(Snapshot::encode).collect();
        if bytes.len() as u64 > MAX_TABLE {
            return Err(too_big("Snapshot table is too big"));
        }
        Ok(bytes)
    }
}

fn text(bytes: &[u8]) -> Cow<'_, str> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end])
}

fn too_big(message: &str) -> Error {
    Error::corrupt(message).with_os_error(EFBIG)
}

fn overhanging(count: u32) -> Error {
    too_big(&format!(
        "Snapshot table is too big\nYou can force-remove all {count} overhanging snapshots with \
         qemu-img check -r all"
    ))
}

fn read_entry(storage: &dyn Storage, offset: u64, index: u32, mend: bool) -> Result<Snapshot> {
    // What lies past the end of the file reads as zeroes.
    let read = |at: u64, len: usize| -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let have = storage.len()?.saturating_sub(at).min(len as u64) as usize;
        if have > 0 {
            storage.read_exact_at(at, &mut bytes[..have]).map_err(|e| e.at_offset(at))?;
        }
        Ok(bytes)
    };
    // No file reaches this far; from here on, adding what an entry may hold does not overflow.
    if offset > i64::MAX as u64 {
        return Err(Error::corrupt("Snapshot table offset invalid").at_offset(offset));
    }
    let mut fixed = Fixed::new_zeroed();
    fixed.as_mut_bytes().copy_from_slice(&read(offset, FIXED)?);
    let extra_len = fixed.extra_data_size.get();
    if extra_len > MAX_EXTRA && !mend {
        return Err(too_big(&format!(
            "Too much extra metadata in snapshot table entry {index}\nYou can force-remove this \
             extra metadata with qemu-img check -r all"
        )));
    }
    let extra = read(offset + FIXED as u64, extra_len.min(MAX_EXTRA) as usize)?;
    let (id_len, name_len) =
        (usize::from(fixed.id_str_size.get()), usize::from(fixed.name_size.get()));
    let mut id = read(offset + FIXED as u64 + u64::from(extra_len), id_len + name_len)?;
    let name = id.split_off(id_len);
    let mut known = Extra::new_zeroed();
    let len = extra.len().min(KNOWN);
    known.as_mut_bytes()[..len].copy_from_slice(&extra[..len]);
    // Older programs write shorter extra data.
    let there = |field: usize, value: U64| (extra.len() >= field + 8).then_some(value.get());
    let vm_state_size = there(offset_of!(Extra, vm_state_size), known.vm_state_size);
    Ok(Snapshot {
        l1_offset: fixed.l1_table_offset.get(),
        l1_size: fixed.l1_size.get(),
        id,
        name,
        seconds: fixed.date_sec.get(),
        nanoseconds: fixed.date_nsec.get(),
        vm_clock: fixed.vm_clock_nsec.get(),
        vm_state_size: vm_state_size.unwrap_or_else(|| fixed.vm_state_size.get().into()),
        disk_size: there(offset_of!(Extra, disk_size), known.disk_size),
        icount: there(offset_of!(Extra, icount), known.icount).filter(|n| *n != NO_ICOUNT),
        extra_len,
        unknown: extra.get(KNOWN..).unwrap_or_default().to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::{CreateOptions, create};
    use crate::storage::MemoryStorage;
    use std::sync::Arc;

    fn sample(id: &str, unknown: &[u8]) -> Snapshot {
        Snapshot {
            l1_offset: 0x30000,
            l1_size: 1,
            id: id.as_bytes().to_vec(),
            name: vec![0xff, b'x'],
            seconds: 1,
            nanoseconds: 2,
            vm_clock: 3,
            vm_state_size: 5 << 32,
            disk_size: Some(4 << 20),
            icount: Some(7),
            extra_len: (KNOWN + unknown.len()) as u32,
            unknown: unknown.to_vec(),
        }
    }

    /// A storage with `table` at 64 KiB, and the header that says so.
    fn stored(table: &[u8], count: u32) -> (MemoryStorage, Header) {
        let new = Arc::new(MemoryStorage::default());
        drop(create(new.clone(), &CreateOptions::new(1 << 20)).unwrap());
        let mut header = Header::read(&*new).unwrap();
        (header.snapshots, header.snapshots_offset) = (count, 65536);
        let storage = MemoryStorage::default();
        storage.write_all_at(65536, table).unwrap();
        (storage, header)
    }

    #[test]
    fn what_is_not_known_of_an_entry_survives_byte_for_byte() {
        let list = [sample("1", b""), sample("22", b"unknown extra"), sample("", &[0; 1000])];
        let bytes = Table::encode(&list).unwrap();
        let (storage, header) = stored(&bytes, 3);
        let table = Table::read(&storage, &header).unwrap();
        assert_eq!(table.snapshots, list);
        assert_eq!(Table::encode(&table.snapshots).unwrap(), bytes);
        assert_eq!(table.len.next_multiple_of(8), bytes.len() as u64);
    }

    #[test]
    fn a_short_entry_takes_its_disk_size_from_the_image() {
        let mut bytes = vec![0; FIXED];
        let fixed = Fixed::mut_from_bytes(&mut bytes).unwrap();
        (fixed.vm_state_size, fixed.id_str_size) = (77.into(), 1.into());
        bytes.push(b'1');
        let (storage, header) = stored(&bytes, 1);
        let found = &Table::read(&storage, &header).unwrap().snapshots[0];
        assert_eq!((found.vm_state_size, found.disk_size, found.icount), (77, Some(1 << 20), None));
        assert!(found.is_incomplete() && found.id() == "1");
    }

    #[test]
    fn too_much_extra_data_is_refused_and_can_be_left_out() {
        let mut bytes = Table::encode(&[sample("1", &[9; 1000])]).unwrap();
        let mut more = sample("2", &[]).encode();
        let (fixed, _) = Fixed::mut_from_prefix(&mut more).unwrap();
        fixed.extra_data_size = 65536.into();
        more.splice(FIXED + KNOWN..FIXED + KNOWN, vec![3; 65536 - KNOWN]);
        bytes.extend_from_slice(&more);
        let (storage, header) = stored(&bytes, 2);
        let error = Table::read(&storage, &header).unwrap_err();
        assert!(error.message().starts_with("Too much extra metadata in snapshot table entry 1\n"));
        assert_eq!(error.raw_os_error(), Some(EFBIG));
        let mended = Table::read_mending(&storage, &header).unwrap();
        assert_eq!(mended.snapshots[1].id(), "2");
        assert_eq!(mended.snapshots[1].unknown.len(), 1000);
        assert_eq!(
            mended.discarded,
            ["Discarding too much extra metadata in snapshot table entry 1 (65536 > 1024)"]
        );
    }
}
