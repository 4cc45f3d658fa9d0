//! A directory with a base, clones of it and snapshots on two branches, and what it shows to a user.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use vdisk::internals::addr::Unit;
use vdisk::internals::block::BlockDevice;
use vdisk::internals::chain::Chain;
use vdisk::internals::change::plan::Keeping;
use vdisk::internals::change::{self, Base, snapshot};
use vdisk::internals::family::tree::Family;
use vdisk::internals::image::Role;
use vdisk::internals::open;
use vdisk::internals::open::OpenOptions;
use vdisk::internals::qcow2::{self, CreateOptions};
use vdisk::internals::storage::{FileOptions, FileStorage};

use crate::dice::Dice;

/// Bytes of each disk.
pub const SIZE: u64 = 160 << 10;
const CLUSTER: u64 = 4 << 10;
/// How the names begin of bases that a commit writes in place, so that nobody is to look at them but
/// through their disk.
const BELOW: &str = "below";

/// The bitmap of `disk.qcow2`, which goes with its head.
const BITMAP: &str = "b";

/// What a user sees: a digest of each disk's contents, of each of its snapshots as `DISK@SNAPSHOT`, and
/// of each of its head's bitmaps as `DISK#BITMAP`; and as `DISK!` and `DISK@SNAPSHOT!`, which of them are
/// said to be stood on.
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
    let disk = change::open(path, &OpenOptions::writable()).unwrap();
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
    open::create(&base, &options).unwrap();
    write_to(&base, dice);
    let below = dir.join("below.qcow2");
    open::create(&below, &options).unwrap();
    write_to(&below, dice);
    Base::seal(&below).unwrap().clone_to(&dir.join("alone.qcow2")).unwrap();
    write_to(&dir.join("alone.qcow2"), dice);
    let sealed = Base::seal(&base).unwrap();
    sealed.clone_to(&disk).unwrap();
    sealed.clone_to(&other).unwrap();
    drop(sealed);
    let file = FileStorage::open(&disk, FileOptions { access: None, write: true }).unwrap();
    let writable = qcow2::OpenOptions { read_only: false, ..qcow2::OpenOptions::default() };
    let mut image = qcow2::Image::open(std::sync::Arc::new(file), writable).unwrap();
    image.add_bitmap(BITMAP, Some(4096), true).unwrap();
    drop(image);
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

/// Fills an empty directory: `long.qcow2`, all of it data, and on it shorter disks. `short.qcow2`
/// ends within a cluster; `below.qcow2` is shorter than `over.qcow2`, which stands on it.
pub fn build_shorter(dir: &Path, dice: &mut Dice) {
    let long = dir.join("long.qcow2");
    let cluster = Unit::from_bits(CLUSTER.trailing_zeros());
    open::create(&long, &CreateOptions { cluster, ..CreateOptions::new(SIZE) }).unwrap();
    let disk = change::open(&long, &OpenOptions::writable()).unwrap();
    disk.write_at(0, &[IoSlice::new(&[0x5a; SIZE as usize])]).unwrap();
    drop(disk);
    let mut shorter = |base: &Path, name: &str, size: u64| {
        let path = dir.join(name);
        Base::seal(base).unwrap().clone_to(&path).unwrap();
        let disk = change::open(&path, &OpenOptions::writable()).unwrap();
        disk.resize(size).unwrap();
        for _ in 0..3 {
            let (offset, fill) = (dice.below(size / 512 - 6) * 512, dice.next() as u8);
            disk.write_at(offset, &[IoSlice::new(&[fill; 3000])]).unwrap();
        }
        path
    };
    shorter(&long, "short.qcow2", (50 << 10) + 512);
    let below = shorter(&long, "below.qcow2", 50 << 10);
    shorter(&below, "over.qcow2", SIZE);
}

/// As [`build`]; and of `disk.qcow2` something is kept aside whose time is over: its head, and the
/// snapshot c.
pub fn build_expired(dir: &Path, dice: &mut Dice) {
    build(dir, dice);
    let age = Duration::from_millis(1);
    let plan = snapshot::plan_delete(&dir.join("disk.qcow2"), "c", false, Keeping(age)).unwrap();
    plan.execute(&mut |_, _| true).unwrap();
    std::thread::sleep(2 * age);
}

/// Fills an empty directory: `one.qcow2`, whose snapshot a says that a clone stands on it, and
/// `three.qcow2`, which is a base, so that its user may know that the clones of both are gone.
pub fn build_marked(dir: &Path, dice: &mut Dice) {
    let cluster = Unit::from_bits(CLUSTER.trailing_zeros());
    let mut cloned = |name: &str, has_snapshot: bool| {
        let disk = dir.join(name);
        open::create(&disk, &CreateOptions { cluster, ..CreateOptions::new(SIZE) }).unwrap();
        write_to(&disk, dice);
        let mut base = disk.clone();
        if has_snapshot {
            snapshot::create(&disk, "a", "").unwrap();
            write_to(&disk, dice);
            base = Family::of(&disk).unwrap().snapshot("a").unwrap().path.clone();
        }
        let clone = dir.join("clone.qcow2");
        Base::seal(&base).unwrap().clone_to(&clone).unwrap();
        // As a user does it who knows nothing of marks.
        fs::remove_file(&clone).unwrap();
    };
    cloned("one.qcow2", true);
    cloned("three.qcow2", false);
}

/// The disks of a directory: every name but those of frozen layers and drafts, and such as [`BELOW`].
pub fn disks(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let mut disks: Vec<_> = entries.filter(|p| is_disk(p)).collect();
    disks.sort();
    disks
}

/// Whether the name is that of a disk's head.
pub fn is_disk(path: &Path) -> bool {
    let name = path.file_name().unwrap().to_str().unwrap();
    !name.starts_with('.') && !name.contains('@') && !name.starts_with(BELOW)
}

/// The digest of what the disk at `path` shows, opened for reading.
pub fn look(path: &Path) -> vdisk::Result<u64> {
    Ok(digest(&change::open(path, &OpenOptions::default())?))
}

/// What the disk shows.
pub fn bytes(disk: &Chain) -> Vec<u8> {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(0, &mut [IoSliceMut::new(&mut bytes)]).unwrap();
    bytes
}

fn digest(disk: &Chain) -> u64 {
    let bytes = bytes(disk);
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
            if member.label.is_marked() {
                state.insert(format!("{name}@{snapshot}!"), 0);
            }
        }
        if family.as_ref().is_some_and(|f| f.head.label.role == Role::Base) {
            state.insert(format!("{name}!"), 0);
        }
        let disk = change::open(&path, &OpenOptions::default())?;
        for bitmap in disk.head().image.bitmaps()? {
            let mut hasher = DefaultHasher::new();
            (bitmap.granularity, bitmap.records, bitmap.written).hash(&mut hasher);
            state.insert(format!("{name}#{}", bitmap.name), hasher.finish());
        }
        state.insert(name, digest(&disk));
    }
    Ok(state)
}

/// Opens every disk for writing, which finishes or takes back what was interrupted.
pub fn heal(dir: &Path) -> vdisk::Result<()> {
    for path in disks(dir) {
        match change::open(&path, &OpenOptions::writable()) {
            Err(e) if e.kind() == vdisk::ErrorKind::Sealed => {}
            other => drop(other?),
        }
    }
    Ok(())
}

/// Who owns the disk that snapshots are taken of, and its layers; nobody else may use them.
const OWNER: u32 = 1000;

fn is_private(path: &Path) -> bool {
    let name = path.file_name().unwrap().to_str().unwrap();
    name.trim_start_matches('.').starts_with("disk")
}

/// Makes one of those files what it is to stay.
pub fn make_private(path: &Path) {
    if is_private(path) {
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
        // Who is not root is the owner of all.
        let _ = chown(path, Some(OWNER), Some(OWNER));
    }
}

/// Whether those files are still nobody else's, whatever stopped the command.
pub fn private(dir: &Path) -> Result<(), String> {
    let root = nix::unistd::geteuid().is_root();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let meta = fs::metadata(&path).unwrap();
        let wide = meta.mode() & 0o777 != 0o600 || root && meta.uid() != OWNER;
        if is_private(&path) && wide {
            let (mode, owner) = (meta.mode(), meta.uid());
            return Err(format!("{} has the mode {mode:o} and the owner {owner}", path.display()));
        }
    }
    Ok(())
}

/// How many files the directory holds.
pub fn files(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

/// The word with what stands in a file's name instead of its `*`.
pub fn expand(dir: &Path, word: &str) -> String {
    let Some((front, back)) = word.split_once('*') else { return word.to_owned() };
    let names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    names.into_iter().find(|n| n.starts_with(front) && n.ends_with(back)).unwrap()
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
