//! Files that lie: truncated and mutated images give errors or answers, never a panic, a hang or
//! memory without bound; and no guest byte lands on metadata.
//!
//! The cases run in a child of bounded memory: an allocation that a number in the file asked for
//! would end it.

use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vdisk::ErrorKind;
use vdisk::addr::Unit;
use vdisk::block::BlockDevice;
use vdisk::chain::{Chain, Format};
use vdisk::image;
use vdisk::luks::{self, Passphrase};
use vdisk::qcow2::{self, CreateOptions, DataFile, Encryption, Method, OpenOptions, Repair};
use vdisk::storage::{FileOptions, FileStorage, MemoryStorage, Storage};

use crate::crash::layer;
use crate::dice::{Budget, Confess, Dice, seed};
use crate::model::{Model, pattern, random_op, random_range};
use crate::processes::{have_qemu, run};

/// No single case may take longer.
const PATIENCE: Duration = Duration::from_secs(10);

fn get(file: &[u8], at: usize) -> u64 {
    let bytes = file.get(at..at + 8).map_or([0; 8], |b| b.try_into().unwrap());
    u64::from_be_bytes(bytes)
}

fn put(file: &mut [u8], at: usize, value: &[u8]) {
    if let Some(bytes) = file.get_mut(at..at + value.len()) {
        bytes.copy_from_slice(value);
    }
}

/// Where an image keeps what, as far as a mutation cares.
struct Places {
    cluster: u64,
    l1: u64,
    l1_entries: u64,
    refcount_table: u64,
    snapshots: u64,
}

impl Places {
    fn of(file: &[u8]) -> Places {
        Places {
            cluster: 1 << (get(file, 16) & 31),
            l1: get(file, 40),
            l1_entries: get(file, 32) & 0xffff_ffff,
            refcount_table: get(file, 48),
            snapshots: get(file, 64),
        }
    }

    /// The place of some number in some structure of the file.
    fn some(&self, file: &[u8], dice: &mut Dice) -> u64 {
        const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
        let l2 = |dice: &mut Dice| {
            get(file, (self.l1 + dice.below(self.l1_entries.max(1)) * 8) as usize) & OFFSET
        };
        let block = get(file, self.refcount_table as usize) & OFFSET;
        match dice.below(10) {
            0..3 => dice.pick(&[4, 8, 16, 20, 24, 32, 36, 40, 48, 56, 60, 64, 72, 80, 88, 96, 100]),
            3 => 104 + dice.below(512),
            4 => self.l1 + dice.below(self.l1_entries.max(1)) * 8,
            5 | 6 => l2(dice) + dice.below(self.cluster) / 8 * 8,
            7 => self.refcount_table + dice.below(8) * 8,
            8 => block + dice.below(self.cluster),
            _ => self.snapshots + dice.below(200),
        }
    }
}

fn mutate(file: &mut Vec<u8>, dice: &mut Dice) {
    let places = Places::of(file);
    for _ in 0..1 + dice.below(4) {
        let at = places.some(file, dice) as usize;
        let cluster = dice.below(file.len() as u64 / places.cluster + 2) * places.cluster;
        let value = match dice.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => cluster | 1 << 63,
            3 => cluster,
            4 => dice.next(),
            5 => 1 << dice.below(64),
            6 => cluster | 1 << 62 | dice.next() << 54,
            _ => get(file, at) ^ 1 << dice.below(64),
        };
        match dice.below(4) {
            0 => put(file, at, &value.to_be_bytes()[4..]),
            1 => put(file, at, &value.to_be_bytes()[6..]),
            _ => put(file, at, &value.to_be_bytes()),
        }
    }
    if dice.once_in(6) {
        file.truncate(dice.below(file.len() as u64) as usize);
    }
}

/// The properties of an image whose data are in another file, and of one that is encrypted.
fn elsewhere(size: u64) -> [CreateOptions; 2] {
    let storage = Arc::new(MemoryStorage::default());
    let quick = luks::Options { iter_time: Duration::from_millis(1), ..luks::Options::default() };
    let data_file = DataFile { name: "data".to_owned(), raw: true, storage };
    let encryption = Encryption { passphrase: passphrase(), method: Method::Luks(quick) };
    let plain = CreateOptions { cluster: Unit::from_bits(12), ..CreateOptions::new(size) };
    [
        CreateOptions { data_file: Some(data_file), ..plain.clone() },
        CreateOptions { encryption: Some(encryption), ..plain },
    ]
}

/// Images of different shapes to be mutated: data, zeroes, compressed clusters, snapshots, bitmaps.
fn originals(dir: &Path) -> Vec<Vec<u8>> {
    let mut dice = Dice::new(7);
    let mut found = Vec::new();
    for (bits, extended_l2, refcount_bits) in [(9, false, 64), (12, false, 1), (14, true, 16)] {
        let cluster = Unit::from_bits(bits);
        let size = 200 << 10;
        let options =
            CreateOptions { cluster, extended_l2, refcount_bits, ..CreateOptions::new(size) };
        let storage = Arc::new(MemoryStorage::default());
        drop(qcow2::create(storage.clone(), &options).unwrap());
        let chain = disk(storage.clone(), false).unwrap();
        let mut model = Model::new(size);
        for _ in 0..20 {
            let op = random_op(&mut dice, size, 1 << bits);
            model.apply(&chain, &op).unwrap();
        }
        drop(chain);
        found.push(storage.to_vec());
    }
    for options in elsewhere(200 << 10) {
        let storage = Arc::new(MemoryStorage::default());
        drop(qcow2::create(storage.clone(), &options).unwrap());
        let chain = disk(storage.clone(), false).unwrap();
        for _ in 0..20 {
            let (at, len) = random_range(&mut dice, 200 << 10, 4096);
            chain.write_at(at, &[IoSlice::new(&pattern(at, len, 1))]).unwrap();
        }
        drop(chain);
        found.push(storage.to_vec());
    }
    if have_qemu() {
        let (raw, packed) = (dir.join("raw"), dir.join("packed"));
        std::fs::write(&raw, pattern(0, 200 << 10, 1)).unwrap();
        let qemu = |words: &str, files: &[&Path]| {
            let mut command = Command::new("qemu-img");
            let out = run(command.args(words.split(' ')).args(files));
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        };
        qemu("convert -c -f raw -O qcow2 -o cluster_size=4k", &[&raw, &packed]);
        qemu("snapshot -c one", &[&packed]);
        qemu("bitmap --add -g 4k", &[&packed, Path::new("map")]);
        found.push(std::fs::read(&packed).unwrap());
    }
    found
}

/// What opens any image: also one that mutation has made an encrypted one, or given a data file.
fn opening(read_only: bool) -> OpenOptions {
    let data_file: Arc<dyn Storage> = Arc::new(MemoryStorage::new(vec![7; 200 << 10]));
    OpenOptions {
        read_only,
        cache: 0,
        data_file: Some(data_file),
        passphrase: Some(passphrase()),
        ..OpenOptions::default()
    }
}

fn passphrase() -> Passphrase {
    Passphrase::new(b"open sesame".to_vec().into())
}

fn disk(storage: Arc<dyn Storage>, read_only: bool) -> vdisk::Result<Chain> {
    let options = opening(read_only);
    let image = Arc::new(qcow2::Image::open(storage, options)?);
    Ok(Chain::new(layer(image, Format::Qcow2), Vec::new(), 1 << 20))
}

/// Everything that a user may do with a file from somewhere. What comes of it is not the question:
/// it has to return.
fn use_it(path: &Path, dice: &mut Dice) {
    let begin = Instant::now();
    let open = |write| -> Arc<dyn Storage> {
        Arc::new(FileStorage::open(path, FileOptions { access: None, write }).unwrap())
    };
    let check = |write: bool, repair| {
        let options = OpenOptions { cache: 4 << 20, ..opening(!write) };
        qcow2::Image::open(open(write), options).and_then(|image| image.check(repair)).is_ok()
    };
    check(false, Repair::None);
    if let Ok(chain) = disk(open(false), true) {
        // Mapped clusters are looked at one by one, also by whoever goes through a disk for good.
        let _ = chain.extents(0, chain.size().min(1 << 36), 10_000);
        let mut buffer = vec![0; 1 << 20];
        for at in (0..chain.size().min(4 << 20)).step_by(1 << 20) {
            let len = (chain.size() - at).min(1 << 20) as usize;
            let _ = chain.read_at(at, &mut [IoSliceMut::new(&mut buffer[..len])]);
        }
    }
    if let Ok(chain) = disk(open(true), false) {
        for _ in 0..20 {
            let (at, len) = random_range(dice, chain.size().min(1 << 20), 4096);
            let _ = match dice.below(4) {
                0 => chain.discard(at, len),
                1 => chain.write_zeroes(at, len, true),
                2 => chain.flush(),
                _ => chain.write_at(at, &[IoSlice::new(&pattern(at, len, 1))]),
            };
        }
    }
    check(true, Repair::All);
    let took = begin.elapsed();
    assert!(took < PATIENCE, "one image kept us busy for {took:?}");
}

/// Images that ask for more than they are worth.
fn greedy(path: &Path) {
    let mut dice = Dice::new(3);
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions { cluster: Unit::from_bits(16), ..CreateOptions::new(1 << 20) };
    drop(qcow2::create(storage.clone(), &options).unwrap());
    let image = storage.to_vec();

    // Four million L1 entries, all of one L2 table, for a disk of 2^50 bytes and more.
    let mut many = image.clone();
    many.resize(40 << 20, 0);
    put(&mut many, 24, &(1u64 << 51).to_be_bytes());
    put(&mut many, 36, &(4u32 << 20).to_be_bytes());
    put(&mut many, 40, &(5u64 << 20).to_be_bytes());
    for entry in 0..4 << 20 {
        put(&mut many, (5 << 20) + entry * 8, &(1u64 << 63 | 4 << 20).to_be_bytes());
    }
    for entry in 0..8192 {
        put(&mut many, (4 << 20) + entry * 8, &(1u64 << 63 | 3 << 20).to_be_bytes());
    }
    std::fs::write(path, &many).unwrap();
    use_it(path, &mut dice);

    // A refcount table full of one block, and of blocks past the end.
    for block in [2u64 << 16, 1 << 40] {
        let mut full = image.clone();
        full.resize(12 << 20, 0);
        put(&mut full, 48, &(1u64 << 20).to_be_bytes());
        put(&mut full, 56, &128u32.to_be_bytes());
        for entry in 0..1 << 20 {
            put(&mut full, (1 << 20) + entry * 8, &block.to_be_bytes());
        }
        std::fs::write(path, &full).unwrap();
        use_it(path, &mut dice);
    }
}

/// Damages an image so that guest data, by its entries or by its refcounts, lies on metadata, and
/// uses it: whatever is answered, the metadata in the file stays the image's own.
#[test]
fn guest_data_never_overwrites_metadata() {
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions { cluster: Unit::from_bits(12), ..CreateOptions::new(1 << 20) };
    drop(qcow2::create(storage.clone(), &options).unwrap());
    let chain = disk(storage.clone(), false).unwrap();
    chain.write_at(0, &[IoSlice::new(&[1; 8192])]).unwrap();
    drop(chain);
    let good = storage.to_vec();
    let l1 = get(&good, 40);
    let l2 = get(&good, l1 as usize) & !(1 << 63);
    let block = get(&good, get(&good, 48) as usize);
    for target in [0, l1, l2, block, get(&good, 48)] {
        for copied in [0, 1 << 63] {
            let mut bad = good.clone();
            put(&mut bad, l2 as usize, &(target | copied).to_be_bytes());
            if target == 0 {
                // Offset 0 means unallocated: the header is reached by refcounts only.
                put(&mut bad, block as usize, &0u16.to_be_bytes());
            }
            let was = bad[target as usize..][..64].to_vec();
            let storage = Arc::new(MemoryStorage::new(bad));
            let chain = disk(storage.clone(), false).unwrap();
            let done = chain.write_at(100, &[IoSlice::new(&[0xaa; 500])]);
            assert_eq!(done.unwrap_err().kind(), ErrorKind::Corrupt, "{target:#x}");
            for _ in 0..3 {
                let _ = chain.discard(0, 4096);
                let _ = chain.write_zeroes(0, 4096, true);
                let _ = chain.write_at(40960, &[IoSlice::new(&[0xaa; 20_000])]);
                let _ = chain.flush();
            }
            assert!(!storage.to_vec()[target as usize..][..64].contains(&0xaa), "{target:#x}");
            if target == 0 || target == l1 {
                let now = storage.to_vec()[target as usize..][..was.len()].to_vec();
                assert_eq!(now[..64], was[..64], "{target:#x}");
            }
        }
    }
    // An L1 entry that makes a refcount block an L2 table.
    let mut bad = good.clone();
    put(&mut bad, l1 as usize, &(block | 1 << 63).to_be_bytes());
    let refused = disk(Arc::new(MemoryStorage::new(bad)), false).err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::Corrupt);
}

#[test]
fn a_huge_empty_disk_is_gone_through_at_once() {
    // Unmapped stretches were looked at page by page of the flattened map, and every read of an
    // empty disk looked through its whole L1 table.
    let size = 1 << 60;
    let options = CreateOptions { cluster: Unit::from_bits(21), ..CreateOptions::new(size) };
    let make = || {
        let storage = Arc::new(MemoryStorage::default());
        let image = qcow2::create(storage, &options).unwrap();
        image::Image::flush(&image).unwrap();
        layer(Arc::new(image), Format::Qcow2)
    };
    let chain = Chain::new(make(), vec![make(), make()], 1 << 20);
    chain.write_at(size / 2, &[IoSlice::new(&[1; 512])]).unwrap();
    let begin = Instant::now();
    let extents = chain.extents(0, size, 10).unwrap();
    assert_eq!(extents.len(), 3);
    for _ in 0..1000 {
        chain.read_at(size / 4, &mut [IoSliceMut::new(&mut [0; 512])]).unwrap();
    }
    // What it must not take is days: no machine is so slow.
    assert!(begin.elapsed() < PATIENCE);
}

/// What the child does in `dir`, where the originals are.
fn torture(dir: &Path, seed: u64) {
    let path = dir.join("image");
    greedy(&path);
    let names = (0..).map(|number| dir.join(format!("original{number}")));
    let originals: Vec<_> = names.map_while(|name| std::fs::read(name).ok()).collect();
    let budget = Budget::new(6);
    let mut done = 0;
    while budget.goes_on(done) {
        let seed = if done == 0 { seed } else { seed.wrapping_add(done) };
        let _confess = Confess(seed);
        let mut dice = Dice::new(seed);
        let mut file = originals[dice.below(originals.len() as u64) as usize].clone();
        mutate(&mut file, &mut dice);
        std::fs::write(&path, &file).unwrap();
        use_it(&path, &mut dice);
        done += 1;
    }
    eprintln!("{done} images, VDISK_SEED={seed:#x}");
}

#[test]
fn mutated_images_cost_neither_panic_nor_patience_nor_memory() {
    if let Some(dir) = std::env::var_os("VDISK_HOSTILE_DIR") {
        return torture(Path::new(&dir), seed());
    }
    let dir = tempfile::tempdir().unwrap();
    for (number, image) in originals(dir.path()).iter().enumerate() {
        std::fs::write(dir.path().join(format!("original{number}")), image).unwrap();
    }
    // Address space, of which the test's own code and threads take a part.
    let mut child = Command::new("prlimit");
    child.arg("--as=600000000").arg(std::env::current_exe().unwrap());
    child.args(["--exact", "hostile::mutated_images_cost_neither_panic_nor_patience_nor_memory"]);
    child.args(["--nocapture", "--test-threads=1"]).env("VDISK_HOSTILE_DIR", dir.path());
    let out = run(&mut child);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    eprintln!("{said}");
}
