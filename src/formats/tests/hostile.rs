//! Damaged images: every fixture under random damage, opened, mapped and read. No panic, no hang,
//! no memory beyond what a small image is worth.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{differencing, fixture, open, storage, vhdx_log, vmdk_forms};
use crate::addr::GuestOffset;
use crate::block::total;
use crate::error::{Error, Result};
use crate::formats::vmdk::Plan;
use crate::formats::{vdi, vhd, vhdx};
use crate::image::{Image, Mapping};
use crate::storage::{MemoryStorage, Storage};

const ROUNDS: u64 = 400;
/// What a process may take for an image under 1 MiB: 256 MiB.
const MEMORY_KIB: u64 = 256 << 10;

/// A whole image, and the part of it that holds tables: where damage goes deepest.
struct Victim {
    format: &'static str,
    name: &'static str,
    bytes: Vec<u8>,
    tables: Range<usize>,
}

fn victims() -> Vec<Victim> {
    let packed = |format, name, tables| {
        let bytes = fixture(name);
        Victim { format, name, bytes, tables: 0..tables }
    };
    let extent =
        |name, bytes: Vec<u8>| Victim { format: "extent", name, tables: 0..bytes.len(), bytes };
    let (log, used) = vhdx_log::dirty_file();
    let child = differencing::vhd(&[Some(&[1, 2]), None, Some(&[7])], Some((b"W2ru", "base")), 4);
    let text = "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\n\
        createType=\"custom\"\nRW 3 FLAT \"a.bin\" 2\nRW 5 ZERO\nRW 1 FLAT \"b.bin\" 0\n";
    vec![
        Victim { format: "vmdk", name: "a descriptor", bytes: text.into(), tables: 0..text.len() },
        extent("a COWD extent", vmdk_forms::cowd(9000, &[0, 1, 2, 5000])),
        extent("a seSparse extent", vmdk_forms::space(40_000, &[0, 1, 4097], &[2, 3])),
        packed("vmdk", "sparse.vmdk", 72 << 10),
        packed("vmdk", "stream.vmdk", 132_608),
        packed("vpc", "dynamic.vhd", 4096),
        packed("vpc", "fixed.vhd", 1 << 20),
        packed("vhdx", "dynamic.vhdx", 4 << 20),
        packed("vdi", "dynamic.vdi", 1024),
        packed("qcow", "packed.qcow", 8 << 10),
        packed("qed", "table.qed", 640 << 10),
        packed("parallels", "table.parallels", 1024),
        Victim { format: "vhdx", name: "a VHDX log", bytes: log, tables: used..used + 16384 },
        Victim { format: "vpc", name: "a VHD child", tables: 0..child.len(), bytes: child },
        Victim {
            format: "vhdx",
            name: "a VHDX child",
            bytes: differencing::vhdx(),
            tables: 0..4 << 20,
        },
    ]
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// Positions whose damage means something: bytes that are not zero, or near one.
fn interesting(bytes: &[u8], tables: Range<usize>) -> Vec<usize> {
    let marked = |&at: &usize| {
        let from = at.saturating_sub(8);
        bytes[from..(at + 8).min(bytes.len())].iter().any(|&b| b != 0)
    };
    let tail = bytes.len().saturating_sub(1536)..bytes.len();
    (tables.start..tables.end.min(bytes.len())).filter(marked).chain(tail).collect()
}

fn damage(bytes: &mut Vec<u8>, places: &[usize], random: &mut Random) {
    for _ in 0..1 + random.below(6) {
        let at = places[random.below(places.len())];
        let value = random.next();
        let edge = [0, 1, 0x7f, 0x80, 0xff][random.below(5)];
        match random.below(5) {
            0 => bytes[at] ^= 1 << (value % 8),
            1 => bytes[at] = edge,
            2 => bytes[at..].iter_mut().take(4).for_each(|b| *b = edge),
            3 => bytes[at..].iter_mut().take(8).for_each(|b| *b = edge),
            _ => bytes[at..].iter_mut().take(4).zip(value.to_le_bytes()).for_each(|(b, v)| *b = v),
        }
    }
    if random.below(10) == 0 {
        bytes.truncate(random.below(bytes.len()));
    }
}

/// Checksums put right, or damage goes no further than them.
fn seal(format: &str, bytes: &mut [u8], random: &mut Random) {
    if random.below(4) == 0 {
        return;
    }
    let vhd = |bytes: &mut [u8], at: usize, len: usize, sum: usize| {
        let Some(part) = bytes.get_mut(at..at + len) else { return };
        part[sum..sum + 4].fill(0);
        let total: u32 = part.iter().map(|&b| u32::from(b)).sum();
        part[sum..sum + 4].copy_from_slice(&(!total).to_be_bytes());
    };
    match format {
        "vpc" => {
            let end = bytes.len().saturating_sub(512);
            vhd(bytes, end, 512, 64);
            if bytes.starts_with(b"conectix") {
                vhd(bytes, 0, 512, 64);
                vhd(bytes, 512, 1024, 36);
            }
        }
        "vhdx" => {
            for (at, len) in
                [(64 << 10, 4096), (128 << 10, 4096), (192 << 10, 65536), (256 << 10, 65536)]
            {
                let Some(part) = bytes.get_mut(at..at + len) else { return };
                part[4..8].fill(0);
                let crc = crc32c::crc32c(part);
                part[4..8].copy_from_slice(&crc.to_le_bytes());
            }
        }
        _ => {}
    }
}

/// The same for whole entries of a VHDX log.
fn seal_log(bytes: &mut [u8], tables: &Range<usize>) {
    let mut at = tables.start;
    while at + 64 <= tables.end && tables.end <= bytes.len() {
        let len = bytes[at + 8..at + 12].try_into().map_or(0, u32::from_le_bytes) as usize;
        if len >= 64 && at + len <= tables.end {
            let entry = &mut bytes[at..at + len];
            entry[4..8].fill(0);
            let crc = crc32c::crc32c(entry);
            entry[4..8].copy_from_slice(&crc.to_le_bytes());
        }
        at += len.next_multiple_of(4096).max(4096);
    }
}

/// Maps everything and reads the ends of every extent, within bounds: a damaged size may promise
/// exabytes of zeroes.
fn walk(image: &dyn Image) -> bool {
    let mut at = 0;
    for _ in 0..2000 {
        if at >= image.size() {
            break;
        }
        let start = crate::addr::GuestOffset(at);
        let extent = match image.map(start, image.size() - at) {
            Ok(extent) => extent,
            // Go on behind a bad entry.
            Err(_) => {
                at = at.saturating_add(image.cluster().bytes());
                continue;
            }
        };
        assert!(extent.start == start && extent.len > 0 && extent.len <= image.size() - at);
        let mut buf = vec![0; extent.len.min(65536) as usize];
        if extent.mapping != Mapping::Unallocated {
            let _ = image.read(&extent, start, &mut [IoSliceMut::new(&mut buf)]);
            let last = start + (extent.len - buf.len() as u64);
            let _ = image.read(&extent, last, &mut [IoSliceMut::new(&mut buf)]);
        }
        at += extent.len;
    }
    true
}

/// A file on a host that has room for 64 MiB.
struct Small(MemoryStorage);

impl Small {
    fn check(end: u64) -> Result<()> {
        let full = || Error::io("full", std::io::Error::from_raw_os_error(nix::libc::ENOSPC));
        if end > 64 << 20 { Err(full()) } else { Ok(()) }
    }
}

impl Storage for Small {
    fn len(&self) -> Result<u64> {
        self.0.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        Small::check(len).and_then(|()| self.0.set_len(len))
    }

    fn is_fixed(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.0.read_at(offset, bufs)
    }

    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        Small::check(offset.saturating_add(total(bufs)))?;
        self.0.write_at(offset, bufs)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.0.punch_hole(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        Small::check(offset.saturating_add(len))?;
        self.0.write_zeroes(offset, len)
    }

    fn sync(&self) -> Result<()> {
        self.0.sync()
    }
}

/// Writes a bit of everything to an image that is opened for it, where its blocks are small.
fn write(format: &str, bytes: &[u8]) {
    let storage = Arc::new(Small(MemoryStorage::new(bytes.to_vec())));
    let image: Result<Box<dyn Image>> = match format {
        "vdi" => vdi::fill(storage).map(|image| Box::new(image) as _),
        "vpc" => vhd::fill(storage, vhd::SizeBy::Creator).map(|image| Box::new(image) as _),
        "vhdx" => vhdx::fill(storage).map(|image| Box::new(image) as _),
        "vmdk" => Plan::read(storage).and_then(|plan| {
            let file = || Arc::new(Small(MemoryStorage::new(vec![0; 4096])));
            let files: Vec<_> = plan.files().iter().map(|_| file() as Arc<dyn Storage>).collect();
            plan.open_to_write(&files).map(|image| Box::new(image) as _)
        }),
        _ => return,
    };
    let Ok(image) = image else { return };
    if image.cluster().bytes() > 2 << 20 {
        return;
    }
    for at in [0, 1 << 20, 3 << 20, image.size() / 1024 * 512] {
        let Ok(extent) = image.map(GuestOffset(at), 512) else { continue };
        let bufs = [IoSlice::new(&[7; 512])];
        match extent.mapping {
            Mapping::Data { exclusive: true, .. } if extent.len == 512 => {
                let _ = image.overwrite(&extent, GuestOffset(at), &bufs);
            }
            _ => {
                let start = image.granularity().floor(at);
                let Ok(place) = image.prepare(GuestOffset(start), 512) else { continue };
                if place.len() >= 512 && place.write(0, &bufs).is_ok() {
                    let _ = place.commit();
                }
            }
        }
    }
    let _ = image.flush();
}

/// Answers whether the image opened.
fn attack(format: &str, bytes: Vec<u8>) -> bool {
    write(format, &bytes);
    if format == "vmdk" {
        // A damaged header may name other files: they hold nothing.
        let Ok(plan) = Plan::read(storage(bytes)) else { return false };
        let files: Vec<_> = plan.files().iter().map(|_| storage(vec![0; 4096])).collect();
        return plan.open(&files).is_ok_and(|image| walk(&image));
    }
    if format == "extent" {
        // One file of a disk that a whole descriptor describes.
        let text = "version=1\ncreateType=\"custom\"\nRW 9000 SPARSE \"x\"\n";
        let plan = Plan::read(storage(text.into())).unwrap();
        return plan.open(&[storage(bytes)]).is_ok_and(|image| walk(&image));
    }
    open(format, bytes, &[]).is_ok_and(|image| walk(&*image))
}

fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
#[ignore = "run by the test below, in a process of its own"]
fn damaged_images_in_this_process() {
    let seed = std::env::var("VDISK_SEED").unwrap().parse::<u64>().unwrap();
    for Victim { format, name, bytes: whole, tables } in victims() {
        let places = interesting(&whole, tables.clone());
        let mut opened = 0;
        for round in 0..ROUNDS {
            let mut random = Random((seed ^ (round << 32)) | 1);
            random.next();
            let mut bytes = whole.clone();
            damage(&mut bytes, &places, &mut random);
            seal(format, &mut bytes, &mut random);
            if name == "a VHDX log" {
                seal_log(&mut bytes, &tables);
            }
            let begin = Instant::now();
            opened += u64::from(attack(format, bytes));
            let took = begin.elapsed();
            assert!(took < Duration::from_secs(10), "{name} round {round}: {took:?}");
        }
        println!("{name}: {} places, {opened} opened, peak {} KiB", places.len(), peak_kib());
        // Damage that always or never reaches the tables tests nothing.
        assert!((ROUNDS / 20..ROUNDS).contains(&opened), "{name}: {opened} of {ROUNDS} opened");
    }
    assert!(peak_kib() < MEMORY_KIB, "{} KiB", peak_kib());
}

#[test]
fn damaged_images_give_errors_and_take_little() {
    let seed = std::env::var("VDISK_SEED").unwrap_or_else(|_| "20261121".to_owned());
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture"])
        .arg("formats::tests::hostile::damaged_images_in_this_process")
        .env("VDISK_SEED", &seed)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("VDISK_SEED={seed}\n{text}");
    assert!(text.contains("1 passed"), "{}", String::from_utf8_lossy(&output.stderr));
}
