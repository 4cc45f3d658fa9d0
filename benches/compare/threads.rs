//! Many threads on one disk against pread and pwrite of the same bytes: what shared locks cost.
//!
//! Every thread works on blocks of its own, so that only what the engine shares can make one wait for
//! another. A machine with fewer cores than threads shows what they cost where they take turns.

use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::Ordering;
use std::thread;

use vdisk::internals::block::BlockDevice;
use vdisk::internals::open;
use vdisk::internals::qcow2::CreateOptions;

use super::{BLOCK, Beneath, SIZE, SPENT, blocks, claim, claims, fill, taken};

const THREADS: [u64; 4] = [1, 2, 4, 8];

/// Runs `work` in several threads with a part of the blocks each.
fn spread(threads: u64, seed: u64, work: impl Fn(u64) + Sync) {
    thread::scope(|scope| {
        for own in 0..threads {
            let work = &work;
            scope.spawn(move || {
                // A block belongs to one thread, whatever the seed.
                blocks(seed + own).filter(|at| at / BLOCK % threads == own).for_each(work);
                SPENT.fetch_add(taken(), Ordering::Relaxed);
            });
        }
    });
}

/// Prints the rows.
pub fn table() {
    let dir = tempfile::tempdir().unwrap();
    claims();
    let path = dir.path().join("disk");
    open::create(&path, &CreateOptions::new(SIZE)).unwrap();
    let disk = super::open(&path);
    fill(&disk);
    let beneath = Beneath::of(&disk, &path);
    for threads in THREADS {
        claim(
            &format!("4 KiB random reads, {threads} threads, engine / pread"),
            |s| {
                spread(threads, s, |at| {
                    let mut block = [0; BLOCK as usize];
                    disk.read_at(at, &mut [IoSliceMut::new(&mut block)]).unwrap();
                });
            },
            |s| {
                spread(threads, s, |at| {
                    beneath.read(at, &mut [0; BLOCK as usize]);
                });
            },
        );
    }
    for threads in THREADS {
        claim(
            &format!("4 KiB random writes in place, {threads} threads, engine / pwrite"),
            |s| {
                spread(threads, s, |at| {
                    disk.write_at(at, &[IoSlice::new(&[s as u8; BLOCK as usize])]).unwrap();
                });
            },
            |s| spread(threads, s, |at| beneath.write(at, &[s as u8; BLOCK as usize])),
        );
    }
}
