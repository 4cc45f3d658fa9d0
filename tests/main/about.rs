//! What is said of a disk: info, tree and check.

use std::fs;

use crate::host::Work;
use crate::require::{Need, have};
use crate::twin::{Twin, clean, json, noise};

fn family(work: &Work) {
    let mut base = Twin::create(work, "base.qcow2", 4 << 20, "");
    base.write(0, &noise(1, 1_000_000));
    work.vdisk("clone base.qcow2 web.qcow2 db.qcow2").succeeds();
    work.vdisk("snapshot create web.qcow2 installed").succeeds();
}

#[test]
fn info_names_the_snapshots() {
    let work = Work::new();
    family(&work);
    assert!(work.vdisk("info web.qcow2").succeeds().out().contains("installed"));
    let info = json(work.vdisk("info --json web.qcow2"));
    assert_eq!(info["snapshots"][0]["name"], "installed");
    assert_eq!(info["snapshots"].as_array().unwrap().len(), 1);
}

#[test]
fn info_names_the_clones() {
    let work = Work::new();
    family(&work);
    let info = json(work.vdisk("info --json base.qcow2"));
    let clones: Vec<&str> =
        info["clones"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert!(clones.iter().any(|name| name.ends_with("db.qcow2")), "{clones:?}");
    let text = work.vdisk("info base.qcow2").succeeds().out();
    assert!(text.contains("db.qcow2"), "{text}");
}

#[test]
fn info_of_a_raw_file_says_raw() {
    let work = Work::new();
    work.put("disk.raw", vec![0; 1 << 20]);
    let info = json(work.vdisk("info --json disk.raw"));
    assert_eq!(info["format"], "raw");
    assert_eq!(info["virtual_size"], 1 << 20);
}

#[test]
fn info_changes_nothing() {
    let work = Work::new();
    family(&work);
    let before: Vec<_> = work.files().iter().map(|name| work.bytes(name)).collect();
    for words in ["info web.qcow2", "info --chain web.qcow2", "tree web.qcow2", "tree ."] {
        work.vdisk(words).succeeds();
    }
    work.vdisk("check web.qcow2 --chain").succeeds();
    work.vdisk("map web.qcow2").succeeds();
    let after: Vec<_> = work.files().iter().map(|name| work.bytes(name)).collect();
    assert!(before == after);
}

#[test]
fn tree_shows_the_family_of_a_disk_and_of_a_directory() {
    let work = Work::new();
    family(&work);
    for words in ["tree web.qcow2", "tree ."] {
        let tree = work.vdisk(words).succeeds().out();
        for part in ["base.qcow2", "web.qcow2", "installed"] {
            assert!(tree.contains(part), "{words}: {part}: {tree}");
        }
        let (base, web) = (tree.find("base.qcow2"), tree.find("web.qcow2"));
        assert!(base < web, "the base stands above its clones: {tree}");
    }
    let tree = work.vdisk("tree .").succeeds().out();
    assert!(tree.contains("db.qcow2"), "{tree}");
    let tree = json(work.vdisk("tree --json ."));
    assert!(tree.to_string().contains("db.qcow2"), "{tree}");
}

#[test]
fn a_file_that_is_missing_is_named_by_every_command_that_reads() {
    let work = Work::new();
    let verbs =
        ["info gone", "tree gone", "map gone", "read gone 0 1", "snapshot list gone", "check gone"];
    for words in verbs {
        let done = work.vdisk(words).fails(&["gone"]);
        assert!(done.stdout.is_empty(), "{words}: {}", done.out());
    }
}

// The exit statuses of check, with damage done by hand.

/// Reads a big-endian number of an image's header or tables.
fn number(image: &[u8], offset: usize) -> usize {
    usize::try_from(u64::from_be_bytes(image[offset..offset + 8].try_into().unwrap())).unwrap()
}

/// Where the L2 entry of the disk's first cluster lies.
fn first_l2_entry(image: &[u8]) -> usize {
    number(image, number(image, 40)) & 0x00ff_ffff_ffff_fe00
}

/// A disk whose first cluster has data, its file's bytes changed by `damage`.
fn damaged(work: &Work, damage: impl FnOnce(&mut Vec<u8>)) {
    let mut disk = Twin::create(work, "disk.qcow2", 4 << 20, "");
    disk.write(0, &noise(1, 65_536));
    clean(work, "disk.qcow2");
    let mut image = work.bytes("disk.qcow2");
    damage(&mut image);
    work.put("disk.qcow2", image);
}

#[test]
fn check_of_a_clean_image_ends_with_0() {
    let work = Work::new();
    family(&work);
    for disk in ["base.qcow2", "web.qcow2", "db.qcow2"] {
        work.vdisk(&format!("check {disk}")).succeeds();
    }
    work.vdisk("check web.qcow2 --chain").succeeds();
}

#[test]
fn check_of_a_mapping_that_leads_nowhere_ends_with_2() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let places: [u64; 3] = [0x8000_0000_0000_0200, 0x8000_0000_4000_0000, 0x8080_0000_0000_0000];
    for entry in places {
        let _ = fs::remove_file(work.path("disk.qcow2"));
        damaged(&work, |image| {
            let at = first_l2_entry(image);
            image[at..at + 8].copy_from_slice(&entry.to_be_bytes());
        });
        let before = work.bytes("disk.qcow2");
        work.qemu_img("check disk.qcow2").ends(2);
        work.vdisk("check disk.qcow2").ends(2).says(&[]);
        assert!(work.bytes("disk.qcow2") == before, "a check repairs nothing");
    }
}

#[test]
fn check_of_two_guest_clusters_in_one_place_ends_with_2() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    damaged(&work, |image| {
        let at = first_l2_entry(image);
        image.copy_within(at..at + 8, at + 8);
    });
    work.qemu_img("check disk.qcow2").ends(2);
    work.vdisk("check disk.qcow2").ends(2);
}

#[test]
fn check_of_what_cannot_be_opened_ends_with_1() {
    let work = Work::new();
    damaged(&work, |image| image.truncate(60));
    work.vdisk("check disk.qcow2").fails(&["disk.qcow2"]);
    fs::remove_file(work.path("disk.qcow2")).unwrap();
    damaged(&work, |image| image[24..32].fill(0x7f));
    work.vdisk("check disk.qcow2").fails(&["disk.qcow2"]);
}
