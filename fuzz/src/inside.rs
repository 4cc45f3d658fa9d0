//! What is inside a disk: file systems and archives, damaged. One body for each target.
//!
//! A file system is hundreds of kilobytes, of which few say anything: so the bytes of these targets are no image,
//! but damage to one of several. The first says to which, the second what is done with it, and each eight that
//! follow are a place, among the blocks that hold anything, and what stands there.

use std::collections::HashMap;
use std::io::{Cursor, IoSlice, IoSliceMut};
use std::sync::{Arc, LazyLock, Mutex};

use vdisk::internals::block::{BlockDevice, BlockExtent, BlockStatus, check_range};
use vdisk::internals::filesystem::ext4::compare::compare;
use vdisk::internals::filesystem::ext4::mounted::{
    Change, Clock, Format, Mounted, New, Onto, Options, Place, ROOT, Seek, format,
};
use vdisk::internals::filesystem::ext4::{Ext4, Moments};
use vdisk::internals::filesystem::fat::Fat;
use vdisk::internals::filesystem::{partition, path, probe, tree};

use crate::dice::Dice;

/// A part of a disk that is held at a time.
const PAGE: u64 = 4096;
/// What damage is counted by.
const CHUNK: usize = 1024;
/// Bytes of a whole disk.
const SIZE: u64 = 16 << 20;
/// Files that are looked at.
const FILES: usize = 60;

/// A disk in memory that shares what nobody has written.
#[derive(Clone)]
pub struct Ram {
    below: Arc<Vec<u8>>,
    size: u64,
    pages: Arc<Mutex<HashMap<u64, Vec<u8>>>>,
}

impl Ram {
    pub fn new(below: Arc<Vec<u8>>, size: u64) -> Ram {
        Ram { below, size, pages: Arc::default() }
    }

    /// All of it.
    fn bytes(&self) -> Vec<u8> {
        let mut all = vec![0; self.size as usize];
        self.read_at(0, &mut [IoSliceMut::new(&mut all)]).unwrap();
        all
    }

    fn page(&self, number: u64) -> Vec<u8> {
        let start = (number * PAGE) as usize;
        let mut page = vec![0; PAGE as usize];
        let there = self.below.get(start..).unwrap_or_default();
        let len = there.len().min(page.len());
        page[..len].copy_from_slice(&there[..len]);
        page
    }

    /// Reads what nobody has written from where it is.
    fn read(&self, offset: u64, buf: &mut [u8]) {
        let pages = self.pages.lock().unwrap();
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let len = (buf.len() - done).min(PAGE as usize - within);
            let to = &mut buf[done..done + len];
            match pages.get(&(at / PAGE)) {
                Some(page) => to.copy_from_slice(&page[within..within + len]),
                None => {
                    let there = self.below.get(at as usize..).unwrap_or_default();
                    let held = there.len().min(len);
                    to[..held].copy_from_slice(&there[..held]);
                    to[held..].fill(0);
                }
            }
            done += len;
        }
    }

    /// Calls `work` with each part of a range that is in one page: where it begins in the range, and it.
    fn each(&self, offset: u64, len: u64, mut work: impl FnMut(usize, &mut [u8])) {
        let mut pages = self.pages.lock().unwrap();
        let mut at = offset;
        while at < offset + len {
            let number = at / PAGE;
            let end = (offset + len).min((number + 1) * PAGE);
            let page = pages.entry(number).or_insert_with(|| self.page(number));
            let within = (at % PAGE) as usize..(at % PAGE + end - at) as usize;
            work((at - offset) as usize, &mut page[within]);
            at = end;
        }
    }
}

impl BlockDevice for Ram {
    fn size(&self) -> u64 {
        self.size
    }

    fn block_size(&self) -> u32 {
        512
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> vdisk::Result<()> {
        let mut at = offset;
        for buf in bufs {
            check_range(at, buf.len() as u64, self.size)?;
            self.read(at, buf);
            at += buf.len() as u64;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> vdisk::Result<()> {
        let mut at = offset;
        for buf in bufs {
            check_range(at, buf.len() as u64, self.size)?;
            self.each(at, buf.len() as u64, |start, page| {
                page.copy_from_slice(&buf[start..start + page.len()]);
            });
            at += buf.len() as u64;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> vdisk::Result<()> {
        check_range(offset, len, self.size)?;
        self.each(offset, len, |_, page| page.fill(0));
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> vdisk::Result<()> {
        self.write_zeroes(offset, len, true)
    }

    fn flush(&self) -> vdisk::Result<()> {
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, _: usize) -> vdisk::Result<Vec<BlockExtent>> {
        check_range(offset, len, self.size)?;
        Ok(vec![BlockExtent { offset, len, status: BlockStatus::Data }])
    }
}

/// An image to be damaged, and which of its chunks hold anything.
struct Shape {
    bytes: Arc<Vec<u8>>,
    size: u64,
    chunks: Vec<usize>,
}

impl Shape {
    fn new(bytes: Vec<u8>) -> Shape {
        let chunks = bytes.chunks(CHUNK).enumerate();
        let chunks = chunks.filter(|(_, chunk)| chunk.iter().any(|byte| *byte != 0));
        let chunks = chunks.map(|(number, _)| number).collect();
        Shape { size: bytes.len() as u64, bytes: Arc::new(bytes), chunks }
    }

    /// The same, damaged.
    fn damaged(&self, damage: &[u8]) -> Ram {
        let ram = Ram::new(self.bytes.clone(), self.size);
        for record in damage.chunks_exact(8) {
            let number = |at: usize| u64::from(u16::from_le_bytes([record[at], record[at + 1]]));
            let chunk = self.chunks[number(0) as usize % self.chunks.len()] as u64;
            let at = chunk * CHUNK as u64 + number(2) % CHUNK as u64;
            let (value, other) = (number(6), number(0) as usize % self.chunks.len());
            let wide = u64::from(record[5]) << 16 | value;
            let value: u64 = match record[4] >> 2 & 7 {
                0 => 0,
                1 => u64::MAX,
                2 => wide,
                3 => value,
                // Where something stands.
                4 => self.chunks[(other + value as usize) % self.chunks.len()] as u64,
                5 => 1 << (value & 63),
                6 => wide << (record[5] & 31),
                _ => value << 16 | 0xf30a,
            };
            let width = [1, 2, 4, 8][usize::from(record[4] & 3)];
            let width = width.min(self.size.saturating_sub(at) as usize);
            let bytes = IoSlice::new(&value.to_le_bytes()[..width]).to_vec();
            ram.write_at(at, &[IoSlice::new(&bytes)]).unwrap();
        }
        ram
    }
}

/// A small file system that mke2fs or mkfs.vfat has made, unpacked. See `testdata/README.md`.
fn made(packed: &[u8]) -> Shape {
    let mut bytes = Vec::new();
    std::io::copy(&mut flate2::read::GzDecoder::new(packed), &mut bytes).unwrap();
    Shape::new(bytes)
}

static SHAPES: LazyLock<Vec<Shape>> = LazyLock::new(|| {
    vec![
        own(true),
        own(false),
        made(include_bytes!("../../testdata/filesystems/blocks.ext2.gz")),
        made(include_bytes!("../../testdata/filesystems/inline.ext4.gz")),
    ]
});

static FAT: LazyLock<Shape> =
    LazyLock::new(|| made(include_bytes!("../../testdata/filesystems/small.fat.gz")));

fn fixed() -> Options {
    let clock = Clock::Fixed { seconds: 1_700_000_000, generation: 1 };
    Options { clock, ..Options::default() }
}

fn new(mode: u16) -> New<'static> {
    New { mode, umask: 0, uid: 0, gid: 0, device: (0, 0), target: b"file" }
}

/// An empty file system of this project's own.
fn empty() -> Ram {
    let ram = Ram::new(Arc::default(), SIZE);
    let device: Arc<dyn BlockDevice> = Arc::new(ram.clone());
    format(&device, SIZE, &Format { uuid: [1; 16], hash_seed: [2; 16], seconds: 1_700_000_000 })
        .unwrap();
    ram
}

/// The same with files in it, and no checksums, which would find all damage. Where it is not closed, its journal
/// holds what was done last.
fn own(closed: bool) -> Shape {
    let ram = empty();
    let plain = |ram: &Ram| {
        // metadata_csum, among the features that an older kernel may read.
        let mut feature = [0; 4];
        ram.read_at(1024 + 0x64, &mut [IoSliceMut::new(&mut feature)]).unwrap();
        let feature = (u32::from_le_bytes(feature) & !0x400).to_le_bytes();
        ram.write_at(1024 + 0x64, &[IoSlice::new(&feature)]).unwrap();
    };
    plain(&ram);
    let fs = Mounted::open(Arc::new(ram.clone()), 0, SIZE, fixed()).unwrap();
    let directory = fs.create(ROOT, b"dir", &new(0o040_755)).unwrap();
    for number in 0..200 {
        let name = format!("a-name-that-is-long-enough-for-an-index-{number}");
        fs.create(directory, name.as_bytes(), &new(0o100_644)).unwrap();
    }
    let file = fs.create(ROOT, b"file", &new(0o100_644)).unwrap();
    // Pieces apart: more extents than an inode has room for.
    (0..12).for_each(|n| assert!(fs.write(file, n * 65536, &[n as u8 + 1; 5000]).is_ok()));
    fs.create(ROOT, b"link", &new(0o120_777)).unwrap();
    fs.set_attribute(file, b"user.note", Some(&[7; 200]), Default::default()).unwrap();
    fs.sync().unwrap();
    if closed {
        fs.close().unwrap();
    }
    Shape::new(ram.bytes())
}

/// Reads it in all ways there are, and writes into it.
pub fn filesystem(bytes: &[u8]) {
    let [which, what, damage @ ..] = bytes else { return };
    let shape = &SHAPES[usize::from(*which) % SHAPES.len()];
    let ram = shape.damaged(damage);
    look_around(&ram);
    let stop = || false;
    if let Ok(fs) = Ext4::open(&ram, 0, shape.size, &stop) {
        let whole = Ram::new(shape.bytes.clone(), shape.size);
        let before = Ext4::open(&whole, 0, shape.size, &stop).unwrap();
        let written = |_, _| true;
        let _ = compare(&Moments { before: &before, after: &fs, written: &written });
    }
    let read_only = Options { read_only: true, ..fixed() };
    if let Ok(fs) = Mounted::open(Arc::new(ram.clone()), 0, shape.size, read_only) {
        read(&fs);
    }
    if let Ok(fs) = Mounted::open(Arc::new(ram), 0, shape.size, fixed()) {
        write(&fs, *what);
        read(&fs);
        let _ = fs.close();
    }
}

fn look_around(ram: &Ram) {
    let _ = probe::probe(ram, 0, ram.size);
    let _ = partition::partitions(ram);
    let _ = vdisk::internals::filesystem::find(ram, Some(1));
}

/// Goes through some of its files.
fn read(fs: &Mounted) {
    let mut left = vec![ROOT];
    let mut seen = 0;
    let mut buf = vec![0; 8192];
    while let Some(number) = left.pop() {
        seen += 1;
        if seen > FILES {
            return;
        }
        let known = fs.attributes(number);
        for name in fs.list(number, 0, 64).unwrap_or_default() {
            let _ = fs.lookup(number, &name.name);
            left.push(name.inode);
        }
        for offset in [0, 65536, 1 << 32] {
            let _ = fs.read(number, offset, &mut buf);
            let _ = fs.seek(number, offset, Seek::Data);
            let _ = fs.seek(number, offset, Seek::Hole);
        }
        let _ = (fs.read_link(number), known);
        for name in fs.attribute_names(number).unwrap_or_default() {
            let _ = fs.attribute(number, &name);
        }
    }
    let _ = path::find(fs, b"/dir/../link/x", true);
    let _ = tree::walk(fs, ROOT, &mut |_| false);
    let _ = fs.statistics();
}

/// Changes some of them.
fn write(fs: &Mounted, what: u8) {
    let mut dice = Dice::new(u64::from(what));
    let mut known = vec![ROOT];
    for name in fs.list(ROOT, 0, 32).unwrap_or_default() {
        known.push(name.inode);
        known.extend(fs.list(name.inode, 0, 8).unwrap_or_default().iter().map(|name| name.inode));
    }
    let names: [&[u8]; 6] = [b"file", b"dir", b"link", b"more", b"new", b"other"];
    for _ in 0..16 {
        let (one, two) = (dice.pick(&known), dice.pick(&known));
        let (name, other) = (dice.pick(&names), dice.pick(&names));
        let at = dice.pick(&[0, 1, 4000, 65536, 1 << 20, 1 << 31]);
        let _ = match dice.below(12) {
            0 => fs.create(one, name, &new(0o100_644)).map(drop),
            1 => fs.create(one, name, &new(0o040_755)).map(drop),
            2 => fs.create(one, name, &new(0o120_777)).map(drop),
            3 => fs.unlink(one, name),
            4 => fs.remove_directory(one, name),
            5 => fs.rename(Place::new(one, name), Place::new(two, other), Onto::default()),
            6 => fs.link(one, two, name),
            7 => fs.set_attribute(one, b"user.other", Some(&[3; 90]), Default::default()),
            8 => {
                let change = Change { size: Some(at), ..Change::default() };
                fs.set_attributes(one, &change).map(drop)
            }
            9 => tree::remove(fs, one),
            10 => fs.sync(),
            _ => fs.write(one, at, &[5; 3000]).map(drop),
        };
    }
}

/// Reads a FAT file system.
pub fn fat(bytes: &[u8]) {
    let [_, _, damage @ ..] = bytes else { return };
    let ram = FAT.damaged(damage);
    look_around(&ram);
    let Ok(fat) = Fat::open(Arc::new(ram.clone()), 0, ram.size) else { return };
    let _ = fat.uuid();
    for path in ["/data", "/loader/entries", "/loader/entries/A long name.conf", "/none/x"] {
        let Ok(Some(node)) = fat.find(path) else { continue };
        let _ = fat.names(&node);
        let mut buf = vec![0; 40000];
        let _ = fat.read(&node, 0, &mut buf);
        let _ = fat.read(&node, 1 << 31, &mut buf);
    }
}

/// Bytes as a disk's partition tables.
pub fn partitions(bytes: &[u8]) {
    let mut disk = bytes.to_vec();
    disk.resize(disk.len().max(64 << 10).next_multiple_of(512), 0);
    sum_up(&mut disk);
    look_around(&Ram::new(Arc::new(disk.clone()), disk.len() as u64));
}

/// Gives a GPT's header and entries the checksums that they should have, as far as they lie inside.
fn sum_up(disk: &mut [u8]) {
    const HEADER: usize = 512;
    if !disk[HEADER..].starts_with(b"EFI PART") {
        return;
    }
    let number = |at: usize| {
        let bytes = disk[HEADER + at..][..4].try_into().unwrap();
        u32::from_le_bytes(bytes) as usize
    };
    let start = number(72).saturating_mul(512);
    let len = number(80).saturating_mul(number(84));
    let entries = start.checked_add(len).and_then(|end| disk.get(start..end));
    if let Some(sum) = entries.map(crc32fast::hash) {
        disk[HEADER + 88..][..4].copy_from_slice(&sum.to_le_bytes());
    }
    let len = u32::from_le_bytes(disk[HEADER + 12..][..4].try_into().unwrap()) as usize;
    disk[HEADER + 16..][..4].fill(0);
    if let Some(sum) = disk.get(HEADER..HEADER.saturating_add(len)).map(crc32fast::hash) {
        disk[HEADER + 16..][..4].copy_from_slice(&sum.to_le_bytes());
    }
}

/// Bytes as a layer's archive, unpacked into an empty file system.
pub fn archive(bytes: &[u8]) {
    static EMPTY: LazyLock<Arc<Vec<u8>>> = LazyLock::new(|| Arc::new(empty().bytes()));
    let Ok(plain) = vdisk::internals::oci::tar::plain(Cursor::new(bytes.to_vec())) else {
        return;
    };
    let ram = Ram::new(EMPTY.clone(), SIZE);
    let fs = Mounted::open(Arc::new(ram), 0, SIZE, fixed()).unwrap();
    // What a bomb is to the host is bounded where it is imported: by the disk's size.
    let done = vdisk::internals::oci::tar::unpack(&fs, plain, &mut |bytes| bytes < SIZE);
    if done.is_ok() {
        read(&fs);
    }
    fs.close().unwrap();
}
