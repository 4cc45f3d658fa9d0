//! Labels that are longer than a sector, and labels that are damaged.

use crate::host::Work;
use crate::require::{Need, have};
use crate::twin::{Twin, clean, json, noise};

const SIZE: usize = 1 << 20;
/// Bytes that a power cut leaves whole.
const SECTOR: usize = 512;

fn description() -> String {
    "as the installer left it, ".repeat(35)
}

/// The snapshot's frozen layer.
fn layer(work: &Work, disk: &str) -> String {
    let list = json(work.vdisk(&format!("snapshot list --json {disk}")));
    let file = list["snapshots"][0]["file"].as_str().unwrap().to_owned();
    file.rsplit('/').next().unwrap().to_owned()
}

fn told(work: &Work, disk: &str) -> (String, String) {
    let list = json(work.vdisk(&format!("snapshot list --json {disk}")));
    let text = |key: &str| list["snapshots"][0][key].as_str().unwrap().to_owned();
    (text("name"), text("description"))
}

/// A clone, on a base whose name is as long as it may be, with a snapshot that is described at length.
fn described<'w>(work: &'w Work, base: &str) -> Twin<'w> {
    work.put(base, noise(9, SIZE));
    work.vdisk(&format!("clone {base} disk.qcow2")).succeeds();
    let mut disk = Twin::of(work, "disk.qcow2", noise(9, SIZE));
    disk.write(1000, b"before");
    work.vdisk_args(["snapshot", "create", "disk.qcow2", "s", "--description", &description()])
        .succeeds();
    disk.write(9000, b"after");
    disk
}

#[test]
fn long_texts_and_names_are_told_and_survive_what_qemu_does_to_the_header() {
    let work = Work::new();
    let base = format!("{}.raw", "b".repeat(241));
    let disk = described(&work, &base);
    assert_eq!(told(&work, "disk.qcow2"), ("s".to_owned(), description()));
    disk.holds();
    if !have(Need::Qemu) {
        return;
    }
    let frozen = layer(&work, "disk.qcow2");
    for change in ["bitmap --add", "bitmap --remove"] {
        work.qemu_img(&format!("{change} {frozen} b")).succeeds();
        assert_eq!(told(&work, "disk.qcow2"), ("s".to_owned(), description()));
    }
    for name in ["t", "a-longer-name-than-before", "s"] {
        let old = told(&work, "disk.qcow2").0;
        work.vdisk(&format!("snapshot rename disk.qcow2 {old} {name}")).succeeds();
        assert_eq!(told(&work, "disk.qcow2"), (name.to_owned(), description()));
        clean(&work, &frozen);
    }
    let info = json(work.qemu_img(&format!("info --output=json {frozen}")));
    assert!(info["backing-filename"].as_str().unwrap().ends_with(&base));
}

/// `check` found no error in a disk that nobody could open, and nothing healed it.
#[test]
fn a_label_that_lost_its_rest_is_found_and_mended() {
    let work = Work::new();
    let disk = described(&work, "base.raw");
    let frozen = layer(&work, "disk.qcow2");
    let mut bytes = work.bytes(&frozen);
    bytes[SECTOR..4096].fill(0);
    work.put(&frozen, bytes);
    work.vdisk("read disk.qcow2 0 10").fails(&["label is damaged"]);
    let found = work.vdisk(&format!("check {frozen}")).ends(2);
    found.says(&["label is damaged"]);
    let mended = work.vdisk(&format!("check --repair all {frozen}")).succeeds();
    mended.says(&["snapshot 's'", "description"]);
    work.vdisk(&format!("check {frozen}")).succeeds();
    assert_eq!(told(&work, "disk.qcow2"), ("s".to_owned(), String::new()));
    work.vdisk("rebase disk.qcow2 --accept-base").text();
    disk.holds();
    // Whether clones stand on it was lost, too.
    work.vdisk("snapshot merge disk.qcow2 s").fails(&["clones stand on it"]);
    work.vdisk("snapshot merge disk.qcow2 s --even-if-cloned").succeeds();
    disk.holds();
}

#[test]
fn a_label_of_which_nothing_is_left_is_dropped_and_that_is_said() {
    let work = Work::new();
    let mut disk = Twin::create(&work, "disk.qcow2", SIZE, "");
    disk.write(0, &noise(3, 100_000));
    let mut bytes = work.bytes("disk.qcow2");
    let at = bytes[..SECTOR].windows(4).position(|w| w == b"vdsk").unwrap();
    bytes[at + 30] ^= 1;
    work.put("disk.qcow2", bytes);
    work.vdisk("info disk.qcow2").fails(&["label is damaged"]);
    work.vdisk("check disk.qcow2").ends(2).says(&["label is damaged"]);
    work.vdisk("check --repair all disk.qcow2").succeeds().says(&["dropped"]);
    work.vdisk("check disk.qcow2").succeeds();
    disk.holds();
    work.vdisk("snapshot create disk.qcow2 s").succeeds();
    disk.holds();
}
