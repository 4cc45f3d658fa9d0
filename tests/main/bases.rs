//! What a disk stands on: sealed bases, other bases, no base.

use crate::host::Work;
use crate::require::{Need, have};
use crate::twin::{Twin, clean, json, noise};

const SIZE: usize = 8 << 20;

/// A base with some bytes and a clone with some more.
fn family(work: &Work) -> Twin<'_> {
    let mut base = Twin::create(work, "base.qcow2", SIZE, "");
    base.write(1 << 20, &noise(1, 300_000));
    work.vdisk("clone base.qcow2 disk.qcow2").succeeds();
    let mut disk = Twin::of(work, "disk.qcow2", base.bytes.clone());
    disk.write(5 << 20, &noise(2, 100_000));
    disk
}

#[test]
fn a_disk_put_on_another_base_shows_the_same_and_one_that_trusts_it_shows_the_new() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let disk = family(&work);
    let mut other = Twin::create(&work, "other.qcow2", SIZE, "--cluster-size 4K");
    other.write(1 << 20, &noise(1, 200_000));
    other.write(6 << 20, &noise(3, 70_000));
    work.vdisk("rebase disk.qcow2 --backing other.qcow2").succeeds();
    disk.holds();
    clean(&work, "disk.qcow2");
    work.vdisk_fed("write other.qcow2 0", b"x").fails(&["other.qcow2", "clones"]);
    work.vdisk("rebase other.qcow2 --backing disk.qcow2").fails(&["other.qcow2"]);
    work.vdisk("create blank.qcow2 8M").succeeds();
    work.vdisk("rebase disk.qcow2 --unsafe --backing blank.qcow2").succeeds();
    work.vdisk("compare disk.qcow2 other.qcow2").ends(1);
}

#[test]
fn a_flattened_disk_needs_no_base() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let disk = family(&work);
    work.vdisk("unseal base.qcow2").fails(&["base.qcow2", "disk.qcow2"]);
    work.vdisk("rebase disk.qcow2 --flatten").succeeds();
    work.vdisk("unseal base.qcow2").succeeds();
    work.vdisk_fed("write base.qcow2 0", b"its own again").succeeds();
    std::fs::remove_file(work.path("base.qcow2")).unwrap();
    disk.holds();
    clean(&work, "disk.qcow2");
}

#[test]
fn a_full_clone_stands_alone_and_leaves_its_source_as_it_was() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let disk = family(&work);
    work.vdisk("clone --full disk.qcow2 copy.qcow2").succeeds();
    work.vdisk("clone --full disk.qcow2 copy.qcow2").fails(&["copy.qcow2"]);
    let mut copy = Twin::of(&work, "copy.qcow2", disk.bytes.clone());
    copy.holds();
    copy.write(0, b"a change of the copy alone");
    copy.holds();
    disk.holds();
    work.vdisk_fed("write disk.qcow2 7M", b"not sealed").succeeds();
}

/// QEMU lets anyone write to a base; its clones would show a mix of old and new.
#[test]
fn a_base_that_another_program_wrote_is_refused_under_its_clone_by_name() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    family(&work);
    work.qemu_io("base.qcow2", &["write -P 7 0 512"]).succeeds();
    for words in
        ["read disk.qcow2 0 1", "snapshot merge disk.qcow2 x", "convert disk.qcow2 new.raw"]
    {
        work.vdisk(words).ends(1);
    }
    work.vdisk("read disk.qcow2 0 1").fails(&["base.qcow2", "has changed", "rebase"]);
    work.vdisk("rebase disk.qcow2 --unsafe --backing base.qcow2").succeeds();
    work.vdisk("read disk.qcow2 0 1").succeeds();
}

/// All files of a test's directory, with what they hold.
fn all(work: &Work) -> Vec<(String, Vec<u8>)> {
    work.files().into_iter().map(|name| (name.clone(), work.bytes(&name))).collect()
}

#[test]
fn the_plan_of_a_rebase_says_what_it_moves_and_changes_nothing() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let disk = family(&work);
    let mut other = Twin::create(&work, "other.qcow2", SIZE, "");
    other.write(1 << 20, &noise(1, 65536));
    other.write(6 << 20, &noise(3, 65536));
    let before = all(&work);
    let plan = json(work.vdisk("rebase disk.qcow2 --flatten --dry-run --json"));
    // Five clusters of the base, of which the disk holds none itself.
    assert_eq!((&plan["moved"], &plan["operation"]), (&327_680.into(), &"flatten".into()));
    assert_eq!(plan["layers"][0]["fate"], "filled");
    let plan = json(work.vdisk("rebase disk.qcow2 --backing other.qcow2 --dry-run --json"));
    assert_eq!((&plan["moved"], &plan["compared"]), (&393_216.into(), &65536.into()));
    assert_eq!(plan["layers"].as_array().unwrap().len(), 3, "the new base will be sealed");
    let plan =
        json(work.vdisk("rebase disk.qcow2 --unsafe --backing other.qcow2 --dry-run --json"));
    assert_eq!(plan["moved"], 0);
    let text = work.vdisk("rebase disk.qcow2 --backing other.qcow2 --dry-run").succeeds().out();
    assert!(text.contains("moved      384 KiB at most"), "{text}");
    work.vdisk("rebase other.qcow2 --backing disk.qcow2 --dry-run").succeeds();
    work.vdisk("rebase base.qcow2 --backing disk.qcow2 --dry-run").fails(&["base.qcow2"]);
    work.vdisk("rebase disk.qcow2 --backing missing --dry-run").fails(&["missing"]);
    assert!(all(&work) == before, "nothing has changed");
    work.vdisk("rebase disk.qcow2 --flatten --json").succeeds();
    disk.holds();
    assert_eq!(json(work.vdisk("info disk.qcow2 --json"))["backing"], serde_json::Value::Null);
}

#[test]
fn the_plan_of_a_compaction_says_what_it_gives_back_and_changes_nothing() {
    let work = Work::new();
    work.vdisk("create disk.q 16M").succeeds();
    work.vdisk_fed("write disk.q 0", &noise(1, 4 << 20)).succeeds();
    work.vdisk_fed("write disk.q 1M", &vec![0; 2 << 20]).succeeds();
    let before = all(&work);
    let plan = json(work.vdisk("compact disk.q --dry-run --json"));
    assert_eq!((&plan["zeroes_unmapped"], &plan["dry_run"]), (&(2 << 20).into(), &true.into()));
    let text = work.vdisk("compact disk.q --dry-run").succeeds().out();
    assert!(text.contains("zeroes     2 MiB"), "{text}");
    assert!(all(&work) == before, "nothing has changed");
    let done = json(work.vdisk("compact disk.q --json"));
    assert_eq!(done["zeroes_unmapped"], plan["zeroes_unmapped"]);
    let freed = |value: &serde_json::Value| value["freed"].as_u64().unwrap();
    assert!(freed(&done).abs_diff(freed(&plan)) <= 128 << 10, "{plan} {done}");
    let again = json(work.vdisk("compact disk.q --dry-run --json"));
    assert_eq!(again["freed"], 0);
}

/// `qemu-img create -b` leaves no word in the base that others stand on it now.
#[test]
fn a_disk_under_clones_that_qemu_made_is_not_changed() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.vdisk("create disk.q 4M").succeeds();
    work.vdisk("snapshot create disk.q one").succeeds();
    work.vdisk_fed("write disk.q 0", b"since").succeeds();
    work.vdisk("snapshot create disk.q two").succeeds();
    work.vdisk("snapshot delete disk.q two --yes").succeeds();
    work.qemu_img("create -q -f qcow2 -b disk.q -F qcow2 child.q").succeeds();
    let trees = [
        "snapshot revert disk.q one --yes",
        "snapshot delete disk.q one --yes",
        "snapshot undo disk.q --yes",
    ];
    let before = work.bytes("disk.q");
    for words in trees.iter().chain(&["resize disk.q 8M", "rebase disk.q --flatten"]) {
        work.vdisk(words).fails(&["disk.q", "child.q"]);
    }
    work.vdisk_fed("write disk.q 0", b"x").fails(&["disk.q", "child.q", "make a clone"]);
    work.vdisk("read disk.q 0 5").succeeds();
    assert!(work.bytes("disk.q") == before);
    // Among many files, a write does not look around; what changes the tree does.
    (0..300).for_each(|number| work.put(format!("file-{number}"), ""));
    for words in trees {
        work.vdisk(words).fails(&["disk.q", "child.q"]);
    }
    work.vdisk("commit child.q").succeeds();
    std::fs::remove_file(work.path("child.q")).unwrap();
    work.vdisk_fed("write disk.q 0", b"x").succeeds();
    work.vdisk("snapshot revert disk.q one --yes").succeeds();
}
