//! A VHDX whose writer died with its log in use, built here; QEMU's own replay is the judge where
//! there is QEMU.

use std::sync::Arc;

use super::{difference, fixture, flat, open, pattern, run};
use crate::ErrorKind;
use crate::formats::vhdx::replay_log;
use crate::require::{Need, have};
use crate::storage::{MemoryStorage, Storage};

const ID: [u8; 16] = [0x5a; 16];
const SECTOR: usize = 4096;

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn crc(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let crc = crc32c::crc32c(bytes);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// A VHDX file with places that the tests change.
struct Vhdx {
    file: Vec<u8>,
    bat: u64,
    log: usize,
    log_len: usize,
}

impl Vhdx {
    fn new() -> Vhdx {
        let file = fixture("dynamic.vhdx");
        let header =
            [64 << 10, 128 << 10].into_iter().max_by_key(|&at| u64_at(&file, at + 8)).unwrap();
        let guid =
            file[192 << 10..].windows(4).position(|w| w == [0x66, 0x77, 0xc2, 0x2d]).unwrap();
        let bat = u64_at(&file, (192 << 10) + guid + 16);
        let log_len = u64_at(&file, header + 68) as u32 as usize;
        Vhdx { bat, log: u64_at(&file, header + 72) as usize, log_len, file }
    }

    /// Sets the log's id in the newer header; zero says that the log is empty.
    fn set_log_id(&mut self, id: [u8; 16]) {
        for at in [64 << 10, 128 << 10] {
            let header = &mut self.file[at..at + SECTOR];
            header[48..64].copy_from_slice(&id);
            crc(header);
        }
    }

    fn put(&mut self, at: usize, entry: &[u8]) {
        for (n, &byte) in entry.iter().enumerate() {
            self.file[self.log + (at + n) % self.log_len] = byte;
        }
    }

    fn sector(&self, at: u64) -> Vec<u8> {
        self.file[at as usize..at as usize + SECTOR].to_vec()
    }
}

enum Update {
    Zero(u64, u64),
    Data(u64, Vec<u8>),
}

struct Entry {
    sequence: u64,
    tail: usize,
    id: [u8; 16],
    flushed: u64,
    last: u64,
    updates: Vec<Update>,
}

impl Entry {
    fn new(sequence: u64, tail: usize, file: &[u8], updates: Vec<Update>) -> Entry {
        let len = file.len() as u64;
        Entry { sequence, tail, id: ID, flushed: len, last: len, updates }
    }

    fn build(&self) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        let mut data = Vec::new();
        for update in &self.updates {
            match update {
                Update::Zero(at, len) => {
                    bytes.extend(b"zero\0\0\0\0");
                    bytes.extend(len.to_le_bytes());
                    bytes.extend(at.to_le_bytes());
                }
                Update::Data(at, sector) => {
                    bytes.extend(b"desc");
                    bytes.extend(&sector[4092..]);
                    bytes.extend(&sector[..8]);
                    bytes.extend(at.to_le_bytes());
                    data.extend(b"data");
                    data.extend(((self.sequence >> 32) as u32).to_le_bytes());
                    data.extend(&sector[8..4092]);
                    data.extend((self.sequence as u32).to_le_bytes());
                }
            }
            bytes.extend(self.sequence.to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
        bytes.extend(data);
        let len = bytes.len() as u32;
        bytes[..4].copy_from_slice(b"loge");
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.tail as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..28].copy_from_slice(&(self.updates.len() as u32).to_le_bytes());
        bytes[32..48].copy_from_slice(&self.id);
        bytes[48..56].copy_from_slice(&self.flushed.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.last.to_le_bytes());
        crc(&mut bytes);
        bytes
    }
}

/// The disk with its block table lost, and the log that restores it: two entries, of which the
/// second puts right what the first left wrong. The second runs over the log's end.
fn dirty() -> (Vhdx, Vec<u8>) {
    let mut vhdx = Vhdx::new();
    let bat = vhdx.bat;
    let table = vhdx.sector(bat);
    let mut wrong = table.clone();
    wrong[..8].fill(0);
    vhdx.file[bat as usize..bat as usize + SECTOR].fill(0);
    // Bytes behind the table, in its region, that a zero descriptor wipes out.
    let start = vhdx.log_len - 4 * SECTOR;
    let first = Entry::new(
        (7 << 32) | 9,
        start,
        &vhdx.file,
        vec![Update::Zero(bat + 8192, 65536), Update::Data(bat, wrong)],
    );
    let second = Entry::new(
        (7 << 32) | 10,
        start,
        &vhdx.file,
        vec![Update::Data(bat, table.clone()), Update::Data(bat + 12288, vec![0; SECTOR])],
    );
    let (first, second) = (first.build(), second.build());
    vhdx.put(start, &first);
    vhdx.put(start + first.len(), &second);
    vhdx.set_log_id(ID);
    (vhdx, table)
}

/// The file with a log in use, and where the log's used part begins.
pub(super) fn dirty_file() -> (Vec<u8>, usize) {
    let (vhdx, _) = dirty();
    let used = vhdx.log + vhdx.log_len - 4 * SECTOR;
    (vhdx.file, used)
}

fn kind(file: Vec<u8>) -> ErrorKind {
    open("vhdx", file, &[]).err().unwrap().kind()
}

#[test]
fn a_log_in_use_is_replayed_without_a_write() {
    let (vhdx, _) = dirty();
    let image = open("vhdx", vhdx.file, &[]).unwrap();
    assert_eq!(difference(&flat(&*image, &[]), &pattern()), None);
}

#[test]
fn what_replay_shows_is_what_qemu_makes_of_the_log() {
    if !have(Need::Qemu) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, raw) = (dir.path().join("dirty.vhdx"), dir.path().join("out.raw"));
    let (path, raw) = (path.to_str().unwrap(), raw.to_str().unwrap());
    let (vhdx, table) = dirty();
    let bat = vhdx.bat as usize;
    std::fs::write(path, &vhdx.file).unwrap();
    run("qemu-img", &["check", "-q", "-r", "all", "-f", "vhdx", path]);
    let replayed = std::fs::read(path).unwrap();
    assert_eq!(difference(&replayed[bat..bat + SECTOR], &table), None);
    run("qemu-img", &["convert", "-f", "vhdx", "-O", "raw", path, raw]);
    let ours = open("vhdx", vhdx.file, &[]).unwrap();
    assert_eq!(difference(&flat(&*ours, &[]), &std::fs::read(raw).unwrap()), None);
}

#[test]
fn a_log_that_is_replayed_for_good_is_replayed_once() {
    let (vhdx, table) = dirty();
    let bat = vhdx.bat as usize;
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
    storage.write_all_at(0, &vhdx.file).unwrap();
    assert!(replay_log(storage.clone()).unwrap());
    assert!(!replay_log(storage.clone()).unwrap(), "the headers still name the log");
    let mut file = vec![0; storage.len().unwrap() as usize];
    storage.read_exact_at(0, &mut file).unwrap();
    assert_eq!(difference(&file[bat..bat + SECTOR], &table), None);
    assert!(file[bat + 8192..bat + 12288].iter().all(|b| *b == 0));
    let image = open("vhdx", file.clone(), &[]).unwrap();
    assert_eq!(difference(&flat(&*image, &[]), &pattern()), None);
    if have(Need::Qemu) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("replayed.vhdx");
        std::fs::write(&path, file).unwrap();
        // Without repair: a log in force would be refused.
        run("qemu-img", &["check", "-q", "-f", "vhdx", path.to_str().unwrap()]);
    }
}

#[test]
fn only_the_newest_complete_sequence_counts() {
    let (mut vhdx, _) = dirty();
    // An older sequence that would lose the table, a newer one of another log, and a newer one
    // whose first entry is gone.
    let zero = || vec![Update::Zero(vhdx.bat, 4096)];
    let old = Entry::new(3, 40960, &vhdx.file, zero()).build();
    let foreign = Entry { id: [9; 16], ..Entry::new(1 << 40, 81920, &vhdx.file, zero()) }.build();
    let torn = Entry::new(1 << 41, 4096 * 100, &vhdx.file, zero()).build();
    let mut damaged =
        Entry::new(1 << 42, 4096 * 150, &vhdx.file, vec![Update::Data(vhdx.bat, vec![0; SECTOR])])
            .build();
    damaged[5000] ^= 1;
    for (at, entry) in [(40960, old), (81920, foreign), (122_880, torn), (4096 * 150, damaged)] {
        vhdx.put(at, &entry);
    }
    let image = open("vhdx", vhdx.file, &[]).unwrap();
    assert_eq!(difference(&flat(&*image, &[]), &pattern()), None);
}

#[test]
fn a_log_that_grew_the_file_makes_the_image_longer() {
    let mut vhdx = Vhdx::new();
    let bat = vhdx.bat;
    let mut table = vhdx.sector(bat);
    // Block 2 moves to a MiB that the file does not have yet: its bytes never left the cache.
    let end = (vhdx.file.len() as u64).next_multiple_of(1 << 20);
    table[16..24].copy_from_slice(&(end | 6).to_le_bytes());
    let last = end + (1 << 20);
    let entry = Entry { last, ..Entry::new(1, 0, &vhdx.file, vec![Update::Data(bat, table)]) };
    vhdx.put(0, &entry.build());
    vhdx.set_log_id(ID);
    let image = open("vhdx", vhdx.file.clone(), &[]).unwrap();
    assert_eq!(difference(&flat(&*image, &[]), &pattern()), None);

    let cut = Entry { flushed: last, ..entry };
    vhdx.put(0, &cut.build());
    assert_eq!(kind(vhdx.file), ErrorKind::Corrupt);
}

#[test]
fn a_log_in_use_without_an_entry_is_refused() {
    let mut vhdx = Vhdx::new();
    vhdx.set_log_id(ID);
    assert_eq!(kind(vhdx.file), ErrorKind::Corrupt);
}
