//! The same file under `vdisk` and QEMU in turn: what one writes, the other reads.

use crate::host::Work;
use crate::require::{Need, have};
use crate::twin::{Twin, noise};

/// Not a multiple of any larger cluster: the last cluster of the disk is cut short.
pub const SIZE: usize = (6 << 20) + 3 * 512;

/// Writes by both, at offsets that mean nothing to the format, in turn over the same places.
pub fn both_write(disk: &mut Twin) {
    disk.qemu_write(0, 1024, 0x11);
    disk.write(1000, &noise(1, 100));
    disk.qemu_write(SIZE - 1536, 1536, 0x22);
    disk.write(SIZE - 700, &noise(2, 700));
    disk.write(1_234_567, &noise(3, 654_321));
    disk.qemu_write(1 << 20, 512 * 3, 0x33);
    disk.write((1 << 20) + 5, &[0x44]);
    disk.holds();
    disk.qemu_zero("write -z", 1_310_720, 131_072);
    disk.write(1_310_720 + 777, &noise(4, 5));
    disk.qemu_zero("write -zu", 1_441_792, 65_536);
    // Whole clusters, however large they are: QEMU leaves the rest of a discard undone.
    disk.qemu_write(2 << 20, 2 << 20, 0x55);
    disk.qemu_zero("discard", 2 << 20, 2 << 20);
    disk.write(3, b"here again");
    disk.holds();
}

#[test]
fn both_write_one_version_3_image_in_turn_at_every_cluster_size() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    for bits in 9..=21 {
        let image = format!("v3-{bits}.qcow2");
        work.qemu_img(&format!("create -q -f qcow2 -o cluster_size={} {image} {SIZE}", 1 << bits))
            .succeeds();
        both_write(&mut Twin::blank(&work, &image, SIZE));
    }
}

#[test]
fn both_write_one_version_2_image_in_turn() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    for bits in [9, 12, 16, 21] {
        let image = format!("v2-{bits}.qcow2");
        let options = format!("compat=0.10,cluster_size={}", 1 << bits);
        work.qemu_img(&format!("create -q -f qcow2 -o {options} {image} {SIZE}")).succeeds();
        // A discard in version 2 may bring back what is below, not zeroes: with nothing below,
        // both read as zeroes.
        both_write(&mut Twin::blank(&work, &image, SIZE));
        let info = work.qemu_img(&format!("info {image}")).succeeds().out();
        assert!(info.contains("compat: 0.10"), "still version 2: {info}");
    }
}

#[test]
fn our_own_image_is_written_by_both_in_turn() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    both_write(&mut Twin::create(&work, "disk.qcow2", SIZE, ""));
}

#[test]
fn a_raw_disk_is_read_and_written_in_place() {
    let work = Work::new();
    let mut disk = Twin::create(&work, "disk.raw", 1 << 20, "--format raw");
    disk.write(100_001, &noise(5, 4097));
    disk.reads_right();
    assert!(work.bytes("disk.raw") == disk.bytes);
}

#[test]
fn qemu_reads_our_pattern_and_we_read_its() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.vdisk("create disk.qcow2 64M").succeeds();
    work.vdisk_fed("write disk.qcow2 33M", &[0xa5; 65_536]).succeeds();
    work.qemu_io(
        "disk.qcow2",
        &["read -P 0xa5 33M 64K", "read -P 0 0 33M", "write -P 0x5a 1M 3K", "flush"],
    )
    .succeeds();
    let read = work.vdisk("read disk.qcow2 1M 3K").succeeds();
    assert!(read.stdout == [0x5a; 3072]);
    assert!(read.stderr.is_empty(), "{}", read.err());
}

#[test]
fn a_write_past_the_end_is_refused_and_changes_nothing() {
    let work = Work::new();
    let mut disk = Twin::create(&work, "disk.qcow2", 1 << 20, "");
    disk.write(0, &noise(6, 1 << 20));
    for offset in ["1048575", "1M", "2M", "4E"] {
        work.vdisk_fed(&format!("write disk.qcow2 {offset}"), b"ab").fails(&["disk.qcow2"]);
    }
    disk.reads_right();
}

#[test]
fn a_read_past_the_end_is_refused() {
    let work = Work::new();
    work.vdisk("create disk.qcow2 1M").succeeds();
    for range in ["1048575 2", "2M 1", "0 2M", "4E 4E"] {
        let done = work.vdisk(&format!("read disk.qcow2 {range}")).fails(&["disk.qcow2"]);
        assert!(done.stdout.len() <= 1 << 20);
    }
}

#[test]
fn an_empty_write_changes_nothing() {
    let work = Work::new();
    work.vdisk("create disk.qcow2 1M").succeeds();
    let before = work.bytes("disk.qcow2");
    work.vdisk_fed("write disk.qcow2 0", b"").succeeds();
    assert!(work.bytes("disk.qcow2") == before);
}

/// QEMU keeps header extensions that it does not know; so must we.
#[test]
fn an_unknown_header_extension_outlives_our_writes() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.qemu_img("create -q -f qcow2 disk.qcow2 4M").succeeds();
    let mut image = work.bytes("disk.qcow2");
    // The feature name table under a type that nobody has heard of.
    assert_eq!(image[112..116], [0x68, 0x03, 0xf8, 0x57], "the feature name table comes first");
    image[112..116].copy_from_slice(&[0xba, 0xdc, 0x0d, 0xe5]);
    let unknown = image[112..504].to_vec();
    work.put("disk.qcow2", &image);
    let mut disk = Twin::blank(&work, "disk.qcow2", 4 << 20);
    disk.write(65_000, &noise(7, 100_000));
    disk.holds();
    let image = work.bytes("disk.qcow2");
    assert!(image.windows(unknown.len()).any(|window| window == unknown), "it is gone");
}

/// Makes an image that needs the incompatible feature of this bit.
fn needing(work: &Work, bit: u8, edit: impl FnOnce(&mut Vec<u8>)) {
    work.qemu_img("create -q -f qcow2 disk.qcow2 4M").succeeds();
    let mut image = work.bytes("disk.qcow2");
    let byte = 72 + 7 - usize::from(bit / 8);
    image[byte] |= 1 << (bit % 8);
    edit(&mut image);
    work.put("disk.qcow2", &image);
}

#[test]
fn an_unknown_incompatible_feature_is_refused_by_the_images_own_name_for_it() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    needing(&work, 40, |image| {
        let name = b"dirty bit\0";
        let at = image.windows(name.len()).position(|window| window == name).unwrap();
        image[at - 1] = 40;
        image[at..at + 10].copy_from_slice(b"time warp\0");
    });
    let before = work.bytes("disk.qcow2");
    work.vdisk("read disk.qcow2 0 512").fails(&["disk.qcow2", "time warp"]);
    work.vdisk_fed("write disk.qcow2 0", b"x").fails(&["disk.qcow2", "time warp"]);
    assert!(work.bytes("disk.qcow2") == before, "a refused image is not touched");
    assert_eq!(work.files(), ["disk.qcow2"]);
}

#[test]
fn an_unknown_incompatible_feature_without_a_name_is_refused_by_its_bit() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    needing(&work, 41, |_| ());
    work.vdisk("read disk.qcow2 0 512").fails(&["disk.qcow2", "incompatible feature"]);
}
