//! Partition tables: GPT (UEFI 2.10, section 5) and MBR with logical partitions.
//!
//! The tables come from whoever wrote the disk: every number is checked before it is used, and
//! what is read is bounded. The crates there are for this trust the entry count and size of a
//! GPT header (an allocation of hundreds of gigabytes, or a panic), so the reading is done here.

use crate::block::BlockDevice;
use crate::error::{Error, Result};

use super::probe::Reader;

/// Entries of a GPT that are read: eight times what is usual.
const MAX_ENTRIES: u32 = 1024;
/// Bytes of one GPT entry that are read.
const MAX_ENTRY: u32 = 4096;
/// Logical partitions that are followed: a longer chain is taken for a loop.
const MAX_LOGICAL: u32 = 128;
/// A sector in bytes, as MBR counts them.
const SECTOR: u64 = 512;

/// One partition, as its table says; it may reach past the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    /// As the kernel numbers it: from 1; logical partitions of an MBR from 5.
    pub number: u32,
    /// First byte.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub len: u64,
}

/// The partitions of a disk in the order of their table, `None` where it has no table.
///
/// Fails with [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt) where a table is there but
/// cannot be believed; a damaged GPT is read from its backup.
pub fn partitions(device: &dyn BlockDevice) -> Result<Option<Vec<Partition>>> {
    let size = device.size();
    let disk = Reader { device, offset: 0, len: size };
    let mut damaged = false;
    for sector in [512u64, 4096] {
        let last = (size / sector).saturating_sub(1).saturating_mul(sector);
        for at in [sector, last] {
            match gpt(&disk, at, sector) {
                Ok(Some(found)) => return Ok(Some(found)),
                Ok(None) => {}
                Err(error) if error.kind() == crate::ErrorKind::Corrupt => damaged = true,
                Err(error) => return Err(error),
            }
        }
    }
    let Some(entries) = mbr_entries(&disk, 0)? else {
        return if damaged { Err(damaged_gpt()) } else { Ok(None) };
    };
    if entries.iter().any(|entry| entry.kind == PROTECTIVE) {
        return Err(damaged_gpt());
    }
    mbr(&disk, entries).map(Some)
}

fn damaged_gpt() -> Error {
    Error::corrupt("the partition table (GPT) and its backup are both damaged")
}

/// The bytes of a whole number of sectors.
fn bytes(sectors: u64, sector: u64) -> Result<u64> {
    sectors.checked_mul(sector).ok_or_else(|| {
        Error::corrupt(format!("sector {sectors} in the partition table is beyond any disk"))
    })
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// The partitions of the GPT whose header stands at byte `at`.
fn gpt(disk: &Reader<'_>, at: u64, sector: u64) -> Result<Option<Vec<Partition>>> {
    let Some(mut header) = disk.get::<512>(at)? else { return Ok(None) };
    if !header.starts_with(b"EFI PART") {
        return Ok(None);
    }
    let (len, sum) = (le32(&header, 12) as usize, le32(&header, 16));
    let (first, count, size) = (le64(&header, 72), le32(&header, 80), le32(&header, 84));
    let entries_sum = le32(&header, 88);
    header[16..20].fill(0);
    let corrupt = |what: &str| Error::corrupt(format!("GPT: {what}")).at_offset(at);
    match header.get(..len) {
        Some(covered) if len >= 92 && crc32fast::hash(covered) == sum => {}
        _ => return Err(corrupt("the header's checksum does not match")),
    }
    if count > MAX_ENTRIES || !(128..=MAX_ENTRY).contains(&size) || size % 8 != 0 {
        return Err(corrupt(&format!("{count} entries of {size} bytes are not believable")));
    }
    let mut table = vec![0; count as usize * size as usize];
    if !disk.fill(bytes(first, sector)?, &mut table)? {
        return Err(corrupt("the entries reach past the end of the disk"));
    }
    if crc32fast::hash(&table) != entries_sum {
        return Err(corrupt("the checksum of the entries does not match"));
    }
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(table.chunks_exact(size as usize)) {
        if entry[..16].iter().all(|b| *b == 0) {
            continue;
        }
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        let sectors = last.checked_sub(first).and_then(|n| n.checked_add(1));
        let sectors =
            sectors.ok_or_else(|| corrupt(&format!("partition {number} ends before it begins")))?;
        let (offset, len) = (bytes(first, sector)?, bytes(sectors, sector)?);
        found.push(Partition { number, offset, len });
    }
    Ok(Some(found))
}

/// The type that stands for a whole disk under GPT.
const PROTECTIVE: u8 = 0xee;

/// One entry of an MBR or of an extended boot record.
#[derive(Clone, Copy)]
struct Entry {
    kind: u8,
    first: u64,
    sectors: u64,
}

impl Entry {
    /// Whether it holds a chain of logical partitions.
    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }
}

/// The four entries of the boot record at byte `at`; `None` where none is there.
fn mbr_entries(disk: &Reader<'_>, at: u64) -> Result<Option<[Entry; 4]>> {
    let Some(record) = disk.get::<512>(at)? else { return Ok(None) };
    if record[510..] != [0x55, 0xaa] {
        return Ok(None);
    }
    let mut entries = [Entry { kind: 0, first: 0, sectors: 0 }; 4];
    for (entry, raw) in entries.iter_mut().zip(record[446..510].chunks_exact(16)) {
        // Anything else in the boot flag is code or text: the record of a file system.
        if raw[0] & 0x7f != 0 {
            return Ok(None);
        }
        let (first, sectors) = (u64::from(le32(raw, 8)), u64::from(le32(raw, 12)));
        let kind = if sectors == 0 { 0 } else { raw[4] };
        *entry = Entry { kind, first, sectors };
    }
    Ok(entries.iter().any(|entry| entry.kind != 0).then_some(entries))
}

fn mbr(disk: &Reader<'_>, entries: [Entry; 4]) -> Result<Vec<Partition>> {
    let mut found = Vec::new();
    let mut extended = None;
    for (number, entry) in (1..).zip(entries) {
        if entry.is_extended() {
            extended.get_or_insert(entry.first);
        } else if entry.kind != 0 {
            found.push(partition(number, entry.first, entry.sectors)?);
        }
    }
    if let Some(start) = extended {
        logical(disk, start, &mut found)?;
    }
    Ok(found)
}

/// Follows the chain of extended boot records from sector `start`.
fn logical(disk: &Reader<'_>, start: u64, found: &mut Vec<Partition>) -> Result<()> {
    let mut at = start;
    for number in 5..5 + MAX_LOGICAL {
        let Some(entries) = mbr_entries(disk, bytes(at, SECTOR)?)? else { return Ok(()) };
        let [this, next, ..] = entries;
        if this.kind != 0 && !this.is_extended() {
            found.push(partition(number, at + this.first, this.sectors)?);
        }
        if !next.is_extended() {
            return Ok(());
        }
        at = start + next.first;
    }
    Err(Error::corrupt("the chain of logical partitions runs in a circle")
        .at_offset(bytes(at, SECTOR)?))
}

fn partition(number: u32, first: u64, sectors: u64) -> Result<Partition> {
    Ok(Partition { number, offset: bytes(first, SECTOR)?, len: bytes(sectors, SECTOR)? })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::ram::Ram;
    use super::*;
    use crate::ErrorKind;

    const SIZE: usize = 1 << 20;

    fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
        disk[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// A boot record at `sector` with entries of a type, a first sector and a length.
    fn record(disk: &mut [u8], sector: usize, entries: &[(u8, u32, u32)]) {
        put(disk, sector * 512 + 510, &[0x55, 0xaa]);
        for (place, (kind, first, sectors)) in entries.iter().enumerate() {
            let at = sector * 512 + 446 + place * 16;
            disk[at + 4] = *kind;
            put(disk, at + 8, &first.to_le_bytes());
            put(disk, at + 12, &sectors.to_le_bytes());
        }
    }

    /// A GPT header at sector `at` with its entries at sector `table`.
    fn header(disk: &mut [u8], at: usize, table: usize, count: u32, entry: u32) {
        let sum = crc32fast::hash(&disk[table * 512..][..128 * 4]);
        let header = at * 512;
        put(disk, header, b"EFI PART\0\0\x01\0\x5c\0\0\0\0\0\0\0");
        put(disk, header + 72, &(table as u64).to_le_bytes());
        put(disk, header + 80, &count.to_le_bytes());
        put(disk, header + 84, &entry.to_le_bytes());
        put(disk, header + 88, &sum.to_le_bytes());
        let sum = crc32fast::hash(&disk[header..][..92]);
        put(disk, header + 16, &sum.to_le_bytes());
    }

    fn gpt_disk() -> Vec<u8> {
        let mut disk = vec![0; SIZE];
        record(&mut disk, 0, &[(PROTECTIVE, 1, 2047)]);
        for (place, first, last) in [(0, 64u64, 127u64), (2, 128, 1023)] {
            for table in [2 * 512, (2047 - 32) * 512] {
                put(&mut disk, table + place * 128, &[7; 16]);
                put(&mut disk, table + place * 128 + 32, &first.to_le_bytes());
                put(&mut disk, table + place * 128 + 40, &last.to_le_bytes());
            }
        }
        header(&mut disk, 1, 2, 4, 128);
        header(&mut disk, 2047, 2047 - 32, 4, 128);
        disk
    }

    fn part(number: u32, first: u64, sectors: u64) -> Partition {
        Partition { number, offset: first * 512, len: sectors * 512 }
    }

    #[test]
    fn a_gpt_numbers_its_partitions_by_their_place() {
        let found = partitions(&Ram(gpt_disk())).unwrap().unwrap();
        assert_eq!(found, [part(1, 64, 64), part(3, 128, 896)]);
    }

    #[test]
    fn a_damaged_gpt_is_read_from_its_backup_and_two_damaged_ones_are_refused() {
        let mut disk = gpt_disk();
        disk[512 + 72] ^= 1;
        assert_eq!(partitions(&Ram(disk.clone())).unwrap().unwrap().len(), 2);
        disk[2047 * 512 + 72] ^= 1;
        assert_eq!(partitions(&Ram(disk)).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn a_gpt_with_absurd_counts_is_refused_before_anything_is_allocated() {
        for (count, entry) in [(u32::MAX, 128), (4, 8), (4, u32::MAX), (1025, 128), (4, 129)] {
            let mut disk = gpt_disk();
            header(&mut disk, 1, 2, count, entry);
            header(&mut disk, 2047, 2, count, entry);
            assert_eq!(partitions(&Ram(disk)).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }

    #[test]
    fn an_mbr_has_primary_and_logical_partitions() {
        let mut disk = vec![0; SIZE];
        record(&mut disk, 0, &[(0x83, 8, 8), (0x05, 100, 900), (0, 0, 0), (0x07, 16, 8)]);
        record(&mut disk, 100, &[(0x83, 2, 10), (0x05, 50, 60)]);
        record(&mut disk, 150, &[(0x83, 4, 20)]);
        let found = partitions(&Ram(disk)).unwrap().unwrap();
        assert_eq!(found, [part(1, 8, 8), part(4, 16, 8), part(5, 102, 10), part(6, 154, 20)]);
    }

    #[test]
    fn a_circle_of_logical_partitions_is_refused() {
        let mut disk = vec![0; SIZE];
        record(&mut disk, 0, &[(0x0f, 100, 900)]);
        record(&mut disk, 100, &[(0x83, 2, 10), (0x05, 50, 60)]);
        record(&mut disk, 150, &[(0x83, 4, 20), (0x05, 50, 60)]);
        assert_eq!(partitions(&Ram(disk)).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn a_disk_without_a_table_has_none() {
        assert_eq!(partitions(&Ram(vec![0; SIZE])).unwrap(), None);
        assert_eq!(partitions(&Ram(vec![0; 100])).unwrap(), None);
        assert_eq!(partitions(&Ram(Vec::new())).unwrap(), None);
        let mut boot_sector = vec![0x90; SIZE];
        put(&mut boot_sector, 510, &[0x55, 0xaa]);
        assert_eq!(partitions(&Ram(boot_sector)).unwrap(), None);
    }

    proptest! {
        #[test]
        fn no_damage_makes_the_reader_panic(
            hits in prop::collection::vec((0..SIZE, any::<u8>()), 1..8),
            near in prop::collection::vec((0usize..1536, any::<u8>()), 1..8),
        ) {
            let mut disk = gpt_disk();
            record(&mut disk, 0, &[(0x83, 8, 8), (0x05, 100, 900)]);
            record(&mut disk, 100, &[(0x83, 2, 10), (0x05, 50, 60)]);
            for (at, byte) in hits.into_iter().chain(near) {
                disk[at] = byte;
            }
            // Headers that pass their checksum, whatever they say.
            let sum = { disk[528..532].fill(0); crc32fast::hash(&disk[512..604]) };
            put(&mut disk, 528, &sum.to_le_bytes());
            let _ = partitions(&Ram(disk.clone()));
            let _ = super::super::probe::probe(&Ram(disk), 0, SIZE as u64);
        }
    }
}
