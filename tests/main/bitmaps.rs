//! Persistent bitmaps, on which incremental backups stand: they stay with the disk's head.

use crate::host::Work;
use crate::require::{Need, have};
use crate::twin::{Twin, clean, json, noise};

const SIZE: usize = 8 << 20;

/// The names of a file's bitmaps, with their flags, as QEMU tells them.
fn bitmaps(work: &Work, file: &str) -> Vec<(String, Vec<String>)> {
    let info = json(work.qemu_img(&format!("info --output=json {file}")));
    let all = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    let flags = |one: &serde_json::Value| {
        let flags = one["flags"].as_array().unwrap().iter();
        flags.map(|flag| flag.as_str().unwrap().to_owned()).collect()
    };
    all.iter().map(|one| (one["name"].as_str().unwrap().to_owned(), flags(one))).collect()
}

fn disk(work: &Work) -> Twin<'_> {
    work.qemu_img(&format!("create -q -f qcow2 disk.qcow2 {SIZE}")).succeeds();
    work.qemu_img("bitmap --add disk.qcow2 x").succeeds();
    Twin::blank(work, "disk.qcow2", SIZE)
}

#[test]
fn a_bitmap_is_there_and_records_after_snapshots_and_merges() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let mut disk = disk(&work);
    let here = [("x".to_owned(), vec!["auto".to_owned()])];
    for (name, bytes) in [("one", 5 << 20), ("two", 1 << 20), ("three", 3 << 20)] {
        work.vdisk(&format!("snapshot create disk.qcow2 {name}")).succeeds();
        assert_eq!(bitmaps(&work, "disk.qcow2"), here);
        disk.write(2 << 20, &noise(7, bytes));
    }
    for name in ["two", "three", "one"] {
        work.vdisk(&format!("snapshot merge disk.qcow2 {name} --forget")).succeeds();
        assert_eq!(bitmaps(&work, "disk.qcow2"), here);
    }
    clean(&work, "disk.qcow2");
    disk.holds();
}

#[test]
fn a_way_back_that_loses_bitmaps_says_so_before_it_asks() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let mut disk = disk(&work);
    work.vdisk("snapshot create disk.qcow2 s").succeeds();
    let before = disk.bytes.clone();
    disk.write(0, b"lost");
    for verb in ["revert", "delete"] {
        let plan = json(work.vdisk(&format!("snapshot {verb} disk.qcow2 s --dry-run --json")));
        assert_eq!(plan["bitmaps_lost"], serde_json::json!(["x"]));
        let plan = work.vdisk(&format!("snapshot {verb} disk.qcow2 s --dry-run")).succeeds().out();
        assert!(plan.contains("bitmaps    x: the next backup is a full one"), "{plan}");
        work.vdisk(&format!("snapshot {verb} disk.qcow2 s")).fails(&["bitmaps", "--yes"]);
    }
    work.vdisk("snapshot revert disk.qcow2 s --yes").succeeds();
    disk.bytes = before;
    disk.holds();
    assert_eq!(bitmaps(&work, "disk.qcow2"), []);
}

#[test]
fn a_full_copy_has_the_bitmaps_where_that_is_asked_for() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let mut disk = disk(&work);
    disk.write(100_000, &noise(1, 70_000));
    work.vdisk("clone --full disk.qcow2 without.qcow2").succeeds();
    work.vdisk("clone --full --bitmaps disk.qcow2 with.qcow2").succeeds();
    assert_eq!(bitmaps(&work, "without.qcow2"), []);
    assert_eq!(bitmaps(&work, "with.qcow2"), bitmaps(&work, "disk.qcow2"));
    clean(&work, "with.qcow2");
    Twin::of(&work, "with.qcow2", disk.bytes.clone()).holds();
}

/// What was written of bitmaps that did not all find room in a full file stayed taken: the file was
/// fuller than before, and nothing else went into it. The room is what QEMU's own test of errors while an
/// image is closed plays with.
#[test]
fn bitmaps_for_which_a_full_file_has_no_room_are_refused_with_a_word_and_leak_nothing() {
    const CLUSTER: usize = 4096;
    let work = Work::new();
    work.vdisk("qemu-img create -q -f qcow2 -o cluster_size=4K made.qcow2 16M").succeeds();
    // Whatever changes, all are written anew: more than there was room for between the rest.
    for name in ["one", "two", "three", "four", "five", "six"] {
        work.vdisk(&format!("qemu-img bitmap --add made.qcow2 {name}")).succeeds();
    }
    work.vdisk_fed("write made.qcow2 0", &noise(1, 300_000)).succeeds();
    let made = work.bytes("made.qcow2");
    let names = || {
        let info = json(work.vdisk("qemu-img info --output=json full.qcow2").succeeds());
        let all = info["format-specific"]["data"]["bitmaps"].as_array().unwrap().clone();
        all.iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let (mut done, mut refused) = (0, 0);
    for room in 0..12 {
        let len = (made.len().next_multiple_of(CLUSTER)) + room * CLUSTER;
        let full = [&made[..], &vec![0; len - made.len()]].concat();
        let name = format!(
            "json:{{\"driver\":\"qcow2\",\"file\":{{\"driver\":\"raw\",\"size\":{len},\
             \"file\":{{\"driver\":\"file\",\"filename\":\"full.qcow2\"}}}}}}"
        );
        let changes: [&[&str]; 4] = [
            &["--add", &name, "new"],
            &["--merge", "one", &name, "two"],
            &["--clear", &name, "one"],
            &["--remove", &name, "two"],
        ];
        for change in changes {
            work.put("full.qcow2", &full);
            let before = names();
            let words = ["qemu-img", "bitmap"].into_iter().chain(change.iter().copied());
            let ended = work.vdisk_args(words);
            if ended.code == Some(0) {
                done += 1;
            } else {
                ended.fails(&["No space left on device"]);
                assert_eq!(names(), before);
                refused += 1;
            }
            work.vdisk("qemu-img check full.qcow2").succeeds();
            let read = work.vdisk("read full.qcow2 0 300000").succeeds();
            assert!(read.stdout == noise(1, 300_000), "{change:?} with {room} clusters free");
        }
    }
    assert!(done > 4 && refused > 4, "{done} done, {refused} refused");
}
