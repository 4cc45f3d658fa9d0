//! The bodies of the fuzz targets over mutated images of all shapes, with a seed: what cargo-fuzz
//! would find by coverage, as far as some seconds go. `VDISK_SEED=fresh VDISK_PROPTEST_CASES=100000`
//! goes on for long.
//!
//! The cases run in a child of bounded memory: an allocation that a number in the file asked for
//! would end it. Whoever wants the images for cargo-fuzz's corpus sets `VDISK_SHAPES` to a directory.

use std::io::Read;
use std::path::Path;
use std::process::Command;

use crate::dice::rounds;
use crate::hostile::{greedy, patiently, use_it};
use crate::processes::run;
use crate::{mutation, shapes, targets};

/// What a process may take for images under 1 MiB.
const MEMORY_KIB: u64 = 256 << 10;
/// Set in the child.
const CHILD: &str = "VDISK_HOSTILE_DIR";

fn qcow2_targets() {
    let shapes = shapes::all();
    rounds(8, |dice| {
        let shape = &shapes[dice.below(shapes.len() as u64) as usize];
        let mut bytes = shape.bytes.clone();
        mutation::mutate(&mut bytes, dice);
        let (name, body) = dice.pick(&targets::QCOW2);
        let _named = Named(name, shape.name);
        patiently(|| body(&bytes));
    });
}

/// Says what panicked.
struct Named(&'static str, &'static str);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("target {}, an image with {}", self.0, self.1);
        }
    }
}

/// Compressed bytes, damaged; and some that promise far more than a cluster.
fn compressed_clusters() {
    let deflated = |len: usize| {
        let mut out = Vec::new();
        let encoder = flate2::read::DeflateEncoder::new(&[0u8; 4096][..], Default::default());
        encoder.take(len as u64).read_to_end(&mut out).unwrap();
        out
    };
    let bomb = vec![0; 64 << 20];
    let seeds = [
        deflated(4096),
        zstd::bulk::compress(&[7; 70_000], 3).unwrap(),
        zstd::bulk::compress(&bomb, 3).unwrap(),
        // A frame that asks for a window of 2 GiB.
        vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x03, 0, 0, 0, 0, 0],
    ];
    rounds(1, |dice| {
        let mut bytes = vec![dice.next() as u8];
        bytes.extend_from_slice(&seeds[dice.below(4) as usize]);
        if !dice.once_in(8) {
            let area = bytes.len();
            mutation::scramble(&mut bytes, area, dice);
        }
        patiently(|| targets::compressed(&bytes));
    });
}

fn foreign_formats() {
    let unpacked = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/formats").join(name);
        let mut bytes = Vec::new();
        let packed = std::fs::File::open(path).unwrap();
        flate2::read::GzDecoder::new(packed).read_to_end(&mut bytes).unwrap();
        bytes
    };
    let names = [
        "sparse.vmdk",
        "stream.vmdk",
        "dynamic.vhd",
        "fixed.vhd",
        "dynamic.vdi",
        "packed.qcow",
        "table.qed",
        "table.parallels",
    ];
    let seeds = names.map(|name| unpacked(&format!("{name}.gz")));
    rounds(3, |dice| {
        let mut bytes = seeds[dice.below(seeds.len() as u64) as usize].clone();
        let area = dice.pick(&[600, 4096, 70_000]);
        mutation::scramble(&mut bytes, area, dice);
        patiently(|| targets::foreign(&bytes));
    });
}

fn luks_headers() {
    let shapes = shapes::all();
    let shape = shapes.iter().find(|shape| shape.name == "luks").unwrap();
    let at = shape.bytes.windows(4).position(|bytes| bytes == b"LUKS").unwrap();
    rounds(1, |dice| {
        let mut bytes = shape.bytes[at..].to_vec();
        mutation::scramble(&mut bytes, 600, dice);
        patiently(|| targets::luks(&bytes));
    });
}

fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// What the child does in `dir`.
fn torture(dir: &Path) {
    qcow2_targets();
    foreign_formats();
    luks_headers();
    let shapes = shapes::all();
    let path = dir.join("image");
    rounds(3, |dice| {
        let mut bytes = shapes[dice.below(shapes.len() as u64) as usize].bytes.clone();
        mutation::mutate(&mut bytes, dice);
        std::fs::write(&path, &bytes).unwrap();
        use_it(&path, dice);
    });
    let peak = peak_kib();
    assert!(peak < MEMORY_KIB, "images under 1 MiB took {peak} KiB");
    // These are larger.
    compressed_clusters();
    greedy(&path);
    eprintln!("{peak} KiB for small images, {} KiB for all", peak_kib());
}

#[test]
fn mutated_images_cost_neither_panic_nor_patience_nor_memory() {
    if let Some(dir) = std::env::var_os(CHILD) {
        return torture(Path::new(&dir));
    }
    if let Some(dir) = std::env::var_os("VDISK_SHAPES") {
        for shape in shapes::all() {
            std::fs::write(Path::new(&dir).join(shape.name), shape.bytes).unwrap();
        }
    }
    let dir = tempfile::tempdir().unwrap();
    // Address space, of which the test's own code and threads take a part.
    let mut child = Command::new("prlimit");
    child.arg("--as=600000000").arg(std::env::current_exe().unwrap());
    child.args(["--exact", "fuzz::mutated_images_cost_neither_panic_nor_patience_nor_memory"]);
    child.args(["--nocapture", "--test-threads=1"]).env(CHILD, dir.path());
    let out = run(&mut child);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    eprintln!("{said}");
}
