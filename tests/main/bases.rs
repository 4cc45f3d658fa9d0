//! What a disk stands on: sealed bases, other bases, no base.

use crate::host::Work;
use crate::require::{Need, have};
use crate::twin::{Twin, clean, noise};

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
