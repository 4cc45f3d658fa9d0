//! Snapshots of an idle disk: taken, listed, gone back to, deleted, merged; nothing is lost that
//! the user did not ask to lose, and QEMU agrees with every file.

use crate::host::{Done, PATIENCE, VDISK, Work};
use crate::require::{Need, have};
use crate::twin::{Twin, clean, json, noise};

const SIZE: usize = 4 << 20;

/// The names in `snapshot list --json`, sorted.
fn names(work: &Work, disk: &str) -> Vec<String> {
    let list = json(work.vdisk(&format!("snapshot list --json {disk}")));
    let entries = list.as_array().or_else(|| list["snapshots"].as_array());
    let entries = entries.unwrap_or_else(|| panic!("a list of snapshots: {list}"));
    let mut names: Vec<String> =
        entries.iter().map(|entry| entry["name"].as_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

/// Requires that QEMU finds no fault in any file of the directory.
fn all_clean(work: &Work) {
    for name in work.files().iter().filter(|name| work.bytes(name).starts_with(b"QFI\xfb")) {
        clean(work, name);
    }
}

/// A disk with snapshots `one`, `two` and `three` in a row, each followed by a write, and what
/// the disk held when each was taken; the head's contents come last.
fn row(work: &Work) -> (Twin<'_>, [Vec<u8>; 4]) {
    let mut disk = Twin::create(work, "disk.qcow2", SIZE, "");
    disk.write(0, &noise(0, 1_000_000));
    let mut moments = Vec::new();
    for (seed, name) in (1..).zip(["one", "two", "three"]) {
        moments.push(disk.bytes.clone());
        work.vdisk(&format!("snapshot create disk.qcow2 {name}")).succeeds();
        let at = usize::try_from(seed).unwrap() * 300_000;
        disk.write(at, &noise(seed, 500_000));
        disk.write(3_500_000 + at / 10, &noise(seed + 10, 100));
    }
    moments.push(disk.bytes.clone());
    (disk, moments.try_into().unwrap())
}

#[test]
fn a_snapshot_changes_neither_the_disks_path_nor_its_contents() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let (mut disk, _) = row(&work);
    disk.holds();
    assert_eq!(names(&work, "disk.qcow2"), ["one", "three", "two"]);
    disk.qemu_write(2 << 20, 65_536, 0x31);
    disk.write(5, b"ours");
    disk.holds();
    all_clean(&work);
}

#[test]
fn list_tells_the_names_in_a_table_a_person_can_read() {
    let work = Work::new();
    let disk = Twin::create(&work, "disk.qcow2", SIZE, "");
    assert!(names(&work, &disk.image).is_empty());
    work.vdisk_args([
        "snapshot",
        "create",
        "disk.qcow2",
        "clean install",
        "--description",
        "before the upgrade",
    ])
    .succeeds();
    assert_eq!(names(&work, &disk.image), ["clean install"]);
    let list = work.vdisk("snapshot list disk.qcow2").succeeds().out();
    assert!(list.contains("clean install"), "{list}");
    let list = json(work.vdisk("snapshot list --json disk.qcow2")).to_string();
    assert!(list.contains("before the upgrade"), "{list}");
}

#[test]
fn revert_goes_back_to_the_moment_the_snapshot_was_taken() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let (mut disk, moments) = row(&work);
    work.vdisk("snapshot revert disk.qcow2 two --yes").succeeds();
    disk.bytes.clone_from(&moments[1]);
    disk.holds();
    assert_eq!(names(&work, "disk.qcow2"), ["one", "three", "two"], "the others are still there");
    disk.write(1_700_000, &noise(50, 200_000));
    disk.holds();
    work.vdisk("snapshot revert disk.qcow2 three --yes").succeeds();
    disk.bytes.clone_from(&moments[2]);
    disk.holds();
    all_clean(&work);
}

#[test]
fn revert_asks_before_it_drops_changes() {
    let work = Work::new();
    let (disk, _) = row(&work);
    work.vdisk("snapshot revert disk.qcow2 one").refuses(&["--yes"]);
    disk.reads_right();
}

/// Runs a `vdisk` command on a terminal of its own, where somebody types `answer`.
fn on_a_terminal(work: &Work, words: &str, answer: &str) -> Done {
    let command = format!("{VDISK} {words}");
    let script = work.command("script", ["-q", "-e", "-c", &command, "/dev/null"]);
    script.finish(Some(answer.into()), PATIENCE)
}

#[test]
fn on_a_terminal_the_answer_decides() {
    let work = Work::new();
    let (mut disk, moments) = row(&work);
    for (answer, reason) in [("n\n", "no"), ("\n", "not yes"), ("", "nobody is there")] {
        let done = on_a_terminal(&work, "snapshot delete disk.qcow2 three", answer);
        assert_ne!(done.code, Some(0), "{reason}: {}", done.text());
        disk.reads_right();
    }
    let done = on_a_terminal(&work, "snapshot delete disk.qcow2 three", "y\n").succeeds();
    assert!(done.out().contains("640 KiB"), "it says how much goes: {}", done.out());
    disk.bytes.clone_from(&moments[2]);
    disk.reads_right();
}

#[test]
fn revert_with_keep_loses_nothing() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let (mut disk, moments) = row(&work);
    work.vdisk("snapshot revert disk.qcow2 one --keep today").succeeds();
    disk.bytes.clone_from(&moments[0]);
    disk.holds();
    assert_eq!(names(&work, "disk.qcow2"), ["one", "three", "today", "two"]);
    disk.write(0, b"another road");
    work.vdisk("snapshot revert disk.qcow2 today --keep aside").succeeds();
    let aside = std::mem::replace(&mut disk.bytes, moments[3].clone());
    disk.holds();
    work.vdisk("snapshot revert disk.qcow2 aside --yes").succeeds();
    disk.bytes = aside;
    disk.holds();
    all_clean(&work);
}

#[test]
fn delete_returns_the_disk_to_the_moment_the_snapshot_was_taken() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let (mut disk, moments) = row(&work);
    work.vdisk("snapshot delete disk.qcow2 three --yes").succeeds();
    disk.bytes.clone_from(&moments[2]);
    disk.holds();
    assert_eq!(names(&work, "disk.qcow2"), ["one", "two"]);
    work.vdisk("snapshot delete disk.qcow2 two --yes").succeeds();
    work.vdisk("snapshot delete disk.qcow2 one --yes").succeeds();
    disk.bytes.clone_from(&moments[0]);
    disk.holds();
    assert!(names(&work, "disk.qcow2").is_empty());
    work.vdisk("snapshot forget disk.qcow2").succeeds();
    disk.holds();
    assert_eq!(work.files(), ["disk.qcow2"], "no layer is left behind");
}

#[test]
fn delete_asks_before_it_drops_changes() {
    let work = Work::new();
    let (disk, _) = row(&work);
    work.vdisk("snapshot delete disk.qcow2 three").refuses(&["--yes"]);
    disk.reads_right();
    assert_eq!(names(&work, "disk.qcow2"), ["one", "three", "two"]);
}

#[test]
fn delete_is_refused_while_snapshots_stand_on_the_changes() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let (mut disk, moments) = row(&work);
    work.vdisk("snapshot delete disk.qcow2 one --yes").fails(&["two", "three"]);
    disk.holds();
    assert_eq!(names(&work, "disk.qcow2"), ["one", "three", "two"]);
    work.vdisk("snapshot delete disk.qcow2 two --tree --yes").succeeds();
    disk.bytes.clone_from(&moments[1]);
    disk.holds();
    assert_eq!(names(&work, "disk.qcow2"), ["one"]);
    all_clean(&work);
}

#[test]
fn merge_loses_no_change_whichever_snapshot_goes() {
    if !have(Need::Qemu) {
        return;
    }
    for gone in ["one", "two", "three"] {
        let work = Work::new();
        let (mut disk, moments) = row(&work);
        work.vdisk(&format!("snapshot merge disk.qcow2 {gone}")).succeeds();
        disk.holds();
        let mut left = vec!["one", "three", "two"];
        left.retain(|name| *name != gone);
        assert_eq!(names(&work, "disk.qcow2"), left);
        all_clean(&work);
        for (name, moment) in ["one", "two", "three"].iter().zip(&moments) {
            if *name != gone {
                work.vdisk(&format!("snapshot revert disk.qcow2 {name} --keep at-{name}-left"))
                    .succeeds();
                disk.bytes.clone_from(moment);
                disk.holds();
            }
        }
    }
}

#[test]
fn merging_every_snapshot_leaves_one_file() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let (disk, _) = row(&work);
    for name in ["two", "one", "three"] {
        work.vdisk(&format!("snapshot merge disk.qcow2 {name}")).succeeds();
        disk.holds();
    }
    assert!(names(&work, "disk.qcow2").is_empty());
    assert_eq!(work.files(), ["disk.qcow2"]);
}

#[test]
fn merge_keeps_zeroes_over_what_was_below() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let mut disk = Twin::create(&work, "disk.qcow2", SIZE, "");
    disk.write(0, &noise(1, SIZE));
    work.vdisk("snapshot create disk.qcow2 full").succeeds();
    disk.qemu_zero("write -z", 65_536, 1 << 20);
    disk.qemu_zero("discard", 2 << 20, 65_536);
    disk.write(100_000, b"an island");
    disk.holds();
    work.vdisk("snapshot create disk.qcow2 holes").succeeds();
    disk.qemu_write(3 << 20, 512, 9);
    for name in ["full", "holes"] {
        work.vdisk(&format!("snapshot merge disk.qcow2 {name}")).succeeds();
        disk.holds();
    }
}

#[test]
fn a_clones_snapshots_leave_its_base_alone() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let mut base = Twin::create(&work, "base.qcow2", SIZE, "--cluster-size 4K");
    base.write(10, &noise(1, 3_000_000));
    work.vdisk("clone base.qcow2 clone.qcow2").succeeds();
    let sealed = work.bytes("base.qcow2");
    let mut clone = Twin::of(&work, "clone.qcow2", base.bytes.clone());
    clone.write(100, &noise(2, 100_000));
    work.vdisk("snapshot create clone.qcow2 s1").succeeds();
    let at_s1 = clone.bytes.clone();
    clone.write(2_900_000, &noise(3, 500_000));
    work.vdisk("snapshot create clone.qcow2 s2").succeeds();
    clone.write(50_000, &noise(4, 100_000));
    work.vdisk("snapshot merge clone.qcow2 s2").succeeds();
    clone.holds();
    work.vdisk("snapshot delete clone.qcow2 s1 --yes").succeeds();
    clone.bytes = at_s1;
    clone.holds();
    base.holds();
    assert!(work.bytes("base.qcow2") == sealed);
}

/// `root` with two branches, `left` and `right`, and the head on `right`.
#[test]
fn branches_keep_their_contents_when_their_root_is_merged() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let mut disk = Twin::create(&work, "disk.qcow2", SIZE, "");
    disk.write(0, &noise(1, 700_000));
    work.vdisk("snapshot create disk.qcow2 root").succeeds();
    let root = disk.bytes.clone();
    disk.write(600_000, &noise(2, 700_000));
    work.vdisk("snapshot create disk.qcow2 left").succeeds();
    let left = disk.bytes.clone();
    work.vdisk("snapshot revert disk.qcow2 root --yes").succeeds();
    disk.bytes = root;
    disk.write(650_000, &noise(3, 700_000));
    work.vdisk("snapshot create disk.qcow2 right").succeeds();
    let right = disk.bytes.clone();
    disk.write(0, b"head");
    // Both branches take the root's changes, and stand beside each other from then on.
    work.vdisk("snapshot merge disk.qcow2 root").succeeds();
    let tree = work.vdisk("tree disk.qcow2").succeeds().out();
    assert!(["left", "right", "disk.qcow2"].iter().all(|name| tree.contains(name)), "{tree}");
    disk.holds();
    all_clean(&work);
    for (name, moment) in [("left", left), ("right", right)] {
        work.vdisk(&format!("snapshot revert disk.qcow2 {name} --keep before-{name}")).succeeds();
        disk.bytes = moment;
        disk.holds();
    }
}

#[test]
fn a_name_that_exists_is_refused_and_changes_nothing() {
    let work = Work::new();
    let (disk, _) = row(&work);
    let files = work.files();
    work.vdisk("snapshot create disk.qcow2 two").fails(&["two", "already"]);
    work.vdisk("snapshot revert disk.qcow2 one --keep two").fails(&["two", "already"]);
    disk.reads_right();
    assert_eq!(work.files(), files);
}

#[test]
fn a_name_that_is_unknown_is_refused_and_changes_nothing() {
    let work = Work::new();
    let (disk, _) = row(&work);
    let files = work.files();
    for verb in ["revert", "delete", "merge"] {
        let words = ["snapshot", verb, "disk.qcow2", "for"];
        work.vdisk_args(words).ends(1).says(&["for", "disk.qcow2"]);
        work.vdisk_args(words.iter().chain(&["--yes"])).refuses(&["for"]);
    }
    disk.reads_right();
    assert_eq!(work.files(), files);
}

#[test]
fn no_name_reaches_outside_the_directory() {
    let work = Work::new();
    std::fs::create_dir(work.path("in")).unwrap();
    work.vdisk("create in/disk.qcow2 1M").succeeds();
    let long = "x".repeat(300);
    let bad = ["", ".", "..", "../out", "/tmp/vdisk-out", "a/b", "new\nline", "esc\x1b[2J", &long];
    for name in bad {
        let done = work.vdisk_args(["snapshot", "create", "in/disk.qcow2", name]);
        if done.code != Some(0) {
            done.refuses(&[]);
        }
        assert_eq!(work.files(), ["in"], "after {name:?}");
        // What a name does to a terminal must not come back from the list.
        let list = work.vdisk("snapshot list in/disk.qcow2").succeeds().out();
        assert!(!list.contains('\x1b'), "{list:?}");
    }
    for name in ["été", "2026-11-21 10:00", "-dash", "日本"] {
        work.vdisk_args(["snapshot", "create", "in/disk.qcow2", "--", name]).succeeds();
        assert!(names(&work, "in/disk.qcow2").iter().any(|known| known == name));
    }
    work.vdisk("check in/disk.qcow2 --chain").succeeds();
}
