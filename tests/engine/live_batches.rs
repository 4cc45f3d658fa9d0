//! Merges in batches give back what they have copied, under readers that found a moment ago where it
//! stood: they read it all the same, and never zeroes.

use std::io::IoSliceMut;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vdisk::Result;
use vdisk::internals::addr::{GuestOffset, Unit};
use vdisk::internals::block::BlockDevice;
use vdisk::internals::chain::{Chain, Layer};
use vdisk::internals::change::live::Live;
use vdisk::internals::change::merge::Wishes;
use vdisk::internals::change::plan::{Direction, Keeping, Method};
use vdisk::internals::change::{merge, snapshot};
use vdisk::internals::image::{Extent, Filter, Image};
use vdisk::internals::open;
use vdisk::internals::open::OpenOptions;
use vdisk::internals::qcow2::CreateOptions;

use crate::dice::{Dice, rounds};
use crate::model::pattern;
use crate::processes::undisturbed;
use crate::property::{check_layer, open_patiently};
use crate::threads::{disturb, holds};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 24 * MIB;
/// What one thread, or nobody, writes.
const STRIPE: u64 = 40_000;
const READERS: u64 = 3;
/// Reads for which each step of a merge waits.
const MEANWHILE: u64 = 10;

/// A layer whose reads come long after whoever reads has found where to.
struct Slow(Arc<dyn Image>, AtomicU64);

impl Filter for Slow {
    fn inner(&self) -> &dyn Image {
        &*self.0
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        // Now and then longer than it takes to copy a batch.
        let long = self.1.fetch_add(1, Ordering::Relaxed).is_multiple_of(16);
        std::thread::sleep(Duration::from_millis(if long { 80 } else { 1 }));
        self.0.read(extent, at, bufs)
    }
}

/// A disk on the snapshots `a` and `b`, which hold so many MiB; returns what it shows.
fn make(path: &Path, dice: &mut Dice, (a, b): (u64, u64)) -> Vec<u8> {
    let cluster = Unit::from_bits(dice.pick(&[12, 16]));
    open::create(path, &CreateOptions { cluster, ..CreateOptions::new(SIZE) }).unwrap();
    let mut bytes = vec![0; SIZE as usize];
    for (name, at, len) in [("a", 0, a), ("b", a / 2, b), ("", 20, 1)] {
        let disk = open_patiently(path, &OpenOptions::writable()).unwrap();
        let (at, len) = (at * MIB, len * MIB);
        let data = pattern(at, len, dice.next());
        disk.write_at(at, &[std::io::IoSlice::new(&data)]).unwrap();
        bytes[at as usize..(at + len) as usize].copy_from_slice(&data);
        drop(disk);
        if !name.is_empty() {
            undisturbed(|| snapshot::create(path, name, "").unwrap());
        }
    }
    bytes
}

/// Reads what nobody writes, over and over.
fn read_on(disk: &Chain, bytes: &[u8], mut dice: Dice, (over, done): (&AtomicBool, &AtomicU64)) {
    while !over.load(Ordering::Relaxed) {
        let stripe = dice.below(SIZE / STRIPE);
        if stripe.is_multiple_of(4) {
            continue;
        }
        let from = stripe * STRIPE + dice.below(STRIPE / 2);
        let len = dice.below(STRIPE / 2) + 1;
        holds(disk, from, &bytes[from as usize..(from + len) as usize]);
        done.fetch_add(1, Ordering::Relaxed);
    }
}

/// Writes every fourth stripe; returns what stands there in the end.
fn write_on(disk: &Chain, bytes: &[u8], mut dice: Dice, over: &AtomicBool) -> Vec<(u64, Vec<u8>)> {
    let all = (0..SIZE / STRIPE).step_by(4).map(|n| n * STRIPE);
    let mut stripes: Vec<_> =
        all.map(|at| (at, bytes[at as usize..(at + STRIPE) as usize].to_vec())).collect();
    while !over.load(Ordering::Relaxed) {
        let number = dice.below(stripes.len() as u64) as usize;
        let (at, bytes) = &mut stripes[number];
        if !disturb(disk, &mut dice, *at, bytes) {
            holds(disk, *at, bytes);
        }
    }
    stripes
}

/// Waits until the readers have done something more, so that none finds the merge done however fast the
/// host is; not for long, where they wait for the merge.
fn let_read(done: &AtomicU64) {
    let (before, until) = (done.load(Ordering::Relaxed), Instant::now() + Duration::from_secs(2));
    while done.load(Ordering::Relaxed) < before + MEANWHILE && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn merge_under_readers(dice: &mut Dice, sizes: (u64, u64), name: &str, direction: Direction) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let bytes = make(&path, dice, sizes);
    let layers = open_patiently(&path, &OpenOptions::writable()).unwrap().all_layers();
    let slow = |layer: &Layer| {
        let image = Arc::new(Slow(layer.image.clone(), AtomicU64::new(0)));
        Layer { image, ..layer.clone() }
    };
    let lower = layers[1..].iter().map(slow).collect();
    let disk = Arc::new(Chain::new(layers[0].clone(), lower, MIB));
    drop(layers);
    let live = Live::new(disk.clone(), &path).unwrap();
    let keeping = Keeping::NOTHING;
    let wishes = Wishes { in_batches: true, keeping, in_use: true, ..Wishes::default() };
    let plan = undisturbed(|| merge::plan_merge(&path, name, wishes)).unwrap();
    assert_eq!((plan.direction, plan.method), (Some(direction), Some(Method::Batches)));
    let (over, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let written = std::thread::scope(|scope| {
        for _ in 0..READERS {
            let (dice, disk) = (Dice::new(dice.next()), &disk);
            scope.spawn(|| read_on(disk, &bytes, dice, (&over, &done)));
        }
        let own = Dice::new(dice.next());
        let writer = scope.spawn(|| write_on(&disk, &bytes, own, &over));
        let merged = undisturbed(|| {
            live.merge(name, wishes, None, None, &mut |_, _| {
                let_read(&done);
                true
            })
        });
        over.store(true, Ordering::Relaxed);
        merged.unwrap();
        writer.join().unwrap()
    });
    assert!(done.load(Ordering::Relaxed) >= MEANWHILE, "readers came to nothing");
    let shows_all = |disk: &Chain| {
        let unwritten = (0..SIZE / STRIPE).filter(|n| !n.is_multiple_of(4)).map(|n| n * STRIPE);
        unwritten.for_each(|at| holds(disk, at, &bytes[at as usize..(at + STRIPE) as usize]));
        written.iter().for_each(|(at, bytes)| holds(disk, *at, bytes));
    };
    shows_all(&disk);
    drop((live, disk));
    shows_all(&open_patiently(&path, &OpenOptions::writable()).unwrap());
    let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(files.len(), 2);
    files.iter().for_each(|file| check_layer(file, false).unwrap());
}

#[test]
fn readers_of_a_disk_in_use_never_see_what_a_merge_in_batches_has_given_back() {
    rounds(6, |dice| {
        merge_under_readers(dice, (14, 6), "a", Direction::Down);
        merge_under_readers(dice, (8, 12), "a", Direction::Up);
        merge_under_readers(dice, (6, 12), "b", Direction::Up);
    });
}
