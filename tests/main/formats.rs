//! Disks and bases in the formats of other programs: VMDK, VHD, VHDX, VDI.

use crate::host::Work;
use crate::require::{Need, have};

const SIZE: usize = 6 << 20;

/// Format, creation options, file name.
const KINDS: [(&str, &str, &str); 9] = [
    ("vmdk", "-o subformat=monolithicSparse", "sparse.vmdk"),
    ("vmdk", "-o subformat=streamOptimized", "stream.vmdk"),
    ("vmdk", "-o subformat=monolithicFlat", "flat.vmdk"),
    ("vmdk", "-o subformat=twoGbMaxExtentSparse", "split.vmdk"),
    ("vpc", "-o force_size=on", "dynamic.vhd"),
    ("vpc", "-o force_size=on,subformat=fixed", "fixed.vhd"),
    ("vhdx", "", "disk.vhdx"),
    ("vhdx", "-o subformat=fixed", "fixed.vhdx"),
    ("vdi", "", "disk.vdi"),
];

fn contents() -> Vec<u8> {
    let mut disk = vec![0; SIZE];
    for (at, len) in [(0, 5000), (1 << 20, 70_000), (3 << 20, 1 << 20), (SIZE - 3000, 3000)] {
        for (n, byte) in disk[at..at + len].iter_mut().enumerate() {
            *byte = (at / 1000 + n / 7) as u8 | 1;
        }
    }
    disk
}

/// The disk in `file`, converted by QEMU.
fn made(work: &Work, format: &str, options: &str, file: &str) {
    work.put("disk.raw", contents());
    work.qemu_img(&format!("convert -f raw -O {format} {options} disk.raw {file}")).succeeds();
}

fn read(work: &Work, disk: &str) -> Vec<u8> {
    work.vdisk(&format!("read {disk} 0 {SIZE}")).succeeds().stdout
}

#[test]
fn a_disk_of_another_program_reads_as_it_is() {
    if !have(Need::Qemu) {
        return;
    }
    for (format, options, file) in KINDS {
        let work = Work::new();
        made(&work, format, options, file);
        // Its mark stands behind the guest's data, where it is no mark: only who says so knows.
        if file != "fixed.vhd" {
            assert!(read(&work, file) == contents(), "{file}");
        }
    }
}

#[test]
fn a_clone_of_another_programs_disk_takes_writes_and_leaves_it_alone() {
    if !have(Need::Qemu) {
        return;
    }
    for (format, options, file) in KINDS {
        let work = Work::new();
        made(&work, format, options, file);
        let before = work.bytes(file);
        if file == "fixed.vhd" {
            let create = format!("create -q -f qcow2 -b {file} -F {format} clone.qcow2");
            work.qemu_img(&create).succeeds();
        } else {
            work.vdisk(&format!("clone {file} clone.qcow2")).succeeds();
        }
        let info = work.qemu_img("info clone.qcow2").succeeds().out();
        assert!(info.contains("cluster_size: 65536"), "{info}");
        assert!(info.contains(&format!("backing file format: {format}")), "{info}");
        assert!(read(&work, "clone.qcow2") == contents(), "{file}");
        let mut expected = contents();
        for at in [100, (1 << 20) + 65_000, SIZE - 4000] {
            expected[at..at + 777].fill(0xdd);
            work.vdisk_fed(&format!("write clone.qcow2 {at}"), &[0xdd; 777]).succeeds();
        }
        assert!(read(&work, "clone.qcow2") == expected, "{file}");
        work.qemu_img("convert -f qcow2 -O raw clone.qcow2 back.raw").succeeds();
        assert!(work.bytes("back.raw") == expected, "{file}");
        assert!(work.bytes(file) == before, "{file}");
    }
}

#[test]
fn a_vmdk_with_a_parent_reads_through_to_it() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    made(&work, "vmdk", "", "base.vmdk");
    work.qemu_img("create -q -f vmdk -b base.vmdk -F vmdk delta.vmdk").succeeds();
    work.qemu_io("delta.vmdk", &["write -P 0x3c 1M 64k"]).succeeds();
    let mut expected = contents();
    expected[1 << 20..(1 << 20) + 65536].fill(0x3c);
    assert!(read(&work, "delta.vmdk") == expected);
}

#[test]
fn a_vmdk_whose_parent_was_written_is_refused() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    made(&work, "vmdk", "", "base.vmdk");
    work.qemu_img("create -q -f vmdk -b base.vmdk -F vmdk delta.vmdk").succeeds();
    work.qemu_io("base.vmdk", &["write -P 0x3c 1M 64k"]).succeeds();
    let done = work.vdisk("read delta.vmdk 0 512").ends(1);
    assert!(done.err().contains("base.vmdk: has changed"), "{}", done.err());
}

#[test]
fn another_programs_disk_is_not_written_and_the_message_says_what_to_do() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    made(&work, "vdi", "", "disk.vdi");
    let before = work.bytes("disk.vdi");
    let done = work.vdisk_fed("write disk.vdi 0", b"x").ends(1);
    assert!(done.err().contains("make a clone"), "{}", done.err());
    assert!(work.bytes("disk.vdi") == before);
}

#[test]
fn a_vmdk_reaches_no_file_outside_its_directory() {
    let work = Work::new();
    for name in ["/etc/passwd", "../secret", "a/../../secret"] {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n\
             createType=\"monolithicFlat\"\nRW 1 FLAT \"{name}\" 0\n"
        );
        work.put("disk.vmdk", text);
        let done = work.vdisk("read disk.vmdk 0 512").ends(1);
        assert!(done.err().contains("own directory"), "{}", done.err());
        assert!(done.stdout.is_empty());
    }
}

#[test]
fn a_disk_that_was_cut_off_is_an_error_with_its_place() {
    if !have(Need::Qemu) {
        return;
    }
    for (format, options, file) in KINDS {
        // A fixed disk that lost its footer is no VHD at all.
        if file == "fixed.vhd" || file == "flat.vmdk" || file == "split.vmdk" {
            continue;
        }
        let work = Work::new();
        made(&work, format, options, file);
        let bytes = work.bytes(file);
        work.put(file, &bytes[..bytes.len() / 2]);
        let done = work.vdisk(&format!("read {file} 0 {SIZE}")).ends(1);
        assert!(done.err().contains("offset 0x"), "{file}: {}", done.err());
    }
}

#[test]
fn an_image_that_qemu_img_converts_to_is_whole_for_qemu() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    // Data, holes inside of blocks and whole blocks of them, and an end inside a block.
    let mut disk = vec![0; (9 << 20) + 512 * 7];
    for (number, sector) in disk.chunks_mut(512).enumerate() {
        let far = number / 128 % 3 == 1 && !(6000..12000).contains(&number);
        if far || number % 700 < 3 {
            sector.fill(number as u8 | 1);
        }
    }
    work.put("src.raw", &disk);
    for (format, options) in [
        ("vdi", "static=off"),
        ("vdi", "static=on"),
        ("vpc", "subformat=dynamic,force_size=on"),
        ("vpc", "subformat=dynamic"),
        ("vpc", "subformat=fixed,force_size=on"),
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=streamOptimized"),
        ("vmdk", "subformat=monolithicFlat"),
    ] {
        let convert =
            format!("qemu-img convert -f raw -O {format} -o {options} src.raw a.{format}");
        work.vdisk(&convert).succeeds();
        let compare = format!("compare -f raw -F {format} src.raw a.{format}");
        work.qemu_img(&compare).succeeds();
        work.vdisk(&format!("qemu-img {compare}")).succeeds();
        if format != "vpc" {
            work.qemu_img(&format!("check -f {format} a.{format}")).succeeds();
        }
    }
    work.vdisk("qemu-img dd -f raw -O vdi if=src.raw of=b.vdi bs=64k").succeeds();
    work.qemu_img("compare -f raw -F vdi src.raw b.vdi").succeeds();
    let split = "qemu-img convert -f raw -O vmdk -o subformat=twoGbMaxExtentFlat src.raw s.vmdk";
    work.vdisk(split).fails(&["several files"]);
}

#[test]
fn a_vhdx_log_is_replayed_for_good_by_a_repair_only() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.qemu_img("create -q -f vhdx a.vhdx 64M").succeeds();
    let before = work.bytes("a.vhdx");
    work.vdisk("qemu-img check a.vhdx").succeeds();
    work.vdisk("qemu-img check -r all a.vhdx").succeeds();
    assert_eq!(work.bytes("a.vhdx"), before, "there was nothing to replay");
    work.qemu_img("check a.vhdx").succeeds();
}
