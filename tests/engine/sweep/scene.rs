//! A directory with a base, clones of it and snapshots on two branches; what it shows to a user,
//! and the commands that change it.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};

use vdisk::addr::Unit;
use vdisk::block::BlockDevice;
use vdisk::chain::{self, Base, Chain, OpenOptions, snapshot, tree::Family};
use vdisk::qcow2::{self, CreateOptions};
use vdisk::storage::{FileOptions, FileStorage};

use crate::dice::Dice;

/// Bytes of each disk.
const SIZE: u64 = 160 << 10;
const CLUSTER: u64 = 4 << 10;
/// The base of `alone.qcow2`: a commit writes it in place, so nobody is to look at it but through
/// that disk.
const BELOW: &str = "below.qcow2";

/// A command that changes the directory.
pub struct Operation {
    /// Commands that are done with before it.
    pub first: Vec<Vec<String>>,
    pub args: Vec<String>,
    /// Whether it is one step, so that nothing between the old state and the new one is allowed.
    /// Otherwise each disk and each snapshot is as before or as after.
    pub atomic: bool,
    /// Whether it holds a disk and writes to it, as [`holder`](super::holder) does.
    pub held: bool,
}

/// What a user sees: a digest of each disk's contents, and of each of its snapshots as
/// `DISK@SNAPSHOT`.
pub type State = BTreeMap<String, u64>;

fn write(disk: &Chain, dice: &mut Dice, times: u64) {
    for _ in 0..times {
        let offset = dice.below(SIZE / 512) * 512;
        let len = (dice.below(3 * CLUSTER / 512) + 1) * 512;
        let len = len.min(SIZE - offset);
        match dice.below(6) {
            0 => disk.write_zeroes(offset, len, true).unwrap(),
            1 => disk.discard(offset, len).unwrap(),
            _ => {
                let bytes: Vec<u8> = (0..len).map(|_| dice.next() as u8).collect();
                disk.write_at(offset, &[IoSlice::new(&bytes)]).unwrap();
            }
        }
    }
}

fn write_to(path: &Path, dice: &mut Dice) {
    let disk = chain::open(path, &OpenOptions::writable()).unwrap();
    write(&disk, dice, 6);
    disk.flush().unwrap();
}

/// Fills an empty directory: `base.qcow2`; `other.qcow2`, a clone of it; and `disk.qcow2`, another,
/// with the snapshots a, b and c in a line and d as a branch on a; `alone.qcow2` on a base of its own.
pub fn build(dir: &Path, dice: &mut Dice) {
    let (base, disk, other) =
        (dir.join("base.qcow2"), dir.join("disk.qcow2"), dir.join("other.qcow2"));
    let options = CreateOptions {
        cluster: Unit::from_bits(CLUSTER.trailing_zeros()),
        ..CreateOptions::new(SIZE)
    };
    chain::create(&base, &options).unwrap();
    write_to(&base, dice);
    chain::create(&dir.join(BELOW), &options).unwrap();
    write_to(&dir.join(BELOW), dice);
    Base::seal(&dir.join(BELOW)).unwrap().clone_to(&dir.join("alone.qcow2")).unwrap();
    write_to(&dir.join("alone.qcow2"), dice);
    let sealed = Base::seal(&base).unwrap();
    sealed.clone_to(&disk).unwrap();
    sealed.clone_to(&other).unwrap();
    drop(sealed);
    write_to(&other, dice);
    write_to(&disk, dice);
    snapshot::create(&disk, "a", "").unwrap();
    write_to(&disk, dice);
    snapshot::revert(&disk, "a", Some("d")).unwrap();
    write_to(&disk, dice);
    snapshot::create(&disk, "b", "the second").unwrap();
    write_to(&disk, dice);
    snapshot::create(&disk, "c", "").unwrap();
    write_to(&disk, dice);
}

/// The commands of a sweep.
pub fn operations() -> Vec<Operation> {
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let one =
        |line: &str| Operation { first: Vec::new(), args: words(line), atomic: true, held: false };
    let many = |line: &str| Operation { atomic: false, ..one(line) };
    let after = |first: &str, line: &str| Operation { first: vec![words(first)], ..one(line) };
    vec![
        one("snapshot create disk.qcow2 e --description words"),
        one("snapshot revert disk.qcow2 b --yes"),
        one("snapshot revert disk.qcow2 d --keep e"),
        one("snapshot delete disk.qcow2 c --yes"),
        one("snapshot delete disk.qcow2 d --yes"),
        one("snapshot delete disk.qcow2 b --tree --yes"),
        one("snapshot delete disk.qcow2 c --forget --yes"),
        one("snapshot merge disk.qcow2 a --in-batches"),
        one("snapshot merge disk.qcow2 b --in-batches"),
        one("snapshot merge disk.qcow2 c --in-batches"),
        after("snapshot delete disk.qcow2 c --yes", "snapshot undo disk.qcow2 --yes"),
        after("snapshot delete disk.qcow2 c --yes", "snapshot undo disk.qcow2 --keep e"),
        after("snapshot delete disk.qcow2 c --yes", "snapshot delete disk.qcow2 b --yes"),
        after("snapshot delete disk.qcow2 c --yes", "snapshot forget disk.qcow2"),
        after("snapshot delete disk.qcow2 b --tree --yes", "snapshot undo disk.qcow2 --yes"),
        after("snapshot delete disk.qcow2 b --tree --yes", "snapshot forget disk.qcow2"),
        after("snapshot revert disk.qcow2 a --yes", "snapshot undo disk.qcow2 --yes"),
        after("snapshot revert disk.qcow2 b --yes", "snapshot merge disk.qcow2 b"),
        one("snapshot merge disk.qcow2 a"),
        one("snapshot merge disk.qcow2 b"),
        one("snapshot merge disk.qcow2 c"),
        one("snapshot rename disk.qcow2 b e"),
        many("clone other.qcow2 new1.qcow2 new2.qcow2"),
        one("clone --full disk.qcow2 copy.qcow2"),
        one("rebase other.qcow2 --flatten"),
        one("commit alone.qcow2"),
        one("resize disk.qcow2 +64K"),
        one("convert disk.qcow2 new.qcow2 --compress"),
        one("create new.qcow2 1M"),
    ]
}

/// Changes of the tree of a disk in use, as [`holder`](super::holder) does them.
pub fn live_operations() -> Vec<Operation> {
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let after = |first: Vec<Vec<String>>, change: &str| {
        let args = super::holder::command(change);
        Operation { first, args, atomic: true, held: true }
    };
    let one = |change: &str| after(Vec::new(), change);
    let deleted = || vec![words("snapshot delete disk.qcow2 d --yes")];
    vec![
        one("create e"),
        one("merge a"),
        one("merge b"),
        one("merge c"),
        one("merge a batches"),
        one("merge b batches"),
        one("merge c batches"),
        one("delete d"),
        one("delete d kept"),
        one("rename b e"),
        after(deleted(), "undo"),
        after(deleted(), "forget"),
        after(vec![words("snapshot delete disk.qcow2 c --yes")], "forget"),
    ]
}

/// The disks of a directory: every name but those of frozen layers and drafts, and [`BELOW`].
pub fn disks(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let mut disks: Vec<_> = entries.filter(|p| is_disk(p)).collect();
    disks.sort();
    disks
}

fn is_disk(path: &Path) -> bool {
    let name = path.file_name().unwrap().to_str().unwrap();
    !name.starts_with('.') && !name.contains('@') && name != BELOW
}

/// The digest of what the disk at `path` shows, opened for reading.
pub fn look(path: &Path) -> vdisk::Result<u64> {
    Ok(digest(&chain::open(path, &OpenOptions::default())?))
}

fn digest(disk: &Chain) -> u64 {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(0, &mut [IoSliceMut::new(&mut bytes)]).unwrap();
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// All that the directory shows.
pub fn observe(dir: &Path) -> vdisk::Result<State> {
    let mut state = State::new();
    for path in disks(dir) {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let family = Family::read(&path)?;
        for member in family.iter().flat_map(Family::snapshots) {
            let snapshot = &member.label.name;
            let disk = snapshot::open_at(&path, snapshot, &OpenOptions::default())?;
            state.insert(format!("{name}@{snapshot}"), digest(&disk));
        }
        state.insert(name, look(&path)?);
    }
    Ok(state)
}

/// Opens every disk for writing, which finishes or takes back what was interrupted.
pub fn heal(dir: &Path) -> vdisk::Result<()> {
    for path in disks(dir) {
        match chain::open(&path, &OpenOptions::writable()) {
            Err(e) if e.kind() == vdisk::ErrorKind::Sealed => {}
            other => drop(other?),
        }
    }
    Ok(())
}

/// Whether every file of the directory is free of corruptions; leaks are allowed.
pub fn check(dir: &Path) -> Result<(), String> {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let options = FileOptions { access: None, write: false };
        let file = FileStorage::open(&path, options).map_err(|e| e.to_string())?;
        let image = qcow2::Image::open(std::sync::Arc::new(file), qcow2::OpenOptions::default());
        let found = image.and_then(|image| image.check(qcow2::Repair::None));
        let found = found.map_err(|e| format!("{}: {e}", path.display()))?;
        if found.corruptions > 0 {
            return Err(format!("{}: {found:#?}", path.display()));
        }
    }
    Ok(())
}
