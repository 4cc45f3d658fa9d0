//! `vdisk create`: what it makes is what was asked for, in QEMU's eyes too.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::host::Work;
use crate::require::{Need, have};
use crate::twin::{Twin, clean, qemu_info};

const CLUSTER_SIZES: [&str; 13] =
    ["512", "1K", "2K", "4K", "8K", "16K", "32K", "64K", "128K", "256K", "512K", "1M", "2M"];

#[test]
fn a_new_disk_is_a_small_qcow2_file_of_version_3() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.vdisk("create disk.qcow2 20G").succeeds();
    clean(&work, "disk.qcow2");
    let info = qemu_info(&work, "disk.qcow2");
    assert_eq!(info["format"], "qcow2");
    assert_eq!(info["virtual-size"], 20_u64 << 30);
    assert_eq!(info["cluster-size"], 65536);
    let details = &info["format-specific"]["data"];
    assert_eq!(details["compat"], "1.1");
    assert_eq!(details["refcount-bits"], 16);
    assert_eq!(details["extended-l2"], false);
    assert_eq!(details["corrupt"], false);
    assert_eq!(work.files(), ["disk.qcow2"]);
    assert!(fs::metadata(work.path("disk.qcow2")).unwrap().len() < 1 << 20);
}

#[test]
fn sizes_are_read_as_qemu_img_reads_them() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let sizes = ["0", "512", "1000", "65537", "64K", "64k", "3M", "1.5G", "20G", "1T", "0x10000"];
    for (number, size) in sizes.iter().enumerate() {
        work.vdisk(&format!("create {number}.v {size}")).succeeds();
        work.qemu_img(&format!("create -q -f qcow2 {number}.q {size}")).succeeds();
        let (ours, theirs) =
            (qemu_info(&work, &format!("{number}.v")), qemu_info(&work, &format!("{number}.q")));
        assert_eq!(ours["virtual-size"], theirs["virtual-size"], "of {size}");
        clean(&work, &format!("{number}.v"));
    }
}

#[test]
fn a_size_that_is_none_is_refused_and_makes_no_file() {
    let work = Work::new();
    for size in ["abc", "12X", "1G2", "-5", "", "1..5G", "99999999999999999999"] {
        let done = work.vdisk_args(["create", "disk.qcow2", size]).refuses(&[]);
        assert!(done.stdout.is_empty());
        assert!(work.files().is_empty(), "size {size:?} left {:?}", work.files());
    }
}

#[test]
fn a_size_beyond_the_format_is_refused_and_makes_no_file() {
    let work = Work::new();
    work.vdisk("create disk.qcow2 1024P --cluster-size 512").fails(&["disk.qcow2"]);
    assert!(work.files().is_empty(), "{:?}", work.files());
}

#[test]
fn every_cluster_size_of_the_format_can_be_had() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    for (exponent, size) in (9..).zip(CLUSTER_SIZES) {
        let mut disk = Twin::create(&work, size, 5 << 20, &format!("--cluster-size {size}"));
        assert_eq!(qemu_info(&work, size)["cluster-size"], 1_u64 << exponent);
        disk.write(12_345, &[7; 70_000]);
        disk.qemu_write((5 << 20) - 512, 512, 9);
        disk.holds();
    }
}

#[test]
fn a_cluster_size_outside_the_format_is_refused_and_makes_no_file() {
    let work = Work::new();
    for size in ["0", "256", "4M", "65537", "100000", "cheese"] {
        work.vdisk(&format!("create disk.qcow2 1G --cluster-size {size}")).refuses(&["cluster"]);
        assert!(work.files().is_empty(), "cluster size {size} left {:?}", work.files());
    }
}

#[test]
fn a_raw_disk_is_a_sparse_file_of_its_size() {
    let work = Work::new();
    work.vdisk("create disk.raw 3M --format raw").succeeds();
    let metadata = fs::metadata(work.path("disk.raw")).unwrap();
    assert_eq!(metadata.len(), 3 << 20);
    assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
}

#[test]
fn a_file_that_exists_is_never_overwritten() {
    let work = Work::new();
    work.put("precious", "the only copy");
    work.vdisk("create precious 1G").fails(&["precious", "exists"]);
    work.vdisk("create precious 1G --format raw").fails(&["precious", "exists"]);
    assert_eq!(work.bytes("precious"), b"the only copy");
}

#[test]
fn a_directory_that_is_missing_is_named() {
    let work = Work::new();
    work.vdisk("create nowhere/disk.qcow2 1G").fails(&["nowhere/disk.qcow2"]);
    assert!(work.files().is_empty());
}
