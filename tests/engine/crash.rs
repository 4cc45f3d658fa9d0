//! The power goes, at every point and in every way: what is left opens, has leaks at most, and
//! holds all that was flushed.

use std::io::IoSlice;
use std::process::Command;
use std::sync::Arc;

use vdisk::internals::addr::Unit;
use vdisk::internals::block::BlockDevice;
use vdisk::internals::chain::{Chain, Layer};
use vdisk::internals::formats::raw;
use vdisk::internals::image::{Backing, Image};
use vdisk::internals::open::Format;
use vdisk::internals::qcow2::{self, CreateOptions, OpenOptions, Repair};
use vdisk::internals::storage::{FileStorage, MemoryStorage, Storage};

use crate::dice::{Budget, Confess, Dice, rounds, seed};
use crate::model::{Model, Op, pattern, random_op, read};
use crate::processes::{have_qemu, run};
use crate::recorder::{Fault, Faulty, Recorder, crash_points, replay};

/// What stands at the start of a run.
pub struct Start {
    pub head: Vec<u8>,
    pub base: Option<Vec<u8>>,
    /// The external data file, of a head that has one.
    pub data: Option<Arc<dyn Storage>>,
    pub model: Model,
    pub unit: u64,
    pub cache: u64,
}

/// What a run did, by the number of events in the log.
#[derive(Default)]
pub struct Story {
    /// All of these bytes were durable after so many events.
    pub durable: Vec<(usize, Vec<u8>)>,
    /// From so many events on, these bytes may stand there.
    pub changes: Vec<(usize, u64, Vec<u8>)>,
}

pub fn layer(image: Arc<dyn Image>, format: Format) -> Layer {
    let file = Arc::new(FileStorage::temporary(&std::env::temp_dir()).unwrap());
    Layer { path: "memory".into(), format, image, file }
}

fn opening(start: &Start, read_only: bool) -> OpenOptions {
    let data_file = start.data.clone();
    OpenOptions { read_only, cache: start.cache, data_file, ..OpenOptions::default() }
}

/// The disk with its head in `storage`, above `base`.
pub fn disk(storage: Arc<dyn Storage>, start: &Start, read_only: bool) -> vdisk::Result<Chain> {
    let options = opening(start, read_only);
    let head = layer(Arc::new(qcow2::Image::open(storage, options)?), Format::Qcow2);
    let below = start.base.iter().map(|bytes| {
        let storage = Arc::new(MemoryStorage::new(bytes.clone()));
        layer(Arc::new(raw::Image::open(storage, true).unwrap()), Format::Raw)
    });
    Ok(Chain::new(head, below.collect(), 1 << 20))
}

fn random_start(dice: &mut Dice) -> Start {
    let bits = dice.pick(&[9, 9, 9, 10, 12, 14, 16]);
    let extended_l2 = bits >= 14 && dice.once_in(2);
    let size = match bits {
        9 => dice.pick(&[64 << 10, 64 << 10, 300 << 10, 2 << 20]),
        10 | 12 => 256 << 10,
        _ => 6 << bits,
    };
    // Wide refcounts in small clusters fill their table soon.
    let refcount_bits = if bits == 9 { dice.pick(&[16, 64, 64]) } else { dice.pick(&[1, 8, 16]) };
    let with_base = dice.once_in(2);
    let backing = Backing { name: "base".to_owned(), format: Some("raw".to_owned()) };
    let options = CreateOptions {
        cluster: Unit::from_bits(bits),
        refcount_bits,
        extended_l2,
        backing: with_base.then_some(backing),
        ..CreateOptions::new(size)
    };
    let storage = Arc::new(MemoryStorage::default());
    drop(qcow2::create(storage.clone(), &options).unwrap());
    let mut model = Model::new(size);
    let base = with_base.then(|| pattern(0, size * 2 / 3, 99));
    if let Some(base) = &base {
        model.bytes[..base.len()].copy_from_slice(base);
    }
    let cache = dice.pick(&[0, 0, 1 << 20]);
    let mut start =
        Start { head: storage.to_vec(), base, data: None, model, unit: 1 << bits, cache };
    // Most of it in place already: what comes then is refcount blocks and table moves.
    if dice.once_in(2) {
        let filled = dice.below(size);
        let op = Op::Write { at: 0, len: filled, fill: 5 };
        let storage = Arc::new(MemoryStorage::new(start.head.clone()));
        let chain = disk(storage.clone(), &start, false).unwrap();
        start.model.apply(&chain, &op).unwrap();
        chain.flush().unwrap();
        drop(chain);
        start.head = storage.to_vec();
    }
    start
}

/// An image with internal snapshots, made by QEMU: tables and clusters that are shared.
fn start_with_snapshots(dice: &mut Dice) -> Start {
    let mut start = random_start(dice);
    start.base = None;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let size = start.model.size();
    let options = CreateOptions {
        cluster: Unit::from_bits(start.unit.trailing_zeros()),
        ..CreateOptions::new(size)
    };
    let storage = Arc::new(MemoryStorage::default());
    drop(qcow2::create(storage.clone(), &options).unwrap());
    start.head = storage.to_vec();
    start.model = Model::new(size);
    for name in ["one", "two"] {
        let storage = Arc::new(MemoryStorage::new(start.head.clone()));
        let chain = disk(storage.clone(), &start, false).unwrap();
        for _ in 0..8 {
            let op = random_op(dice, size, start.unit);
            start.model.apply(&chain, &op).unwrap();
        }
        chain.flush().unwrap();
        drop(chain);
        std::fs::write(&path, storage.to_vec()).unwrap();
        let mut take = Command::new("qemu-img");
        assert!(run(take.args(["snapshot", "-c", name]).arg(&path)).status.success());
        start.head = std::fs::read(&path).unwrap();
    }
    start
}

/// Uses the disk at random, and notes what must and what may stand there. Stops at an error that
/// is not of the test's making only by panicking.
pub fn play(
    chain: &Chain,
    events: &dyn Fn() -> usize,
    start: &Start,
    dice: &mut Dice,
    may_fail: bool,
) -> Story {
    let mut model = start.model.clone();
    let mut story = Story { durable: vec![(0, model.bytes.clone())], ..Story::default() };
    for _ in 0..25 + dice.below(25) {
        let before = events();
        if dice.once_in(20) {
            let grown = model.size() + dice.below(start.unit * 70);
            match chain.resize(grown) {
                Ok(()) => {
                    model.bytes.resize(grown as usize, 0);
                    story.durable.push((events(), model.bytes.clone()));
                }
                Err(error) => assert!(may_fail, "{error:?}"),
            }
            continue;
        }
        let op = random_op(dice, model.size(), start.unit);
        let (at, possible) = match op {
            Op::Write { at, len, fill } => (at, pattern(at, len, fill)),
            Op::Zero { at, len, .. } | Op::Discard { at, len } => (at, vec![0; len as usize]),
            Op::Read { .. } | Op::Flush => (0, Vec::new()),
        };
        story.changes.push((before, at, possible.clone()));
        match (model.apply(chain, &op), &op) {
            (Ok(()), Op::Flush) => story.durable.push((events(), model.bytes.clone())),
            (Ok(()), Op::Discard { at, len }) => {
                let now = model.bytes[*at as usize..(at + len) as usize].to_vec();
                story.changes.push((before, *at, now));
            }
            (Ok(()), _) => {}
            (Err(error), _) => {
                assert!(may_fail, "{op:?}: {error:?}");
                // It may have come through in parts: go on from what there is.
                match read(chain, at, possible.len() as u64) {
                    Ok(now) => model.bytes[at as usize..][..now.len()].copy_from_slice(&now),
                    Err(_) => return story,
                }
            }
        }
    }
    story
}

/// Opens what a crash after `events` left, and holds it against the story.
pub fn verify(file: Vec<u8>, start: &Start, story: &Story, events: usize) {
    let storage = Arc::new(MemoryStorage::new(file));
    let image = qcow2::Image::open(storage.clone(), opening(start, true)).unwrap();
    let check = image.check(Repair::None).unwrap();
    assert_eq!((check.corruptions, check.errors), (0, 0), "{:#?}", check.messages);
    drop(image);
    let chain = disk(storage.clone(), start, true).unwrap();
    let now = read(&chain, 0, chain.size()).unwrap();
    let (flushed, durable) = story.durable.iter().rev().find(|(at, _)| *at <= events).unwrap();
    assert!(now.len() >= durable.len(), "the disk has shrunk");
    let later: Vec<_> = story.changes.iter().filter(|c| c.0 >= *flushed && c.0 <= events).collect();
    for at in (0..now.len()).step_by(512) {
        let end = (at + 512).min(now.len());
        if durable.get(at..end) == Some(&now[at..end]) {
            continue;
        }
        for (i, byte) in now.iter().enumerate().take(end).skip(at) {
            let written = later.iter().any(|(_, at, bytes)| {
                (i as u64).checked_sub(*at).and_then(|i| bytes.get(i as usize)) == Some(byte)
            });
            let flushed = durable.get(i).copied().unwrap_or(0);
            assert!(written || flushed == *byte, "byte {i} reads {byte:#04x}, was {flushed:#04x}");
        }
    }
    drop(chain);
    let image = qcow2::Image::open(storage, opening(start, false)).unwrap();
    let check = image.check(Repair::Leaks).unwrap();
    assert!(check.is_clean(), "{:#?}", check.messages);
}

fn crash_rounds(seconds: u64, make: impl Fn(&mut Dice) -> Start) {
    rounds(seconds, |dice| {
        let start = make(dice);
        let recorder = Arc::new(Recorder::new(start.head.clone()));
        let chain = disk(recorder.clone(), &start, false).unwrap();
        let story = play(&chain, &|| recorder.events(), &start, dice, false);
        drop(chain);
        let see = |file, events| verify(file, &start, &story, events);
        crash_points(&start.head, &recorder.log(), dice, see);
    });
}

#[test]
fn a_crash_at_any_point_leaves_leaks_at_most_and_all_that_was_flushed() {
    crash_rounds(8, random_start);
}

#[test]
fn a_crash_of_an_image_with_internal_snapshots_leaves_leaks_at_most() {
    if have_qemu() {
        crash_rounds(6, start_with_snapshots);
    }
}

/// One run in which call number `n` fails; whether it came that far.
fn faulty_run(start: &Start, fault: Fault, n: u64, seed: u64) -> bool {
    let storage = Arc::new(Faulty::new(start.head.clone(), fault));
    let chain = disk(storage.clone(), start, false).unwrap();
    storage.arm(n);
    let mut dice = Dice::new(seed);
    let story = play(&chain, &|| storage.now.events(), start, &mut dice, true);
    let failed = storage.has_failed();
    storage.disarm();
    // A flush that says it worked has all that was acknowledged.
    drop(chain);
    let mut file = start.head.clone();
    let log = storage.now.log();
    log.iter().for_each(|event| replay(&mut file, event));
    verify(file, start, &story, log.len());
    failed
}

#[test]
fn a_host_that_fails_at_any_call_leaves_leaks_at_most_and_all_that_was_flushed() {
    let seed = seed();
    let budget = Budget::new(8);
    let mut done = 0;
    while budget.goes_on(done) {
        let seed = if done == 0 { seed } else { seed.wrapping_add(done) };
        let _confess = Confess(seed);
        let mut dice = Dice::new(seed);
        let start = random_start(&mut dice);
        for fault in [Fault::Full, Fault::Io] {
            let mut n = 0;
            while faulty_run(&start, fault, n, seed) && budget.goes_on(done + 1) {
                // Every early call; later ones by and by.
                n += 1 + n / 50;
            }
        }
        done += 1;
    }
    crate::dice::say_done(done, seed);
}

#[test]
fn an_image_whose_metadata_write_failed_refuses_to_go_on() {
    let mut dice = Dice::new(1);
    let mut start = random_start(&mut dice);
    start.base = None;
    let storage = Arc::new(Faulty::new(start.head.clone(), Fault::Io));
    let chain = disk(storage.clone(), &start, false).unwrap();
    let _ = chain.write_at(0, &[IoSlice::new(&[1; 4096])]);
    storage.arm(0);
    let first = chain.flush().unwrap_err();
    assert_eq!(first.kind(), vdisk::ErrorKind::Io);
    storage.disarm();
    for error in [chain.flush().unwrap_err(), chain.write_zeroes(0, 4096, true).unwrap_err()] {
        assert_eq!(error.kind(), vdisk::ErrorKind::Poisoned, "{error}");
    }
}
