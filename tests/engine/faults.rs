//! A host that fails at any call of any change: what is on disk is as before the change or as after
//! it, with leaks at most, and a sync that failed is the last thing that the handle did.

use std::sync::Arc;

use vdisk::internals::addr::{GuestOffset, Unit};
use vdisk::internals::image::{Compress as _, Image as _};
use vdisk::internals::qcow2::{self, Amend, CreateOptions, Image, NewSnapshot, OpenOptions};
use vdisk::internals::storage::{MemoryStorage, Storage};
use vdisk::{ErrorKind, Result};

use crate::dice::{Dice, rounds};
use crate::internal::{State, WRITABLE, bytes_of, scribble, state, verify};
use crate::recorder::{Fault, Faulty, replay};

/// A change of the image, and whether it is one that bitmaps forbid.
type Change = (&'static str, fn(&mut Image) -> Result<()>);

const CHANGES: [Change; 12] = [
    ("create", |image| image.create_snapshot(&NewSnapshot::default()).map(drop)),
    ("apply", |image| image.apply_snapshot("1")),
    ("delete", |image| image.delete_snapshot("1")),
    ("rename", |image| image.rename_snapshot("1", "another")),
    ("width", |image| image.amend(&Amend { refcount_bits: Some(64), ..Amend::default() })),
    ("version", |image| image.amend(&Amend { version: Some(2), ..Amend::default() })),
    ("grow", |image| image.resize(image.size() * 3)),
    ("shrink", |image| image.resize(image.size() / 3 / 512 * 512)),
    ("add a bitmap", |image| image.add_bitmap("new", Some(512), true)),
    ("merge a bitmap", |image| image.merge_bitmap("bitmap", std::slice::from_ref(&(0..4096)))),
    ("remove a bitmap", |image| image.remove_bitmap("bitmap")),
    ("compress", |image| {
        for number in 0..8 {
            let at = GuestOffset(number * image.cluster().bytes());
            image
                .write_compressed(at, &vec![number as u8 + 1; image.cluster().bytes() as usize])?;
        }
        image.flush()
    }),
];

/// An image with data, a snapshot and, where they are not in the way, a bitmap.
fn start(what: &str, dice: &mut Dice) -> Vec<u8> {
    let bits = dice.pick(&[9, 9, 12]);
    let size = 24 << bits;
    let options = CreateOptions { cluster: Unit::from_bits(bits), ..CreateOptions::new(size) };
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
    let mut image = qcow2::create(storage.clone(), &options).unwrap();
    if !["apply", "version"].contains(&what) {
        image.add_bitmap("bitmap", Some(512), true).unwrap();
    }
    drop(image);
    let mut now = State { now: vec![0; size as usize], snapshots: Vec::new() };
    scribble(&storage, &mut now, 1 << bits, dice);
    let mut image = Image::open(storage.clone(), WRITABLE).unwrap();
    image.create_snapshot(&NewSnapshot::default()).unwrap();
    drop(image);
    scribble(&storage, &mut now, 1 << bits, dice);
    bytes_of(&storage)
}

fn state_of(file: &[u8]) -> State {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(file.to_vec()));
    state(&storage)
}

/// Whether each part of `found` is as before or as after.
fn is_between(found: &State, before: &State, after: &State) -> bool {
    let (len, sides) = (found.now.len(), [&before.now, &after.now]);
    let sectors = (0..len).step_by(512).all(|at| {
        let part = &found.now[at..(at + 512).min(len)];
        sides.iter().any(|side| side.get(at..at + part.len()) == Some(part))
    });
    // What a smaller disk loses goes piece by piece.
    let going = after.now.len() < before.now.len();
    let kept = len.min(after.now.len());
    let prefix = going && found.now[..kept] == before.now[..kept];
    sides.iter().any(|side| side.len() == len)
        && (sectors || prefix)
        && [&before.snapshots, &after.snapshots].contains(&&found.snapshots)
}

/// One change during which call number `n` fails; whether it came that far.
fn faulty_change(file: &[u8], (what, change): Change, fault: Fault, n: u64) -> bool {
    let before = state_of(file);
    let storage = Arc::new(Faulty::new(file.to_vec(), fault));
    let mut image = Image::open(storage.clone(), WRITABLE).unwrap();
    storage.arm(n);
    let done = change(&mut image);
    let failed = storage.has_failed();
    storage.disarm();
    if failed && fault == Fault::Sync {
        assert!(done.is_err(), "{what}: sync {n} failed, and nobody knows");
        let after = image.flush().unwrap_err();
        assert_eq!(after.kind(), ErrorKind::Poisoned, "{what}: sync {n} failed");
        let events = storage.now.events();
        drop(image);
        assert_eq!(storage.now.events(), events, "{what}: a poisoned image is written");
    } else {
        assert!(failed || done.is_ok(), "{what}: {:?}", done.err());
        drop(image);
    }
    let mut left = file.to_vec();
    storage.now.log().iter().for_each(|event| replay(&mut left, event));
    let bitmaps = Image::open(Arc::new(MemoryStorage::new(left.clone())), OpenOptions::default());
    bitmaps.unwrap().bitmaps().unwrap();
    let after = finished(file, change);
    verify(left, &|found| is_between(found, &before, &after));
    failed
}

/// The state after the change, with nothing failing.
fn finished(file: &[u8], change: fn(&mut Image) -> Result<()>) -> State {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(file.to_vec()));
    change(&mut Image::open(storage.clone(), WRITABLE).unwrap()).unwrap();
    state(&storage)
}

#[test]
fn a_change_during_which_the_host_fails_is_done_or_not_begun() {
    rounds(10, |dice| {
        let change = dice.pick(&CHANGES);
        let file = start(change.0, dice);
        for fault in [Fault::Sync, Fault::Io, Fault::Full] {
            let mut n = 0;
            while faulty_change(&file, change, fault, n) {
                // Every early call; later ones by and by.
                n += 1 + n / 30;
            }
        }
    });
}
