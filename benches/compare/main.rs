//! Ratios, measured in turn in one run: `cargo bench --bench compare`.
//!
//! Each line is one claim: both sides are measured in turn, several times, and the table shows the
//! median and the worst of the ratios (1 is parity, more is better for the side named first), by the
//! clock and, for what this process does itself, in time of processors. Files are in `$TMPDIR`. It is
//! for people; no test depends on it. `cargo bench --bench compare peers` prints the table of single
//! disks against QEMU alone, `trees` that of clones, snapshots and deep chains, `threads` that of many
//! threads on one disk, `files` those of overlays and of files in a disk (only where it is asked for: they
//! take the superuser), `images` that of images against podman (the same), `nbd` that of NBD with TLS
//! against qemu-nbd, `vhost` that of vhost-user against qemu-storage-daemon, `vm` that of virtual machines that
//! start, against QEMU's, `ratios` the rest.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code, reason = "the tests use the rest")]
#[path = "../../tests/main/certificates.rs"]
mod certificates;
mod disks;
mod driver;
mod files;
mod images;
mod nbd;
mod peers;
mod threads;
mod trees;
mod vhost;
mod vm;

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use vdisk::internals::block::BlockDevice;
use vdisk::internals::chain::Chain;
use vdisk::internals::change::{self, Base, snapshot};
use vdisk::internals::image::{Backing, Mapping};
use vdisk::internals::open;
use vdisk::internals::open::OpenOptions;
use vdisk::internals::qcow2::CreateOptions;

/// How often both sides of a claim are measured.
const PAIRS: usize = 7;
/// The data that is read and written.
const SIZE: u64 = 128 << 20;
/// What files are filled by: the host's page cache keeps what was written in one call in pages of
/// that size, and both sides shall have the same.
const FILL: u64 = 64 << 10;
const BLOCK: u64 = 4096;
/// Random accesses in one measurement.
const ACCESSES: u64 = 40_000;

/// Pseudo-random blocks, the same for both sides.
fn blocks(seed: u64) -> impl Iterator<Item = u64> {
    let mut state = seed | 1;
    (0..ACCESSES).map(move |_| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % (SIZE / BLOCK) * BLOCK
    })
}

fn seconds(work: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    work();
    begin.elapsed().as_secs_f64()
}

/// Nanoseconds of a processor that threads which have ended took for a measurement.
static SPENT: AtomicU64 = AtomicU64::new(0);

/// Nanoseconds of a processor that this thread has taken.
fn taken() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// What one side of a pair took.
struct Cost {
    seconds: f64,
    /// Time of processors, which does not count while others have them: 0 where the host does not say.
    processor: f64,
}

fn cost(work: impl FnOnce()) -> Cost {
    SPENT.store(0, Ordering::Relaxed);
    let before = taken();
    let seconds = seconds(work);
    let spent = taken() - before + SPENT.load(Ordering::Relaxed);
    Cost { seconds, processor: spent as f64 }
}

/// Prints the head of a table of claims.
fn claims() {
    let (ratio, cpu) = ("ratio, more is better", "processor");
    println!("{ratio:<64} {:>7} {:>7} {cpu:>10} {:>7}", "median", "worst", "worst");
}

/// Measures both sides in turn and prints how much faster `ours` was, by the clock and in time of
/// processors: on a busy machine only the latter says anything.
fn claim(what: &str, mut ours: impl FnMut(u64), mut peer: impl FnMut(u64)) {
    ours(0);
    peer(0);
    let pair = |n: usize| {
        let seed = n as u64 * 7919 + 1;
        // The order changes, so that neither side always comes first.
        let (a, b) = if n.is_multiple_of(2) {
            let a = cost(|| ours(seed));
            (a, cost(|| peer(seed)))
        } else {
            let b = cost(|| peer(seed));
            (cost(|| ours(seed)), b)
        };
        (b.seconds / a.seconds, b.processor / a.processor)
    };
    let (mut clock, mut processor): (Vec<f64>, Vec<f64>) = (0..PAIRS).map(pair).unzip();
    for ratios in [&mut clock, &mut processor] {
        ratios.sort_by(f64::total_cmp);
    }
    println!(
        "{what:<64} {:>7.2} {:>7.2} {:>10.2} {:>7.2}",
        clock[PAIRS / 2],
        clock[0],
        processor[PAIRS / 2],
        processor[0]
    );
}

fn reads(disk: &Chain, seed: u64) {
    let mut buffer = [0; BLOCK as usize];
    for at in blocks(seed) {
        disk.read_at(at, &mut [IoSliceMut::new(&mut buffer)]).unwrap();
    }
}

fn writes(disk: &Chain, seed: u64) {
    let buffer = [seed as u8; BLOCK as usize];
    for at in blocks(seed) {
        disk.write_at(at, &[IoSlice::new(&buffer)]).unwrap();
    }
}

fn fill(disk: &Chain) {
    let bytes: Vec<u8> = (0..FILL).map(|i| (i >> 3) as u8 | 1).collect();
    for at in (0..SIZE).step_by(FILL as usize) {
        disk.write_at(at, &[IoSlice::new(&bytes)]).unwrap();
    }
    disk.flush().unwrap();
}

fn open(path: &Path) -> Chain {
    change::open(path, &OpenOptions::writable()).unwrap()
}

/// The file that a full disk stands in, and where in it each cluster does: the same bytes without the engine.
/// (Another file's pages lie elsewhere in memory, which alone makes up to a tenth.)
struct Beneath {
    file: File,
    hosts: Vec<u64>,
}

impl Beneath {
    fn of(disk: &Chain, path: &Path) -> Beneath {
        let host = |at| match disk.map(at, FILL, false).unwrap().mapping {
            Mapping::Data { host, .. } => host.0,
            other => panic!("{other:?}"),
        };
        let file = File::options().read(true).write(true).open(path).unwrap();
        Beneath { file, hosts: (0..SIZE / FILL).map(|n| host(n * FILL)).collect() }
    }

    fn host(&self, at: u64) -> u64 {
        self.hosts[(at / FILL) as usize] + at % FILL
    }

    fn read(&self, at: u64, block: &mut [u8]) {
        self.file.read_exact_at(block, self.host(at)).unwrap();
    }

    fn write(&self, at: u64, block: &[u8]) {
        self.file.write_all_at(block, self.host(at)).unwrap();
    }
}

/// A full disk below `depth - 1` deltas, each with a little of its own.
fn stack(dir: &Path, depth: usize) -> PathBuf {
    let name = |n: usize| format!("depth{depth}-{n}");
    for n in 0..depth {
        let below = || Backing { name: name(n - 1), format: Some("qcow2".to_owned()) };
        let options = CreateOptions { backing: (n > 0).then(below), ..CreateOptions::new(SIZE) };
        let path = dir.join(name(n));
        open::create(&path, &options).unwrap();
        let disk = open(&path);
        if n == 0 {
            fill(&disk);
        } else {
            for k in 0..8 {
                let at = ((n as u64 * 131 + k * 977) % (SIZE >> 16)) << 16;
                disk.write_at(at, &[IoSlice::new(&[n as u8; 65536])]).unwrap();
            }
            disk.flush().unwrap();
        }
    }
    dir.join(name(depth - 1))
}

/// An empty disk of `size` bytes on which snapshots and clones are made.
fn family(dir: &Path, size: u64) -> (PathBuf, PathBuf) {
    let (disk, base) = (dir.join(format!("disk{size}")), dir.join(format!("base{size}")));
    for path in [&disk, &base] {
        open::create(path, &CreateOptions::new(size)).unwrap();
        let disk = open(path);
        // Some data everywhere: tables over the whole disk.
        for n in 0..64 {
            disk.write_at(size / 64 * n, &[IoSlice::new(&[1; 4096])]).unwrap();
        }
        disk.flush().unwrap();
    }
    (disk, base)
}

fn main() {
    // Cargo adds words of its own.
    let words: Vec<String> = std::env::args().skip(1).filter(|w| !w.starts_with('-')).collect();
    let asked = |name: &str| words.is_empty() || words.iter().any(|w| w == name);
    if asked("ratios") {
        ratios();
    }
    if asked("peers") {
        peers::table();
    }
    if asked("trees") {
        trees::table();
    }
    if asked("threads") {
        threads::table();
    }
    if asked("nbd") {
        nbd::table();
    }
    if asked("vhost") {
        vhost::table();
    }
    if asked("vm") {
        vm::table();
    }
    if words.iter().any(|w| w == "images") {
        images::table();
    }
    if words.iter().any(|w| w == "files") {
        files::table();
        disks::table();
    }
}

fn ratios() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    claims();

    let (shallow, deep) = (open(&stack(dir, 1)), open(&stack(dir, 100)));
    claim("4 KiB random reads, depth 100 / depth 1", |s| reads(&deep, s), |s| reads(&shallow, s));
    drop((shallow, deep));

    let path = dir.join("depth1-0");
    let disk = open(&path);
    let beneath = Beneath::of(&disk, &path);
    let mut buffer = [0; BLOCK as usize];
    claim(
        "4 KiB random reads, engine / pread of the same bytes",
        |s| reads(&disk, s),
        |s| blocks(s).for_each(|at| beneath.read(at, &mut buffer)),
    );
    let mut other = [0; BLOCK as usize];
    claim(
        "the same without the engine on either side: what chance makes up",
        |s| blocks(s).for_each(|at| beneath.read(at, &mut other)),
        |s| blocks(s).for_each(|at| beneath.read(at, &mut buffer)),
    );
    claim(
        "4 KiB random writes in place, engine / pwrite of the same bytes",
        |s| writes(&disk, s),
        |s| {
            let block = [s as u8; BLOCK as usize];
            blocks(s).for_each(|at| beneath.write(at, &block));
        },
    );
    drop(disk);

    let (small, large) = (family(dir, 1 << 30), family(dir, 1 << 40));
    let take = |path: &Path, s: u64| {
        (0..10).for_each(|n| snapshot::create(path, &format!("s{s}-{n}"), "").unwrap());
    };
    claim("snapshot create, 1 TiB / 1 GiB", |s| take(&large.0, s), |s| take(&small.0, s));
    let clone = |path: &Path, s: u64| {
        let base = Base::seal(path).unwrap();
        let name = |n| path.with_extension(format!("{s}-{n}"));
        (0..10).for_each(|n| base.clone_to(&name(n)).unwrap());
    };
    claim("clone, 1 TiB / 1 GiB", |s| clone(&large.1, s), |s| clone(&small.1, s));
}
