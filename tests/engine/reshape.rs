//! Images that change their shape: version, refcount width and size, with snapshots in them.

use std::io::IoSlice;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use vdisk::ErrorKind;
use vdisk::internals::addr::Unit;
use vdisk::internals::block::BlockDevice;
use vdisk::internals::chain::Chain;
use vdisk::internals::image::Image as _;
use vdisk::internals::open::Format;
use vdisk::internals::qcow2::{self, Amend, CreateOptions, Image};
use vdisk::internals::storage::{MemoryStorage, Storage};

use crate::crash::layer;
use crate::dice::{Dice, rounds};
use crate::internal::{
    KINDS, State, Step, WRITABLE, bytes_of, compare, crash_everywhere, new_file, open_file,
    qemu_finds_it_clean, qemu_img, scribble, take,
};
use crate::model::{pattern, read};
use crate::recorder::{Recorder, replay};
use crate::require::{Need, have};

#[derive(Debug, Clone)]
enum Change {
    Amend(Amend),
    Resize(u64),
}

fn random_change(state: &State, unit: u64, extended: bool, dice: &mut Dice) -> Change {
    let size = state.now.len() as u64;
    let width = dice.pick(&[8, 16, 16, 32, 64]);
    let amend = match dice.below(6) {
        0 if !extended => Amend { version: Some(2), refcount_bits: Some(16), ..Amend::default() },
        1 => Amend { version: Some(3), lazy_refcounts: Some(true), ..Amend::default() },
        2 | 3 => Amend { version: Some(3), refcount_bits: Some(width), ..Amend::default() },
        _ => {
            let size = (size / 2 + dice.below(unit * 40)) / 512 * 512 + 512;
            return Change::Resize(size);
        }
    };
    Change::Amend(amend)
}

/// Whether it was done, or refused for a reason that stands.
fn change(storage: &Arc<dyn Storage>, what: &Change, state: &State) -> bool {
    let mut image = Image::open(storage.clone(), WRITABLE).unwrap();
    let version = image.header().version;
    let done = match what {
        Change::Amend(amend) => image.amend(amend),
        Change::Resize(size) => image.resize(*size),
    };
    let Err(error) = done else { return true };
    let snapshots = &state.snapshots;
    let excused = match what {
        Change::Resize(_) => version == 2 && !snapshots.is_empty(),
        Change::Amend(_) => snapshots.iter().any(|s| s.2.len() != state.now.len()),
    };
    assert!(excused && error.kind() == ErrorKind::Unsupported, "{what:?}: {error}");
    false
}

#[test]
fn an_image_of_any_shape_becomes_one_of_any_other() {
    if !have(Need::Qemu) {
        return;
    }
    rounds(15, |dice| {
        let (options, unit) = dice.pick(&KINDS);
        let size = (unit * 40).min(3 << 20);
        let dir = tempfile::tempdir().unwrap();
        let path = new_file(&dir, options, size);
        let mut now = State { now: vec![0; size as usize], snapshots: Vec::new() };
        for number in 0..8 {
            scribble(&open_file(&path), &mut now, unit, dice);
            if dice.once_in(3) && now.snapshots.len() < 3 {
                let step = Step::Create(format!("name {number}"));
                take(&open_file(&path), &step).unwrap();
                now = now.after(&step);
            }
            let what = random_change(&now, unit, options.contains("extended"), dice);
            let did = change(&open_file(&path), &what, &now);
            if let (true, Change::Resize(size)) = (did, &what) {
                // What stands in the rest of a cluster that was cut is the caller's to zero.
                let cut = !now.now.len().is_multiple_of(unit as usize);
                now.now.resize(*size as usize, 0);
                if cut {
                    let all = crate::internal::state(&open_file(&path)).now;
                    let fair = all.iter().zip(&now.now).filter(|(a, b)| a != b).count();
                    assert!(fair < unit as usize, "{fair} bytes came back");
                    now.now = all;
                }
            }
            qemu_finds_it_clean(&path);
        }
        compare(&path, &now);
    });
}

#[test]
fn a_crash_while_the_shape_changes_loses_nothing() {
    rounds(10, |dice| {
        let bits = dice.pick(&[9, 9, 12]);
        let size = 40 << bits;
        let cluster = Unit::from_bits(bits);
        let options = CreateOptions { cluster, ..CreateOptions::new(size) };
        let memory: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
        drop(qcow2::create(memory.clone(), &options).unwrap());
        let mut now = State { now: vec![0; size as usize], snapshots: Vec::new() };
        for number in 0..6 {
            scribble(&memory, &mut now, 1 << bits, dice);
            if number % 3 == 1 {
                let step = Step::Create(format!("name {number}"));
                take(&memory, &step).unwrap();
                now = now.after(&step);
            }
            let mut file = bytes_of(&memory);
            let what = random_change(&now, 1 << bits, false, dice);
            let recorder = Arc::new(Recorder::new(file.clone()));
            let storage: Arc<dyn Storage> = recorder.clone();
            let did = change(&storage, &what, &now);
            let after = crate::internal::state(&storage);
            assert!(after.snapshots == now.snapshots);
            let kept = now.now.len().min(after.now.len());
            // Between the old size and a smaller one, what is to go goes piece by piece.
            let accept = |found: &State| {
                found.snapshots == now.snapshots
                    && found.now.get(..kept) == now.now.get(..kept)
                    && [now.now.len(), after.now.len()].contains(&found.now.len())
            };
            crash_everywhere(&file, &recorder.log(), dice, &accept);
            recorder.log().iter().for_each(|event| replay(&mut file, event));
            memory.set_len(0).unwrap();
            memory.write_all_at(0, &file).unwrap();
            assert!(did || after.now == now.now);
            now.now = after.now;
        }
    });
}

#[test]
fn a_width_that_is_too_narrow_is_refused_with_the_cluster_that_needs_more() {
    let memory = Arc::new(MemoryStorage::default());
    let storage: Arc<dyn Storage> = memory.clone();
    drop(qcow2::create(storage.clone(), &CreateOptions::new(1 << 20)).unwrap());
    let mut now = State { now: vec![0; 1 << 20], snapshots: Vec::new() };
    scribble(&storage, &mut now, 65536, &mut Dice::new(4));
    take(&storage, &Step::Create("one".into())).unwrap();
    let before = memory.to_vec();
    let mut image = Image::open(storage.clone(), WRITABLE).unwrap();
    let narrow = Amend { refcount_bits: Some(1), ..Amend::default() };
    let error = image.amend(&narrow).unwrap_err();
    assert_eq!(
        error.message(),
        "Cannot decrease refcount entry width to 1 bits: Cluster at offset 0x40000 has a refcount of 2"
    );
    drop(image);
    assert!(memory.to_vec() == before, "nothing was changed");
}

fn flat(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("flat");
    let run = Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(path).arg(&raw).status();
    assert!(run.unwrap().success());
    std::fs::read(raw).unwrap()
}

#[test]
fn zeroes_over_a_base_stay_zeroes_in_version_2() {
    if !have(Need::Qemu) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base"), [0x77; 1 << 20]).unwrap();
    let path = dir.path().join("disk.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base"];
    assert_eq!(qemu_img(&create, &path).0, Some(0));
    let zero = ["-c", "write -P 3 0 128k", "-c", "write -z 0 64k", "-c", "write -z 512k 128k"];
    assert!(Command::new("qemu-io").args(zero).arg(&path).output().unwrap().status.success());
    take(&open_file(&path), &Step::Create("one".into())).unwrap();
    let again = ["-c", "write -z 700k 100k", "-c", "discard 64k 64k"];
    assert!(Command::new("qemu-io").args(again).arg(&path).output().unwrap().status.success());
    let before = flat(&path);
    let mut image = Image::open(open_file(&path), WRITABLE).unwrap();
    image.amend(&Amend { version: Some(2), ..Amend::default() }).unwrap();
    drop(image);
    qemu_finds_it_clean(&path);
    assert!(qemu_img(&["info"], &path).1.contains("compat: 0.10"));
    assert!(flat(&path) == before);
    take(&open_file(&path), &Step::Apply("1".into())).unwrap();
    qemu_finds_it_clean(&path);
    let bytes = flat(&path);
    assert!(bytes[..65536].iter().all(|b| *b == 0) && bytes[65536] == 3);
    assert!(bytes[512 << 10..640 << 10].iter().all(|b| *b == 0) && bytes[640 << 10] == 0x77);
}

#[test]
fn a_disk_that_shrinks_gives_its_file_back() {
    if !have(Need::Qemu) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = new_file(&dir, "cluster_size=4k", 64 << 20);
    let fill = ["-c", "write -P 1 0 48M"];
    assert!(Command::new("qemu-io").args(fill).arg(&path).output().unwrap().status.success());
    let image = Image::open(open_file(&path), WRITABLE).unwrap();
    image.resize(1 << 20).unwrap();
    drop(image);
    qemu_finds_it_clean(&path);
    assert!(std::fs::metadata(&path).unwrap().len() < 8 << 20, "the file is cut");
    let image = Image::open(open_file(&path), WRITABLE).unwrap();
    image.resize(64 << 20).unwrap();
    drop(image);
    qemu_finds_it_clean(&path);
    let bytes = flat(&path);
    assert!(bytes[..1 << 20].iter().all(|b| *b == 1) && bytes[1 << 20..].iter().all(|b| *b == 0));
}

/// A writer that was killed with lazy refcounts: the dirty bit is on, refcounts are missing.
#[test]
fn an_image_that_was_not_closed_is_repaired_when_it_is_opened_for_writing() {
    if !have(Need::Qemu) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = new_file(&dir, "lazy_refcounts=on", 1 << 20);
    let die = ["-c", "write -P 9 0 300k", "-c", "flush", "-c", "abort"];
    assert!(!Command::new("qemu-io").args(die).arg(&path).output().unwrap().status.success());
    assert_ne!(qemu_img(&["check"], &path).0, Some(0), "QEMU left it dirty");
    let image = Image::open(open_file(&path), WRITABLE).unwrap();
    assert_eq!(image.header().incompatible, 0);
    drop(image);
    qemu_finds_it_clean(&path);
    let bytes = flat(&path);
    assert!(
        bytes[..300 << 10].iter().all(|b| *b == 9) && bytes[300 << 10..].iter().all(|b| *b == 0)
    );
}

/// The map of where metadata stands did not follow: after another refcount width, the new blocks were
/// unguarded and writes over the old ones' clusters refused; after a smaller size, clusters that
/// had been refcount blocks could not be taken again.
#[test]
fn a_disk_that_was_reshaped_is_written_in_all_its_clusters() {
    let size = 600 << 10;
    let cluster = Unit::from_bits(9);
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
    let options = CreateOptions { cluster, refcount_bits: 64, ..CreateOptions::new(size) };
    let mut image = qcow2::create(storage.clone(), &options).unwrap();
    image.amend(&Amend { refcount_bits: Some(1), ..Amend::default() }).unwrap();
    image.amend(&Amend { refcount_bits: Some(64), ..Amend::default() }).unwrap();
    let chain = Chain::new(layer(Arc::new(image), Format::Qcow2), Vec::new(), 1 << 20);
    for (size, fill) in [(size, 1), (4 << 10, 2), (size, 3), (2 << 10, 4), (size, 5)] {
        chain.resize(size).unwrap();
        let data = pattern(0, size, fill);
        chain.write_at(0, &[IoSlice::new(&data)]).unwrap();
        chain.write_at(0, &[IoSlice::new(&data)]).unwrap();
        chain.flush().unwrap();
        assert!(read(&chain, 0, size).unwrap() == data);
    }
    drop(chain);
    let image = Image::open(storage, WRITABLE).unwrap();
    assert!(image.check(qcow2::Repair::None).unwrap().is_clean());
}
