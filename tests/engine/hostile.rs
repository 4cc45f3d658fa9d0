//! Files that lie: images that ask for more than they are worth give errors or answers, never a
//! panic, a hang or memory without bound; and no guest byte lands on metadata.

use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vdisk::ErrorKind;
use vdisk::internals::addr::Unit;
use vdisk::internals::block::BlockDevice;
use vdisk::internals::chain::Chain;
use vdisk::internals::image;
use vdisk::internals::open::Format;
use vdisk::internals::qcow2::{self, CreateOptions, OpenOptions, Repair};
use vdisk::internals::storage::{FileOptions, FileStorage, MemoryStorage, Storage};

use crate::crash::layer;
use crate::dice::Dice;
use crate::model::{pattern, random_range};
use crate::mutation::{get, put};
use crate::shapes::opening;

/// No single case may take longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs one case, which takes no longer than it may. What counts is this thread's own time: the
/// machine may have other things to do.
pub fn patiently<T>(case: impl FnOnce() -> T) -> T {
    let busy = || {
        let said = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
        let nanoseconds = said.split(' ').next().and_then(|first| first.parse().ok());
        Duration::from_nanos(nanoseconds.unwrap_or(0))
    };
    let begin = busy();
    let done = case();
    let took = busy() - begin;
    assert!(took < PATIENCE, "one image kept us busy for {took:?}");
    done
}

fn disk(storage: Arc<dyn Storage>, read_only: bool) -> vdisk::Result<Chain> {
    let options = opening(read_only);
    let image = Arc::new(qcow2::Image::open(storage, options)?);
    Ok(Chain::new(layer(image, Format::Qcow2), Vec::new(), 1 << 20))
}

/// Everything that a user may do with a file from somewhere. What comes of it is not the question:
/// it has to return.
pub fn use_it(path: &Path, dice: &mut Dice) {
    patiently(|| use_all_of_it(path, dice));
}

fn use_all_of_it(path: &Path, dice: &mut Dice) {
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
}

/// Images that ask for more than they are worth.
pub fn greedy(path: &Path) {
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
    let l2 = get(&good, l1) & !(1 << 63);
    let block = get(&good, get(&good, 48));
    for target in [0, l1, l2, block, get(&good, 48)] {
        for copied in [0, 1 << 63] {
            let mut bad = good.clone();
            put(&mut bad, l2, &(target | copied).to_be_bytes());
            if target == 0 {
                // Offset 0 means unallocated: the header is reached by refcounts only.
                put(&mut bad, block, &0u16.to_be_bytes());
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
    put(&mut bad, l1, &(block | 1 << 63).to_be_bytes());
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
    // What it must not take is days.
    patiently(|| {
        let extents = chain.extents(0, size, 10).unwrap();
        assert_eq!(extents.len(), 3);
        for _ in 0..1000 {
            chain.read_at(size / 4, &mut [IoSliceMut::new(&mut [0; 512])]).unwrap();
        }
    });
}
