//! Files from somewhere, seen from outside: whatever an image under 1 MiB says, a command takes at
//! most 256 MiB and 10 seconds, ends with an answer or an error that names the place, and changes
//! nothing that it was not told to change.
//!
//! `VDISK_SEED=fresh VDISK_PROPTEST_CASES=1000` goes on for long with new images.

use crate::dice::rounds;
use crate::host::{Done, VDISK, Work};
use crate::mutation::{self, get, put};
use crate::shapes;

/// The address space that a command may take, of which its memory is a part.
const MEMORY: &str = "--as=268435456";

/// Commands that only look at `image`.
const LOOKS: [&str; 14] = [
    "info image",
    "info --json image",
    "check image",
    "map image",
    "map --json image",
    "compare image image",
    "snapshot list image",
    "convert image raw-target",
    "qemu-img info image",
    "qemu-img check image",
    "qemu-img map --output=json image",
    "qemu-img compare image other",
    "qemu-img convert -O qcow2 image target",
    "qemu-img measure -O qcow2 image",
];

/// Commands that change it.
const CHANGES: [&str; 9] = [
    "check --repair leaks image",
    "check --repair all image",
    "qemu-img check -r all image",
    "qemu-img snapshot -c new image",
    "qemu-img snapshot -d 1 image",
    "qemu-img bitmap --add image new",
    "qemu-img bitmap --remove image number",
    "qemu-img resize image +1M",
    "qemu-img amend -o compat=1.1 image",
];

/// Runs a command within its bounds; it ends by itself.
fn bounded(work: &Work, words: &str) -> Done {
    let all = [MEMORY, "timeout", "10", VDISK].into_iter().chain(words.split(' '));
    let done = work.run("prlimit", all);
    let code = done.code;
    assert!(matches!(code, Some(0..=64)), "{words}: {code:?} {}", done.text());
    done
}

#[test]
fn no_small_image_costs_much_memory_or_time() {
    let shapes = shapes::all();
    rounds(8, |dice| {
        let work = Work::new();
        let mut bytes = shapes[dice.below(shapes.len() as u64) as usize].bytes.clone();
        mutation::mutate(&mut bytes, dice);
        work.put("image", &bytes);
        work.put("other", &bytes[..bytes.len() / 2]);
        work.put("data", vec![7; shapes::SIZE as usize]);
        for _ in 0..3 {
            bounded(&work, dice.pick(&LOOKS));
        }
        assert!(work.bytes("image") == bytes, "a look has changed the file");
        bounded(&work, dice.pick(&CHANGES));
    });
}

/// A small image with data and a snapshot.
fn image() -> Vec<u8> {
    let shapes = shapes::all();
    shapes.into_iter().find(|shape| shape.name == "version 3").unwrap().bytes
}

/// The L2 table that the first used L1 entry names: the entry's place, and the table's.
fn first_table(bytes: &[u8]) -> (u64, u64) {
    let l1 = get(bytes, 40);
    let entries = (0..64).map(|index| l1 + index * 8);
    let used = |at: u64| Some((at, get(bytes, at) & 0x00ff_ffff_ffff_fe00)).filter(|e| e.1 != 0);
    entries.into_iter().find_map(used).unwrap()
}

#[test]
fn what_points_nowhere_is_named_with_its_offset_and_nothing_is_written() {
    let good = image();
    let (l1_entry, l2) = first_table(&good);
    let with = |at: u64, value: u64| {
        let mut bytes = good.clone();
        put(&mut bytes, at, &value.to_be_bytes());
        bytes
    };
    let l1 = get(&good, 40);
    // The image, a command, and the place that its message names.
    let cases = [
        ("an L1 table over the header", with(40, 0), "info image", "0x28"),
        ("an L1 table past 2^56", with(40, 1 << 57), "info image", "0x28"),
        ("an L1 table past the end", with(40, 1 << 40), "info image", "0x10000000000"),
        ("refcounts over the header", with(48, 0), "info image", "0x30"),
        ("refcounts past 2^56", with(48, 1 << 60), "info image", "0x30"),
        ("L1 as its own L2 table", with(l1_entry, l1 | 1 << 63), "qemu-img resize image +1M", ""),
        ("an L2 table of itself", with(l2, l2 | 1 << 63), "check image", "cluster"),
        (
            "an L2 table past the end",
            with(l1_entry, 1 << 50),
            "convert image raw",
            "0x4000000000000",
        ),
        ("a cluster off its boundary", with(l2, 0x300), "check image", "offset=200"),
        ("snapshots off a boundary", with(64, 0x123), "snapshot list image", "0x40"),
        ("snapshots past 2^63", with(64, 1 << 63), "qemu-img snapshot -l image", ""),
    ];
    for (what, bytes, command, place) in cases {
        let work = Work::new();
        work.put("image", &bytes);
        let done = bounded(&work, command);
        assert_ne!(done.code, Some(0), "{what}: {command} says that all is right");
        assert!(done.text().contains(place), "{what}: {command} says {}", done.text());
        assert!(work.bytes("image") == bytes, "{what}: {command} has changed the file");
        for command in CHANGES.iter().filter(|words| !words.contains("check")) {
            let done = bounded(&work, command);
            if done.code != Some(0) && !done.text().contains("image has no") {
                assert!(!done.text().is_empty(), "{what}: {command} fails without a word");
            }
        }
    }
}

#[test]
fn a_disk_that_stands_on_itself_is_refused_by_name() {
    let work = Work::new();
    work.vdisk("create base 1M").succeeds();
    let qemu = "qemu-img create -q -f qcow2 -F qcow2 -u -b";
    for (target, backing) in [("image", "imagf"), ("one", "two"), ("two", "one")] {
        work.vdisk(&format!("{qemu} {backing} {target} 1M")).succeeds();
    }
    let mut own = work.bytes("image");
    let at = own.windows(5).position(|name| name == b"imagf").unwrap();
    own[at + 4] = b'e';
    work.put("image", own);
    for disk in ["image", "one"] {
        let before = work.bytes(disk);
        for command in ["info", "check --chain", "map", "snapshot list", "compare base"] {
            let done = bounded(&work, &format!("{command} {disk}"));
            if !matches!(command, "info" | "snapshot list") {
                assert_ne!(done.code, Some(0), "{command} {disk}: {}", done.text());
                assert!(done.err().contains(disk), "{command} {disk}: {}", done.err());
            }
        }
        assert!(work.bytes(disk) == before);
    }
}

#[test]
fn a_cluster_that_inflates_without_end_is_read_as_one_cluster() {
    let bomb = zstd::bulk::compress(&vec![0; 128 << 20], 3).unwrap();
    let shapes = shapes::all();
    let zstd = shapes.iter().find(|shape| shape.name == "zstd").unwrap();
    let mut bytes = zstd.bytes.clone();
    let (_, l2) = first_table(&bytes);
    let end = bytes.len().next_multiple_of(4096) as u64;
    bytes.resize(end as usize, 0);
    bytes.extend_from_slice(&bomb[..bomb.len().min(8000)]);
    bytes.resize(end as usize + 8192, 0);
    // Sixteen sectors, the most that a descriptor of 4 KiB clusters can say.
    put(&mut bytes, l2, &(1u64 << 62 | 15 << 58 | end).to_be_bytes());
    let work = Work::new();
    work.put("image", &bytes);
    for command in ["convert image target", "compare image image", "qemu-img convert image raw"] {
        bounded(&work, command);
    }
    assert!(work.bytes("image") == bytes);
}
