//! A snapshot of a disk in use whose host fails at each call, and crashes at each point: the disk
//! shows what was written, or says that it cannot go on; what was flushed is there afterwards.

use std::io::IoSlice;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Mutex, OnceLock, Weak};

use vdisk::internals::addr::{GuestOffset, Unit};
use vdisk::internals::block::BlockDevice;
use vdisk::internals::chain::{Chain, Layer};
use vdisk::internals::change::live::Live;
use vdisk::internals::change::snapshot;
use vdisk::internals::family::tree::Family;
use vdisk::internals::image::{Allocation, Extent, Filter, Identity, Image};
use vdisk::internals::open;
use vdisk::internals::open::OpenOptions;
use vdisk::internals::qcow2::CreateOptions;
use vdisk::{Error, ErrorKind, Result};

use crate::dice::{Confess, Dice, seed};
use crate::model::{Model, Op, random_op, read};
use crate::processes::undisturbed;
use crate::property::{check_layer, open_patiently};

/// A layer that fails at its nth call that changes something, and tells of flushes and marks.
struct Faulty {
    inner: Arc<dyn Image>,
    left: AtomicI64,
    /// Whether all calls after that fail, too.
    for_good: bool,
    /// Called at each flush and mark.
    seen: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Faulty {
    fn spend(&self) -> Result<()> {
        let left = self.left.fetch_sub(1, Ordering::SeqCst);
        if left == 0 || left < 0 && self.for_good {
            return Err(Error::new(ErrorKind::NoSpace, "a fault was asked for"));
        }
        Ok(())
    }

    fn tell(&self) {
        if let Some(seen) = self.seen.get() {
            seen();
        }
    }
}

impl Filter for Faulty {
    fn inner(&self) -> &dyn Image {
        &*self.inner
    }

    fn overwrite(&self, extent: &Extent, at: GuestOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.spend()?;
        self.inner.overwrite(extent, at, bufs)
    }

    fn prepare(&self, at: GuestOffset, len: u64) -> Result<Box<dyn Allocation + '_>> {
        self.spend()?;
        self.inner.prepare(at, len)
    }

    fn zero(&self, at: GuestOffset, len: u64, unmap: bool) -> Result<()> {
        self.spend()?;
        self.inner.zero(at, len, unmap)
    }

    fn discard(&self, at: GuestOffset, len: u64, expose: bool) -> Result<()> {
        self.spend()?;
        self.inner.discard(at, len, expose)
    }

    fn set_identity(&self, identity: &Identity) -> Result<()> {
        self.tell();
        self.spend()?;
        self.inner.set_identity(identity)?;
        self.tell();
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.tell();
        self.spend()?;
        self.inner.flush()
    }
}

/// A disk on a base whose head is faulty, and what it shows.
struct Case {
    _dir: tempfile::TempDir,
    path: std::path::PathBuf,
    model: Model,
    disk: Arc<Chain>,
    /// Once nobody else holds it, others may read the file.
    head: Weak<Faulty>,
}

fn case(dice: &mut Dice, left: i64, for_good: bool) -> Case {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let size = 40 << 12;
    let options = CreateOptions { cluster: Unit::from_bits(12), ..CreateOptions::new(size) };
    open::create(&path, &options).unwrap();
    let mut model = Model::new(size);
    let disk = open_patiently(&path, &OpenOptions::writable()).unwrap();
    (0..6).for_each(|_| model.apply(&disk, &random_op(dice, size, 1 << 12)).unwrap());
    drop(disk);
    undisturbed(|| snapshot::create(&path, "below", "").unwrap());
    let disk = open_patiently(&path, &OpenOptions::writable()).unwrap();
    (0..6).for_each(|_| model.apply(&disk, &random_op(dice, size, 1 << 12)).unwrap());
    disk.flush().unwrap();
    let layers = disk.all_layers();
    let inner = layers[0].image.clone();
    let head =
        Arc::new(Faulty { inner, left: AtomicI64::new(i64::MAX), for_good, seen: OnceLock::new() });
    head.left.store(left, Ordering::SeqCst);
    let weak = Arc::downgrade(&head);
    let layer = Layer { image: head, ..layers[0].clone() };
    let disk = Arc::new(Chain::new(layer, layers[1..].to_vec(), 1 << 20));
    Case { _dir: dir, path, model, disk, head: weak }
}

/// Copies the files as a crash of this process would leave them.
fn copy_all(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from.parent().unwrap()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// An operation that only writes: it can be done in the middle of a change of the tree.
fn random_change(dice: &mut Dice, size: u64) -> Op {
    loop {
        match random_op(dice, size, 1 << 12) {
            Op::Read { .. } | Op::Flush => {}
            op => return op,
        }
    }
}

#[test]
fn a_live_snapshot_that_fails_at_any_call_leaves_the_disk_as_it_was_written() {
    let seed = seed();
    let _confess = Confess(seed);
    let mut dice = Dice::new(seed);
    let (mut failed, mut poisoned) = (0, 0);
    for round in 0..36 {
        let (left, for_good) = (round / 2, round % 2 == 1);
        let Case { _dir, path, model, disk, head } = case(&mut dice, left, for_good);
        let live = Live::new(disk.clone(), &path).unwrap();
        // Guests go on writing while the old head is made durable: into the new one.
        let before = model.clone();
        let model = Arc::new(Mutex::new(model));
        let (guest, seen) = (Arc::downgrade(&disk), model.clone());
        let own = Mutex::new(Dice::new(dice.next()));
        let on_new = AtomicBool::new(false);
        let hook = move || {
            let Some(guest) = guest.upgrade() else { return };
            // The first flush is before the moment: what is written then is part of it.
            if !on_new.swap(true, Ordering::SeqCst) || guest.all_layers().len() < 3 {
                return;
            }
            let mut dice = own.lock().unwrap();
            let mut model = seen.lock().unwrap();
            for _ in 0..3 {
                let op = random_change(&mut dice, model.size());
                if model.apply(&*guest, &op).is_err() {
                    return;
                }
            }
        };
        head.upgrade().unwrap().seen.set(Box::new(hook)).ok().unwrap();
        let taken = undisturbed(|| live.snapshot("now", "", None));
        if let Some(head) = head.upgrade() {
            head.left.store(i64::MAX, Ordering::SeqCst);
        }
        let model = model.lock().unwrap().clone();
        model.compare(&*disk).unwrap();
        let flushed = disk.flush();
        match &taken {
            Ok(_) => {
                flushed.as_ref().unwrap();
                let moment = snapshot::open_at(&path, "now", &OpenOptions::default()).unwrap();
                before.compare(&moment).unwrap();
            }
            Err(_) => failed += 1,
        }
        poisoned += u64::from(flushed.is_err());
        drop((live, disk));
        let copy = tempfile::tempdir().unwrap();
        copy_all(&path, copy.path());
        let path = copy.path().join("disk.qcow2");
        let again = open_patiently(&path, &OpenOptions::writable()).unwrap();
        if flushed.is_ok() {
            model.compare(&again).unwrap();
        } else {
            // What was not flushed is there or not, byte by byte.
            let got = read(&again, 0, again.size()).unwrap();
            let old_or_new = before.bytes.iter().zip(&model.bytes).zip(&got);
            assert!(old_or_new.into_iter().all(|((old, new), got)| got == old || got == new));
        }
        drop(again);
        let family = Family::of(&path).unwrap();
        assert_eq!(family.snapshot("now").is_ok(), taken.is_ok());
        family.members().for_each(|member| check_leaks_only(&member.path));
    }
    assert!(failed > 5 && poisoned > 0, "{failed} failed, {poisoned} poisoned");
}

fn check_leaks_only(path: &Path) {
    let options = OpenOptions { unprotected: true, ..OpenOptions::default() };
    let layer = open::open_image(path, &options).unwrap();
    let check = layer.image.check(vdisk::internals::qcow2::Repair::None).unwrap();
    assert_eq!((check.corruptions, check.errors), (0, 0), "{}: {check:?}", path.display());
}

#[test]
fn a_crash_at_any_point_of_a_live_snapshot_shows_what_was_flushed() {
    let seed = seed();
    let _confess = Confess(seed);
    let mut dice = Dice::new(seed);
    for _ in 0..4 {
        let Case { _dir, path, model, disk, head } = case(&mut dice, i64::MAX, false);
        let live = Live::new(disk.clone(), &path).unwrap();
        let copies = Arc::new(Mutex::new(Vec::new()));
        let (files, kept) = (path.clone(), copies.clone());
        head.upgrade()
            .unwrap()
            .seen
            .set(Box::new(move || {
                let copy = tempfile::tempdir().unwrap();
                copy_all(&files, copy.path());
                kept.lock().unwrap().push(copy);
            }))
            .ok()
            .unwrap();
        undisturbed(|| live.snapshot("now", "", None).unwrap());
        let last = tempfile::tempdir().unwrap();
        copy_all(&path, last.path());
        let mut copies = std::mem::take(&mut *copies.lock().unwrap());
        assert!(copies.len() >= 5, "flushes and marks were seen");
        copies.push(last);
        for (number, copy) in copies.iter().enumerate() {
            let path = copy.path().join("disk.qcow2");
            let again = open_patiently(&path, &OpenOptions::writable()).unwrap();
            model.compare(&again).unwrap();
            drop(again);
            for file in std::fs::read_dir(copy.path()).unwrap() {
                let path = file.unwrap().path();
                // What the flush before made free, the next one writes down.
                check_leaks_only(&path);
                if number + 1 == copies.len() {
                    check_layer(&path, false).unwrap();
                }
            }
        }
    }
}
