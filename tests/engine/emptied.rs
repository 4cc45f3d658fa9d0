//! Images that are emptied, whole and with faults at the steps on the way.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::Mutex;

use vdisk::internals::addr::Unit;
use vdisk::internals::qcow2::{self, CreateOptions, Image, Repair};
use vdisk::internals::storage::{MemoryStorage, Step as At, Storage};
use vdisk::{Error, Result};

use crate::dice::{Confess, Dice, seed};
use crate::internal::{State, Step, WRITABLE, scribble, state, take};
use crate::recorder::{Event, Recorder, crash, replay};

const SIZE: u64 = 1 << 20;

/// A disk with something in it.
fn filled(bits: u32, dice: &mut Dice) -> (Arc<dyn Storage>, State) {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
    let options = CreateOptions { cluster: Unit::from_bits(bits), ..CreateOptions::new(SIZE) };
    drop(qcow2::create(storage.clone(), &options).unwrap());
    let mut now = State { now: vec![0; SIZE as usize], snapshots: Vec::new() };
    scribble(&storage, &mut now, 1 << bits, dice);
    (storage, now)
}

fn bytes(storage: &dyn Storage) -> Vec<u8> {
    let mut file = vec![0; storage.len().unwrap() as usize];
    storage.read_exact_at(0, &mut file).unwrap();
    file
}

/// What a crash left shows what it may to who only reads, and the same once it is mended.
fn opens_again(file: Vec<u8>, accept: &dyn Fn(&State) -> bool) {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(file));
    let found = state(&storage);
    assert!(accept(&found), "bytes that were never there");
    let image = Image::open(storage.clone(), WRITABLE).unwrap();
    image.check(Repair::All).unwrap();
    assert!(image.check(Repair::None).unwrap().is_clean());
    drop(image);
    assert!(state(&storage) == found, "mending it changed what it holds");
}

#[test]
fn a_crash_while_an_image_is_emptied_leaves_old_bytes_or_none() {
    let seed = seed();
    let _confess = Confess(seed);
    let mut dice = Dice::new(seed);
    for bits in [9, 12, 16] {
        let (storage, old) = filled(bits, &mut dice);
        let mut file = bytes(&*storage);
        let recorder = Arc::new(Recorder::new(file.clone()));
        let mut image = Image::open(recorder.clone(), WRITABLE).unwrap();
        image.make_empty().unwrap();
        drop(image);
        let accept = |found: &State| {
            let mut pairs = found.now.iter().zip(&old.now);
            found.now.len() == old.now.len() && pairs.all(|(new, old)| *new == 0 || new == old)
        };
        for events in 0..=recorder.events() {
            let log = recorder.log();
            let settled = log[..events].iter().rposition(|e| matches!(e, Event::Sync));
            let (past, pending) = log[..events].split_at(settled.unwrap_or(0));
            let mut left = file.clone();
            past.iter().for_each(|event| replay(&mut left, event));
            crash(&mut left, pending, &mut dice);
            opens_again(left, &accept);
        }
        recorder.log().iter().for_each(|event| replay(&mut file, event));
        let clusters = 3 + (SIZE >> bits).div_ceil((1 << bits) / 8).div_ceil((1 << bits) / 8);
        assert_eq!(file.len() as u64, clusters << bits, "as short as a new one");
        let emptied: Arc<dyn Storage> = Arc::new(MemoryStorage::new(file));
        assert!(state(&emptied).now.iter().all(|byte| *byte == 0));
    }
}

#[test]
fn an_image_with_a_snapshot_is_emptied_around_it() {
    let mut dice = Dice::new(7);
    let (storage, mut old) = filled(12, &mut dice);
    take(&storage, &Step::Create("kept".into())).unwrap();
    old.snapshots = state(&storage).snapshots;
    let mut image = Image::open(storage.clone(), WRITABLE).unwrap();
    image.make_empty().unwrap();
    assert!(image.check(Repair::None).unwrap().is_clean());
    drop(image);
    let found = state(&storage);
    assert!(found.now.iter().all(|byte| *byte == 0) && found.snapshots == old.snapshots);
}

/// Memory that fails every write from the step on that it waits for.
struct FailsAt {
    now: MemoryStorage,
    step: At,
    failing: Mutex<bool>,
}

impl FailsAt {
    fn check(&self) -> Result<()> {
        let failing = *self.failing.lock().unwrap();
        let broken = || Error::io("failed", std::io::Error::from_raw_os_error(5));
        if failing { Err(broken()) } else { Ok(()) }
    }
}

impl Storage for FailsAt {
    fn len(&self) -> Result<u64> {
        self.now.len()
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.check()?;
        self.now.set_len(len)
    }

    fn is_fixed(&self) -> bool {
        self.now.is_fixed()
    }

    fn read_at(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.now.read_at(offset, bufs)
    }

    fn write_at(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.check()?;
        self.now.write_at(offset, bufs)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.check()?;
        self.now.punch_hole(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.check()?;
        self.now.write_zeroes(offset, len)
    }

    fn sync(&self) -> Result<()> {
        self.check()?;
        self.now.sync()
    }

    fn about_to(&self, step: At) {
        *self.failing.lock().unwrap() |= step == self.step;
    }
}

fn failing_at(step: At, file: Vec<u8>) -> Arc<FailsAt> {
    Arc::new(FailsAt { now: MemoryStorage::new(file), step, failing: Mutex::new(false) })
}

#[test]
fn an_image_that_could_not_be_emptied_at_any_step_opens_again() {
    let mut dice = Dice::new(11);
    let (storage, _) = filled(12, &mut dice);
    let steps = [At::WriteRoot, At::ClearFirstTables, At::ReplaceCountTable, At::NewCounts];
    for step in steps {
        let broken = failing_at(step, bytes(&*storage));
        let mut image = Image::open(broken.clone(), WRITABLE).unwrap();
        let error = image.make_empty().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5), "{step:?}: {error}");
        drop(image);
        let after: Arc<dyn Storage> = Arc::new(MemoryStorage::new(broken.now.to_vec()));
        let image = Image::open(after.clone(), WRITABLE).unwrap();
        assert!(image.check(Repair::None).unwrap().is_clean(), "{step:?}");
    }
}

/// The snapshot is gone from the table, and what it held is leaked: nothing else is wrong.
#[test]
fn a_snapshot_whose_clusters_cannot_be_freed_leaves_leaks() {
    let mut dice = Dice::new(12);
    let (storage, old) = filled(12, &mut dice);
    take(&storage, &Step::Create("gone".into())).unwrap();
    let broken = failing_at(At::Free, bytes(&*storage));
    let failing: Arc<dyn Storage> = broken.clone();
    let error = take(&failing, &Step::Delete("1".into())).unwrap_err();
    assert_eq!(error.message(), qcow2::OLD_TABLE_LEAKED);
    let after: Arc<dyn Storage> = Arc::new(MemoryStorage::new(broken.now.to_vec()));
    let found = state(&after);
    assert!(found.snapshots.is_empty() && found.now == old.now);
    let options = qcow2::OpenOptions { repair: true, ..WRITABLE };
    let image = Image::open(after, options).unwrap();
    let check = image.check(Repair::None).unwrap();
    assert!(check.leaks > 0 && check.corruptions == 0, "{:#?}", check.messages);
    // Refcounts that are right say what the flags are to be: to mend leaks is to mend all.
    image.check(Repair::Leaks).unwrap();
    assert!(image.check(Repair::None).unwrap().is_clean());
}
