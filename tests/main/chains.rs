//! Clones and backing chains: who reads through whom, and that a base never changes.

use std::fs;

use crate::host::Work;
use crate::require::{Need, have};
use crate::twin::{Twin, clean, json, noise, qemu_info, same_bytes};

const SIZE: usize = 4 << 20;

/// A base with something in it, and what it holds.
fn base(work: &Work) -> Vec<u8> {
    let mut base = Twin::create(work, "base.qcow2", SIZE, "");
    base.write(1000, &noise(1, 2_000_000));
    base.bytes
}

#[test]
fn a_clone_reads_as_its_base_and_holds_nothing_of_its_own() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let contents = base(&work);
    work.vdisk("clone base.qcow2 clone.qcow2").succeeds();
    Twin::of(&work, "clone.qcow2", contents).holds();
    clean(&work, "base.qcow2");
    let info = qemu_info(&work, "clone.qcow2");
    assert_eq!(info["backing-filename"], "base.qcow2", "relative, so that a directory can move");
    assert_eq!(info["backing-filename-format"], "qcow2");
    assert_eq!(info["virtual-size"], SIZE);
    assert!(fs::metadata(work.path("clone.qcow2")).unwrap().len() < 1 << 20);
}

#[test]
fn writes_to_a_clone_leave_its_base_and_its_siblings_as_they_were() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let contents = base(&work);
    work.vdisk("clone base.qcow2 one.qcow2 two.qcow2").succeeds();
    let sealed = work.bytes("base.qcow2");
    let mut one = Twin::of(&work, "one.qcow2", contents.clone());
    let mut two = Twin::of(&work, "two.qcow2", contents.clone());
    one.write(500, &noise(2, 1000));
    two.qemu_write(3 << 19, 1 << 20, 0x77);
    one.write(SIZE - 1, b"!");
    two.write(999, &noise(3, 300_000));
    one.holds();
    two.holds();
    assert!(work.bytes("base.qcow2") == sealed, "the base's file is byte for byte the same");
    Twin::of(&work, "base.qcow2", contents).holds();
}

#[test]
fn a_directory_of_clones_moves_whole() {
    let work = Work::new();
    fs::create_dir(work.path("here")).unwrap();
    work.vdisk("create here/base.qcow2 1M").succeeds();
    work.vdisk_fed("write here/base.qcow2 7", b"from the base").succeeds();
    work.vdisk("clone here/base.qcow2 here/clone.qcow2").succeeds();
    work.vdisk("snapshot create here/clone.qcow2 s1").succeeds();
    work.vdisk_fed("write here/clone.qcow2 100", b"from the clone").succeeds();
    fs::rename(work.path("here"), work.path("there")).unwrap();
    let read = work.vdisk("read there/clone.qcow2 7 13").succeeds();
    assert_eq!(read.out(), "from the base");
    let read = work.vdisk("read there/clone.qcow2 100 14").succeeds();
    assert_eq!(read.out(), "from the clone");
}

#[test]
fn a_clone_in_another_directory_finds_its_base() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let contents = base(&work);
    fs::create_dir_all(work.path("sites/a")).unwrap();
    work.vdisk("clone base.qcow2 sites/a/web.qcow2").succeeds();
    assert_eq!(qemu_info(&work, "sites/a/web.qcow2")["backing-filename"], "../../base.qcow2");
    Twin::of(&work, "sites/a/web.qcow2", contents).holds();
}

#[test]
fn clones_can_be_counted_out_under_a_name_pattern() {
    let work = Work::new();
    base(&work);
    work.vdisk("clone base.qcow2 --count 12 --name web-{:04}.qcow2").succeeds();
    let names = work.files();
    let clones: Vec<&String> = names.iter().filter(|name| name.starts_with("web-")).collect();
    assert_eq!(clones.len(), 12, "{names:?}");
    for clone in &clones {
        let number = clone.strip_prefix("web-").and_then(|name| name.strip_suffix(".qcow2"));
        assert!(number.is_some_and(|n| n.len() == 4 && n.parse::<u32>().is_ok()), "{clone}");
    }
    let read = work.vdisk(&format!("read {} 1000 2000000", clones[11])).succeeds().stdout;
    same_bytes(clones[11], &read, &noise(1, 2_000_000));
}

#[test]
fn a_clone_never_overwrites_a_file() {
    let work = Work::new();
    base(&work);
    work.put("precious", "the only copy");
    work.vdisk("clone base.qcow2 precious").fails(&["precious", "exists"]);
    work.vdisk("clone base.qcow2 base.qcow2").fails(&["base.qcow2", "exists"]);
    work.vdisk("clone --full base.qcow2 precious").fails(&["precious", "exists"]);
    assert_eq!(work.bytes("precious"), b"the only copy");
    Twin::of(&work, "base.qcow2", {
        let mut contents = vec![0; SIZE];
        contents[1000..2_001_000].copy_from_slice(&noise(1, 2_000_000));
        contents
    })
    .reads_right();
}

#[test]
fn a_full_clone_stands_alone() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let contents = base(&work);
    work.vdisk("clone base.qcow2 linked.qcow2").succeeds();
    let mut linked = Twin::of(&work, "linked.qcow2", contents);
    linked.write(3_000_000, &noise(2, 5000));
    work.vdisk("clone --full linked.qcow2 copy.qcow2").succeeds();
    fs::remove_file(work.path("base.qcow2")).unwrap();
    fs::remove_file(work.path("linked.qcow2")).unwrap();
    Twin::of(&work, "copy.qcow2", linked.bytes).holds();
    assert!(qemu_info(&work, "copy.qcow2").get("backing-filename").is_none());
}

#[test]
fn a_base_with_clones_is_sealed_against_our_own_writes() {
    let work = Work::new();
    let contents = base(&work);
    work.vdisk("clone base.qcow2 clone.qcow2").succeeds();
    work.vdisk_fed("write base.qcow2 0", b"oops").fails(&["base.qcow2", "clone"]);
    work.vdisk("snapshot create base.qcow2 s1").ends(1).says(&["base.qcow2"]);
    Twin::of(&work, "base.qcow2", contents.clone()).reads_right();
    Twin::of(&work, "clone.qcow2", contents).reads_right();
}

#[test]
fn a_raw_disk_can_be_a_base() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let contents = noise(9, 1_000_960);
    work.put("base.raw", &contents);
    work.vdisk("clone base.raw clone.qcow2").succeeds();
    assert_eq!(qemu_info(&work, "clone.qcow2")["backing-filename-format"], "raw");
    let mut clone = Twin::of(&work, "clone.qcow2", contents.clone());
    clone.holds();
    clone.write(65_530, &noise(10, 70_000));
    clone.qemu_write(512 * 1500, 1024, 3);
    clone.holds();
    assert!(work.bytes("base.raw") == contents);
}

#[test]
fn a_chain_of_mixed_makers_sizes_and_clusters_reads_the_same_to_both() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let mut contents = noise(11, 2 << 20);
    work.put("0.raw", &contents);
    // Longer than what is below, then shorter, then longer again: what a shorter layer hides
    // must not come back.
    let layers = [
        ("1.qcow2", "0.raw", "raw", "cluster_size=4k", 6 << 20),
        ("2.qcow2", "1.qcow2", "qcow2", "cluster_size=2M", 3 << 20),
        ("3.qcow2", "2.qcow2", "qcow2", "compat=0.10,cluster_size=512", 8 << 20),
    ];
    for (seed, (name, below, format, options, size)) in layers.into_iter().enumerate() {
        let create =
            format!("create -q -f qcow2 -o {options} -b {below} -F {format} {name} {size}");
        work.qemu_img(&create).succeeds();
        contents.resize(size, 0);
        let mut layer = Twin::of(&work, name, contents);
        layer.holds();
        layer.write(100_000 * (seed + 1), &noise(seed as u64, 200_001));
        layer.qemu_write(size - 4096, 4096, 0x60);
        layer.qemu_zero("write -z", 512 << 10, 64 << 10);
        layer.holds();
        contents = layer.bytes;
    }
    work.vdisk("clone 3.qcow2 4.qcow2").succeeds();
    let mut top = Twin::of(&work, "4.qcow2", contents);
    top.write(1 << 20, &noise(20, 1_100_000));
    top.holds();
    work.vdisk("check 4.qcow2 --chain").succeeds();
}

#[test]
fn chains_of_a_hundred_deltas_read_and_write() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let mut contents = base(&work);
    let mut below = "base.qcow2".to_owned();
    for depth in 0..100 {
        let name = format!("{depth}.qcow2");
        work.vdisk(&format!("clone {below} {name}")).succeeds();
        if depth % 10 == 0 {
            let mut disk = Twin::of(&work, &name, contents);
            disk.write(depth * 30_000, &noise(depth as u64, 50_000));
            contents = disk.bytes;
        }
        below = name;
    }
    Twin::of(&work, &below, contents).holds();
    let chain = json(work.vdisk(&format!("info --chain --json {below}")));
    assert_eq!(chain["chain"].as_array().unwrap().len(), 101, "down to the base: {chain}");
}

#[test]
fn a_commit_writes_the_delta_into_its_base_and_leaves_the_disk_as_it_was() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let contents = base(&work);
    work.vdisk("clone base.qcow2 clone.qcow2").succeeds();
    let mut clone = Twin::of(&work, "clone.qcow2", contents);
    clone.write(700, &noise(4, 900_000));
    clone.write(SIZE - 5000, &noise(5, 5000));
    let plan = json(work.vdisk("commit clone.qcow2 --dry-run --json"));
    assert_eq!(plan["dry_run"], true);
    assert!(plan["moved"].as_u64().unwrap() >= 900_000, "{plan}");
    work.vdisk("commit clone.qcow2").succeeds();
    clone.holds();
    Twin::of(&work, "base.qcow2", clone.bytes.clone()).holds();
    clean(&work, "base.qcow2");
    clean(&work, "clone.qcow2");
    let again = json(work.vdisk("commit clone.qcow2 --dry-run --json"));
    assert_eq!(again["moved"], 0, "the disk holds nothing of its own any more");
    // The base is sealed again, and the disk knows it as it is now.
    work.vdisk_fed("write base.qcow2 0", b"x").fails(&["clones stand on it", "clone.qcow2"]);
    clone.write(0, b"more");
    clone.holds();
}

#[test]
fn a_commit_into_a_base_that_others_stand_on_is_refused_by_their_names() {
    let work = Work::new();
    work.vdisk("create base.qcow2 1M").succeeds();
    work.vdisk("clone base.qcow2 one.qcow2 two.qcow2").succeeds();
    work.vdisk("commit one.qcow2").fails(&["two.qcow2"]);
    work.vdisk("commit base.qcow2").fails(&["base.qcow2"]);
    work.vdisk("snapshot create one.qcow2 monday").succeeds();
    work.vdisk("commit one.qcow2").fails(&["snapshot merge"]);
    work.vdisk("create alone.qcow2 1M").succeeds();
    work.vdisk("commit alone.qcow2").fails(&["stands alone"]);
}
