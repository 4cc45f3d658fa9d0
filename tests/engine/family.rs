//! A disk with snapshots, used at random: every snapshot, the head, and clones of it at the end,
//! against a model that keeps a copy of each.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use vdisk::ErrorKind;
use vdisk::internals::addr::Unit;
use vdisk::internals::change::merge::Wishes;
use vdisk::internals::change::plan::{Keeping, Plan, Undoable};
use vdisk::internals::change::{self, Base, merge, snapshot};
use vdisk::internals::family;
use vdisk::internals::image::Role;
use vdisk::internals::open;
use vdisk::internals::open::OpenOptions;
use vdisk::internals::qcow2::CreateOptions;

use crate::dice::{Dice, rounds};
use crate::model::{Model, random_op};
use crate::processes::{have_qemu, undisturbed};
use crate::property::{check_layer, open_patiently};

/// A moment of the disk, and the snapshot that it was made from.
#[derive(Clone)]
struct Moment {
    model: Model,
    parent: Option<String>,
}

/// What the disk was before the last change that can be taken back.
#[derive(Clone)]
struct Before {
    /// The head, where the change moved it.
    head: Option<Moment>,
    /// The snapshots that went.
    snapshots: Vec<(String, Moment)>,
}

struct Family {
    path: PathBuf,
    unit: u64,
    head: Moment,
    snapshots: BTreeMap<String, Moment>,
    taken: u64,
    before: Option<Before>,
}

fn carry_out(plan: &Plan) {
    plan.execute(&mut |_, _| true).unwrap();
}

/// What is dropped is kept for undo as often as not.
fn keeping(dice: &mut Dice) -> Keeping {
    if dice.once_in(2) { Keeping::NOTHING } else { Keeping::default() }
}

impl Family {
    fn children(&self, name: &str) -> Vec<String> {
        let all = self.snapshots.iter().filter(|(_, m)| self.parent(m).as_deref() == Some(name));
        all.map(|(name, _)| name.clone()).collect()
    }

    /// The snapshot that a moment stands on, over those that are only kept aside.
    fn parent(&self, moment: &Moment) -> Option<String> {
        let mut parent = moment.parent.clone();
        while let Some(name) = parent.as_ref().filter(|name| !self.snapshots.contains_key(*name)) {
            let kept = self.before.iter().flat_map(|b| &b.snapshots);
            parent = kept.clone().find(|(n, _)| n == name).and_then(|(_, m)| m.parent.clone());
        }
        parent
    }

    /// Only the last change can be taken back.
    fn set_before(&mut self, new: Option<Before>) {
        for (name, moment) in
            std::mem::replace(&mut self.before, new).into_iter().flat_map(|b| b.snapshots)
        {
            self.reparent(&name, moment.parent.as_deref());
        }
    }

    /// What stands on `name`, which goes, stands on `parent` from now on.
    fn reparent(&mut self, name: &str, parent: Option<&str>) {
        let before = self.before.iter_mut();
        let kept = before.flat_map(|b| b.snapshots.iter_mut().map(|(_, m)| m).chain(&mut b.head));
        for moment in self.snapshots.values_mut().chain([&mut self.head]).chain(kept) {
            if moment.parent.as_deref() == Some(name) {
                moment.parent = parent.map(str::to_owned);
            }
        }
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
        let disk = change::open(&self.path, &OpenOptions { cache, ..OpenOptions::writable() });
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

    fn revert(&mut self, name: &str, keep: bool, keeping: Keeping) {
        let kept = keep.then(|| self.new_name());
        let plan = snapshot::plan_revert(&self.path, name, kept.as_deref(), keeping).unwrap();
        carry_out(&plan);
        let there = self.snapshots[name].model.clone();
        let now = Moment { parent: Some(name.to_owned()), model: there };
        let old = std::mem::replace(&mut self.head, now);
        if let Some(kept) = kept {
            self.snapshots.insert(kept, old);
        } else if keeping == Keeping::NOTHING {
            if plan.undo != Undoable::NotNeeded {
                self.set_before(None);
            }
        } else if plan.undo != Undoable::NotNeeded {
            self.set_before(Some(Before { head: Some(old), snapshots: Vec::new() }));
        }
    }

    fn delete(&mut self, name: &str, tree: bool, keeping: Keeping) {
        let above = self.descendants(name);
        let plan = snapshot::plan_delete(&self.path, name, tree, keeping);
        if !above.is_empty() && !tree {
            assert_eq!(plan.unwrap_err().kind(), ErrorKind::Sealed);
            return;
        }
        carry_out(&plan.unwrap());
        let parent = self.parent(&self.head);
        let gone = self.snapshots.remove(name).unwrap();
        let mut before = Before { head: None, snapshots: vec![(name.to_owned(), gone.clone())] };
        let parent = parent.unwrap_or_default();
        if parent == name || above.contains(&parent) {
            let back = Moment { model: gone.model, parent: Some(name.to_owned()) };
            before.head = Some(std::mem::replace(&mut self.head, back));
        }
        for name in above {
            let gone = self.snapshots.remove(&name).unwrap();
            before.snapshots.push((name, gone));
        }
        self.set_before(Some(before));
        if keeping == Keeping::NOTHING {
            self.set_before(None);
        }
    }

    fn merge(&mut self, name: &str, in_batches: bool) {
        let head_parent = self.parent(&self.head);
        let stood_on = !self.children(name).is_empty() || head_parent.as_deref() == Some(name);
        let wishes = Wishes { in_batches, keeping: Keeping::NOTHING, ..Wishes::default() };
        let plan = merge::plan_merge(&self.path, name, wishes);
        if !stood_on {
            assert_eq!(plan.unwrap_err().kind(), ErrorKind::Invalid);
            return;
        }
        let plan = plan.unwrap();
        carry_out(&plan);
        if plan.forgets.is_some() {
            self.set_before(None);
        }
        let gone = self.snapshots.remove(name).unwrap();
        self.reparent(name, gone.parent.as_deref());
    }

    fn undo(&mut self, keep: bool) {
        let Some(before) = self.before.take() else {
            let nothing = snapshot::plan_undo(&self.path, None).unwrap_err();
            assert!(matches!(nothing.kind(), ErrorKind::NotFound), "{nothing}");
            return;
        };
        let kept = (keep && before.head.is_some()).then(|| self.new_name());
        carry_out(&snapshot::plan_undo(&self.path, kept.as_deref()).unwrap());
        if let Some(head) = before.head {
            let old = std::mem::replace(&mut self.head, head);
            kept.map(|kept| self.snapshots.insert(kept, old));
        }
        self.snapshots.extend(before.snapshots);
    }

    fn forget(&mut self) {
        if family::tree::Family::read(&self.path).unwrap().is_some() {
            carry_out(&snapshot::plan_forget(&self.path).unwrap());
        }
        self.set_before(None);
    }

    fn step(&mut self, dice: &mut Dice) {
        crate::dice::operation();
        let name = self.some_name(dice);
        match (dice.below(24), name) {
            (0..8, _) => self.write(dice),
            (20..23, _) => self.undo(dice.once_in(2)),
            (23, _) => self.forget(),
            (8..13, _) | (_, None) => self.create(),
            (13..15, Some(name)) => self.revert(&name, dice.once_in(3), keeping(dice)),
            (15..17, Some(name)) => self.delete(&name, dice.once_in(2), keeping(dice)),
            (_, Some(name)) => self.merge(&name, dice.once_in(2)),
        }
    }

    fn compare(&self) {
        let disk = change::open(&self.path, &OpenOptions::default()).unwrap();
        self.head.model.compare(&disk).unwrap();
        drop(disk);
        for (name, moment) in &self.snapshots {
            let disk = snapshot::open_at(&self.path, name, &OpenOptions::default()).unwrap();
            moment.model.compare(&disk).unwrap_or_else(|e| panic!("'{name}': {e}"));
        }
        let family = family::tree::Family::read(&self.path).unwrap();
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
            let disk = change::open(path, &OpenOptions::writable()).unwrap();
            for _ in 0..5 {
                let op = random_op(dice, model.size(), self.unit);
                model.apply(&disk, &op).unwrap();
            }
        }
        drop(base);
        let refused = change::open(&self.path, &OpenOptions::writable()).err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::Sealed);
        for (path, model) in clones.iter().zip(&models) {
            let disk = change::open(path, &OpenOptions::default()).unwrap();
            model.compare(&disk).unwrap();
        }
        self.compare();
    }
}

/// How many layers have no name, and several layers that stand on them.
fn shared_layers(path: &Path) -> usize {
    let Some(family) = family::tree::Family::read(path).unwrap() else { return 0 };
    let unnamed = family.layers.iter().filter(|m| m.label.role == Role::Unnamed);
    unnamed.filter(|m| family.children(m.label.layer).len() > 1).count()
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
    open::create(&path, &options).unwrap();
    let head = Moment { model: Model::new(options.size), parent: None };
    let mut family =
        Family { path, unit: 1 << bits, head, snapshots: BTreeMap::new(), taken: 0, before: None };
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
    undisturbed(|| {
        family.forget();
        family.compare();
    });
    let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
    let shared = shared_layers(&family.path);
    assert_eq!(files.len(), 1 + family.snapshots.len() + shared, "nothing is left over: {files:?}");
    files.iter().for_each(|path| check_layer(path, with_qemu).unwrap());
    undisturbed(|| family.clone_twice(dice));
}

#[test]
fn snapshots_and_clones_read_as_the_moments_that_they_were_taken() {
    let with_qemu = have_qemu();
    rounds(8, |dice| round(dice, with_qemu));
}

/// The clock decided which event was the last one: set back, it brought back an older delete.
#[test]
fn an_undo_brings_back_what_was_dropped_last_whatever_the_clock_said() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    open::create(&path, &CreateOptions::new(1 << 20)).unwrap();
    for name in ["a", "b"] {
        snapshot::create(&path, name, "").unwrap();
    }
    snapshot::delete(&path, "b", false).unwrap();
    // As if that had been done when the clock was a year ahead.
    let tree = family::tree::Family::of(&path).unwrap();
    for member in tree.members().filter(|m| m.label.kept.is_some()) {
        let options = OpenOptions { unprotected: true, ..OpenOptions::writable() };
        let layer = open::open_image(&member.path, &options).unwrap();
        let mut identity = layer.image.identity().unwrap();
        let kept = identity.label.as_mut().and_then(|label| label.kept.as_mut()).unwrap();
        kept.since += 365 * 86_400_000;
        kept.until += 365 * 86_400_000;
        layer.image.set_identity(&identity).unwrap();
    }
    snapshot::delete(&path, "a", false).unwrap();
    let plan = snapshot::plan_undo(&path, None).unwrap();
    assert_eq!(plan.snapshots, ["a"]);
}

#[test]
fn a_clock_that_was_set_forth_ends_no_keeping_before_its_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    open::create(&path, &CreateOptions::new(1 << 20)).unwrap();
    snapshot::create(&path, "a", "").unwrap();
    snapshot::delete(&path, "a", false).unwrap();
    // What is kept for a week, moved as if the clock had gone on by a year in the meantime.
    let move_back = |boot: u64| {
        let tree = family::tree::Family::of(&path).unwrap();
        for member in tree.members().filter(|m| m.label.kept.is_some()) {
            let options = OpenOptions { unprotected: true, ..OpenOptions::writable() };
            let layer = open::open_image(&member.path, &options).unwrap();
            let mut identity = layer.image.identity().unwrap();
            let kept = identity.label.as_mut().and_then(|label| label.kept.as_mut()).unwrap();
            kept.since -= 365 * 86_400_000;
            kept.until -= 365 * 86_400_000;
            kept.uptime.as_mut().unwrap().boot ^= boot;
            layer.image.set_identity(&identity).unwrap();
        }
    };
    let open_and_close = || drop(change::open(&path, &OpenOptions::writable()).unwrap());
    move_back(0);
    open_and_close();
    assert_eq!(snapshot::plan_undo(&path, None).unwrap().snapshots, ["a"]);
    // On another host, or after another boot, the clock is all there is.
    move_back(1);
    open_and_close();
    assert_eq!(snapshot::plan_undo(&path, None).unwrap_err().kind(), ErrorKind::NotFound);
}
