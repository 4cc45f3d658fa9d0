//! What a guest can do to the host with its descriptors: nothing. Chains that are well-formed,
//! malformed and random, served from memory to memory, without a transport.

use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::config::{MAX_RANGES, MAX_SECTORS};
use super::request::SECTOR;
use super::ring::Ring;
use super::*;
use crate::block::{BlockDevice, BlockExtent, check_range, total, total_mut};
use crate::error::Result;

/// Two regions of guest memory with a hole between them.
const REGIONS: [(u64, u64); 2] = [(0, 0x20000), (0x20000, 0x10000)];
const MEMORY_END: u64 = 0x30000;

const TABLE: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const INDIRECT: u64 = 0x4000;
const HEADER: u64 = 0x14000;
const STATUS: u64 = 0x14100;
const DATA: u64 = 0x15000;
const SIZE: u16 = 16;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const TO_INDIRECT: u16 = 4;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What the status byte holds while nobody has written it.
const UNTOUCHED: u8 = 0xee;

const DISK: u64 = 64 << 10;
const SECTORS: u64 = DISK / SECTOR;

const ALL: u64 = u64::MAX;
const NO_FLUSH: u64 = !(1 << 9);
const NO_DISCARD: u64 = !(1 << 13);

#[derive(Default)]
struct Ram {
    bytes: Mutex<Vec<u8>>,
    flushes: AtomicU32,
    discarded: Mutex<Vec<(u64, u64)>>,
    zeroed: Mutex<Vec<(u64, u64, bool)>>,
    read_only: bool,
}

impl BlockDevice for Ram {
    fn size(&self) -> u64 {
        DISK
    }
    fn block_size(&self) -> u32 {
        4096
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        check_range(offset, total_mut(bufs), DISK)?;
        let bytes = self.bytes.lock().unwrap();
        let mut at = offset as usize;
        for buf in bufs {
            let len = buf.len();
            buf.copy_from_slice(&bytes[at..at + len]);
            at += len;
        }
        Ok(())
    }
    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        assert!(!self.read_only, "a write reached a read-only disk");
        check_range(offset, total(bufs), DISK)?;
        let mut bytes = self.bytes.lock().unwrap();
        let mut at = offset as usize;
        for buf in bufs {
            bytes[at..at + buf.len()].copy_from_slice(buf);
            at += buf.len();
        }
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        assert!(!self.read_only, "a write reached a read-only disk");
        check_range(offset, len, DISK)?;
        self.zeroed.lock().unwrap().push((offset, len, may_unmap));
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        assert!(!self.read_only, "a discard reached a read-only disk");
        check_range(offset, len, DISK)?;
        self.discarded.lock().unwrap().push((offset, len));
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn extents(&self, _: u64, _: u64, _: usize) -> Result<Vec<BlockExtent>> {
        Ok(Vec::new())
    }
}

#[derive(Default)]
struct Bell(AtomicU32);

impl Interrupt for Bell {
    fn queue_used(&self, _: u16) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn needs_reset(&self) {}
}

/// One descriptor: address, length, flags, next.
type Desc = (u64, u32, u16, u16);

struct Bench {
    memory: Arc<Memory>,
    disk: Arc<Ram>,
    bell: Arc<Bell>,
    features: u64,
}

impl Bench {
    fn new() -> Bench {
        let regions = REGIONS.map(|(base, len)| (GuestAddress(base), len as usize));
        let bytes = (0..DISK).map(|at| (at / SECTOR) as u8 ^ 0x5a).collect();
        Bench {
            memory: Arc::new(Memory::from_ranges(&regions).unwrap()),
            disk: Arc::new(Ram { bytes: Mutex::new(bytes), ..Ram::default() }),
            bell: Arc::default(),
            features: ALL,
        }
    }

    fn header(&self, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(0u32, GuestAddress(HEADER + 4)).unwrap();
        self.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.memory.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
    }

    fn table(&self, at: u64, descs: &[Desc]) {
        for (n, &(addr, len, flags, next)) in descs.iter().enumerate() {
            let raw = RawDescriptor::from(Descriptor::new(addr, len, flags, next));
            self.memory.write_obj(raw, GuestAddress(at + n as u64 * 16)).unwrap();
        }
    }

    fn queue(&self) -> Queue {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(TABLE as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        queue
    }

    /// Serves the chains with these heads.
    fn serve(&self, heads: &[u16], idx: u16) -> std::result::Result<u64, Broken> {
        self.memory.write_obj(idx, GuestAddress(AVAIL + 2)).unwrap();
        for (n, head) in heads.iter().enumerate() {
            self.memory.write_obj(*head, GuestAddress(AVAIL + 4 + n as u64 * 2)).unwrap();
        }
        let bell = Arc::clone(&self.bell) as Arc<dyn Interrupt>;
        let mut ring = Ring::new(0, self.queue(), Arc::clone(&self.memory), bell);
        let executor =
            Block::new(Arc::clone(&self.disk) as _, Id::new("ram"), 1).executor(self.features);
        ring.drain(&AtomicBool::new(false), &mut Pool::new(executor))
    }

    /// Serves one chain from descriptor 0: its status byte and used length.
    fn one(
        &self,
        kind: u32,
        sector: u64,
        descs: &[Desc],
    ) -> std::result::Result<(u8, u32), Broken> {
        self.header(kind, sector);
        self.table(TABLE, descs);
        assert_eq!(self.serve(&[0], 1)?, 1);
        let used: u32 = self.memory.read_obj(GuestAddress(USED + 8)).unwrap();
        Ok((self.memory.read_obj(GuestAddress(STATUS)).unwrap(), used))
    }

    /// A discard or write zeroes request with these ranges.
    fn ranged(&self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        for (n, &(sector, count, flags)) in ranges.iter().enumerate() {
            let at = DATA + n as u64 * 16;
            self.memory.write_obj(sector, GuestAddress(at)).unwrap();
            self.memory.write_obj(count, GuestAddress(at + 8)).unwrap();
            self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        }
        let len = ranges.len() as u32 * 16;
        self.one(kind, 0, &[head(1), (DATA, len, NEXT, 2), tail()]).unwrap().0
    }
}

fn head(next: u16) -> Desc {
    (HEADER, 16, NEXT, next)
}

fn tail() -> Desc {
    (STATUS, 1, WRITE, 0)
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

#[test]
fn a_read_fills_its_buffers_in_order_also_across_regions() {
    let bench = Bench::new();
    let edge = REGIONS[0].1 - 100;
    let descs = [head(1), (edge, 612, NEXT | WRITE, 2), (DATA, 412, NEXT | WRITE, 3), tail()];
    assert_eq!(bench.one(IN, 7, &descs), Ok((OK, 1025)));
    let mut got = [0; 612];
    bench.memory.read_slice(&mut got, GuestAddress(edge)).unwrap();
    assert!(got[..512].iter().all(|b| *b == 7 ^ 0x5a) && got[512..].iter().all(|b| *b == 8 ^ 0x5a));
    assert_eq!(bench.bell.0.load(Ordering::Relaxed), 1);
}

#[test]
fn any_framing_of_a_request_is_taken() {
    let bench = Bench::new();
    // The header in three pieces, one of them empty, and the status byte behind the data.
    let descs = [
        (HEADER, 3, NEXT, 1),
        (HEADER + 3, 0, NEXT, 2),
        (HEADER + 3, 13, NEXT, 3),
        (STATUS - 511, 512, NEXT | WRITE, 4),
        (STATUS + 1, 1, WRITE, 0),
    ];
    assert_eq!(bench.one(IN, 1, &descs), Ok((1 ^ 0x5a, 513)));
    assert_eq!(bench.memory.read_obj::<u8>(GuestAddress(STATUS + 1)).unwrap(), OK);
    // Header and data in one.
    bench.memory.write_slice(&[9; 512], GuestAddress(HEADER + 16)).unwrap();
    bench.header(OUT, 2);
    bench.memory.write_slice(&[9; 512], GuestAddress(HEADER + 16)).unwrap();
    let status = MEMORY_END - 1;
    bench.table(TABLE, &[(HEADER, 528, NEXT, 1), (status, 1, WRITE, 0)]);
    assert_eq!(bench.serve(&[0], 1), Ok(1));
    assert_eq!(bench.memory.read_obj::<u8>(GuestAddress(status)).unwrap(), OK);
    assert!(bench.disk.bytes.lock().unwrap()[1024..1536].iter().all(|b| *b == 9));
}

#[test]
fn a_request_may_stand_in_an_indirect_table() {
    let bench = Bench::new();
    bench.table(INDIRECT, &[head(1), (DATA, 512, NEXT | WRITE, 2), tail()]);
    assert_eq!(bench.one(IN, 0, &[(INDIRECT, 48, TO_INDIRECT, 0)]), Ok((OK, 513)));
    // A table in a table, and one of an odd length: nothing of them can be read.
    bench.table(INDIRECT, &[(INDIRECT, 48, TO_INDIRECT, 0)]);
    assert_eq!(bench.one(IN, 0, &[(INDIRECT, 48, TO_INDIRECT, 0)]), Err(Broken));
    assert_eq!(bench.one(IN, 0, &[(INDIRECT, 47, TO_INDIRECT, 0)]), Err(Broken));
}

#[test]
fn a_chain_without_an_end_breaks_the_queue_and_harms_nobody() {
    let data = (DATA, 512, NEXT | WRITE, 0);
    for descs in [
        vec![head(1), data],
        vec![(HEADER, 16, NEXT, 0)],
        vec![head(SIZE), data],
        vec![head(u16::MAX)],
        vec![head(1), (DATA, 512, 0, 0)],
        vec![head(1), (MEMORY_END, 1, WRITE, 0)],
        vec![head(1), (u64::MAX, 2, WRITE, 0)],
        vec![(HEADER, 16, 0, 0)],
        vec![(HEADER, 0, WRITE, 0)],
        vec![(0, 0, 0, 0)],
    ] {
        let bench = Bench::new();
        assert_eq!(bench.one(IN, 0, &descs), Err(Broken), "{descs:?}");
        assert_eq!(bench.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), UNTOUCHED);
    }
    let bench = Bench::new();
    assert_eq!(bench.serve(&[SIZE], 1), Err(Broken));
    assert_eq!(bench.serve(&[0], SIZE + 1), Err(Broken));
}

#[test]
fn a_malformed_request_gets_an_error_where_it_has_a_status_byte() {
    let to_guest = |addr, len| [head(1), (addr, len, NEXT | WRITE, 2), tail()].to_vec();
    let to_disk = |addr, len| [head(1), (addr, len, NEXT, 2), tail()].to_vec();
    for (kind, sector, descs, status) in [
        (IN, 0, to_guest(DATA, 511), IOERR),
        (IN, 0, to_guest(DATA, 0), IOERR),
        (IN, 0, to_disk(DATA, 512), IOERR),
        (OUT, 0, to_guest(DATA, 512), IOERR),
        (OUT, 0, to_disk(DATA, 513), IOERR),
        (IN, 0, to_guest(MEMORY_END - 1, 512), IOERR),
        (IN, 0, to_guest(1 << 40, 512), IOERR),
        (IN, 0, to_guest(u64::MAX - 5, 512), IOERR),
        (OUT, 0, to_disk(DATA, 0xffff_fe00), IOERR),
        (IN, SECTORS, to_guest(DATA, 512), IOERR),
        (IN, SECTORS - 1, to_guest(DATA, 1024), IOERR),
        (OUT, u64::MAX / 512, to_disk(DATA, 512), IOERR),
        (OUT, u64::MAX, to_disk(DATA, 512), IOERR),
        (IN, 0, vec![(HEADER, 15, NEXT, 1), tail()], IOERR),
        (IN, 0, vec![tail()], IOERR),
        (GET_ID, 0, vec![head(1), tail()], IOERR),
        (DISCARD, 0, to_disk(DATA, 15), IOERR),
        (DISCARD, 0, to_disk(DATA, 17), IOERR),
        (DISCARD, 0, to_disk(DATA, 16 * (MAX_RANGES + 1)), IOERR),
        (DISCARD, 0, vec![head(1), tail()], IOERR),
        (99, 0, to_guest(DATA, 512), UNSUPP),
        (u32::MAX, u64::MAX, vec![head(1), tail()], UNSUPP),
    ] {
        let bench = Bench::new();
        let before = bench.disk.bytes.lock().unwrap().clone();
        let got = bench.one(kind, sector, &descs).map(|(status, _)| status);
        assert_eq!(got, Ok(status), "type {kind} sector {sector:#x} {descs:?}");
        assert!(before == *bench.disk.bytes.lock().unwrap());
    }
}

#[test]
fn buffers_in_the_wrong_order_or_on_top_of_each_other_are_refused() {
    let bench = Bench::new();
    let late = [head(1), (DATA, 512, NEXT | WRITE, 2), (DATA + 512, 512, NEXT, 3), tail()];
    assert_eq!(bench.one(IN, 0, &late), Ok((IOERR, 0)));
    let same = [head(1), (DATA, 512, NEXT | WRITE, 2), (DATA + 511, 512, NEXT | WRITE, 3), tail()];
    assert_eq!(bench.one(IN, 0, &same), Ok((IOERR, 0)));
}

#[test]
fn an_endless_list_of_segments_is_refused_and_not_kept() {
    let bench = Bench::new();
    let many = 4000;
    let mut descs = vec![head(1)];
    descs.extend((1..many).map(|n| (DATA, 512, NEXT | WRITE, n + 1)));
    descs.push(tail());
    bench.table(INDIRECT, &descs);
    let len = descs.len() as u32 * 16;
    assert_eq!(bench.one(IN, 0, &[(INDIRECT, len, TO_INDIRECT, 0)]), Ok((IOERR, 0)));
}

#[test]
fn flush_id_and_ranges_do_what_they_say() {
    let bench = Bench::new();
    assert_eq!(bench.one(FLUSH, 0, &[head(1), tail()]), Ok((OK, 1)));
    assert_eq!(bench.disk.flushes.load(Ordering::Relaxed), 1);
    let id = [head(1), (DATA, 20, NEXT | WRITE, 2), tail()];
    assert_eq!(bench.one(GET_ID, 0, &id), Ok((OK, 21)));
    let mut got = [1; 20];
    bench.memory.read_slice(&mut got, GuestAddress(DATA)).unwrap();
    assert_eq!(&got[..4], b"ram\0");
    assert_eq!(bench.ranged(DISCARD, &[(2, 3, 0), (SECTORS - 1, 1, 0)]), OK);
    assert_eq!(*bench.disk.discarded.lock().unwrap(), [(1024, 1536), (DISK - 512, 512)]);
    assert_eq!(bench.ranged(WRITE_ZEROES, &[(1, 1, 1), (2, 1, 0)]), OK);
    assert_eq!(*bench.disk.zeroed.lock().unwrap(), [(512, 512, true), (1024, 512, false)]);
}

#[test]
fn ranges_take_effect_all_or_none() {
    let bench = Bench::new();
    assert_eq!(bench.ranged(DISCARD, &[(0, 1, 0), (SECTORS, 1, 0)]), IOERR);
    assert_eq!(bench.ranged(DISCARD, &[(0, 1, 0), (1, 1, 1)]), UNSUPP);
    assert_eq!(bench.ranged(DISCARD, &[(0, 1, 0), (u64::MAX, u32::MAX, 0)]), IOERR);
    assert_eq!(bench.ranged(WRITE_ZEROES, &[(0, 1, 0), (1, 1, 2)]), UNSUPP);
    assert_eq!(bench.ranged(WRITE_ZEROES, &[(0, MAX_SECTORS + 1, 0)]), IOERR);
    assert!(bench.disk.discarded.lock().unwrap().is_empty());
    assert!(bench.disk.zeroed.lock().unwrap().is_empty());
}

#[test]
fn what_was_not_negotiated_is_not_there() {
    let mut bench = Bench::new();
    bench.features = NO_DISCARD;
    assert_eq!(bench.ranged(DISCARD, &[(0, 1, 0)]), UNSUPP);
    // Without flush each write must be durable when it completes.
    bench.features = NO_FLUSH;
    let write = [head(1), (DATA, 512, NEXT, 2), tail()];
    assert_eq!(bench.one(OUT, 0, &write), Ok((OK, 1)));
    assert_eq!(bench.ranged(DISCARD, &[(0, 1, 0)]), OK);
    assert_eq!(bench.disk.flushes.load(Ordering::Relaxed), 2);
}

#[test]
fn a_read_only_disk_is_never_written() {
    let mut bench = Bench::new();
    let bytes = std::mem::take(&mut *bench.disk.bytes.lock().unwrap());
    bench.disk = Arc::new(Ram { bytes: Mutex::new(bytes), read_only: true, ..Ram::default() });
    let write = [head(1), (DATA, 512, NEXT, 2), tail()];
    assert_eq!(bench.one(OUT, 0, &write), Ok((IOERR, 1)));
    assert_eq!(bench.ranged(DISCARD, &[(0, 1, 0)]), IOERR);
    assert_eq!(bench.ranged(WRITE_ZEROES, &[(0, 1, 0)]), IOERR);
}

/// Mostly plausible, so that chains get far, and sometimes wild.
fn descriptor() -> impl Strategy<Value = Desc> {
    let addr = prop_oneof![
        4 => Just(HEADER),
        2 => Just(STATUS),
        4 => DATA..MEMORY_END,
        1 => (0..64u64).prop_map(|n| INDIRECT + n * 16),
        1 => 0..INDIRECT,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        4 => Just(16u32),
        3 => Just(1),
        4 => (1..20u32).prop_map(|n| n * 512),
        2 => 0..3000u32,
        1 => any::<u32>(),
    ];
    let flags =
        prop_oneof![3 => Just(NEXT), 3 => Just(NEXT | WRITE), 2 => Just(WRITE), 1 => 0..8u16];
    (addr, len, flags, prop_oneof![9 => 0..SIZE, 1 => any::<u16>()])
}

type Case = (Vec<Desc>, Vec<Desc>, (u32, u64), Vec<u16>, Vec<u8>);

fn case() -> impl Strategy<Value = Case> {
    let kind = prop_oneof![9 => 0..16u32, 1 => any::<u32>()];
    let sector = prop_oneof![4 => 0..SECTORS + 2, 1 => any::<u64>()];
    (
        prop::collection::vec(descriptor(), SIZE as usize),
        prop::collection::vec(descriptor(), 64),
        (kind, sector),
        prop::collection::vec(prop_oneof![9 => 0..SIZE, 1 => any::<u16>()], 1..8),
        prop::collection::vec(any::<u8>(), 64),
    )
}

fn contents(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY_END as usize];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// Serves a random case; the device may write only where the guest said that it may.
fn survive(
    (table, indirect, (kind, sector), heads, ranges): Case,
) -> std::result::Result<(), TestCaseError> {
    let bench = Bench::new();
    bench.header(kind, sector);
    bench.table(TABLE, &table);
    bench.table(INDIRECT, &indirect);
    bench.memory.write_slice(&ranges, GuestAddress(DATA)).unwrap();
    let before = contents(&bench.memory);
    let served = bench.serve(&heads, heads.len() as u16);
    let after = contents(&bench.memory);
    prop_assert!(served.unwrap_or(0) <= heads.len() as u64);

    let mut allowed = vec![false; MEMORY_END as usize];
    allowed[AVAIL as usize..USED as usize + 6 + 8 * SIZE as usize].fill(true);
    let mut writable = table.iter().chain(&indirect).filter(|d| d.2 & WRITE != 0);
    // A guest that lets the device write over its descriptors has changed what it allows.
    if writable.clone().any(|d| d.0 < HEADER) {
        return Ok(());
    }
    writable.by_ref().filter(|d| d.0 < MEMORY_END).for_each(|&(addr, len, ..)| {
        let end = addr.saturating_add(len.into()).min(MEMORY_END);
        allowed[addr as usize..end as usize].fill(true);
    });
    let wrong = (0..MEMORY_END as usize).find(|&at| before[at] != after[at] && !allowed[at]);
    prop_assert_eq!(wrong, None, "the device wrote where it may not");
    Ok(())
}

#[test]
fn no_random_chain_makes_the_device_write_where_it_may_not() {
    let seed = match std::env::var("VDISK_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => rand_seed(),
    };
    println!("VDISK_SEED={seed}");
    let config = Config {
        cases: 4000,
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new(config).run(&case(), survive).unwrap();
}

fn rand_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |since| since.as_nanos() as u64)
}
