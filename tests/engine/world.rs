//! Several disks in several directories, used at random, idle and live: clones of heads and of
//! snapshots, clones of clones, copies of heads, heads that are renamed, disks that are removed. After
//! every step every disk and every snapshot of every disk reads as a model of its bytes says, whatever
//! was done to its neighbours; what would not is refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use vdisk::ErrorKind;
use vdisk::internals::addr::Unit;
use vdisk::internals::change::live::Live;
use vdisk::internals::change::merge::Wishes;
use vdisk::internals::change::plan::{Keeping, Plan, Undoable};
use vdisk::internals::change::rebase::flatten;
use vdisk::internals::change::{Base, DeleteWishes, merge, plan_remove, snapshot, unseal};
use vdisk::internals::family::clones_of;
use vdisk::internals::family::tree::Family;
use vdisk::internals::image::Role;
use vdisk::internals::open;
use vdisk::internals::open::OpenOptions;
use vdisk::internals::qcow2::CreateOptions;

use crate::dice::{Dice, operation, rounds};
use crate::model::{Model, random_op};
use crate::processes::{have_qemu, undisturbed};
use crate::property::{check_layer, open_patiently};

/// What is asked of who holds a disk.
type Ask<'a> = dyn Fn(&Live) -> vdisk::Result<()> + 'a;

/// What a disk was made on: another disk's head, or its snapshot of that name.
type On = (u64, Option<String>);

struct Disk {
    path: PathBuf,
    head: Model,
    snapshots: BTreeMap<String, Model>,
    on: Option<On>,
    /// Names of snapshots that are gone, and what they held.
    gone: BTreeMap<String, Model>,
    /// The head that the last undoable change put aside.
    aside: Option<Model>,
    /// Whether it is a copy of another head, or was copied: whose layers they are is not told apart.
    copied: bool,
}

struct World {
    dir: tempfile::TempDir,
    disks: BTreeMap<u64, Disk>,
    next: u64,
    unit: u64,
    refused: u64,
    done: u64,
    /// What was done, told when it fails.
    story: Vec<String>,
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.story.join("\n"));
        }
    }
}

const DIRECTORIES: [&str; 3] = ["a", "b", "a/c"];

fn keeping(dice: &mut Dice) -> Keeping {
    match dice.below(3) {
        0 => Keeping::NOTHING,
        1 => Keeping(Duration::from_millis(1)),
        _ => Keeping::default(),
    }
}

fn is_sealed(path: &Path) -> bool {
    let label = open::peek(path).unwrap().and_then(|p| p.identity.label);
    label.is_some_and(|l| l.role == Role::Base)
}

impl World {
    fn new(dice: &mut Dice) -> World {
        let dir = tempfile::tempdir().unwrap();
        DIRECTORIES.iter().for_each(|d| std::fs::create_dir(dir.path().join(d)).unwrap());
        let bits = dice.pick(&[9, 12, 16]);
        let mut world = World {
            dir,
            disks: BTreeMap::new(),
            next: 0,
            unit: 1 << bits,
            refused: 0,
            done: 0,
            story: Vec::new(),
        };
        for _ in 0..2 {
            world.make(dice, bits);
        }
        world
    }

    fn new_path(&mut self, dice: &mut Dice) -> PathBuf {
        self.next += 1;
        let ending = dice.pick(&["", ".qcow2", ".img"]);
        self.dir.path().join(dice.pick(&DIRECTORIES)).join(format!("disk{}{ending}", self.next))
    }

    fn make(&mut self, dice: &mut Dice, bits: u32) {
        let path = self.new_path(dice);
        let size = (dice.below(8) + 8) << bits.max(11);
        let options = CreateOptions { cluster: Unit::from_bits(bits), ..CreateOptions::new(size) };
        open::create(&path, &options).unwrap();
        self.add(path, Model::new(size), None);
    }

    fn add(&mut self, path: PathBuf, head: Model, on: Option<On>) {
        let (snapshots, gone) = (BTreeMap::new(), BTreeMap::new());
        let disk = Disk { path, head, snapshots, on, gone, aside: None, copied: false };
        self.disks.insert(self.next, disk);
    }

    fn pick(&self, dice: &mut Dice) -> u64 {
        let number = dice.below(self.disks.len() as u64) as usize;
        *self.disks.keys().nth(number).unwrap()
    }

    fn some_snapshot(&self, dice: &mut Dice, disk: u64) -> Option<String> {
        let names = &self.disks[&disk].snapshots;
        let number = dice.below(names.len().max(1) as u64) as usize;
        names.keys().nth(number).cloned()
    }

    /// Whether somebody may stand on the disk or one of its snapshots.
    fn is_cloned(&self, disk: u64) -> bool {
        self.disks[&disk].copied
            || self.disks.values().any(|d| d.on.as_ref().is_some_and(|on| on.0 == disk))
    }

    fn tell(&mut self, what: String) {
        self.story.push(what);
    }

    /// A refusal is right where somebody stands there, or the disk is a base.
    fn note(&mut self, disk: u64, kind: ErrorKind) {
        self.tell(format!("  refused: {kind:?}"));
        let right = match kind {
            ErrorKind::Sealed => self.is_cloned(disk) || is_sealed(&self.disks[&disk].path),
            ErrorKind::Invalid | ErrorKind::InUse | ErrorKind::NotFound => true,
            _ => false,
        };
        assert!(right, "disk {disk} refuses with {kind:?}");
        self.refused += 1;
    }

    fn write(&mut self, dice: &mut Dice, number: u64) {
        let unit = self.unit;
        self.tell(format!("write {number}"));
        let disk = self.disks.get_mut(&number).unwrap();
        let chain = match open_patiently(&disk.path, &OpenOptions::writable()) {
            Err(e) if e.kind() == ErrorKind::Sealed => return self.note(number, e.kind()),
            other => other.unwrap(),
        };
        for _ in 0..=dice.below(5) {
            let op = random_op(dice, disk.head.size(), unit);
            disk.head.apply(&chain, &op).unwrap();
        }
    }

    fn create(&mut self, number: u64) {
        self.next += 1;
        let name = format!("s{}", self.next);
        self.tell(format!("create {number} {name}"));
        let disk = self.disks.get_mut(&number).unwrap();
        match snapshot::create(&disk.path, &name, "") {
            Ok(()) => _ = disk.snapshots.insert(name, disk.head.clone()),
            Err(e) => self.note(number, e.kind()),
        }
    }

    fn clone(&mut self, dice: &mut Dice, number: u64, name: Option<String>) {
        let path = self.new_path(dice);
        self.tell(format!("clone {number} {name:?} as {} {}", self.next, path.display()));
        let disk = &self.disks[&number];
        let (base, model) = match &name {
            None => (disk.path.clone(), disk.head.clone()),
            Some(name) => {
                let family = Family::of(&disk.path).unwrap();
                (family.snapshot(name).unwrap().path.clone(), disk.snapshots[name].clone())
            }
        };
        Base::seal(&base).and_then(|base| base.clone_to(&path)).unwrap();
        self.add(path, model, Some((number, name)));
    }

    /// Whether clones are not to count, where it is known who they are.
    fn even(&self, dice: &mut Dice, number: u64) -> bool {
        dice.once_in(8) && !self.disks[&number].copied
    }

    /// Who stands on these snapshots, on one another, and so on.
    fn standing_on(&self, number: u64, names: &[String]) -> Vec<u64> {
        let right_on = |on: &On| on.0 == number && on.1.as_ref().is_some_and(|n| names.contains(n));
        let mut found: Vec<u64> = Vec::new();
        for (id, disk) in &self.disks {
            let above = |on: &On| found.contains(&on.0);
            if disk.on.as_ref().is_some_and(|on| right_on(on) || above(on)) {
                found.push(*id);
            }
        }
        found
    }

    fn lose(&mut self, lost: &[u64]) {
        for id in lost {
            let disk = self.disks.remove(id).unwrap();
            let family = Family::of(&disk.path).unwrap();
            family.members().for_each(|m| std::fs::remove_file(&m.path).unwrap());
        }
    }

    /// Executes what is planned, idle or by who holds the disk.
    fn carry_out(
        &mut self,
        dice: &mut Dice,
        number: u64,
        plan: vdisk::Result<Plan>,
        live: Option<&Ask<'_>>,
    ) -> Option<Plan> {
        let plan = match plan {
            Ok(plan) => plan,
            Err(e) => {
                self.note(number, e.kind());
                return None;
            }
        };
        if dice.once_in(10) {
            // As while a user is asked whether to go on.
            let name = self.some_snapshot(dice, number);
            self.clone(dice, number, name);
        }
        let path = self.disks[&number].path.clone();
        let done = match live {
            Some(ask) if !is_sealed(&path) => {
                let chain = Arc::new(open_patiently(&path, &OpenOptions::writable()).unwrap());
                let live = Live::new(chain.clone(), &path).unwrap();
                let done = ask(&live);
                if done.is_ok() {
                    self.disks[&number].head.compare(&*chain).unwrap();
                }
                done
            }
            _ => plan.execute(&mut |_, _| true),
        };
        match done {
            Ok(()) => {
                self.done += 1;
                Some(plan)
            }
            Err(e) => {
                self.note(number, e.kind());
                None
            }
        }
    }

    fn delete(&mut self, dice: &mut Dice, number: u64, name: &str) {
        let (tree, even_if_cloned) = (dice.once_in(2), self.even(dice, number));
        let wishes = DeleteWishes { tree, keeping: keeping(dice), even_if_cloned };
        self.tell(format!("delete {number} {name} {wishes:?}"));
        let others = self.disks[&number].snapshots.len() > 1;
        let plan = snapshot::plan_delete_as(&self.disks[&number].path, name, wishes);
        let ask = |live: &Live| live.delete(name, wishes, None, &mut |_, _| true);
        let live = dice.once_in(3) && plan.as_ref().is_ok_and(|plan| !plan.moves_head());
        if !tree && others && plan.as_ref().is_err_and(|e| e.kind() == ErrorKind::Sealed) {
            return;
        }
        let Some(plan) = self.carry_out(dice, number, plan, live.then_some(&ask)) else { return };
        let mut names = plan.snapshots.clone();
        names.push(name.to_owned());
        if even_if_cloned {
            self.lose(&self.standing_on(number, &names));
        }
        let disk = self.disks.get_mut(&number).unwrap();
        let target = disk.snapshots[name].clone();
        for name in names {
            let model = disk.snapshots.remove(&name).unwrap();
            disk.gone.insert(name, model);
        }
        disk.aside = plan.moves_head().then(|| std::mem::replace(&mut disk.head, target));
    }

    fn revert(&mut self, dice: &mut Dice, number: u64, name: &str) {
        self.next += 1;
        let keep = dice.once_in(2).then(|| format!("k{}", self.next));
        let path = self.disks[&number].path.clone();
        self.tell(format!("revert {number} {name} {keep:?}"));
        let plan = snapshot::plan_revert(&path, name, keep.as_deref(), keeping(dice));
        let Some(plan) = self.carry_out(dice, number, plan, None) else { return };
        let disk = self.disks.get_mut(&number).unwrap();
        let old = std::mem::replace(&mut disk.head, disk.snapshots[name].clone());
        match keep {
            Some(keep) => _ = disk.snapshots.insert(keep, old),
            None if plan.undo != Undoable::NotNeeded => disk.aside = Some(old),
            None => {}
        }
    }

    fn merge(&mut self, dice: &mut Dice, number: u64, name: &str) {
        let (in_batches, even_if_cloned) = (dice.once_in(2), self.even(dice, number));
        let in_use = dice.once_in(2) && !is_sealed(&self.disks[&number].path);
        let wishes = Wishes { keeping: keeping(dice), in_batches, in_use, even_if_cloned };
        self.tell(format!("merge {number} {name} {wishes:?}"));
        let plan = merge::plan_merge(&self.disks[&number].path, name, wishes);
        let ask = |live: &Live| live.merge(name, wishes, None, None, &mut |_, _| true);
        if self.carry_out(dice, number, plan, in_use.then_some(&ask)).is_none() {
            return;
        }
        if even_if_cloned {
            self.lose(&self.standing_on(number, &[name.to_owned()]));
        }
        let disk = self.disks.get_mut(&number).unwrap();
        let model = disk.snapshots.remove(name).unwrap();
        disk.gone.insert(name.to_owned(), model);
        disk.aside = None;
    }

    fn undo(&mut self, dice: &mut Dice, number: u64) {
        self.tell(format!("undo {number}"));
        let plan = snapshot::plan_undo(&self.disks[&number].path, None);
        let Some(plan) = self.carry_out(dice, number, plan, None) else { return };
        let disk = self.disks.get_mut(&number).unwrap();
        for name in plan.snapshots.clone() {
            let model = disk.gone.remove(&name).unwrap();
            disk.snapshots.insert(name, model);
        }
        if plan.moves_head() {
            disk.head = disk.aside.take().unwrap();
        }
    }

    fn forget(&mut self, dice: &mut Dice, number: u64) {
        let even = self.even(dice, number);
        self.tell(format!("forget {number} {even}"));
        let plan = snapshot::plan_forget_as(&self.disks[&number].path, even);
        let ask = |live: &Live| live.forget(even, None, &mut |_, _| true);
        let live = dice.once_in(2);
        self.carry_out(dice, number, plan, live.then_some(&ask));
    }

    fn remove(&mut self, dice: &mut Dice, number: u64) {
        if self.disks.len() < 2 {
            return;
        }
        self.tell(format!("remove {number}"));
        let plan = plan_remove(&self.disks[&number].path, false);
        if plan.is_ok() && dice.once_in(6) {
            let name = self.some_snapshot(dice, number);
            self.clone(dice, number, name);
        }
        match plan.and_then(|plan| plan.execute()) {
            Ok(untold) => {
                assert!(untold.is_empty());
                self.disks.remove(&number);
            }
            Err(e) => self.note(number, e.kind()),
        }
    }

    /// A copy of a head beside it is a disk of its own, on the same layers.
    fn copy(&mut self, number: u64) {
        if is_sealed(&self.disks[&number].path) {
            return;
        }
        self.next += 1;
        let from = self.disks[&number].path.clone();
        let to = from.with_file_name(format!("copy{}", self.next));
        std::fs::copy(&from, &to).unwrap();
        let head = self.disks[&number].head.clone();
        self.disks.get_mut(&number).unwrap().copied = true;
        self.tell(format!("copy {number} as {}", self.next));
        // What is kept aside of the other is not its own.
        let own = Family::read(&from)
            .unwrap()
            .is_some_and(|family| family.head.parent().is_some_and(|id| family.layer(id).is_ok()));
        let on = if own { Some((number, None)) } else { self.disks[&number].on.clone() };
        self.add(to, head, on);
        self.disks.get_mut(&self.next).unwrap().copied = true;
    }

    fn rename(&mut self, number: u64) {
        let disk = self.disks.get_mut(&number).unwrap();
        // Of two heads of one disk, the one with the layers' name owns them; and clones find a base
        // only by its name, or its ids.
        if disk.copied || is_sealed(&disk.path) {
            return;
        }
        self.next += 1;
        let to = disk.path.with_file_name(format!("renamed{}.q", self.next));
        std::fs::rename(&disk.path, &to).unwrap();
        disk.path.clone_from(&to);
        self.tell(format!("rename {number} {}", to.display()));
    }

    fn flatten(&mut self, number: u64) {
        self.tell(format!("flatten {number}"));
        match flatten(&self.disks[&number].path, &mut |_, _| true) {
            Err(e) => self.note(number, e.kind()),
            Ok(()) => {
                let disk = self.disks.get_mut(&number).unwrap();
                // Its snapshots stand where they stood.
                if disk.snapshots.is_empty() && disk.gone.is_empty() {
                    disk.on = None;
                }
            }
        }
    }

    fn unseal(&mut self, number: u64) {
        let path = self.disks[&number].path.clone();
        let stands = |d: &Disk| d.on.as_ref().is_some_and(|on| on.0 == number && on.1.is_none());
        // The user is to say it only where it is true.
        if is_sealed(&path) && !self.disks.values().any(stands) {
            self.tell(format!("unseal {number}"));
            assert!(clones_of(&path).unwrap().is_empty());
            assert!(unseal(&path, false).unwrap().is_empty());
        }
    }

    fn step(&mut self, dice: &mut Dice) {
        operation();
        let number = self.pick(dice);
        let name = self.some_snapshot(dice, number);
        match (dice.below(40), name) {
            (0..9, _) => self.write(dice, number),
            (9..14, _) | (23..33, None) => self.create(number),
            (14, _) => self.clone(dice, number, None),
            (15..19, name) => self.clone(dice, number, name),
            (19, _) => self.copy(number),
            (20, _) => self.rename(number),
            (21, _) => self.flatten(number),
            (22, _) => self.unseal(number),
            (23..28, Some(name)) => self.merge(dice, number, &name),
            (28..31, Some(name)) => self.delete(dice, number, &name),
            (31..33, Some(name)) => self.revert(dice, number, &name),
            (33..35, _) => self.undo(dice, number),
            (35..38, _) => self.forget(dice, number),
            (_, _) => self.remove(dice, number),
        }
    }

    fn compare(&self) {
        for (id, disk) in &self.disks {
            let here = disk.path.display();
            let chain = open_patiently(&disk.path, &OpenOptions::default());
            let chain = chain.unwrap_or_else(|e| panic!("disk {id}, {here}: {e}"));
            disk.head.compare(&chain).unwrap_or_else(|e| panic!("disk {id}, {here}: {e}"));
            for (name, model) in &disk.snapshots {
                let chain = snapshot::open_at(&disk.path, name, &OpenOptions::default());
                let chain = chain.unwrap_or_else(|e| panic!("disk {id}, {here}, '{name}': {e}"));
                model.compare(&chain).unwrap_or_else(|e| panic!("disk {id}, '{name}': {e}"));
            }
        }
    }

    fn check(&self, with_qemu: bool) {
        for dir in DIRECTORIES {
            for entry in std::fs::read_dir(self.dir.path().join(dir)).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file() {
                    check_layer(&path, with_qemu).unwrap();
                }
            }
        }
    }
}

fn round(dice: &mut Dice, with_qemu: bool) {
    let mut world = undisturbed(|| World::new(dice));
    for _ in 0..40 + dice.below(40) {
        undisturbed(|| {
            world.step(dice);
            if world.disks.len() > 9 {
                let number = world.pick(dice);
                world.remove(dice, number);
            }
            world.compare();
        });
    }
    if dice.once_in(4) {
        world.check(with_qemu);
    }
    assert!(world.done > 0 || world.refused > 0);
}

#[test]
fn disks_that_stand_on_one_another_read_right_whatever_is_done_to_the_others() {
    let with_qemu = have_qemu();
    rounds(12, |dice| round(dice, with_qemu));
}
