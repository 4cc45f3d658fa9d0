//! Many threads on one disk: byte-disjoint writes that share clusters, with discards, zeroes and
//! flushes in between, and hardly any memory for metadata.

use std::io::IoSlice;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use vdisk::internals::addr::Unit;
use vdisk::internals::block::BlockDevice;
use vdisk::internals::chain::Chain;
use vdisk::internals::change;
use vdisk::internals::image::Backing;
use vdisk::internals::open;
use vdisk::internals::qcow2::CreateOptions;

use crate::dice::{Budget, Confess, Dice, seed};
use crate::model::{pattern, read};
use crate::processes::have_qemu;
use crate::property::{check_layer, open_patiently};

const THREADS: u64 = 6;

/// Does something to the part of a disk at `at` that nobody else touches, and to `bytes`, which is
/// what stands there; `false` where it did nothing.
pub fn disturb(disk: &Chain, dice: &mut Dice, at: u64, bytes: &mut [u8]) -> bool {
    crate::dice::operation();
    let len = bytes.len() as u64;
    let from = dice.below(len);
    let part = dice.below(len - from + 1);
    let range = from as usize..(from + part) as usize;
    match dice.below(16) {
        0..9 => {
            let data = pattern(at + from, part, dice.next());
            disk.write_at(at + from, &[IoSlice::new(&data)]).unwrap();
            bytes[range].copy_from_slice(&data);
        }
        9..11 => {
            disk.write_zeroes(at + from, part, dice.once_in(2)).unwrap();
            bytes[range].fill(0);
        }
        11..13 => {
            disk.discard(at + from, part).unwrap();
            let now = read(disk, at + from, part).unwrap();
            let fair = bytes[range.clone()].iter().zip(&now).all(|(a, b)| a == b || *b == 0);
            assert!(fair, "a discard at {at} shows other bytes");
            bytes[range].copy_from_slice(&now);
        }
        13 if dice.once_in(3) => disk.flush().unwrap(),
        _ => return false,
    }
    true
}

/// Panics unless `bytes` stand at `at`.
pub fn holds(disk: &Chain, at: u64, bytes: &[u8]) {
    let got = read(disk, at, bytes.len() as u64).unwrap();
    if let Some(i) = crate::model::first_difference(&got, bytes) {
        panic!("byte {} reads {:#04x}, not {:#04x}", at + i as u64, got[i], bytes[i]);
    }
}

/// What one thread owns: every `THREADS`th stripe of the disk, and what must stand there.
struct Owner {
    stripes: Vec<(u64, Vec<u8>)>,
    dice: Dice,
}

impl Owner {
    /// Some operation on one of its stripes, checked.
    fn step(&mut self, disk: &Chain) {
        let number = self.dice.below(self.stripes.len() as u64) as usize;
        let (at, bytes) = &mut self.stripes[number];
        if !disturb(disk, &mut self.dice, *at, bytes) {
            self.check(disk, number);
        }
    }

    fn check(&self, disk: &Chain, number: usize) {
        let (at, bytes) = &self.stripes[number];
        holds(disk, *at, bytes);
    }
}

/// Makes a disk on a base of patterned data; returns its first contents.
fn make(dir: &Path, options: &CreateOptions, with_base: bool) -> Vec<u8> {
    let size = options.size;
    let mut options = options.clone();
    let mut contents = vec![0; size as usize];
    if with_base {
        let base = dir.join("base");
        let shape = CreateOptions { cluster: Unit::from_bits(12), ..CreateOptions::new(size) };
        open::create(&base, &shape).unwrap();
        let disk = open_patiently(&base, &open::OpenOptions::writable()).unwrap();
        let data = pattern(0, size * 3 / 4, 77);
        disk.write_at(0, &[IoSlice::new(&data)]).unwrap();
        disk.flush().unwrap();
        contents[..data.len()].copy_from_slice(&data);
        options.backing =
            Some(Backing { name: "base".to_owned(), format: Some("qcow2".to_owned()) });
    }
    open::create(&dir.join("disk"), &options).unwrap();
    contents
}

fn round(dice: &mut Dice, with_qemu: bool) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let bits = dice.pick(&[9, 9, 10, 12, 14, 16]);
    let size = (dice.below(64) + 64) << bits.max(12);
    let extended_l2 = bits >= 14 && dice.once_in(2);
    let cluster = Unit::from_bits(bits);
    let options = CreateOptions { cluster, extended_l2, ..CreateOptions::new(size) };
    let contents = make(dir.path(), &options, dice.once_in(2));
    let cache = if dice.once_in(2) { 0 } else { 1 << 20 };
    let open = open::OpenOptions { cache, ..open::OpenOptions::writable() };
    let disk = open_patiently(&path, &open).unwrap();

    // Stripes that are no whole clusters: neighbours meet in nearly every cluster.
    let stripe = dice.pick(&[300, 512, 1 << bits, (1 << bits) * 3 / 2, 7777]).min(size / 16);
    let mut owners: Vec<Owner> =
        (0..THREADS).map(|_| Owner { stripes: Vec::new(), dice: Dice::new(dice.next()) }).collect();
    for (number, at) in (0..size).step_by(stripe as usize).enumerate() {
        let end = (at + stripe).min(size);
        let bytes = contents[at as usize..end as usize].to_vec();
        owners[number % THREADS as usize].stripes.push((at, bytes));
    }
    let steps = 150 + dice.below(300);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let flusher = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                disk.flush().unwrap();
                std::thread::yield_now();
            }
        });
        let workers: Vec<_> = owners
            .iter_mut()
            .map(|owner| scope.spawn(|| (0..steps).for_each(|_| owner.step(&disk))))
            .collect();
        let ends: Vec<_> = workers.into_iter().map(|w| w.join()).collect();
        done.store(true, Ordering::Relaxed);
        flusher.join().unwrap();
        assert!(ends.iter().all(Result::is_ok), "{options:?} cache {cache} stripe {stripe}");
    });
    let all = |disk: &Chain| {
        for owner in &owners {
            (0..owner.stripes.len()).for_each(|number| owner.check(disk, number));
        }
    };
    all(&disk);
    drop(disk);
    all(&open_patiently(&path, &open::OpenOptions::default()).unwrap());
    check_layer(&path, with_qemu).unwrap();
}

#[test]
fn threads_that_share_clusters_keep_each_others_bytes() {
    let with_qemu = have_qemu();
    let seed = seed();
    let _confess = Confess(seed);
    let mut dice = Dice::new(seed);
    let budget = Budget::new(8);
    let mut done = 0;
    while budget.goes_on(done) {
        round(&mut dice, with_qemu);
        done += 1;
    }
    crate::dice::say_done(done, seed);
}

/// Clusters become free when nothing in the file refers to them any more, which a flush sees to. A guest
/// that trims and writes and never flushes made its file grow without bound.
#[test]
fn a_guest_that_never_flushes_gets_what_it_freed_back() {
    const MIB: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    open::create(&path, &CreateOptions::new(64 * MIB)).unwrap();
    let disk = change::open(&path, &open::OpenOptions::writable()).unwrap();
    let data = pattern(7, MIB, 7);
    std::thread::scope(|scope| {
        for half in 0..2 {
            let (disk, data) = (&disk, &data);
            scope.spawn(move || {
                for _ in 0..24 {
                    for at in (half * 8..half * 8 + 8).map(|n| n * MIB) {
                        disk.write_at(at, &[IoSlice::new(data)]).unwrap();
                    }
                    disk.discard(half * 8 * MIB, 8 * MIB).unwrap();
                }
                for at in (half * 8..half * 8 + 8).map(|n| n * MIB) {
                    disk.write_at(at, &[IoSlice::new(data)]).unwrap();
                }
            });
        }
    });
    let len = std::fs::metadata(&path).unwrap().len();
    // What is stored, what waits for a flush, and as much again that is freed while that is under way;
    // without those flushes it is all that was ever written.
    assert!(len < (16 + 2 * 64 + 16) * MIB, "{len} bytes for a disk of 16 MiB of data");
    (0..16).for_each(|n| holds(&disk, n * MIB, &data));
    drop(disk);
    check_layer(&path, have_qemu()).unwrap();
}
