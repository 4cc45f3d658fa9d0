//! `vdisk mount --raw`: a disk and its snapshots as files.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use crate::host::Work;
use crate::mount::{MIB, noise, soon};
use crate::require::{Need, have};

/// Where the first hole or the first data from `offset` begins.
fn seek(file: &File, offset: i64, whence: nix::unistd::Whence) -> Option<i64> {
    nix::unistd::lseek(file, offset, whence).ok()
}

#[test]
fn a_raw_mount_reads_writes_and_has_the_disks_holes() {
    if !have(Need::Fuse) || !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    fs::create_dir(work.path("at")).unwrap();
    work.qemu_img("create -f qcow2 disk.qcow2 64M").succeeds();
    work.qemu_io("disk.qcow2", &["write -P 1 1M 1M", "write -P 2 10M 128k"]).succeeds();
    work.vdisk("mount --raw disk.qcow2 at").succeeds();
    let disk = File::options().read(true).write(true).open(work.path("at/disk.raw")).unwrap();
    assert_eq!(disk.metadata().unwrap().len(), 64 * MIB);
    let mut bytes = vec![0; 2 << 20];
    disk.read_exact_at(&mut bytes, MIB / 2).unwrap();
    assert!(bytes[..512 << 10].iter().all(|b| *b == 0));
    assert!(bytes[512 << 10..][..1 << 20].iter().all(|b| *b == 1));
    // Odd offsets, odd lengths, across clusters.
    let data = noise(2, 300_001);
    disk.write_all_at(&data, 20 * MIB + 12_345).unwrap();
    disk.sync_all().unwrap();
    drop(disk);

    use nix::unistd::Whence::{SeekData, SeekHole};
    let disk = File::open(work.path("at/disk.raw")).unwrap();
    // Everything counts as data until the kernel has told of the writer's close.
    soon("the first hole", || seek(&disk, 0, SeekData) != Some(0));
    assert_eq!(seek(&disk, 0, SeekData), Some(1 << 20));
    assert_eq!(seek(&disk, 1 << 20, SeekHole), Some(2 << 20));
    assert_eq!(seek(&disk, 2 << 20, SeekData), Some(10 << 20));
    assert_eq!(seek(&disk, 30 << 20, SeekData), None);
    assert_eq!(seek(&disk, 30 << 20, SeekHole), Some(30 << 20));
    drop(disk);
    work.run("cp", ["--sparse=auto", "at/disk.raw", "copy.raw"]).succeeds();
    work.run("cmp", ["at/disk.raw", "copy.raw"]).succeeds();
    work.vdisk("umount at").succeeds();
    work.qemu_img("check disk.qcow2").succeeds();
    work.qemu_img("compare disk.qcow2 copy.raw").succeeds();
    let mut copy = File::open(work.path("copy.raw")).unwrap();
    copy.seek(SeekFrom::Start(20 * MIB + 12_345)).unwrap();
    let mut back = vec![0; data.len()];
    copy.read_exact(&mut back).unwrap();
    assert!(back == data);
}

#[test]
fn holes_punched_in_a_raw_mount_are_given_back_to_the_disk() {
    if !have(Need::Fuse) || !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    fs::create_dir(work.path("at")).unwrap();
    work.qemu_img("create -f qcow2 disk.qcow2 64M").succeeds();
    work.qemu_io("disk.qcow2", &["write -P 1 0 8M"]).succeeds();
    work.vdisk("mount --raw disk.qcow2 at").succeeds();
    work.run("fallocate", ["-p", "-o", "1M", "-l", "4M", "at/disk.raw"]).succeeds();
    work.run("fallocate", ["-z", "-o", "6M", "-l", "1M", "at/disk.raw"]).succeeds();
    // The disk has its size and keeps it.
    work.run("fallocate", ["-l", "65M", "at/disk.raw"]).ends(1);
    work.run("truncate", ["-s", "1M", "at/disk.raw"]).ends(1);
    for words in [&["touch", "at/new"][..], &["mkdir", "at/new"], &["rm", "-f", "at/disk.raw"]] {
        work.run(words[0], &words[1..]).fails(&["at/", "not permitted"]);
    }
    work.vdisk("umount at").succeeds();
    let reads = [
        "read -P 1 0 1M",
        "read -P 0 1M 4M",
        "read -P 1 5M 1M",
        "read -P 0 6M 1M",
        "read -P 1 7M 1M",
        "read -P 0 8M 56M",
    ];
    work.qemu_io("disk.qcow2", &reads).succeeds();
    work.qemu_img("check disk.qcow2").succeeds();
    let map = work.qemu_img("map --output=json disk.qcow2").succeeds().out();
    assert!(map.contains(r#""start": 1048576, "length": 4194304"#), "{map}");
}

#[test]
fn a_raw_mount_ends_at_the_disks_end() {
    if !have(Need::Fuse) || !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    fs::create_dir(work.path("at")).unwrap();
    work.qemu_img("create -f qcow2 disk.qcow2 1M").succeeds();
    work.vdisk("mount --raw disk.qcow2 at").succeeds();
    let past = work.run(
        "dd",
        [
            "if=/dev/zero",
            "of=at/disk.raw",
            "bs=64k",
            "seek=15",
            "count=2",
            "conv=notrunc,fsync",
            "oflag=direct",
        ],
    );
    past.ends(1).says(&["no space left"]);
    work.vdisk("umount at").succeeds();
    work.vdisk("mount --raw --read-only disk.qcow2 at").succeeds();
    let error = File::options().write(true).open(work.path("at/disk.raw")).unwrap_err();
    assert!(matches!(error.raw_os_error(), Some(libc::EROFS | libc::EACCES)), "{error}");
    work.vdisk("umount at").succeeds();
}

#[test]
fn a_raw_mount_shows_the_snapshots_as_they_were_taken() {
    if !have(Need::Fuse) || !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    fs::create_dir(work.path("at")).unwrap();
    work.vdisk("create disk.qcow2 16M").succeeds();
    for (number, name) in ["one", "two", "three"].iter().enumerate() {
        let write = format!("write -P {} {number}M 2M", number + 1);
        work.qemu_io("disk.qcow2", &[&write]).succeeds();
        work.vdisk(&format!("snapshot create disk.qcow2 {name}")).succeeds();
    }
    work.vdisk("mount --raw disk.qcow2 at").succeeds();
    work.run("dd", ["if=/dev/zero", "of=at/disk.raw", "bs=1M", "count=16", "conv=notrunc,fsync"])
        .succeeds();
    let mut names: Vec<_> = fs::read_dir(work.path("at/snapshots"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["one.raw", "three.raw", "two.raw"]);
    for (number, name) in ["one", "two", "three"].iter().enumerate() {
        let bytes = work.bytes(format!("at/snapshots/{name}.raw"));
        let last = number as u8 + 1;
        let expected = |mib: usize| if mib > number + 1 { 0 } else { last.min(mib as u8 + 1) };
        for mib in 0..16 {
            let stretch = &bytes[mib << 20..(mib + 1) << 20];
            assert!(stretch.iter().all(|b| *b == expected(mib)), "{name}: {mib} MiB");
        }
        let error = File::options().write(true).open(work.path(format!("at/snapshots/{name}.raw")));
        assert!(matches!(error.unwrap_err().raw_os_error(), Some(libc::EROFS | libc::EACCES)));
    }
    work.vdisk("umount at").succeeds();
    work.qemu_io("disk.qcow2", &["read -P 0 0 16M"]).succeeds();
    work.qemu_img("check disk.qcow2").succeeds();
}
