//! Internal snapshots: taken, applied and deleted by us and by QEMU in turn, and with the power
//! going at every point.

use std::io::IoSliceMut;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use vdisk::ErrorKind;
use vdisk::internals::addr::{GuestOffset, Unit};
use vdisk::internals::image::{Image as _, Mapping};
use vdisk::internals::qcow2::{self, CreateOptions, Image, NewSnapshot, OpenOptions, Repair};
use vdisk::internals::storage::{FileOptions, FileStorage, MemoryStorage, Storage};

use crate::dice::{Dice, rounds};
use crate::model::{Model, random_op};
use crate::recorder::{Event, Recorder, crash_points, replay};
use crate::require::{Need, have};

/// The disk's bytes, and those of its snapshots by id.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    pub now: Vec<u8>,
    pub snapshots: Vec<(String, String, Vec<u8>)>,
}

pub const WRITABLE: OpenOptions = OpenOptions {
    read_only: false,
    cache: 1 << 20,
    same_contents: false,
    repair: false,
    data_file: None,
    passphrase: None,
};

/// All bytes of an image that stands on nothing.
pub fn contents(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; image.size() as usize];
    let mut at = 0;
    while at < image.size() {
        let extent = image.map(GuestOffset(at), image.size() - at).unwrap();
        let part = &mut bytes[at as usize..(at + extent.len) as usize];
        if extent.mapping != Mapping::Unallocated {
            image.read(&extent, extent.start, &mut [IoSliceMut::new(part)]).unwrap();
        }
        at += extent.len;
    }
    bytes
}

pub fn state(storage: &Arc<dyn Storage>) -> State {
    let image = Image::open(storage.clone(), OpenOptions::default()).unwrap();
    let read = |s: &qcow2::Snapshot| {
        let old = Image::open_snapshot(storage.clone(), OpenOptions::default(), &s.id()).unwrap();
        (s.id().into_owned(), s.name().into_owned(), contents(&old))
    };
    let snapshots = image.snapshots().unwrap().iter().map(read).collect();
    State { now: contents(&image), snapshots }
}

/// Writes at random.
pub fn scribble(storage: &Arc<dyn Storage>, state: &mut State, unit: u64, dice: &mut Dice) {
    let image = Image::open(storage.clone(), WRITABLE).unwrap();
    let layer = crate::crash::layer(Arc::new(image), vdisk::internals::open::Format::Qcow2);
    let chain = vdisk::internals::chain::Chain::new(layer, Vec::new(), 1 << 20);
    let mut model = Model { bytes: std::mem::take(&mut state.now) };
    for _ in 0..1 + dice.below(6) {
        let op = random_op(dice, model.size(), unit);
        model.apply(&chain, &op).unwrap();
    }
    vdisk::internals::block::BlockDevice::flush(&chain).unwrap();
    state.now = model.bytes;
}

/// What is done to the snapshots.
#[derive(Debug, Clone)]
pub enum Step {
    Create(String),
    Apply(String),
    Delete(String),
    Rename(String, String),
}

fn random_step(state: &State, number: u64, dice: &mut Dice) -> Step {
    if state.snapshots.is_empty() || state.snapshots.len() < 4 && dice.once_in(2) {
        return Step::Create(format!("name {number}"));
    }
    let at = dice.below(state.snapshots.len() as u64) as usize;
    let id = state.snapshots[at].0.clone();
    match dice.below(7) {
        0..3 => Step::Apply(id),
        3..6 => Step::Delete(id),
        _ => Step::Rename(id, format!("renamed {number}")),
    }
}

impl State {
    /// The state after `step`.
    pub fn after(&self, step: &Step) -> State {
        let mut new = self.clone();
        let at = |id: &str| self.snapshots.iter().position(|s| s.0 == id).unwrap();
        match step {
            Step::Create(name) => {
                let ids = self.snapshots.iter().map(|s| s.0.parse::<u64>().unwrap());
                let id = (ids.max().unwrap_or(0) + 1).to_string();
                new.snapshots.push((id, name.clone(), self.now.clone()));
            }
            Step::Apply(id) => new.now = self.snapshots[at(id)].2.clone(),
            Step::Delete(id) => drop(new.snapshots.remove(at(id))),
            Step::Rename(id, name) => new.snapshots[at(id)].1 = name.clone(),
        }
        new
    }
}

pub fn take(storage: &Arc<dyn Storage>, step: &Step) -> vdisk::Result<()> {
    let mut image = Image::open(storage.clone(), WRITABLE)?;
    match step {
        Step::Create(name) => {
            let new = NewSnapshot { name: name.clone(), seconds: 5, ..NewSnapshot::default() };
            image.create_snapshot(&new).map(drop)
        }
        Step::Apply(id) => image.apply_snapshot(id),
        Step::Delete(id) => image.delete_snapshot(id),
        Step::Rename(id, name) => image.rename_snapshot(id, name),
    }
}

pub fn qemu_img(args: &[&str], path: &Path) -> (Option<i32>, String) {
    let run = Command::new("timeout").args(["60", "qemu-img"]).args(args).arg(path).output();
    let run = run.unwrap();
    let text = [run.stdout, run.stderr].concat();
    (run.status.code(), String::from_utf8_lossy(&text).into_owned())
}

/// Like [`take`], by QEMU.
fn take_by_qemu(path: &Path, state: &State, step: &Step) {
    let name = |id: &String| state.snapshots.iter().find(|s| s.0 == *id).unwrap().1.clone();
    let args = match step {
        Step::Create(name) => ["-c".to_owned(), name.clone()],
        Step::Apply(id) => ["-a".to_owned(), name(id)],
        Step::Delete(id) => ["-d".to_owned(), name(id)],
        Step::Rename(..) => return take(&open_file(path), step).unwrap(),
    };
    let done = qemu_img(&["snapshot", &args[0], &args[1]], path);
    assert_eq!(done.0, Some(0), "{args:?}: {}", done.1);
}

/// Without a lock: a process that another test starts at the same time would hold it a while longer.
pub fn open_file(path: &Path) -> Arc<dyn Storage> {
    let options = FileOptions { access: None, write: true };
    Arc::new(FileStorage::open(path, options).unwrap())
}

#[track_caller]
pub fn qemu_finds_it_clean(path: &Path) {
    let (code, text) = qemu_img(&["check"], path);
    assert_eq!(code, Some(0), "{text}");
}

/// What QEMU reads of the disk, or of a snapshot by name.
pub fn qemu_contents(path: &Path, name: Option<&str>) -> Vec<u8> {
    let raw = path.with_extension("raw");
    let mut command = Command::new("timeout");
    command.args(["60", "qemu-img", "convert", "-O", "raw"]);
    if let Some(name) = name {
        command.arg("-l").arg(format!("snapshot.name={name}"));
    }
    assert!(command.arg(path).arg(&raw).status().unwrap().success());
    std::fs::read(raw).unwrap()
}

pub fn compare(path: &Path, expected: &State) {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(std::fs::read(path).unwrap()));
    assert!(state(&storage) == *expected, "we read something else");
    assert!(qemu_contents(path, None) == expected.now, "QEMU reads something else");
    for (id, name, bytes) in &expected.snapshots {
        // QEMU gives every snapshot the size that the disk has now.
        let found = qemu_contents(path, Some(name));
        let both = found.len().min(bytes.len());
        assert_eq!(found.len(), expected.now.len());
        assert!(found[..both] == bytes[..both], "QEMU reads another snapshot {id}");
    }
}

pub const KINDS: [(&str, u64); 7] = [
    ("cluster_size=64k", 65536),
    ("cluster_size=512,refcount_bits=4", 512),
    ("cluster_size=4k,refcount_bits=64", 4096),
    ("cluster_size=16k,extended_l2=on", 16384),
    ("cluster_size=1k,compat=0.10", 1024),
    ("cluster_size=2M,refcount_bits=8", 2 << 20),
    ("cluster_size=4k,compat=0.10", 4096),
];

pub fn new_file(dir: &tempfile::TempDir, options: &str, size: u64) -> PathBuf {
    let path = dir.path().join("disk.qcow2");
    let _ = std::fs::remove_file(&path);
    let size = size.to_string();
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-o", options]);
    let run = command.arg(&path).arg(size).status();
    assert!(run.unwrap().success());
    path
}

#[test]
fn we_and_qemu_take_apply_and_delete_snapshots_in_turn() {
    if !have(Need::Qemu) {
        return;
    }
    rounds(25, |dice| {
        let (options, unit) = dice.pick(&KINDS);
        let size = (unit * 40).min(3 << 20) + 512 * dice.below(3);
        let dir = tempfile::tempdir().unwrap();
        let path = new_file(&dir, options, size);
        let mut now = State { now: vec![0; size as usize], snapshots: Vec::new() };
        for number in 0..12 {
            scribble(&open_file(&path), &mut now, unit, dice);
            let step = random_step(&now, number, dice);
            if dice.once_in(3) {
                take_by_qemu(&path, &now, &step);
            } else {
                take(&open_file(&path), &step).unwrap();
            }
            now = now.after(&step);
            qemu_finds_it_clean(&path);
        }
        compare(&path, &now);
        // All that the snapshots held alone is free again.
        for (id, ..) in std::mem::take(&mut now.snapshots) {
            take(&open_file(&path), &Step::Delete(id)).unwrap();
            qemu_finds_it_clean(&path);
        }
        compare(&path, &now);
    });
}

/// What a crash left is as before the step or as after it, with leaks at most once it was opened.
pub fn verify(file: Vec<u8>, accept: &dyn Fn(&State) -> bool) {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(file));
    let image = Image::open(storage.clone(), OpenOptions::default()).unwrap();
    let check = image.check(Repair::None).unwrap();
    assert_eq!(check.errors, 0, "{:#?}", check.messages);
    // Flags that follow refcounts: the dirty bit says so, where the version has it.
    let dirty = image.header().incompatible & 1 != 0;
    let errors = check.messages.iter().filter(|m| m.starts_with("ERROR"));
    let excused = |m: &&String| m.contains("OFLAG_COPIED") && (dirty || image.header().version < 3);
    let bad: Vec<_> = errors.filter(|m| !excused(m)).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    let found = state(&storage);
    assert!(accept(&found), "neither the old state nor the new one");
    drop(image);
    let image = Image::open(storage.clone(), WRITABLE).unwrap();
    let check = image.check(Repair::All).unwrap();
    assert_eq!((check.corruptions, check.errors), (0, 0), "{:#?}", check.messages);
    assert!(image.check(Repair::None).unwrap().is_clean());
    drop(image);
    assert!(state(&storage) == found, "opening or repairing it changed what it holds");
}

/// Crashes at every event of the log; each time the disk is as `accept` says.
pub fn crash_everywhere(
    start: &[u8],
    log: &[Event],
    dice: &mut Dice,
    accept: &dyn Fn(&State) -> bool,
) {
    crash_points(start, log, dice, |file, _| verify(file, accept));
}

/// All bytes of a storage.
pub fn bytes_of(storage: &Arc<dyn Storage>) -> Vec<u8> {
    let mut file = vec![0; storage.len().unwrap() as usize];
    storage.read_exact_at(0, &mut file).unwrap();
    file
}

#[test]
fn a_crash_while_snapshots_change_leaves_the_old_state_or_the_new_one() {
    rounds(12, |dice| {
        let bits = dice.pick(&[9, 9, 12, 14]);
        let size = 40 << bits;
        let version = dice.pick(&[2, 3, 3]);
        let options = CreateOptions {
            cluster: Unit::from_bits(bits),
            version,
            extended_l2: bits == 14 && version == 3,
            ..CreateOptions::new(size)
        };
        let memory: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
        drop(qcow2::create(memory.clone(), &options).unwrap());
        let mut file = bytes_of(&memory);
        let mut now = State { now: vec![0; size as usize], snapshots: Vec::new() };
        for number in 0..8 {
            let before: Arc<dyn Storage> = Arc::new(MemoryStorage::new(file));
            scribble(&before, &mut now, 1 << bits, dice);
            file = bytes_of(&before);
            let step = random_step(&now, number, dice);
            let recorder = Arc::new(Recorder::new(file.clone()));
            let storage: Arc<dyn Storage> = recorder.clone();
            take(&storage, &step).unwrap();
            let after = now.after(&step);
            let log = recorder.log();
            crash_everywhere(&file, &log, dice, &|found| *found == now || *found == after);
            log.iter().for_each(|event| replay(&mut file, event));
            now = after;
        }
    });
}

#[test]
fn compressed_clusters_are_counted_like_all_others() {
    if !have(Need::Qemu) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("source");
    let bytes: Vec<u8> = (0..1u32 << 20).map(|i| (i / 100 % 251) as u8).collect();
    std::fs::write(&raw, &bytes).unwrap();
    let path = dir.path().join("disk.qcow2");
    let mut run = Command::new("qemu-img");
    run.args(["convert", "-q", "-c", "-f", "raw", "-O", "qcow2"]);
    assert!(run.arg(&raw).arg(&path).status().unwrap().success());
    let mut now = State { now: bytes, snapshots: Vec::new() };
    let mut dice = Dice::new(7);
    for step in [Step::Create("a".into()), Step::Create("b".into()), Step::Apply("1".into())] {
        take(&open_file(&path), &step).unwrap();
        now = now.after(&step);
        qemu_finds_it_clean(&path);
        scribble(&open_file(&path), &mut now, 65536, &mut dice);
        qemu_finds_it_clean(&path);
    }
    compare(&path, &now);
    for step in [Step::Delete("1".into()), Step::Delete("2".into())] {
        take(&open_file(&path), &step).unwrap();
        now = now.after(&step);
        qemu_finds_it_clean(&path);
    }
    compare(&path, &now);
}

#[test]
fn a_refcount_without_room_refuses_the_snapshot_and_leaks_at_most() {
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions { refcount_bits: 1, ..CreateOptions::new(1 << 20) };
    drop(qcow2::create(storage.clone(), &options).unwrap());
    let shared: Arc<dyn Storage> = storage.clone();
    let mut now = State { now: vec![0; 1 << 20], snapshots: Vec::new() };
    scribble(&shared, &mut now, 65536, &mut Dice::new(4));
    let error = take(&shared, &Step::Create("no room".into())).unwrap_err();
    assert_eq!((error.kind(), error.raw_os_error()), (ErrorKind::Invalid, Some(22)), "{error}");
    assert!(error.offset().is_some(), "it names the cluster");
    let check = Image::open(shared.clone(), WRITABLE).unwrap().check(Repair::None).unwrap();
    assert_eq!((check.corruptions, check.leaks), (0, 1), "{:#?}", check.messages);
    assert!(state(&shared) == now);
}

#[test]
fn an_unknown_snapshot_is_not_found_and_a_damaged_one_is_refused() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
    drop(qcow2::create(storage.clone(), &CreateOptions::new(1 << 20)).unwrap());
    take(&storage, &Step::Create("one".into())).unwrap();
    for step in [Step::Apply("2".into()), Step::Delete("one".into())] {
        assert_eq!(take(&storage, &step).unwrap_err().kind(), ErrorKind::NotFound);
    }
    let header = Image::open(storage.clone(), OpenOptions::default()).unwrap().header();
    let damage = [
        (header.snapshots_offset, 0x0040_0200u64.to_be_bytes(), "Snapshot L1 table offset invalid"),
        (header.snapshots_offset + 8, [0x10, 0, 0, 0, 0, 1, 0, 3], "Snapshot L1 table too large"),
    ];
    for (at, bytes, message) in damage {
        let mut old = [0; 8];
        storage.read_exact_at(at, &mut old).unwrap();
        storage.write_all_at(at, &bytes).unwrap();
        for step in [Step::Apply("1".into()), Step::Delete("1".into())] {
            assert_eq!(take(&storage, &step).unwrap_err().message(), message);
        }
        let error =
            Image::open_snapshot(storage.clone(), OpenOptions::default(), "one").err().unwrap();
        assert_eq!(error.message(), message);
        storage.write_all_at(at, &old).unwrap();
    }
    take(&storage, &Step::Delete("1".into())).unwrap();
}

/// Types into a QEMU without a guest.
fn monitor(path: &Path, commands: &str) -> String {
    use std::io::Write;
    let drive = format!("if=none,id=d,format=qcow2,file={}", path.display());
    let mut qemu = Command::new("timeout")
        .args(["60", "qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"])
        .args(["-S", "-monitor", "stdio", "-drive", &drive])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    qemu.stdin.take().unwrap().write_all(commands.as_bytes()).unwrap();
    String::from_utf8_lossy(&qemu.wait_with_output().unwrap().stdout).into_owned()
}

#[test]
fn the_vm_state_that_qemu_saved_outlives_our_changes() {
    if !have(Need::Qemu) || Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = new_file(&dir, "cluster_size=4k", 1 << 20);
    monitor(&path, "savevm first\nquit\n");
    let list = || Image::open(open_file(&path), OpenOptions::default()).unwrap().snapshots();
    let saved = list().unwrap();
    assert!(saved[0].vm_state_size > 0, "QEMU saved something");
    let mut now = State { now: vec![0; 1 << 20], snapshots: Vec::new() };
    scribble(&open_file(&path), &mut now, 4096, &mut Dice::new(3));
    take(&open_file(&path), &Step::Create("second".into())).unwrap();
    take(&open_file(&path), &Step::Apply(saved[0].id().into_owned())).unwrap();
    qemu_finds_it_clean(&path);
    take(&open_file(&path), &Step::Delete("2".into())).unwrap();
    qemu_finds_it_clean(&path);
    assert_eq!(list().unwrap()[0].vm_state_size, saved[0].vm_state_size);
    let said = monitor(&path, "loadvm first\ninfo status\nquit\n");
    assert!(!said.contains("Error"), "{said}");
    qemu_finds_it_clean(&path);
    assert!(qemu_contents(&path, None) == vec![0; 1 << 20]);
}
