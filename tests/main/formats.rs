//! Disks and bases in the formats of other programs: VMDK, VHD, VHDX, VDI.

use crate::host::{Done, Work};
use crate::require::{Need, have};

const SIZE: usize = 6 << 20;

/// Format, creation options, file name.
const KINDS: [(&str, &str, &str); 12] = [
    ("vmdk", "-o subformat=monolithicSparse", "sparse.vmdk"),
    ("vmdk", "-o subformat=streamOptimized", "stream.vmdk"),
    ("vmdk", "-o subformat=monolithicFlat", "flat.vmdk"),
    ("vmdk", "-o subformat=twoGbMaxExtentSparse", "split.vmdk"),
    ("vpc", "-o force_size=on", "dynamic.vhd"),
    ("vpc", "-o force_size=on,subformat=fixed", "fixed.vhd"),
    ("vhdx", "", "disk.vhdx"),
    ("vhdx", "-o subformat=fixed", "fixed.vhdx"),
    ("vdi", "", "disk.vdi"),
    ("qcow", "", "disk.qcow"),
    ("qed", "", "disk.qed"),
    ("parallels", "", "disk.hds"),
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

/// One command of `qemu-io` on an image of a format that is said.
fn qemu_io(work: &Work, format: &str, image: &str, command: &str) -> Done {
    work.run("qemu-io", ["-f", format, "-c", command, image])
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
        ("vmdk", "subformat=twoGbMaxExtentSparse"),
        ("vmdk", "subformat=twoGbMaxExtentFlat"),
        ("vhdx", "subformat=dynamic"),
        ("vhdx", "subformat=fixed"),
        ("vhdx", "block_size=1M,log_size=3M,block_state_zero=off"),
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

/// A VHD's footer with another creator, and a checksum that is right, or one too high.
fn created_by(file: &mut [u8], creator: &[u8; 4], wrong: u32) {
    let from = file.len() - 512;
    let footer = &mut file[from..];
    footer[28..32].copy_from_slice(creator);
    footer[64..68].fill(0);
    let sum: u32 = footer.iter().map(|&b| u32::from(b)).sum();
    footer[64..68].copy_from_slice(&(!sum).wrapping_add(wrong).to_be_bytes());
}

/// A list of programs that mean the recorded size left out most: their disks ended where the
/// geometry does, and the backup header of a GPT was past the end.
#[test]
fn a_vhd_of_any_program_has_the_size_that_qemu_gives_it() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.put("src.raw", vec![7; (4 << 20) - 77 * 512]);
    let convert = "convert -f raw -O vpc -o subformat=fixed,force_size=on src.raw a.vhd";
    work.qemu_img(convert).succeeds();
    let made = work.bytes("a.vhd");
    for creator in
        [b"vpc ", b"qemu", b"qem2", b"win ", b"vbox", b"rufs", b"mkos", b"tap\0", b"????"]
    {
        let mut file = made.clone();
        // A geometry that holds less than the size.
        let from = file.len() - 512;
        file[from + 56..from + 60].copy_from_slice(&[0, 60, 4, 17]);
        created_by(&mut file, creator, 0);
        work.put("b.vhd", &file);
        work.qemu_img("convert -f vpc -O raw b.vhd right.raw").succeeds();
        work.vdisk("qemu-img convert -f vpc -O raw b.vhd drop-in.raw").succeeds();
        work.vdisk("convert --source-format vpc --format raw b.vhd own.raw").succeeds();
        let right = work.bytes("right.raw");
        assert!(
            work.bytes("drop-in.raw") == right && work.bytes("own.raw") == right,
            "{creator:?}"
        );
        std::fs::remove_file(work.path("own.raw")).unwrap();
    }
    // Virtual PC before 2004 made footers of 511 bytes.
    work.put("short.vhd", &made[..made.len() - 1]);
    work.vdisk("convert --source-format vpc --format raw short.vhd own.raw").succeeds();
    assert!(work.bytes("own.raw") == work.bytes("src.raw"));

    let mut file = made;
    created_by(&mut file, b"qem2", 1);
    work.put("bad.vhd", &file);
    for check in ["check -f vpc a.vhd", "check -f vpc bad.vhd"] {
        let right = work.qemu_img(check);
        let done = work.vdisk(&format!("qemu-img {check}"));
        assert_eq!((done.code, done.err()), (right.code, right.err()), "{check}");
    }
}

#[test]
fn a_raw_file_that_ends_inside_a_sector_loses_nothing() {
    let work = Work::new();
    let mut disk = vec![0x5a; 1000];
    work.put("u.raw", &disk);
    work.vdisk("convert u.raw u.qcow2").succeeds();
    work.vdisk("clone u.raw c.qcow2").succeeds();
    work.vdisk("create s.qcow2 512").succeeds();
    work.vdisk("resize s.qcow2 1000").succeeds();
    disk.resize(1024, 0);
    for image in ["u.qcow2", "c.qcow2"] {
        assert_eq!(&work.bytes(image)[24..32], 1024u64.to_be_bytes(), "{image}");
        assert!(work.vdisk(&format!("read {image} 0 1024")).succeeds().stdout == disk, "{image}");
    }
    assert_eq!(&work.bytes("s.qcow2")[24..32], 1024u64.to_be_bytes());
    assert_eq!(work.bytes("u.raw").len(), 1000, "a base is not written");
    if have(Need::Qemu) {
        work.qemu_img("compare -f raw -F qcow2 u.raw c.qcow2").succeeds();
    }
}

/// What QEMU would read and this engine does not was copied as a raw disk: the container's bytes, and
/// status 0.
#[test]
fn a_format_that_is_not_read_is_known_by_name() {
    let work = Work::new();
    let mut bochs = vec![0; 4096];
    bochs[..22].copy_from_slice(b"Bochs Virtual HD Image");
    bochs[32..39].copy_from_slice(b"Redolog");
    bochs[48..55].copy_from_slice(b"Growing");
    bochs[66] = 2;
    work.put("a.bochs", bochs);
    let cloop =
        "#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";
    work.put("a.cloop", format!("{cloop:\0<4096}"));
    let mut dmg = vec![0; 4096];
    dmg[4096 - 512..4096 - 508].copy_from_slice(b"koly");
    work.put("a.dmg", &dmg);
    for format in ["bochs", "cloop", "dmg"] {
        let why = format!("images of format '{format}' are not read");
        for verb in ["convert", "qemu-img convert -O raw"] {
            let done = work.vdisk(&format!("{verb} a.{format} out")).ends(1);
            assert!(done.err().contains(&why), "{}", done.err());
            assert!(!work.path("out").exists());
        }
    }
    // Such a tail alone is anyone's disk, and whoever says raw means it.
    work.put("a.raw", &dmg);
    work.vdisk("qemu-img convert -O raw a.raw b.raw").succeeds();
    work.vdisk("qemu-img convert -f raw -O raw a.dmg b.raw").succeeds();
    assert!(work.bytes("b.raw") == dmg);
}

#[test]
fn other_versions_of_a_format_are_named() {
    let work = Work::new();
    work.put("two.luks", [b"LUKS\xba\xbe\0\x02".as_slice(), &[0; 8184]].concat());
    work.put("one.qcow", [b"QFI\xfb\0\0\0\x01".as_slice(), &[0; 1016]].concat());
    let says = |words: &str, why: &str| {
        let done = work.vdisk(words).ends(1);
        assert!(done.err().contains(why), "{words}: {}", done.err());
    };
    says("qemu-img info -f luks two.luks", "LUKS version 2 is not supported");
    says("convert --source-format luks two.luks out", "LUKS version 2 is not supported");
    says("qemu-img info -f qcow2 one.qcow", "Unsupported qcow2 version 1");
    says("convert --source-format qcow2 one.qcow out", "Unsupported qcow2 version 1");
    // As QEMU sees it, and as a guest leaves it that encrypted all of its disk.
    assert!(work.vdisk("qemu-img info two.luks").succeeds().out().contains("file format: raw"));
}

#[test]
fn more_snapshots_than_an_image_may_have_are_refused() {
    let work = Work::new();
    work.vdisk("create d.qcow2 1M").succeeds();
    let mut image = work.bytes("d.qcow2");
    image[60..64].copy_from_slice(&70_000u32.to_be_bytes());
    work.put("d.qcow2", image);
    for verb in
        ["info d.qcow2", "read d.qcow2 0 512", "convert d.qcow2 out", "qemu-img info d.qcow2"]
    {
        let done = work.vdisk(verb).ends(1);
        assert!(done.err().contains("Snapshot table too large"), "{verb}: {}", done.err());
    }
}

/// What QEMU writes in place was refused, or emptied.
#[test]
fn an_image_of_another_program_is_written_where_it_stands() {
    if !have(Need::Qemu) {
        return;
    }
    let (first, second) = (contents(), contents().into_iter().rev().collect::<Vec<u8>>());
    for (format, options, image) in [
        ("vmdk", "subformat=monolithicSparse", "a.vmdk"),
        ("vmdk", "subformat=monolithicFlat", "a.vmdk"),
        ("vmdk", "subformat=twoGbMaxExtentSparse", "a.vmdk"),
        ("vpc", "force_size=on", "a.vhd"),
        ("vpc", "force_size=on,subformat=fixed", "a.vhd"),
        ("vdi", "static=off", "a.vdi"),
        ("vdi", "static=on", "a.vdi"),
        ("vhdx", "block_size=1M", "a.vhdx"),
        ("vhdx", "subformat=fixed", "a.vhdx"),
    ] {
        let work = Work::new();
        work.put("first.raw", &first);
        work.put("second.raw", &second);
        let is = |raw: &str| {
            work.qemu_img(&format!("compare -f raw -F {format} {raw} {image}")).succeeds();
            if format != "vpc" {
                work.qemu_img(&format!("check -f {format} {image}")).succeeds();
            }
        };
        work.qemu_img(&format!("convert -f raw -O {format} -o {options} first.raw {image}"))
            .succeeds();
        work.vdisk(&format!("qemu-img convert -n -f raw -O {format} second.raw {image}"))
            .succeeds();
        is("second.raw");
        work.vdisk(&format!("qemu-img dd -n -f raw -O {format} bs=64k if=first.raw of={image}"))
            .succeeds();
        is("first.raw");
        work.qemu_img(&format!("create -q -f qcow2 -b {image} -F {format} top.qcow2")).succeeds();
        let writes = ["write -P 7 2M 70k", "write -z 3M 1M", "write -P 9 5M 512"];
        work.qemu_io("top.qcow2", &writes).succeeds();
        work.qemu_img("convert -f qcow2 -O raw top.qcow2 want.raw").succeeds();
        work.vdisk("qemu-img commit top.qcow2").succeeds();
        is("want.raw");
        // A program that goes on writes next to it, not over it.
        qemu_io(&work, format, image, "write -P 5 1500k 200k").succeeds();
        let done = work.vdisk(&format!("qemu-img resize -f {format} {image} 9M")).ends(1);
        assert!(done.err().contains("does not support resize"), "{}", done.err());
        qemu_io(&work, "raw", "want.raw", "write -P 5 1500k 200k").succeeds();
        is("want.raw");
    }
}

#[test]
fn a_vmdk_that_is_written_is_no_longer_what_its_children_were_made_on() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    made(&work, "vmdk", "", "base.vmdk");
    work.qemu_img("create -q -f vmdk -b base.vmdk -F vmdk delta.vmdk").succeeds();
    work.vdisk("qemu-img create -f vmdk -b base.vmdk -F vmdk -q second.vmdk").succeeds();
    // A delta takes writes, and what it does not hold still shows.
    qemu_io(&work, "vmdk", "delta.vmdk", "write -P 3 2M 512").succeeds();
    work.put("src.raw", vec![4; 700]);
    work.vdisk("qemu-img dd -n -f raw -O vmdk if=src.raw of=delta.vmdk").succeeds();
    let mut expected = contents();
    expected[..700].fill(4);
    expected[700..1024].fill(0);
    expected[2 << 20..(2 << 20) + 512].fill(3);
    assert!(read(&work, "delta.vmdk") == expected);
    work.qemu_img("convert -f vmdk -O raw delta.vmdk back.raw").succeeds();
    assert!(work.bytes("back.raw") == expected);
    work.vdisk("qemu-img commit -f vmdk delta.vmdk").succeeds();
    assert!(read(&work, "base.vmdk") == expected);
    let done = work.vdisk("read second.vmdk 0 512").ends(1);
    assert!(done.err().contains("base.vmdk: has changed"), "{}", done.err());
}

#[test]
fn what_is_only_read_says_what_to_do_instead() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    for (format, options) in [("qed", ""), ("vmdk", "-o subformat=streamOptimized")] {
        made(&work, format, options, "a.img");
        let before = work.bytes("a.img");
        let convert = format!("qemu-img convert -n -f raw -O {format} disk.raw a.img");
        let done = work.vdisk(&convert).ends(1);
        assert!(done.err().contains("convert i"), "{}", done.err());
        assert!(work.bytes("a.img") == before);
    }
}
