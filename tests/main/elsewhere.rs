//! Data that do not stand in the image as they are: in a file of their own, or encrypted.

use std::fs;

use crate::host::Work;
use crate::interop::{SIZE, both_write};
use crate::require::{Need, have};
use crate::twin::{PASSPHRASE, Twin, json, noise, qemu_info, same_bytes};

fn with_passphrase() -> Work {
    let work = Work::new();
    work.put(PASSPHRASE, "open sesame");
    work
}

#[test]
fn both_write_one_image_with_an_external_data_file_in_turn() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    for (number, options) in ["", "--cluster-size 512", "--extended-l2"].iter().enumerate() {
        let image = format!("own-{number}.qcow2");
        let words = format!("--data-file own-{number}.data {options}");
        both_write(&mut Twin::create(&work, &image, SIZE, &words));
        assert!(fs::metadata(work.path(&image)).unwrap().len() < 2 << 20, "{image}: tables only");
    }
    for (number, options) in ["", ",data_file_raw=on", ",extended_l2=on"].iter().enumerate() {
        let image = format!("theirs-{number}.qcow2");
        let options = format!("data_file=theirs-{number}.data{options}");
        work.qemu_img(&format!("create -q -f qcow2 -o {options} {image} {SIZE}")).succeeds();
        both_write(&mut Twin::blank(&work, &image, SIZE));
    }
}

#[test]
fn a_raw_data_file_is_the_disk_for_who_does_not_know_the_image() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let mut disk = Twin::create(&work, "d.qcow2", SIZE, "--data-file d.raw --data-file-raw");
    let info = qemu_info(&work, "d.qcow2");
    assert_eq!(info["format-specific"]["data"]["data-file-raw"], true, "{info}");
    both_write(&mut disk);
    same_bytes("d.raw", &work.bytes("d.raw"), &disk.bytes);
    // What others write there is seen: all of the tables were allocated.
    disk.bytes[777_777..777_780].copy_from_slice(b"abc");
    work.put("d.raw", &disk.bytes);
    disk.holds();
    for size in [SIZE + 204_800, SIZE - 307_200] {
        work.vdisk(&format!("resize d.qcow2 {size} --shrink")).succeeds();
        disk.bytes.resize(size, 0);
        disk.holds();
        same_bytes("d.raw", &work.bytes("d.raw"), &disk.bytes);
    }
}

#[test]
fn a_disk_and_its_data_file_move_together_and_are_missed_by_name() {
    let work = Work::new();
    fs::create_dir(work.path("a")).unwrap();
    let mut disk = Twin::create(&work, "a/d.qcow2", 1 << 20, "--data-file d.data");
    disk.write(1000, &noise(1, 200_000));
    fs::rename(work.path("a"), work.path("b")).unwrap();
    let moved = Twin::of(&work, "b/d.qcow2", disk.bytes);
    moved.reads_right();
    fs::rename(work.path("b/d.data"), work.path("b/gone")).unwrap();
    work.vdisk("read b/d.qcow2 0 512").fails(&["d.data", "external data file"]);
    // A name that is no path is refused, like a backing file's.
    let mut bytes = work.bytes("b/d.qcow2");
    let at = bytes.windows(6).position(|b| b == b"d.data").unwrap();
    bytes[at..at + 6].copy_from_slice(b"nbd:xy");
    work.put("b/d.qcow2", &bytes);
    work.vdisk("read b/d.qcow2 0 512").fails(&["nbd:xy", "only paths"]);
    // Neither is the image itself.
    fs::hard_link(work.path("b/d.qcow2"), work.path("b/itself")).unwrap();
    bytes[at..at + 6].copy_from_slice(b"itself");
    bytes[at - 1] = 6;
    fs::write(work.path("b/d.qcow2"), &bytes).unwrap();
    work.vdisk("read b/d.qcow2 0 512").fails(&["names itself"]);
}

#[test]
fn making_a_disk_replaces_no_file_that_is_to_be_its_data_file() {
    let work = Work::new();
    work.put("precious", "all that I have");
    work.vdisk("create d.qcow2 1M --data-file precious").fails(&["precious", "exists"]);
    assert_eq!(work.bytes("precious"), b"all that I have");
    assert_eq!(work.files(), ["precious"]);
}

#[test]
fn snapshots_and_clones_stand_on_a_disk_with_a_data_file() {
    let work = Work::new();
    let mut disk = Twin::create(&work, "d.qcow2", 1 << 20, "--data-file d.data");
    disk.write(70_000, &noise(2, 100_000));
    let before = disk.bytes.clone();
    work.vdisk("snapshot create d.qcow2 one").succeeds();
    disk.write(80_000, b"after");
    disk.reads_right();
    work.vdisk("snapshot revert d.qcow2 one --yes").succeeds();
    disk.bytes = before;
    disk.reads_right();
    work.vdisk("snapshot delete d.qcow2 one --yes").succeeds();
    disk.reads_right();
    work.vdisk("clone d.qcow2 c.qcow2").succeeds();
    Twin::of(&work, "c.qcow2", disk.bytes).reads_right();
}

#[test]
fn both_write_one_encrypted_image_of_qemus_in_turn() {
    if !have(Need::Qemu) {
        return;
    }
    let work = with_passphrase();
    let luks = "encrypt.format=luks,encrypt.iter-time=10";
    for (number, options) in [
        luks,
        "encrypt.format=luks,encrypt.iter-time=10,cluster_size=512",
        "encrypt.format=luks,encrypt.iter-time=10,extended_l2=on",
        "encrypt.format=luks,encrypt.iter-time=10,compat=0.10",
        "encrypt.format=luks,encrypt.iter-time=10,data_file=x.data",
        "encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256",
        "encrypt.format=aes",
    ]
    .iter()
    .enumerate()
    {
        let image = format!("e{number}.qcow2");
        let secret = format!("--object secret,id=sec0,file={PASSPHRASE}");
        let options = format!("{options},encrypt.key-secret=sec0");
        work.qemu_img(&format!("create -q -f qcow2 {secret} -o {options} {image} {SIZE}"))
            .succeeds();
        let mut disk = Twin::blank(&work, &image, SIZE).encrypted();
        if options.contains("compat=0.10") {
            // No zero clusters: only what both write.
            disk.write(100_001, &noise(4, 300_000));
            disk.qemu_write(1 << 20, 4096, 0x11);
            disk.write((1 << 20) + 77, b"here");
            disk.holds();
        } else {
            both_write(&mut disk);
        }
        if number == 0 {
            let bytes = work.bytes(&image);
            assert!(!bytes.windows(64).any(|b| b == [0x33; 64]), "no guest byte stands in plain");
        }
    }
}

#[test]
fn an_encrypted_disk_of_our_own_is_written_by_both_in_turn() {
    if !have(Need::Qemu) {
        return;
    }
    let work = with_passphrase();
    for (number, options) in
        ["", "--preallocation full", "--extended-l2", "--data-file x.data"].iter().enumerate()
    {
        let image = format!("own{number}.qcow2");
        let key = format!("--encrypt --iter-time 10 --passphrase-file {PASSPHRASE}");
        let mut disk = Twin::create(&work, &image, SIZE, &format!("{key} {options}")).encrypted();
        disk.holds();
        both_write(&mut disk);
        let info = qemu_info(&work, &image);
        assert_eq!(info["encrypted"], true, "{info}");
        assert_eq!(info["format-specific"]["data"]["encrypt"]["cipher-alg"], "aes-256", "{info}");
    }
}

#[test]
fn without_the_passphrase_an_encrypted_disk_shows_its_tables_and_nothing_else() {
    let work = with_passphrase();
    let key = format!("--encrypt --iter-time 10 --passphrase-file {PASSPHRASE}");
    let mut disk = Twin::create(&work, "d.qcow2", 1 << 20, &key).encrypted();
    disk.write(5, &noise(3, 200_000));
    disk.reads_right();
    assert_eq!(json(work.vdisk("check d.qcow2 --json"))["leaks"], 0);
    json(work.vdisk("info d.qcow2 --json"));
    json(work.vdisk("map d.qcow2 --json"));
    work.vdisk("read d.qcow2 0 512").fails(&["encrypted", "no passphrase"]);
    work.vdisk_fed("write d.qcow2 0", b"in plain").fails(&["encrypted", "no passphrase"]);
    work.put("wrong", "open barley");
    let wrong = work.vdisk("read d.qcow2 0 512 --passphrase-file wrong");
    wrong.fails(&["opens none of the image's key slots"]);
    disk.reads_right();
    work.vdisk("check d.qcow2").succeeds();
    // The rest of the last cluster would have to be zeroed: nothing is done.
    work.vdisk("resize d.qcow2 2M").fails(&["encrypted", "no passphrase"]);
    disk.reads_right();
    // A new layer would hold in plain what is written to it.
    work.vdisk("snapshot create d.qcow2 one").fails(&["is encrypted"]);
    work.vdisk("clone d.qcow2 c.qcow2").fails(&["is encrypted"]);
    disk.write(0, b"still a disk of its own");
    disk.reads_right();
    let done = work.vdisk(&format!("clone --full d.qcow2 c.qcow2 --passphrase-file {PASSPHRASE}"));
    done.succeeds();
    Twin::of(&work, "c.qcow2", disk.bytes).reads_right();
}

#[test]
fn the_drop_in_makes_reads_and_describes_data_files_as_qemu_img_does() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    for raw in ["off", "on"] {
        let image = format!("{raw}.qcow2");
        let options = format!("data_file={raw}.data,data_file_raw={raw}");
        work.vdisk(&format!("qemu-img create -q -f qcow2 -o {options} {image} {SIZE}")).succeeds();
        let mut disk = Twin::blank(&work, &image, SIZE);
        disk.qemu_write(100_352, 200_192, 0x77);
        disk.write(5, b"ours");
        disk.holds();
        for words in ["info", "info --output=json", "check"] {
            let ours = work.vdisk(&format!("qemu-img {words} {image}")).succeeds().out();
            let theirs = work.qemu_img(&format!("{words} {image}")).succeeds().out();
            match words {
                "info --output=json" => {
                    let parse = |text: &str| serde_json::from_str::<serde_json::Value>(text);
                    assert_eq!(parse(&ours).unwrap(), parse(&theirs).unwrap());
                }
                _ => assert_eq!(ours, theirs, "{words}"),
            }
        }
        work.vdisk(&format!("qemu-img convert -O raw {image} flat")).succeeds();
        same_bytes("flat", &work.bytes("flat"), &disk.bytes);
        let refused = work.vdisk(&format!("qemu-img snapshot -c one {image}"));
        refused.fails(&["Could not create snapshot", "not supported"]);
        let info = json(work.vdisk(&format!("info --json {image}")));
        assert_eq!(info["format_specific"]["data_file"], format!("{raw}.data"));
    }
    let words = "qemu-img create -q -f qcow2 -o data_file_raw=on x.qcow2 1M";
    work.vdisk(words).fails(&["data-file-raw requires data-file"]);
}

#[test]
fn a_clone_that_grows_with_preallocation_goes_on_showing_its_base() {
    if !have(Need::Qemu) {
        return;
    }
    // The new cluster at the old end of the disk hid what the base shows in its first part.
    let work = Work::new();
    let size = 200_192;
    for extended in ["off", "on"] {
        let base = noise(9, size);
        work.put("base.raw", &base);
        let create = format!("create -q -f qcow2 -o extended_l2={extended} -b base.raw -F raw");
        work.qemu_img(&format!("{create} {extended}.qcow2 {size}")).succeeds();
        let words = format!("qemu-img resize --preallocation=metadata {extended}.qcow2 1M");
        work.vdisk(&words).succeeds();
        let mut disk = Twin::of(&work, &format!("{extended}.qcow2"), base);
        disk.bytes.resize(1 << 20, 0);
        disk.holds();
    }
}
