//! The drop-in for qemu-img keeps what a disk shows: what a script relies on without looking.

use crate::host::Work;
use crate::twin::noise;

/// Where a base holds something that the disk on it does not.
const AT: [u64; 2] = [3 << 20, 40 << 20];

/// A base with data at [`AT`], the last cluster of it half full, and images of every kind that read
/// as zeroes there.
fn base_and_blank_disks(work: &Work) -> Vec<String> {
    work.vdisk("create base.qcow2 64M").succeeds();
    for at in AT {
        work.vdisk_fed(&format!("write base.qcow2 {at}"), &noise(at, 100 << 10)).succeeds();
    }
    let kinds = ["compat=0.10", "compat=1.1", "extended_l2=on", "cluster_size=4k"];
    let make = |(number, kind): (usize, &&str)| {
        let name = format!("disk{number}.qcow2");
        work.vdisk(&format!("qemu-img create -q -f qcow2 -o {kind} {name} 64M")).succeeds();
        // One with tables, one without.
        work.vdisk_fed(&format!("write {name} 0"), b"mine").succeeds();
        name
    };
    kinds.iter().enumerate().map(make).collect()
}

#[track_caller]
fn shows_its_zeroes(work: &Work, name: &str) {
    let mine = work.vdisk(&format!("read {name} 0 4")).succeeds().stdout;
    assert_eq!(mine, b"mine", "{name}");
    for at in AT {
        let bytes = work.vdisk(&format!("read {name} {at} 128K")).succeeds().stdout;
        assert!(bytes.iter().all(|byte| *byte == 0), "{name} shows its base at {at}");
    }
}

/// A disk without a base reads as zeroes where it holds nothing. Once, what the new base holds
/// there showed through afterwards: in clusters that were only compared in part, in version 2, and
/// wherever there was no table.
#[test]
fn a_disk_without_a_base_keeps_its_zeroes_on_one() {
    let ways = ["qemu-img rebase -b base.qcow2 -F qcow2", "rebase --backing base.qcow2"];
    for way in ways {
        let work = Work::new();
        for name in base_and_blank_disks(&work) {
            work.vdisk(&format!("{way} {name}")).succeeds();
            shows_its_zeroes(&work, &name);
            work.vdisk(&format!("check {name}")).succeeds();
        }
    }
}

/// `-B` says what the copy stands on; that the source stands on it as well is not said.
#[test]
fn a_copy_on_a_base_keeps_the_zeroes_of_its_source() {
    let work = Work::new();
    for name in base_and_blank_disks(&work) {
        for options in ["", "-o compat=0.10"] {
            let words = format!("-O qcow2 {options} -B base.qcow2 -F qcow2 {name} copy.qcow2");
            work.vdisk(&format!("qemu-img convert {words}")).succeeds();
            shows_its_zeroes(&work, "copy.qcow2");
        }
    }
}

/// An image that is shorter than those around it hides what its base holds past its end: what the
/// one above leaves open there is zero, and stays so in the base.
#[test]
fn what_a_short_image_hides_is_zero_in_the_base_it_is_committed_past() {
    let work = Work::new();
    work.vdisk("qemu-img create -q -f qcow2 base.qcow2 2M").succeeds();
    work.vdisk_fed("write base.qcow2 0", &noise(1, 2 << 20)).succeeds();
    work.vdisk("qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 middle.qcow2 1M").succeeds();
    work.vdisk("qemu-img create -q -f qcow2 -b middle.qcow2 -F qcow2 top.qcow2 2M").succeeds();
    work.vdisk("qemu-img commit -q -b base.qcow2 top.qcow2").succeeds();
    let bytes = work.vdisk("read base.qcow2 0 2M").succeeds().stdout;
    let (kept, hidden) = bytes.split_at(1 << 20);
    assert!(kept == &noise(1, 2 << 20)[..1 << 20], "the beginning has changed");
    assert!(hidden.iter().all(|byte| *byte == 0), "the base shows what was hidden");
}

/// What the qcow2 specification says of the corrupt bit: who finds the tables wrong sets it, and
/// nobody writes until a check has mended the image.
#[test]
fn an_image_whose_tables_are_found_wrong_says_so_until_it_is_mended() {
    let work = Work::new();
    work.vdisk("create disk.qcow2 4M").succeeds();
    work.vdisk_fed("write disk.qcow2 0", &noise(1, 256 << 10)).succeeds();
    let sound = work.bytes("disk.qcow2");
    let number = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap());
    let l2 = (number(number(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    // The second entry points into a cluster, then onto the L1 table.
    for wrong in [number(l2 + 8) | 0x200, number(40) | 1 << 63] {
        let mut bytes = sound.clone();
        bytes[l2 + 8..l2 + 16].copy_from_slice(&wrong.to_be_bytes());
        work.put("disk.qcow2", &bytes);
        // Who only reads changes nothing.
        work.vdisk("qemu-img info disk.qcow2").succeeds();
        assert!(work.bytes("disk.qcow2") == bytes, "info has changed the image");
        work.vdisk_fed("write disk.qcow2 64K", b"no").fails(&[]);
        let info = work.vdisk("qemu-img info disk.qcow2").succeeds().out();
        assert!(info.contains("corrupt: true"), "{info}");
        work.vdisk_fed("write disk.qcow2 1M", b"no").fails(&["corrupt", "check"]);
        work.vdisk("check --repair all disk.qcow2").succeeds();
        work.vdisk_fed("write disk.qcow2 1M", b"yes").succeeds();
        let read = work.vdisk("read disk.qcow2 0 64K").succeeds().stdout;
        assert!(read == noise(1, 256 << 10)[..64 << 10], "the rest is not what it was");
    }
}

/// A name in an image comes from whoever wrote it: `json:` may mean any file, or a server.
#[test]
fn a_json_name_in_an_image_is_followed_only_for_who_vouches_for_it() {
    let work = Work::new();
    work.put("base.raw", vec![7; 1 << 20]);
    let json = "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"base.raw\"}}";
    let create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", json, "-F", "raw", "a.qcow2"];
    work.vdisk_args(create).succeeds();
    let convert = ["qemu-img", "convert", "-O", "raw", "a.qcow2", "out.raw"];
    let vdisk = env!("CARGO_BIN_EXE_vdisk");
    let with = |value: &str| {
        let variable = format!("VDISK_TRUST_JSON_NAMES={value}");
        work.run("env", [variable.as_str(), vdisk].into_iter().chain(convert))
    };
    work.vdisk_args(convert).fails(&["only paths of files are opened"]);
    with("0").fails(&["only paths of files are opened"]);
    with("1").succeeds();
    assert!(work.bytes("out.raw") == work.bytes("base.raw"));
    // The engine's own verbs know no such thing.
    let own = [&format!("VDISK_TRUST_JSON_NAMES={}", 1), vdisk, "read", "a.qcow2", "0", "512"];
    work.run("env", own).fails(&["only paths of files are opened"]);
}

/// An OVA is a tar: its disks stand in it as they are.
#[test]
fn a_vmdk_inside_another_file_is_opened_where_it_stands() {
    let work = Work::new();
    let disk: Vec<u8> = (0..3u32 << 20).map(|n| (n / 7000) as u8).collect();
    work.put("disk.raw", &disk);
    work.vdisk("qemu-img convert -f raw -O vmdk -o subformat=streamOptimized disk.raw d.vmdk")
        .succeeds();
    let vmdk = work.bytes("d.vmdk");
    let size = vmdk.len();
    assert!(size.is_multiple_of(512));
    work.put("a.ova", [vec![1; 1536], vmdk, vec![2; 2048]].concat());
    let options = |size: usize| {
        format!(
            "driver=vmdk,file.driver=raw,file.offset=1536,file.size={size},file.file.filename=a.ova"
        )
    };
    let convert = |options: &str| format!("qemu-img convert --image-opts -O raw {options} out.raw");
    work.vdisk(&convert(&options(size))).succeeds();
    assert!(work.bytes("out.raw") == disk);
    let json = format!(
        "json:{{'driver':'vmdk','file':{{'driver':'raw','offset':1536,'size':{size},\
         'file':{{'driver':'file','filename':'a.ova'}}}}}}"
    );
    work.vdisk_args(["qemu-img", "compare", "-F", "raw", &json, "disk.raw"]).succeeds();
    work.vdisk(&convert(&options(1 << 30))).fails(&["has to be smaller or equal"]);
    work.vdisk(&convert(&options(size + 1))).fails(&["not multiple of 512"]);
    // Nothing is written past a part of a given size.
    let into = "driver=raw,offset=512,size=1024,file.filename=a.ova";
    let before = work.bytes("a.ova");
    work.vdisk(&format!("qemu-img convert -n --target-image-opts -f raw disk.raw {into}"))
        .fails(&["smaller than input"]);
    assert!(work.bytes("a.ova") == before);
}
