//! Snapshots, merges, deletions, compactions and new sizes of a disk that threads write meanwhile:
//! every snapshot shows what each thread had written at one moment, and the disk all of it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use vdisk::ErrorKind;
use vdisk::internals::addr::Unit;
use vdisk::internals::block::BlockDevice;
use vdisk::internals::chain::Chain;
use vdisk::internals::change::DeleteWishes;
use vdisk::internals::change::live::Live;
use vdisk::internals::change::merge::Wishes;
use vdisk::internals::change::plan::Keeping;
use vdisk::internals::change::snapshot;
use vdisk::internals::family::tree::Family;
use vdisk::internals::open;
use vdisk::internals::open::OpenOptions;
use vdisk::internals::qcow2::CreateOptions;

use crate::dice::{Budget, Confess, Dice, say_done, seed};
use crate::model::{pattern, read};
use crate::processes::{have_qemu, undisturbed};
use crate::property::{check_layer, open_patiently};
use crate::threads::{disturb, holds};

const THREADS: usize = 4;

/// What a thread did to one of its stripes: what it held afterwards.
struct Step {
    stripe: usize,
    bytes: Vec<u8>,
}

/// One thread's stripes of the disk, and all that it ever did to them.
struct Worker {
    stripes: Vec<(u64, Vec<u8>)>,
    first: Vec<Vec<u8>>,
    steps: Vec<Step>,
    dice: Dice,
}

impl Worker {
    fn step(&mut self, disk: &Chain) {
        let number = self.dice.below(self.stripes.len() as u64) as usize;
        let (at, bytes) = &mut self.stripes[number];
        if !disturb(disk, &mut self.dice, *at, bytes) {
            holds(disk, *at, bytes);
        }
        self.steps.push(Step { stripe: number, bytes: self.stripes[number].1.clone() });
    }

    /// Whether `disk` shows this thread's stripes as they were after some number of steps.
    fn was_once(&self, disk: &Chain, between: (u64, u64)) -> bool {
        let got: Vec<Vec<u8>> = self
            .stripes
            .iter()
            .map(|(at, bytes)| read(disk, *at, bytes.len() as u64).unwrap())
            .collect();
        let mut state = self.first.clone();
        let last = (between.1 + 1).min(self.steps.len() as u64);
        for done in 0..=last {
            if done > 0 {
                let step = &self.steps[done as usize - 1];
                state[step.stripe].clone_from(&step.bytes);
            }
            if done >= between.0 && state == got {
                return true;
            }
        }
        false
    }
}

/// When a snapshot was taken: for each thread how many steps it had done before and after.
#[derive(Clone)]
struct Moment {
    between: Vec<(u64, u64)>,
    size: u64,
}

/// How long what is dropped is kept: not at all, or long.
fn keeping(dice: &mut Dice) -> Keeping {
    if dice.once_in(2) { Keeping::NOTHING } else { Keeping::default() }
}

struct Disk {
    path: PathBuf,
    live: Arc<Live>,
    moments: BTreeMap<String, Moment>,
    taken: u64,
    renamed: u64,
    /// The snapshot that was deleted last.
    deleted: Option<(String, Moment)>,
    longest: Duration,
}

impl Disk {
    fn counts(counters: &[AtomicU64]) -> Vec<u64> {
        counters.iter().map(|c| c.load(Ordering::SeqCst)).collect()
    }

    fn take(&mut self, counters: &[AtomicU64]) {
        self.taken += 1;
        let name = format!("live {}", self.taken);
        let before = Disk::counts(counters);
        let size = self.live.info().size;
        self.longest = self.longest.max(self.live.snapshot(&name, "", None).unwrap());
        let after = Disk::counts(counters);
        self.moments
            .insert(name, Moment { between: before.into_iter().zip(after).collect(), size });
    }

    fn delete(&self, name: &str, keeping: Keeping) -> vdisk::Result<()> {
        let wishes = DeleteWishes { keeping, ..DeleteWishes::default() };
        self.live.delete(name, wishes, None, &mut |_, _| true)
    }

    /// Takes back a deletion, or a merge; what was dropped before the disk was in use is not.
    fn undo(&mut self) {
        let before: BTreeSet<_> = self.names();
        match self.live.undo(None, None, &mut |_, _| true) {
            Ok(()) => {
                let back: Vec<_> = self.names().difference(&before).cloned().collect();
                if let Some((name, moment)) = self.deleted.take()
                    && back.contains(&name)
                {
                    self.moments.insert(name, moment);
                }
            }
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::InUse) => {}
            Err(e) => panic!("{e}"),
        }
    }

    fn names(&self) -> BTreeSet<String> {
        let family = Family::read(&self.path).unwrap();
        let snapshots = family.iter().flat_map(|family| family.snapshots());
        snapshots.map(|member| member.label.name.clone()).collect()
    }

    fn some_name(&self, dice: &mut Dice) -> Option<String> {
        let number = dice.below(self.moments.len().max(1) as u64) as usize;
        self.moments.keys().nth(number).cloned()
    }

    fn merge(&mut self, name: &str, dice: &mut Dice) {
        let stop_at = dice.once_in(3).then(|| dice.below(4));
        let mut told = 0;
        let (in_batches, keeping) = (dice.once_in(2), keeping(dice));
        let wishes = Wishes { in_batches, keeping, in_use: true, ..Wishes::default() };
        let done = self.live.merge(name, wishes, None, None, &mut |_, _| {
            told += 1;
            stop_at.is_none_or(|at| told <= at)
        });
        match done {
            Ok(()) => drop(self.moments.remove(name)),
            Err(e) if e.kind() == ErrorKind::Interrupted && stop_at.is_some() => {
                // Downwards it is no restore point any more; upwards it stands.
                let family = Family::of(&self.path).unwrap();
                if family.snapshot(name).is_err() {
                    self.live.merge(name, wishes, None, None, &mut |_, _| true).unwrap();
                    self.moments.remove(name);
                }
            }
            // Nothing stands on it.
            Err(e) if e.kind() == ErrorKind::Invalid => {}
            Err(e) => panic!("{e}"),
        }
    }

    fn change(&mut self, dice: &mut Dice, counters: &[AtomicU64]) {
        let name = self.some_name(dice);
        match (dice.below(20), name) {
            (0..7, _) | (_, None) => self.take(counters),
            (7..13, Some(name)) => self.merge(&name, dice),
            (13..15, Some(name)) => match self.delete(&name, keeping(dice)) {
                Ok(()) => self.deleted = self.moments.remove(&name).map(|moment| (name, moment)),
                Err(e) => assert!(matches!(e.kind(), ErrorKind::InUse | ErrorKind::Sealed), "{e}"),
            },
            (15, _) => self.undo(),
            (16, Some(name)) if dice.once_in(2) => {
                self.renamed += 1;
                let new = format!("renamed {}", self.renamed);
                self.live.rename(&name, &new).unwrap();
                let moment = self.moments.remove(&name).unwrap();
                self.moments.insert(new, moment);
            }
            (16, _) if dice.once_in(2) => {
                self.live.forget(false, None, &mut |_, _| true).unwrap();
                self.deleted = None;
            }
            (16, _) => {
                self.live.compact(&mut |_, _| true).unwrap();
                let found = self.live.check(true).unwrap();
                assert!(
                    found.iter().all(|(_, check)| check.is_clean()),
                    "{found:?}",
                    found = found.iter().map(|f| &f.1).collect::<Vec<_>>()
                );
            }
            (17, _) => {
                let size = self.live.info().size;
                self.live.resize(size + dice.below(70_000)).unwrap();
                let smaller = self.live.resize(size - 1).unwrap_err();
                assert_eq!(smaller.kind(), ErrorKind::InUse);
            }
            (_, Some(name)) => {
                self.live.diff(&name, None).unwrap();
                assert_eq!(self.live.revert(&name).kind(), ErrorKind::InUse);
            }
        }
    }

    fn check(&self, name: &str, workers: &[Worker]) {
        let moment = &self.moments[name];
        let disk = snapshot::open_at(&self.path, name, &OpenOptions::default()).unwrap();
        assert_eq!(disk.size(), moment.size, "'{name}'");
        for (worker, between) in workers.iter().zip(&moment.between) {
            assert!(worker.was_once(&disk, *between), "'{name}' is no moment of the disk");
        }
    }
}

/// The files of a disk's frozen layers.
fn frozen(path: &Path) -> Vec<PathBuf> {
    let family = Family::read(path).unwrap();
    family.into_iter().flat_map(|f| f.layers).map(|layer| layer.path).collect()
}

/// A disk with a few snapshots and branches, taken while it was idle; returns its contents.
fn make(path: &Path, dice: &mut Dice, size: u64, bits: u32) -> (Vec<u8>, Vec<String>) {
    let extended_l2 = bits >= 14 && dice.once_in(2);
    let cluster = Unit::from_bits(bits);
    let options = CreateOptions { cluster, extended_l2, ..CreateOptions::new(size) };
    open::create(path, &options).unwrap();
    let mut model = crate::model::Model::new(size);
    let mut names = Vec::new();
    for number in 0..dice.below(4) {
        let disk = open_patiently(path, &OpenOptions::writable()).unwrap();
        for _ in 0..4 {
            let op = crate::model::random_op(dice, size, 1 << bits);
            model.apply(&disk, &op).unwrap();
        }
        drop(disk);
        let name = format!("idle {number}");
        snapshot::create(path, &name, "").unwrap();
        if dice.once_in(3) {
            let disk = open_patiently(path, &OpenOptions::writable()).unwrap();
            let data = pattern(0, size / 2, dice.next());
            disk.write_at(0, &[IoSlice::new(&data)]).unwrap();
            drop(disk);
            snapshot::revert(path, &name, Some(&format!("beside {number}"))).unwrap();
        }
        names.push(name);
    }
    (model.bytes, names)
}

fn workers(dice: &mut Dice, contents: &[u8], bits: u32) -> Vec<Worker> {
    let size = contents.len() as u64;
    // Stripes that are no whole clusters: neighbours meet in nearly every cluster.
    let stripe = dice.pick(&[512, 1 << bits, (1 << bits) * 3 / 2, 7777]).min(size / 16);
    let mut stripes: Vec<Vec<(u64, Vec<u8>)>> = vec![Vec::new(); THREADS];
    for (number, at) in (0..size).step_by(stripe as usize).enumerate() {
        let bytes = contents[at as usize..(at + stripe).min(size) as usize].to_vec();
        stripes[number % THREADS].push((at, bytes));
    }
    stripes
        .into_iter()
        .map(|stripes| Worker {
            first: stripes.iter().map(|(_, bytes)| bytes.clone()).collect(),
            stripes,
            steps: Vec::new(),
            dice: Dice::new(dice.next()),
        })
        .collect()
}

fn round(dice: &mut Dice, with_qemu: bool) -> Duration {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let bits = dice.pick(&[9, 12, 12, 14, 16]);
    let size = (dice.below(32) + 24) << bits.max(11);
    let (contents, _) = undisturbed(|| make(&path, dice, size, bits));
    let mut workers = workers(dice, &contents, bits);
    let cache = if dice.once_in(3) { 0 } else { 1 << 20 };
    let open = OpenOptions { cache, ..OpenOptions::writable() };
    let disk = Arc::new(open_patiently(&path, &open).unwrap());
    let live = Arc::new(Live::new(disk.clone(), &path).unwrap());
    let mut family = Disk {
        path: path.clone(),
        live,
        moments: BTreeMap::new(),
        taken: 0,
        renamed: 0,
        deleted: None,
        longest: Duration::ZERO,
    };
    let counters: Vec<AtomicU64> = (0..THREADS).map(|_| AtomicU64::new(0)).collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let running: Vec<_> = workers
            .iter_mut()
            .zip(&counters)
            .map(|(worker, counter)| {
                let (disk, done) = (&disk, &done);
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) && worker.steps.len() < 4000 {
                        worker.step(disk);
                        counter.fetch_add(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        let changes = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..12 + dice.below(20) {
                undisturbed(|| family.change(dice, &counters));
                for layer in frozen(&path) {
                    check_layer(&layer, false).unwrap();
                }
            }
        }));
        done.store(true, Ordering::Relaxed);
        let ends: Vec<_> = running.into_iter().map(|r| r.join()).collect();
        assert!(changes.is_ok() && ends.iter().all(Result::is_ok), "bits {bits} cache {cache}");
    });
    let end = counters.iter().map(|c| (c.load(Ordering::SeqCst), c.load(Ordering::SeqCst)));
    let end: Vec<_> = end.collect();
    let head = |disk: &Chain| {
        for (worker, between) in workers.iter().zip(&end) {
            assert!(worker.was_once(disk, *between), "the disk is not what was written last");
        }
    };
    head(&disk);
    undisturbed(|| family.moments.keys().for_each(|name| family.check(name, &workers)));
    let Disk { path, moments, longest, live, .. } = family;
    drop((disk, live));
    head(&open_patiently(&path, &OpenOptions::writable()).unwrap());
    let disk = Arc::new(open_patiently(&path, &OpenOptions::writable()).unwrap());
    let live = Arc::new(Live::new(disk, &path).unwrap());
    let family =
        Disk { path: path.clone(), live, moments, taken: 0, renamed: 0, deleted: None, longest };
    undisturbed(|| family.moments.keys().for_each(|name| family.check(name, &workers)));
    drop(family);
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        check_layer(&entry.unwrap().path(), with_qemu).unwrap();
    }
    longest
}

#[test]
fn a_disk_whose_tree_changes_under_its_writers_keeps_every_moment() {
    let with_qemu = have_qemu();
    let seed = seed();
    let budget = Budget::new(10);
    let (mut done, mut longest) = (0, Duration::ZERO);
    while budget.goes_on(done) {
        let seed = seed.wrapping_add(done);
        let _confess = Confess(seed);
        longest = longest.max(round(&mut Dice::new(seed), with_qemu));
        done += 1;
    }
    eprintln!("longest pause {longest:?}");
    say_done(done, seed);
}
