//! A disk with snapshots, used at random: every snapshot, the head, and clones of it at the end,
//! against a model that keeps a copy of each.

use std::collections::BTreeMap;
use std::path::PathBuf;

use vdisk::ErrorKind;
use vdisk::addr::Unit;
use vdisk::chain::{self, Base, OpenOptions, merge, snapshot};
use vdisk::qcow2::CreateOptions;

use crate::dice::{Budget, Confess, Dice, seed};
use crate::model::{Model, random_op};
use crate::processes::{have_qemu, undisturbed};
use crate::property::{check_layer, open_patiently};

/// A moment of the disk, and the snapshot that it was made from.
#[derive(Clone)]
struct Moment {
    model: Model,
    parent: Option<String>,
}

struct Family {
    path: PathBuf,
    unit: u64,
    head: Moment,
    snapshots: BTreeMap<String, Moment>,
    taken: u64,
}

impl Family {
    fn children(&self, name: &str) -> Vec<String> {
        let all = self.snapshots.iter().filter(|(_, m)| m.parent.as_deref() == Some(name));
        all.map(|(name, _)| name.clone()).collect()
    }

    fn descendants(&self, name: &str) -> Vec<String> {
        let mut found = self.children(name);
        let mut next = 0;
        while let Some(name) = found.get(next).cloned() {
            found.extend(self.children(&name));
            next += 1;
        }
        found
    }

    fn new_name(&mut self) -> String {
        self.taken += 1;
        format!("snapshot {}", self.taken)
    }

    fn some_name(&self, dice: &mut Dice) -> Option<String> {
        let number = dice.below(self.snapshots.len().max(1) as u64) as usize;
        self.snapshots.keys().nth(number).cloned()
    }

    fn write(&mut self, dice: &mut Dice) {
        let cache = if dice.once_in(2) { 0 } else { 1 << 20 };
        let disk = chain::open(&self.path, &OpenOptions { cache, ..OpenOptions::writable() });
        let disk = disk.unwrap();
        for _ in 0..dice.below(6) {
            let op = random_op(dice, self.head.model.size(), self.unit);
            self.head.model.apply(&disk, &op).unwrap();
        }
        if dice.once_in(12) {
            let size = self.head.model.size() + dice.below(2 * self.unit);
            disk.resize(size).unwrap();
            self.head.model.bytes.resize(size as usize, 0);
        }
    }

    fn create(&mut self) {
        let name = self.new_name();
        snapshot::create(&self.path, &name, "").unwrap();
        self.snapshots.insert(name.clone(), self.head.clone());
        self.head.parent = Some(name);
    }

    fn revert(&mut self, name: &str, keep: bool) {
        let kept = keep.then(|| self.new_name());
        snapshot::revert(&self.path, name, kept.as_deref()).unwrap();
        if let Some(kept) = kept {
            self.snapshots.insert(kept, self.head.clone());
        }
        self.head =
            Moment { parent: Some(name.to_owned()), model: self.snapshots[name].model.clone() };
    }

    fn delete(&mut self, name: &str, tree: bool) {
        let above = self.descendants(name);
        let done = snapshot::delete(&self.path, name, tree);
        if !above.is_empty() && !tree {
            assert_eq!(done.unwrap_err().kind(), ErrorKind::Sealed);
            return;
        }
        done.unwrap();
        let gone = self.snapshots.remove(name).unwrap();
        let parent = self.head.parent.clone().unwrap_or_default();
        if parent == name || above.contains(&parent) {
            self.head = gone;
        }
        above.iter().for_each(|name| drop(self.snapshots.remove(name)));
    }

    fn merge(&mut self, name: &str) {
        let stood_on = !self.children(name).is_empty() || self.head.parent.as_deref() == Some(name);
        let done = merge::merge(&self.path, name, &mut |_, _| true);
        if !stood_on {
            assert_eq!(done.unwrap_err().kind(), ErrorKind::Invalid);
            return;
        }
        done.unwrap();
        let gone = self.snapshots.remove(name).unwrap();
        for moment in self.snapshots.values_mut().chain([&mut self.head]) {
            if moment.parent.as_deref() == Some(name) {
                moment.parent = gone.parent.clone();
            }
        }
    }

    fn step(&mut self, dice: &mut Dice) {
        let name = self.some_name(dice);
        match (dice.below(20), name) {
            (0..8, _) => self.write(dice),
            (8..13, _) | (_, None) => self.create(),
            (13..15, Some(name)) => self.revert(&name, dice.once_in(2)),
            (15..17, Some(name)) => self.delete(&name, dice.once_in(2)),
            (_, Some(name)) => self.merge(&name),
        }
    }

    fn compare(&self) {
        let disk = chain::open(&self.path, &OpenOptions::default()).unwrap();
        self.head.model.compare(&disk).unwrap();
        drop(disk);
        for (name, moment) in &self.snapshots {
            let disk = snapshot::open_at(&self.path, name, &OpenOptions::default()).unwrap();
            moment.model.compare(&disk).unwrap_or_else(|e| panic!("'{name}': {e}"));
        }
        let family = chain::tree::Family::read(&self.path).unwrap();
        let members = family.iter().flat_map(|f| f.snapshots());
        let mut names: Vec<_> = members.map(|m| m.label.name.clone()).collect();
        names.sort();
        assert!(names.iter().eq(self.snapshots.keys()), "{names:?}");
    }

    /// Two clones of the disk as it is now: neither sees the other, nor does the base change.
    fn clone_twice(&mut self, dice: &mut Dice) {
        let base = Base::seal(&self.path).unwrap();
        let clones = ["one", "two"].map(|name| self.path.with_file_name(name));
        let mut models = [self.head.model.clone(), self.head.model.clone()];
        for (path, model) in clones.iter().zip(&mut models) {
            base.clone_to(path).unwrap();
            let disk = chain::open(path, &OpenOptions::writable()).unwrap();
            for _ in 0..5 {
                let op = random_op(dice, model.size(), self.unit);
                model.apply(&disk, &op).unwrap();
            }
        }
        drop(base);
        let refused = chain::open(&self.path, &OpenOptions::writable()).err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::Sealed);
        for (path, model) in clones.iter().zip(&models) {
            let disk = chain::open(path, &OpenOptions::default()).unwrap();
            model.compare(&disk).unwrap();
        }
        self.compare();
    }
}

fn round(dice: &mut Dice, with_qemu: bool) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let bits = dice.pick(&[9, 12, 12, 16, 16]);
    let options = CreateOptions {
        cluster: Unit::from_bits(bits),
        extended_l2: bits >= 14 && dice.once_in(2),
        ..CreateOptions::new((dice.below(16) + 8) << bits.max(11))
    };
    chain::create(&path, &options).unwrap();
    let head = Moment { model: Model::new(options.size), parent: None };
    let mut family = Family { path, unit: 1 << bits, head, snapshots: BTreeMap::new(), taken: 0 };
    for step in 0..15 + dice.below(25) {
        undisturbed(|| {
            family.step(dice);
            if step % 4 == 0 {
                family.compare();
            }
        });
    }
    undisturbed(|| family.compare());
    drop(open_patiently(&family.path, &OpenOptions::writable()).unwrap());
    let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(files.len(), 1 + family.snapshots.len(), "no file is left over: {files:?}");
    files.iter().for_each(|path| check_layer(path, with_qemu).unwrap());
    undisturbed(|| family.clone_twice(dice));
}

#[test]
fn snapshots_and_clones_read_as_the_moments_that_they_were_taken() {
    let with_qemu = have_qemu();
    let seed = seed();
    let budget = Budget::new(8);
    let mut done = 0;
    while budget.goes_on(done) {
        let seed = if done == 0 { seed } else { seed.wrapping_add(done) };
        let _confess = Confess(seed);
        round(&mut Dice::new(seed), with_qemu);
        done += 1;
    }
    eprintln!("{done} rounds, VDISK_SEED={seed:#x}");
}
