//! The table against QEMU's tools and plain system calls: each row is one job that both sides do.
//!
//! Durability is the same on both sides of a row: the drop-in is called with the words that
//! `qemu-img` is called with, whose `convert` leaves the target to the page cache (cache mode
//! `unsafe`) and whose `commit` and `rebase` flush. Files are in memory where there is room
//! (`/dev/shm`), so the host's disk and what a sync costs on it stay out of the ratios.

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use vdisk::internals::block::BlockDevice;
use vdisk::internals::chain::Chain;

use super::{open, seconds};

/// How often both sides of a row are measured.
const PAIRS: usize = 5;
const BLOCK: u64 = 4096;
/// Accesses in one measurement.
const ACCESSES: u64 = 100_000;
/// From one access to the next: coprime to any size of the disk, so that all blocks have their turn.
pub const STEP: u64 = BLOCK * 40_503;
/// The mapped disk that is checked.
const MAPPED: &str = "100G";
/// Compression is slow, and its speed does not depend on the disk's size.
const COMPRESSED_PART: u64 = 8;

/// A server of one side's under way; killed with this guard.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Both programs under one set of words.
#[derive(Clone, Copy, PartialEq)]
pub enum Side {
    Ours,
    Peer,
}

impl Side {
    pub fn name(self) -> &'static str {
        if self == Side::Ours { "ours" } else { "peer" }
    }

    pub fn run(self, dir: &Path, words: &[&str]) {
        let mut command = match self {
            Side::Ours => Command::new(env!("CARGO_BIN_EXE_vdisk")),
            Side::Peer => Command::new("qemu-img"),
        };
        if self == Side::Ours {
            command.arg("qemu-img");
        }
        let done = command.args(words).current_dir(dir).stdout(Stdio::null()).status().unwrap();
        assert!(done.success(), "{} {words:?}", self.name());
    }

    pub fn timed(self, dir: &Path, words: &[&str]) -> f64 {
        seconds(|| self.run(dir, words))
    }
}

/// Measures both sides in turn; `job` returns its own seconds, so that it can prepare unmeasured.
/// Returns our median.
pub fn row(what: &str, peer: &str, mut job: impl FnMut(Side) -> f64) -> f64 {
    job(Side::Ours);
    job(Side::Peer);
    let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..PAIRS {
        let order = if pair % 2 == 0 { [Side::Ours, Side::Peer] } else { [Side::Peer, Side::Ours] };
        let times = order.map(&mut job);
        let (a, b) =
            if order[0] == Side::Ours { (times[0], times[1]) } else { (times[1], times[0]) };
        ours.push(a);
        theirs.push(b);
        ratios.push(b / a);
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[PAIRS / 2]
    };
    let (a, b, ratio) = (median(&mut ours), median(&mut theirs), median(&mut ratios));
    println!(
        "{what:<44} {peer:<16} {:>8.1} {:>8.1} {ratio:>7.2} {:>7.2}",
        b * 1e3,
        a * 1e3,
        ratios[0]
    );
    a
}

/// Bytes that compress to about a half, different from block to block.
fn fill(piece: &mut [u8], state: &mut u64) {
    for (n, word) in piece.chunks_mut(8).enumerate() {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(0xb5);
        let bytes = if n % 2 == 0 { state.to_le_bytes() } else { *b"the same" };
        word.copy_from_slice(&bytes[..word.len()]);
    }
}

/// A raw disk with data in each `every`th MiB.
pub fn raw(dir: &Path, name: &str, size: u64, every: u64) {
    let file = File::create_new(dir.join(name)).unwrap();
    file.set_len(size).unwrap();
    let mut piece = vec![0; 1 << 20];
    let mut state = 1;
    for at in (0..size >> 20).step_by(every as usize) {
        fill(&mut piece, &mut state);
        file.write_all_at(&piece, at << 20).unwrap();
    }
}

fn conversions(dir: &Path, size: u64) {
    for (kind, every) in [("full", 1), ("sparse", 16)] {
        raw(dir, "disk.raw", size, every);
        Side::Peer.run(dir, &["convert", "-O", "qcow2", "disk.raw", "disk.qcow2"]);
        for (from, to) in [("raw", "qcow2"), ("qcow2", "raw")] {
            let (source, peer) = (format!("disk.{from}"), "qemu-img");
            let convert = |side: Side| {
                let target = format!("{}.{to}", side.name());
                side.timed(dir, &["convert", "-f", from, "-O", to, &source, &target])
            };
            let sides = [Side::Ours, Side::Peer];
            // Both targets go before each run: who gets memory that was in use a moment ago is
            // sooner done than who gets some that a host has to find first.
            let clear = || {
                for side in sides {
                    let _ = fs::remove_file(dir.join(format!("{}.{to}", side.name())));
                }
                let _ = fs::remove_file(dir.join("peer.raw"));
            };
            row(&format!("convert {from} to {to}, {kind}"), peer, |side| {
                clear();
                convert(side)
            });
            if every == 1 {
                // What a copy takes that looks at nothing: no program that reads and writes is faster by much.
                row(&format!("convert {from} to {to}, {kind}"), "cp", |side| {
                    clear();
                    match side {
                        Side::Ours => convert(side),
                        Side::Peer => copied(dir, &["cp", "--reflink=never", &source, "peer.raw"]),
                    }
                });
            }
            clear();
            for side in sides {
                convert(side);
            }
            same(dir, to);
        }
        fs::remove_file(dir.join("disk.raw")).unwrap();
        raw(dir, "disk.raw", size / COMPRESSED_PART, every);
        for method in ["zlib", "zstd"] {
            let option = format!("compression_type={method}");
            row(
                &format!("convert raw to qcow2, {method}, {kind}, 1/{COMPRESSED_PART}"),
                "qemu-img",
                |side| {
                    let target = format!("{}.qcow2", side.name());
                    let _ = fs::remove_file(dir.join(&target));
                    let words = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &option];
                    side.timed(dir, &[&words[..], &["disk.raw", &target]].concat())
                },
            );
            same(dir, "qcow2");
        }
        for name in ["disk.raw", "disk.qcow2"] {
            fs::remove_file(dir.join(name)).unwrap();
        }
    }
}

/// The seconds that a program takes which copies bytes and knows no image.
fn copied(dir: &Path, words: &[&str]) -> f64 {
    seconds(|| {
        let done = Command::new(words[0]).args(&words[1..]).current_dir(dir).status().unwrap();
        assert!(done.success(), "{words:?}");
    })
}

/// What both sides made shows the same disk, or the row says nothing.
fn same(dir: &Path, format: &str) {
    let (a, b) = (format!("ours.{format}"), format!("peer.{format}"));
    Side::Peer.run(dir, &["compare", "-f", format, "-F", format, &a, &b]);
    for name in [a, b] {
        fs::remove_file(dir.join(name)).unwrap();
    }
}

/// A delta with a cluster in each fourth cluster of `size` bytes.
pub fn scattered(dir: &Path, name: &str, base: &str, size: u64) {
    Side::Peer.run(dir, &["create", "-f", "qcow2", "-b", base, "-F", "qcow2", name]);
    write_scattered(&open(&dir.join(name)), size);
}

/// Writes a cluster in each fourth cluster of `size` bytes.
pub fn write_scattered(disk: &Chain, size: u64) {
    let mut piece = vec![0; 64 << 10];
    let mut state = 3;
    for at in (0..size).step_by(256 << 10) {
        fill(&mut piece, &mut state);
        disk.write_at(at, &[IoSlice::new(&piece)]).unwrap();
    }
    disk.flush().unwrap();
}

fn deltas(dir: &Path, size: u64) {
    let text = size.to_string();
    Side::Peer.run(dir, &["create", "-f", "qcow2", "base", &text]);
    scattered(dir, "delta", "base", size);
    row("commit of a scattered delta, 1/4 of the disk", "qemu-img", |side| {
        // Both start from an empty base.
        Side::Peer.run(dir, &["create", "-f", "qcow2", "base", &text]);
        side.timed(dir, &["commit", "-d", "-f", "qcow2", "delta"])
    });
    let part = size / 4;
    raw(dir, "part", part, 1);
    row("commit of a scattered delta, 1/4 of the disk", "dd, its bytes", |side| match side {
        Side::Ours => {
            Side::Peer.run(dir, &["create", "-f", "qcow2", "base", &text]);
            side.timed(dir, &["commit", "-d", "-f", "qcow2", "delta"])
        }
        Side::Peer => {
            let _ = fs::remove_file(dir.join("room"));
            copied(dir, &["dd", "if=part", "of=room", "bs=512k", "conv=notrunc", "status=none"])
        }
    });
    // Two bases that differ in half of what they hold.
    raw(dir, "one.raw", size, 8);
    raw(dir, "two.raw", size, 4);
    row("rebase onto a base that differs in 1/8", "qemu-img", |side| {
        let _ = fs::remove_file(dir.join("top"));
        Side::Peer.run(dir, &["create", "-f", "qcow2", "-b", "one.raw", "-F", "raw", "top"]);
        side.timed(dir, &["rebase", "-f", "qcow2", "-b", "two.raw", "-F", "raw", "top"])
    });
    for name in ["base", "delta", "part", "room", "one.raw", "two.raw", "top"] {
        fs::remove_file(dir.join(name)).unwrap();
    }
}

fn tables(dir: &Path) {
    let words = ["create", "-f", "qcow2", "-o", "preallocation=metadata", "mapped", MAPPED];
    Side::Peer.run(dir, &words);
    row("check of 100 GiB of mapped metadata", "qemu-img", |side| {
        side.timed(dir, &["check", "-f", "qcow2", "mapped"])
    });
    fs::remove_file(dir.join("mapped")).unwrap();
    row("create of a 1 TiB disk, 20 times", "qemu-img", |side| {
        seconds(|| (0..20).for_each(|_| side.run(dir, &["create", "-f", "qcow2", "new", "1T"])))
    });
    fs::remove_file(dir.join("new")).unwrap();
}

/// What `qemu-img bench` says it took, without the start of the process.
fn qemu_bench(path: &Path, write: bool) -> f64 {
    let mut command = Command::new("qemu-img");
    command.args(["bench", "-f", "qcow2", "-t", "writeback", "-d", "1", "-s", "4096"]);
    command.args(["-c", &ACCESSES.to_string(), "-S", &STEP.to_string()]);
    let output = command.args(write.then_some("-w")).arg(path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let word = text.split("completed in ").nth(1).and_then(|t| t.split(' ').next());
    word.unwrap().parse().unwrap()
}

/// The same blocks in the same order for every side.
fn blocks(size: u64) -> impl Iterator<Item = u64> {
    (0..ACCESSES).map(move |n| n * STEP % size)
}

fn engine(path: &Path, size: u64, write: bool) -> f64 {
    let disk: Chain = open(path);
    let mut block = [7; BLOCK as usize];
    seconds(|| {
        for at in blocks(size) {
            match write {
                true => disk.write_at(at, &[IoSlice::new(&block)]),
                false => disk.read_at(at, &mut [IoSliceMut::new(&mut block)]),
            }
            .unwrap();
        }
    })
}

fn plain(path: &Path, size: u64, write: bool) -> f64 {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut block = [7; BLOCK as usize];
    seconds(|| {
        for at in blocks(size) {
            match write {
                true => file.write_all_at(&block, at),
                false => file.read_exact_at(&mut block, at),
            }
            .unwrap();
        }
    })
}

fn accesses(dir: &Path, size: u64) {
    raw(dir, "plain", size, 1);
    Side::Peer.run(dir, &["convert", "-f", "raw", "-O", "qcow2", "plain", "image"]);
    let (image, raw) = (dir.join("image"), dir.join("plain"));
    for (what, write) in [("reads", false), ("writes in place", true)] {
        row(
            &format!("4 KiB scattered {what}, one at a time"),
            "qemu-img bench",
            |side| match side {
                Side::Ours => engine(&image, size, write),
                Side::Peer => qemu_bench(&image, write),
            },
        );
        row(&format!("4 KiB scattered {what}, one at a time"), "raw file", |side| match side {
            Side::Ours => engine(&image, size, write),
            Side::Peer => plain(&raw, size, write),
        });
    }
}

/// `VDISK_BENCH_SIZE` in bytes or GiB (`4G`); 1 GiB without it.
fn size() -> u64 {
    let Ok(text) = std::env::var("VDISK_BENCH_SIZE") else { return 1 << 30 };
    match text.strip_suffix('G') {
        Some(number) => number.parse::<u64>().unwrap() << 30,
        None => text.parse().unwrap(),
    }
}

fn directory() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if tempfile::tempfile_in(&memory).is_ok() { memory } else { std::env::temp_dir() }
}

/// A directory for a table of disks, and their size; prints the table's head.
pub fn place() -> (TempDir, u64) {
    let (size, place) = (size(), directory());
    println!("\ndisks of {} MiB in {}; {PAIRS} pairs in turn", size >> 20, place.display());
    println!(
        "{:<44} {:<16} {:>8} {:>8} {:>7} {:>7}",
        "job", "peer", "peer ms", "ours ms", "median", "lowest"
    );
    (tempfile::tempdir_in(&place).unwrap(), size)
}

/// Prints the table; without QEMU's tools there is none.
pub fn table() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        eprintln!("SKIPPED: the table against QEMU needs qemu-img");
        return;
    }
    let (dir, size) = place();
    let dir = dir.path();
    accesses(dir, size);
    tables(dir);
    deltas(dir, size);
    for name in ["plain", "image"] {
        let _ = fs::remove_file(dir.join(name));
    }
    conversions(dir, size);
}
