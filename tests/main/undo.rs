//! Plans, and taking back: what a change of the tree will do is shown first, what it drops is kept
//! aside for a time, and comes back when it is asked for.

use crate::host::Work;
use crate::require::{Need, have};
use crate::twin::{Twin, clean, json, noise};

const SIZE: usize = 4 << 20;

fn names(work: &Work) -> Vec<String> {
    let list = json(work.vdisk("snapshot list --json disk.qcow2"));
    let all = list["snapshots"].as_array().unwrap();
    let mut names: Vec<String> =
        all.iter().map(|entry| entry["name"].as_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

/// A disk with the snapshots `one` and `two`, each followed by a write, and what it held when each
/// was taken; what it holds now comes last.
fn row(work: &Work) -> (Twin<'_>, [Vec<u8>; 3]) {
    let mut disk = Twin::create(work, "disk.qcow2", SIZE, "");
    disk.write(0, &noise(0, 1_000_000));
    let mut moments = Vec::new();
    for (seed, name) in (1..).zip(["one", "two"]) {
        moments.push(disk.bytes.clone());
        work.vdisk(&format!("snapshot create disk.qcow2 {name}")).succeeds();
        disk.write(usize::try_from(seed).unwrap() * 300_000, &noise(seed, 500_000));
    }
    moments.push(disk.bytes.clone());
    (disk, moments.try_into().unwrap())
}

fn all_clean(work: &Work) {
    if have(Need::Qemu) {
        for name in work.files().iter().filter(|name| work.bytes(name).starts_with(b"QFI\xfb")) {
            clean(work, name);
        }
    }
}

#[test]
fn undo_brings_back_a_deleted_snapshot_and_the_changes_made_since() {
    let work = Work::new();
    let (mut disk, moments) = row(&work);
    work.vdisk("snapshot delete disk.qcow2 two --yes").succeeds();
    assert_eq!(names(&work), ["one"]);
    disk.bytes.clone_from(&moments[1]);
    disk.reads_right();
    work.vdisk("snapshot undo disk.qcow2").succeeds();
    assert_eq!(names(&work), ["one", "two"]);
    disk.bytes.clone_from(&moments[2]);
    disk.reads_right();
    work.vdisk("snapshot undo disk.qcow2").fails(&["nothing is kept aside"]);
    for (name, moment) in ["one", "two"].iter().zip(&moments) {
        work.vdisk(&format!("snapshot revert disk.qcow2 {name} --yes")).succeeds();
        disk.bytes.clone_from(moment);
        disk.reads_right();
    }
    all_clean(&work);
}

#[test]
fn undo_brings_back_a_whole_branch() {
    let work = Work::new();
    let (mut disk, moments) = row(&work);
    work.vdisk("snapshot delete disk.qcow2 one --tree --yes").succeeds();
    assert!(names(&work).is_empty());
    disk.bytes.clone_from(&moments[0]);
    disk.reads_right();
    work.vdisk("snapshot undo disk.qcow2 --yes").succeeds();
    assert_eq!(names(&work), ["one", "two"]);
    disk.bytes.clone_from(&moments[2]);
    disk.reads_right();
    all_clean(&work);
}

#[test]
fn undo_asks_before_it_drops_what_was_written_since_and_can_keep_it() {
    let work = Work::new();
    let (mut disk, moments) = row(&work);
    work.vdisk("snapshot revert disk.qcow2 one --yes").succeeds();
    disk.bytes.clone_from(&moments[0]);
    disk.write(2_000_000, b"written since");
    let since = disk.bytes.clone();
    work.vdisk("snapshot undo disk.qcow2").refuses(&["--yes"]);
    disk.reads_right();
    work.vdisk("snapshot undo disk.qcow2 --keep since").succeeds();
    disk.bytes.clone_from(&moments[2]);
    disk.reads_right();
    assert_eq!(names(&work), ["one", "since", "two"]);
    work.vdisk("snapshot revert disk.qcow2 since --yes").succeeds();
    disk.bytes = since;
    disk.reads_right();
    all_clean(&work);
}

#[test]
fn undo_refuses_where_another_snapshot_has_the_name_by_now() {
    let work = Work::new();
    let (mut disk, moments) = row(&work);
    work.vdisk("snapshot delete disk.qcow2 two --yes").succeeds();
    work.vdisk("snapshot create disk.qcow2 two").succeeds();
    work.vdisk("snapshot undo disk.qcow2 --yes").fails(&["'two'", "rename"]);
    disk.bytes.clone_from(&moments[1]);
    disk.reads_right();
    work.vdisk("snapshot rename disk.qcow2 two second").succeeds();
    work.vdisk("snapshot undo disk.qcow2 --yes").succeeds();
    disk.bytes.clone_from(&moments[2]);
    disk.reads_right();
    assert_eq!(names(&work), ["one", "second", "two"]);
}

#[test]
fn forget_gives_the_space_back_and_leaves_no_file_behind() {
    let work = Work::new();
    let (mut disk, moments) = row(&work);
    work.vdisk("snapshot delete disk.qcow2 two --yes").succeeds();
    let plan = json(work.vdisk("snapshot forget disk.qcow2 --dry-run --json"));
    assert!(plan["freed"].as_u64().unwrap() >= 500_000, "{plan}");
    work.vdisk("snapshot forget disk.qcow2").succeeds();
    disk.bytes.clone_from(&moments[1]);
    disk.reads_right();
    assert_eq!(work.files().len(), 2, "{:?}", work.files());
    work.vdisk("snapshot undo disk.qcow2").fails(&["nothing is kept aside"]);
    work.vdisk("snapshot delete disk.qcow2 one --forget --yes").succeeds();
    disk.bytes.clone_from(&moments[0]);
    disk.reads_right();
    assert_eq!(work.files(), ["disk.qcow2"]);
    work.vdisk("snapshot forget disk.qcow2").succeeds();
    all_clean(&work);
}

#[test]
fn what_is_kept_aside_goes_when_its_time_is_over() {
    let work = Work::new();
    let (mut disk, moments) = row(&work);
    work.vdisk("snapshot revert disk.qcow2 one --keep-for 1s --yes").succeeds();
    let kept = json(work.vdisk("snapshot list --json disk.qcow2"))["kept_aside"].clone();
    assert_eq!(kept["what"], "revert", "{kept}");
    assert_eq!(kept["until_ms"].as_u64().unwrap() - kept["since_ms"].as_u64().unwrap(), 1000);
    let files = work.files().len();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    disk.bytes.clone_from(&moments[0]);
    disk.write(0, b"the next open for writing drops it");
    assert_eq!(work.files().len(), files - 1, "{:?}", work.files());
    work.vdisk("snapshot undo disk.qcow2 --yes").fails(&["nothing is kept aside"]);
    disk.reads_right();
}

#[test]
fn the_next_change_that_drops_something_takes_the_place_of_the_last() {
    let work = Work::new();
    let (mut disk, moments) = row(&work);
    for _ in 0..3 {
        work.vdisk("snapshot revert disk.qcow2 one --yes").succeeds();
        disk.bytes.clone_from(&moments[0]);
        disk.write(77, b"again");
    }
    let again = disk.bytes.clone();
    // The head, two snapshots, and what the last revert dropped.
    assert_eq!(work.files().len(), 4, "{:?}", work.files());
    work.vdisk("snapshot undo disk.qcow2 --yes").succeeds();
    disk.bytes = again;
    disk.reads_right();
}

#[test]
fn a_dry_run_says_what_would_be_done_and_does_nothing() {
    let work = Work::new();
    let (disk, _) = row(&work);
    let before: Vec<_> = work.files().iter().map(|name| (name.clone(), work.bytes(name))).collect();
    for (words, keys) in [
        ("snapshot delete disk.qcow2 two", vec![("kept", 524_288), ("exclusive", 524_288)]),
        ("snapshot delete disk.qcow2 two --forget", vec![("kept", 0), ("freed", 524_288)]),
        ("snapshot delete disk.qcow2 one --tree", vec![("dropped", 1_114_112)]),
        ("snapshot revert disk.qcow2 one", vec![("dropped", 524_288), ("moved", 0)]),
        ("snapshot merge disk.qcow2 two", vec![("dropped", 0)]),
    ] {
        let plan = json(work.vdisk(&format!("{words} --dry-run --json")));
        for (key, value) in keys {
            if key != "exclusive" {
                assert_eq!(plan[key].as_u64(), Some(value), "{words}: {key}: {plan}");
            }
        }
        for key in ["exclusive", "shared", "space_needed", "layers", "undo", "why"] {
            assert!(!plan[key].is_null(), "{words}: {key}: {plan}");
        }
        let text = work.vdisk(&format!("{words} --dry-run")).succeeds().out();
        assert!(text.contains("disk.qcow2") && text.contains("undo"), "{text}");
    }
    let after: Vec<_> = work.files().iter().map(|name| (name.clone(), work.bytes(name))).collect();
    assert!(before == after, "a dry run changed something");
    disk.reads_right();
}

#[test]
fn a_merge_goes_where_fewer_bytes_are_moved() {
    let work = Work::new();
    let mut disk = Twin::create(&work, "disk.qcow2", SIZE, "");
    disk.write(0, &noise(1, 3_000_000));
    work.vdisk("snapshot create disk.qcow2 full").succeeds();
    disk.write(0, &noise(2, 70_000));
    work.vdisk("snapshot create disk.qcow2 small").succeeds();
    disk.write(100_000, &noise(3, 1_000_000));
    let plan = |name: &str| {
        let words = format!("snapshot merge disk.qcow2 {name} --dry-run --json --in-batches");
        json(work.vdisk(&words))
    };
    let (down, up) = (plan("full"), plan("small"));
    assert_eq!(down["direction"], "down", "{down}");
    assert_eq!(down["moved"], 131_072, "{down}");
    assert_eq!(up["direction"], "up", "{up}");
    assert_eq!(up["moved"], 65_536, "{up}");
    for name in ["full", "small"] {
        work.vdisk(&format!("snapshot merge disk.qcow2 {name} --in-batches")).succeeds();
        disk.reads_right();
    }
    all_clean(&work);
}

#[test]
fn what_is_kept_aside_is_told_by_list_info_and_tree() {
    let work = Work::new();
    let (_disk, _) = row(&work);
    work.vdisk("snapshot delete disk.qcow2 two --yes").succeeds();
    let said = work.vdisk("snapshot list disk.qcow2").succeeds().text();
    assert!(said.contains("delete of 'two'") && said.contains("512 KiB"), "{said}");
    let said = work.vdisk("info disk.qcow2").succeeds().out();
    assert!(said.contains("delete of 'two'"), "{said}");
    let info = json(work.vdisk("info --json disk.qcow2"));
    assert_eq!(info["kept_aside"]["size"], 524_288, "{info}");
    let said = work.vdisk("tree disk.qcow2").succeeds().out();
    assert!(said.contains("kept for undo"), "{said}");
}

#[test]
fn undo_works_in_a_directory_that_was_moved() {
    let work = Work::new();
    std::fs::create_dir(work.path("here")).unwrap();
    work.vdisk("create here/disk.qcow2 1M").succeeds();
    work.vdisk("snapshot create here/disk.qcow2 one").succeeds();
    work.vdisk_fed("write here/disk.qcow2 0", b"since").succeeds();
    work.vdisk("snapshot delete here/disk.qcow2 one --yes").succeeds();
    std::fs::rename(work.path("here"), work.path("there")).unwrap();
    work.vdisk("snapshot undo there/disk.qcow2").succeeds();
    let read = work.vdisk("read there/disk.qcow2 0 5").succeeds().stdout;
    assert_eq!(read, b"since");
}

#[test]
fn a_base_stays_sealed_while_a_kept_layer_stands_on_it() {
    let work = Work::new();
    work.vdisk("create base.qcow2 1M").succeeds();
    work.vdisk("clone base.qcow2 disk.qcow2").succeeds();
    work.vdisk("snapshot create disk.qcow2 one").succeeds();
    work.vdisk_fed("write disk.qcow2 0", b"since").succeeds();
    work.vdisk("snapshot delete disk.qcow2 one --yes").succeeds();
    work.vdisk("unseal base.qcow2").fails(&["disk@"]);
    work.vdisk_fed("write base.qcow2 0", b"no").fails(&["base"]);
    work.vdisk("snapshot undo disk.qcow2").succeeds();
    assert_eq!(work.vdisk("read disk.qcow2 0 5").succeeds().stdout, b"since");
}

#[test]
fn a_clone_is_not_made_of_a_layer_that_is_only_kept_aside() {
    let work = Work::new();
    let (_disk, _) = row(&work);
    work.vdisk("snapshot revert disk.qcow2 one --yes").succeeds();
    let kept = json(work.vdisk("snapshot list --json disk.qcow2"))["kept_aside"].clone();
    let file = kept["files"][0].as_str().unwrap();
    work.vdisk(&format!("clone {file} clone.qcow2")).fails(&["kept aside"]);
}
