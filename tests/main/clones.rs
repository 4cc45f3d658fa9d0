//! Who stands on a snapshot: a clone in any directory, a copy of a head, a head of another name. What
//! they stand on is not taken from under them without a word, and what is done beside them leaves them
//! as they are.

use std::fs;

use crate::host::Work;
use crate::require::{Need, have};
use crate::twin::{Twin, clean, json, noise, same_bytes};

const SIZE: usize = 16 << 20;

/// A disk with the snapshots `A` and `B`, each followed by a write, in the directory `a`, and an empty
/// directory `b`.
fn disk(work: &Work) -> Twin<'_> {
    fs::create_dir(work.path("a")).unwrap();
    fs::create_dir(work.path("b")).unwrap();
    let mut disk = Twin::create(work, "a/d.qcow2", SIZE, "");
    disk.write(0, &noise(1, 1 << 20));
    work.vdisk("snapshot create a/d.qcow2 A").succeeds();
    // More than a clone remembers all bytes of.
    disk.write(1 << 19, &noise(2, 9 << 20));
    work.vdisk("snapshot create a/d.qcow2 B").succeeds();
    disk.write(100, b"now");
    disk
}

/// The file of the layer of a disk's snapshot.
fn layer(work: &Work, disk: &str, name: &str) -> String {
    let list = json(work.vdisk(&format!("snapshot list --json {disk}")));
    let all = list["snapshots"].as_array().unwrap();
    let entry = all.iter().find(|entry| entry["name"] == name).unwrap();
    entry["file"].as_str().unwrap().to_owned()
}

fn contents(work: &Work, disk: &str) -> Vec<u8> {
    work.vdisk(&format!("read {disk} 0 {SIZE}")).succeeds().stdout
}

#[track_caller]
fn reads(work: &Work, disk: &str, bytes: &[u8]) {
    same_bytes(disk, &contents(work, disk), bytes);
}

#[test]
fn a_clone_of_a_snapshot_in_another_directory_keeps_the_snapshot_until_it_is_removed() {
    let work = Work::new();
    let disk = disk(&work);
    work.vdisk(&format!("clone {} b/c.qcow2", layer(&work, "a/d.qcow2", "A"))).succeeds();
    let model = contents(&work, "b/c.qcow2");
    for words in [
        "snapshot delete a/d.qcow2 A --tree --forget --yes",
        "snapshot delete a/d.qcow2 A --tree --yes",
        "snapshot merge a/d.qcow2 A --forget",
        "snapshot merge a/d.qcow2 A --in-batches",
        "rm a/d.qcow2 --yes",
    ] {
        work.vdisk(words).fails(&["b/c.qcow2", "--even-if-cloned", "vdisk rm"]);
        reads(&work, "b/c.qcow2", &model);
        disk.reads_right();
    }
    work.vdisk("rm b/c.qcow2").refuses(&["--yes"]);
    reads(&work, "b/c.qcow2", &model);
    let plan = json(work.vdisk("rm b/c.qcow2 --dry-run --json"));
    assert_eq!(plan["files"].as_array().unwrap().len(), 1);
    work.vdisk("rm b/c.qcow2 --yes").succeeds();
    work.vdisk("snapshot merge a/d.qcow2 A").succeeds();
    disk.reads_right();
    work.vdisk("rm a/d.qcow2 --yes").succeeds();
    assert_eq!(fs::read_dir(work.path("a")).unwrap().count(), 0);
}

#[test]
fn a_clone_that_is_not_where_it_was_made_still_counts_until_the_user_says_that_it_is_gone() {
    let work = Work::new();
    let disk = disk(&work);
    let b = layer(&work, "a/d.qcow2", "B");
    work.vdisk(&format!("clone {b} b/c.qcow2")).succeeds();
    let model = contents(&work, "b/c.qcow2");
    fs::rename(work.path("b/c.qcow2"), work.path("b/moved.qcow2")).unwrap();
    work.vdisk("snapshot merge a/d.qcow2 B").fails(&["b/c.qcow2", "not found there", "unseal"]);
    reads(&work, "b/moved.qcow2", &model);
    // The id of its disk tells which one it was.
    work.vdisk("rm b/moved.qcow2 --yes").succeeds();
    work.vdisk(&format!("clone {b} b/c.qcow2")).succeeds();
    work.vdisk(&format!("unseal {b}")).fails(&["b/c.qcow2"]);
    fs::remove_file(work.path("b/c.qcow2")).unwrap();
    work.vdisk("snapshot merge a/d.qcow2 B").fails(&["b/c.qcow2"]);
    work.vdisk(&format!("unseal {b}")).succeeds();
    work.vdisk("snapshot merge a/d.qcow2 B").succeeds();
    disk.reads_right();
}

/// The layer knew where a clone was made, and nothing of a copy of it in a third directory: when the
/// first was removed, the copy's base went with the next delete.
#[test]
fn a_copy_of_a_clone_in_another_directory_counts_from_its_first_use_on() {
    let work = Work::new();
    let disk = disk(&work);
    let b = layer(&work, "a/d.qcow2", "B");
    fs::create_dir(work.path("c")).unwrap();
    work.vdisk(&format!("clone {b} b/c.qcow2")).succeeds();
    fs::copy(work.path("b/c.qcow2"), work.path("c/copy.qcow2")).unwrap();
    work.vdisk_fed("write c/copy.qcow2 1M", b"its own").succeeds();
    let model = contents(&work, "c/copy.qcow2");
    work.vdisk("rm b/c.qcow2 --yes").succeeds();
    for words in [
        "snapshot delete a/d.qcow2 B --forget --yes",
        "snapshot merge a/d.qcow2 B",
        "rm a/d.qcow2 --yes",
        &format!("unseal {b}"),
    ] {
        work.vdisk(words).fails(&["c/copy.qcow2"]);
    }
    // Its copies are others to itself: what they show is not written over.
    fs::create_dir(work.path("e")).unwrap();
    work.vdisk("create e/base.qcow2 16M").succeeds();
    work.vdisk("clone e/base.qcow2 c/on.qcow2").succeeds();
    fs::copy(work.path("c/on.qcow2"), work.path("b/on.qcow2")).unwrap();
    work.vdisk_fed("write b/on.qcow2 0", b"of the copy").succeeds();
    work.vdisk("commit c/on.qcow2").fails(&["b/on.qcow2"]);
    work.vdisk("commit b/on.qcow2").fails(&["c/on.qcow2"]);
    work.vdisk("rm c/on.qcow2 --yes").succeeds();
    work.vdisk("commit b/on.qcow2").succeeds();
    // Moved, it is found where it was used last.
    fs::create_dir(work.path("d")).unwrap();
    fs::rename(work.path("c/copy.qcow2"), work.path("d/moved.qcow2")).unwrap();
    work.vdisk_fed("write d/moved.qcow2 2M", b"").succeeds();
    work.vdisk("snapshot merge a/d.qcow2 B").fails(&["d/moved.qcow2"]);
    reads(&work, "d/moved.qcow2", &model);
    disk.reads_right();
    work.vdisk("rm d/moved.qcow2 --yes").succeeds();
    work.vdisk("snapshot merge a/d.qcow2 B").succeeds();
    disk.reads_right();
}

#[test]
fn a_clone_that_was_put_elsewhere_does_not_count() {
    let work = Work::new();
    let disk = disk(&work);
    let a = layer(&work, "a/d.qcow2", "A");
    work.vdisk(&format!("clone {a} b/one.qcow2 b/two.qcow2")).succeeds();
    let model = contents(&work, "b/one.qcow2");
    work.vdisk("rebase b/one.qcow2 --flatten").succeeds();
    work.vdisk("snapshot merge a/d.qcow2 A").fails(&["b/two.qcow2"]);
    work.vdisk("create b/other.qcow2 16M").succeeds();
    work.vdisk("rebase b/two.qcow2 --backing b/other.qcow2").succeeds();
    work.vdisk("rm b/other.qcow2 --yes").fails(&["b/two.qcow2"]);
    work.vdisk("snapshot merge a/d.qcow2 A").succeeds();
    disk.reads_right();
    reads(&work, "b/one.qcow2", &model);
    reads(&work, "b/two.qcow2", &model);
}

#[test]
fn what_is_kept_aside_or_let_go_of_never_takes_a_layer_from_under_a_clone_elsewhere() {
    let work = Work::new();
    let disk = disk(&work);
    // Its layer loses its name, and the head stands on it: it would be folded away.
    work.vdisk("snapshot delete a/d.qcow2 B --forget --yes").succeeds();
    let b = layer(&work, "a/d.qcow2", "A");
    work.vdisk(&format!("clone {b} b/c.qcow2")).succeeds();
    let model = contents(&work, "b/c.qcow2");
    work.vdisk("snapshot create a/d.qcow2 C").succeeds();
    work.vdisk_fed("write a/d.qcow2 0", b"since").succeeds();
    work.vdisk("snapshot delete a/d.qcow2 C --keep-for 1s --yes").succeeds();
    std::thread::sleep(std::time::Duration::from_millis(1200));
    work.vdisk_fed("write a/d.qcow2 0", b"after").succeeds();
    work.vdisk("snapshot forget a/d.qcow2").succeeds();
    reads(&work, "b/c.qcow2", &model);
    drop(disk);
}

#[test]
fn the_user_may_drop_what_clones_stand_on() {
    let work = Work::new();
    let disk = disk(&work);
    let a = layer(&work, "a/d.qcow2", "A");
    work.vdisk(&format!("clone {a} b/c.qcow2")).succeeds();
    work.vdisk("snapshot merge a/d.qcow2 A --even-if-cloned --forget").succeeds();
    disk.reads_right();
    work.vdisk("read b/c.qcow2 0 512").fails(&["missing"]);
}

#[test]
fn a_clone_made_by_the_drop_in_counts_too() {
    let work = Work::new();
    let disk = disk(&work);
    let a = layer(&work, "a/d.qcow2", "A");
    // Names are relative to the new file.
    work.vdisk(&format!("qemu-img create -q -f qcow2 -b ../{a} -F qcow2 b/c.qcow2")).succeeds();
    work.vdisk("snapshot merge a/d.qcow2 A").fails(&["b/c.qcow2"]);
    work.vdisk("rm b/c.qcow2 --yes").succeeds();
    work.vdisk("snapshot merge a/d.qcow2 A").fails(&["b/c.qcow2"]);
    work.vdisk(&format!("unseal {a}")).succeeds();
    work.vdisk("snapshot merge a/d.qcow2 A").succeeds();
    disk.reads_right();
}

/// The contents of the layer are what they were; its files are longer, and were written.
#[test]
fn a_merge_beside_a_clone_of_a_snapshot_leaves_the_clone_as_it_is() {
    for how in ["", "--in-batches"] {
        for below in ["A", "B"] {
            let work = Work::new();
            let disk = disk(&work);
            let above = if below == "A" { "B" } else { "C" };
            work.vdisk("snapshot create a/d.qcow2 C").succeeds();
            let base = layer(&work, "a/d.qcow2", above);
            work.vdisk(&format!("clone {base} a/c.qcow2 b/c.qcow2")).succeeds();
            let model = contents(&work, "b/c.qcow2");
            work.vdisk(&format!("snapshot merge a/d.qcow2 {below} {how}")).succeeds();
            reads(&work, "b/c.qcow2", &model);
            work.vdisk_fed("write a/c.qcow2 0", b"x").succeeds();
            work.vdisk("snapshot create b/c.qcow2 own").succeeds();
            work.vdisk(&format!("clone {base} b/later.qcow2")).succeeds();
            reads(&work, "b/later.qcow2", &model);
            disk.reads_right();
            if have(Need::Qemu) {
                clean(&work, "b/later.qcow2");
            }
        }
    }
}

#[test]
fn forgetting_beside_a_clone_of_a_snapshot_leaves_the_clone_as_it_is() {
    let work = Work::new();
    let mut base = Twin::create(&work, "base", SIZE, "");
    base.write(0, &noise(1, 9 << 20));
    work.vdisk("snapshot create base s1").succeeds();
    base.write(1 << 20, &noise(2, 1 << 20));
    work.vdisk("snapshot delete base s1 --yes").succeeds();
    work.vdisk("snapshot create base s2").succeeds();
    work.vdisk("snapshot revert base s2 --yes").succeeds();
    work.vdisk(&format!("clone {} k", layer(&work, "base", "s2"))).succeeds();
    let model = contents(&work, "k");
    work.vdisk("snapshot forget base").succeeds();
    reads(&work, "k", &model);
    work.vdisk_fed("write k 0", b"x").succeeds();
}

#[test]
fn what_qemu_committed_is_noticed_also_after_changes_of_our_own() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let disk = disk(&work);
    let b = layer(&work, "a/d.qcow2", "B");
    work.vdisk(&format!("clone {b} b/one.qcow2 b/two.qcow2")).succeeds();
    work.vdisk("snapshot merge a/d.qcow2 A").succeeds();
    work.vdisk_fed("write b/one.qcow2 3M", b"for the base").succeeds();
    work.qemu_img("commit -q b/one.qcow2").succeeds();
    work.vdisk("read b/two.qcow2 0 512").fails(&["has changed"]);
    // What was written by another is not taken over by the next change, nor by the next clone.
    work.vdisk("snapshot rename a/d.qcow2 B two").succeeds();
    work.vdisk(&format!("clone {b} b/three.qcow2")).succeeds();
    work.vdisk("read b/three.qcow2 0 512").succeeds();
    work.vdisk("read b/two.qcow2 0 512").fails(&["has changed"]);
    work.vdisk("rebase b/two.qcow2 --accept-base").succeeds();
    work.vdisk("read b/two.qcow2 0 512").succeeds();
    drop(disk);
}

#[test]
fn a_copy_of_a_head_is_a_disk_of_its_own_on_the_layers_that_it_stands_on() {
    let work = Work::new();
    let disk = disk(&work);
    fs::copy(work.path("a/d.qcow2"), work.path("a/bak.qcow2")).unwrap();
    for words in ["snapshot merge a/d.qcow2 B", "snapshot delete a/d.qcow2 B --forget --yes"] {
        work.vdisk(words).fails(&["a/bak.qcow2", "--even-if-cloned"]);
    }
    work.vdisk("rm a/d.qcow2 --yes").fails(&["a/bak.qcow2"]);
    work.vdisk("snapshot merge a/d.qcow2 A").succeeds();
    reads(&work, "a/bak.qcow2", &disk.bytes);
    // Not its snapshots, so it cannot drop them.
    work.vdisk("snapshot delete a/bak.qcow2 B --yes").fails(&["has no snapshot"]);
    work.vdisk("snapshot create a/bak.qcow2 own").succeeds();
    work.vdisk_fed("write a/bak.qcow2 0", b"its own").succeeds();
    disk.reads_right();
    work.vdisk("rm a/bak.qcow2 --yes").succeeds();
    disk.reads_right();
    work.vdisk("snapshot merge a/d.qcow2 B").succeeds();
    disk.reads_right();
}

#[test]
fn two_heads_of_one_disk_that_share_its_snapshots_drop_none_of_them() {
    let work = Work::new();
    let disk = disk(&work);
    fs::copy(work.path("a/d.qcow2"), work.path("a/y.qcow2")).unwrap();
    fs::rename(work.path("a/d.qcow2"), work.path("a/x.qcow2")).unwrap();
    for words in [
        "snapshot delete a/x.qcow2 A --tree --yes",
        "snapshot merge a/x.qcow2 A",
        "snapshot merge a/y.qcow2 B",
        "rm a/x.qcow2 --yes",
    ] {
        let other = if words.contains("x.qcow2") { "a/y.qcow2" } else { "a/x.qcow2" };
        work.vdisk(words).fails(&[other]);
    }
    reads(&work, "a/x.qcow2", &disk.bytes);
    reads(&work, "a/y.qcow2", &disk.bytes);
    fs::rename(work.path("a/x.qcow2"), work.path("a/d.qcow2")).unwrap();
    work.vdisk("snapshot merge a/d.qcow2 A").succeeds();
    disk.reads_right();
    reads(&work, "a/y.qcow2", &disk.bytes);
}

#[test]
fn a_head_of_another_name_finds_its_snapshots_and_a_new_disk_of_the_old_name_takes_none() {
    let work = Work::new();
    let mut disk = disk(&work);
    fs::rename(work.path("a/d.qcow2"), work.path("a/new.img")).unwrap();
    work.vdisk("create a/d.qcow2 16M").succeeds();
    work.vdisk("snapshot create a/d.qcow2 other").succeeds();
    let names = |head: &str| {
        let list = json(work.vdisk(&format!("snapshot list --json {head}")));
        let all = list["snapshots"].as_array().unwrap().clone();
        all.iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names("a/new.img"), ["A", "B"]);
    assert_eq!(names("a/d.qcow2"), ["other"]);
    work.vdisk("snapshot create a/new.img C").succeeds();
    work.vdisk("snapshot revert a/new.img A --yes").succeeds();
    work.vdisk("snapshot undo a/new.img").succeeds();
    reads(&work, "a/new.img", &disk.bytes);
    work.vdisk("snapshot merge a/new.img B --in-batches").succeeds();
    work.vdisk("snapshot delete a/new.img C --yes --forget").succeeds();
    reads(&work, "a/new.img", &disk.bytes);
    disk.bytes.truncate(0);
    assert_eq!(names("a/new.img"), ["A"]);
    work.vdisk("rm a/new.img --yes").succeeds();
    assert_eq!(names("a/d.qcow2"), ["other"]);
    work.vdisk("rm a/d.qcow2 --yes").succeeds();
    assert_eq!(fs::read_dir(work.path("a")).unwrap().count(), 0);
}

#[test]
fn an_old_head_that_is_copied_back_goes_on_beside_the_snapshots_taken_since() {
    let work = Work::new();
    let mut disk = Twin::create(&work, "d.qcow2", SIZE, "");
    disk.write(0, &noise(1, 1 << 20));
    let old = disk.bytes.clone();
    fs::copy(work.path("d.qcow2"), work.path("old")).unwrap();
    disk.write(100, b"before the snapshot");
    let moment = disk.bytes.clone();
    work.vdisk("snapshot create d.qcow2 s1").succeeds();
    disk.write(200, b"after it");
    fs::copy(work.path("old"), work.path("d.qcow2")).unwrap();
    reads(&work, "d.qcow2", &old);
    work.vdisk("snapshot create d.qcow2 s2").succeeds();
    reads(&work, "d.qcow2", &old);
    work.vdisk("snapshot revert d.qcow2 s1 --yes").succeeds();
    reads(&work, "d.qcow2", &moment);
    work.vdisk("snapshot revert d.qcow2 s2 --yes").succeeds();
    reads(&work, "d.qcow2", &old);
}

#[test]
fn an_undo_after_a_merge_that_kept_nothing_takes_back_nothing_older() {
    let work = Work::new();
    let mut disk = disk(&work);
    work.vdisk("snapshot delete a/d.qcow2 B --yes").succeeds();
    disk.bytes = contents(&work, "a/d.qcow2");
    disk.write(300, b"since");
    work.vdisk("snapshot merge a/d.qcow2 A --forget").succeeds().says(&["delete of 'B'", "undo"]);
    work.vdisk("snapshot undo a/d.qcow2 --yes").fails(&["nothing is kept aside"]);
    disk.reads_right();
}

#[test]
fn what_was_sealed_for_a_clone_that_could_not_be_made_is_a_disk_again() {
    let work = Work::new();
    work.vdisk("create base.qcow2 4M").succeeds();
    work.vdisk("create other.qcow2 4M").succeeds();
    work.vdisk("clone base.qcow2 nowhere/c.qcow2").fails(&["nowhere"]);
    work.vdisk("rebase base.qcow2 --backing base.qcow2").fails(&["base.qcow2"]);
    work.vdisk_fed("write base.qcow2 0", b"its own").succeeds();
    work.vdisk("clone base.qcow2 c.qcow2").succeeds();
    work.vdisk("clone base.qcow2 nowhere/c.qcow2").fails(&["nowhere"]);
    work.vdisk("rm c.qcow2 --yes").succeeds();
    // The mark of the one that was not made was taken back.
    work.vdisk_fed("write base.qcow2 0", b"x").fails(&["unseal", "no clone"]);
    work.vdisk("rm base.qcow2 --yes").succeeds();
    assert_eq!(work.files(), ["other.qcow2"]);
}
