//! Block devices full of old bytes as places of disks: what `vdisk` itself does on them, and a loop
//! device for all tests that need one.

use std::fs;
use std::path::PathBuf;

use crate::host::{Work, with_own_mounts};
use crate::require::{Need, have};
use crate::twin::noise;

/// A loop device on a file, which goes with the test's directory.
pub struct Device {
    /// Its name.
    pub path: String,
    file: PathBuf,
}

/// What a device held before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Old {
    /// Every bit is set.
    Ones,
    /// Noise.
    Noise,
}

impl Old {
    /// So many bytes of it.
    pub fn bytes(self, len: usize) -> Vec<u8> {
        match self {
            Old::Ones => vec![0xff; len],
            Old::Noise => noise(77, len),
        }
    }
}

impl Device {
    /// A device of `len` bytes.
    pub fn new(work: &Work, name: &str, old: Old, len: usize) -> Device {
        work.put(name, old.bytes(len));
        let file = work.path(name);
        let words = ["-f", "--show", file.to_str().unwrap()];
        let path = work.run("losetup", words).succeeds().out().trim().to_owned();
        Device { path, file }
    }

    /// What it holds now.
    pub fn bytes(&self, work: &Work) -> Vec<u8> {
        work.run("blockdev", ["--flushbufs", &self.path]).succeeds();
        fs::read(&self.file).unwrap()
    }

    /// Gives it the old bytes again.
    pub fn refill(&self, old: Old) {
        let len = fs::metadata(&self.file).unwrap().len();
        fs::write(&self.path, old.bytes(len as usize)).unwrap();
    }

    /// Ends it.
    pub fn detach(self, work: &Work) {
        work.run("losetup", ["-d", &self.path]).succeeds();
    }
}

/// A disk of 10 MiB with data in front and in the middle.
pub fn put_source(work: &Work, name: &str) -> Vec<u8> {
    let mut bytes = vec![0; 10 << 20];
    bytes[..3 << 20].copy_from_slice(&noise(5, 3 << 20));
    bytes[6 << 20..7 << 20].copy_from_slice(&noise(6, 1 << 20));
    bytes[(6 << 20) + 9000..(6 << 20) + 90_000].fill(0);
    work.put(name, &bytes);
    bytes
}

#[test]
fn convert_and_create_take_a_device_once_the_user_agrees() {
    if !have(Need::Root) {
        return;
    }
    let work = Work::new();
    let source = put_source(&work, "src.raw");
    for old in [Old::Ones, Old::Noise] {
        let device = Device::new(&work, "dev.img", old, 32 << 20);
        let path = device.path.as_str();
        for words in ["convert src.raw DEV", "create DEV 10M", "create DEV 32M --format raw"] {
            let words = words.replace("DEV", path);
            work.vdisk(&words).fails(&[path, "32 MiB", "unknown kind", "--yes"]);
            assert!(device.bytes(&work) == old.bytes(32 << 20), "{words}: nothing was done");
        }
        work.vdisk(&format!("convert src.raw {path} --format raw --yes")).succeeds();
        let now = device.bytes(&work);
        assert!(now[..source.len()] == source, "old bytes show");
        assert!(now[source.len()..] == old.bytes(32 << 20)[source.len()..], "past the source");
        for options in
            ["--format raw --compress", "--cluster-size 8", "--extended-l2 --cluster-size 4K"]
        {
            device.refill(old);
            work.vdisk(&format!("convert src.raw {path} --yes {options}")).fails(&[]);
            assert!(device.bytes(&work) == old.bytes(32 << 20), "{options}: nothing was done");
        }
        for options in ["", "--compress", "--cluster-size 4K", "--extended-l2"] {
            device.refill(old);
            work.vdisk(&format!("convert src.raw {path} --yes {options}")).succeeds();
            work.vdisk(&format!("compare --strict src.raw {path}")).succeeds();
            work.vdisk(&format!("check {path}")).succeeds();
            work.vdisk(&format!("convert src.raw {path}")).fails(&["qcow2 disk", "--yes"]);
        }
        for options in ["", "--preallocation metadata", "--preallocation full", "--extended-l2"] {
            device.refill(old);
            work.vdisk(&format!("create {path} 10M --yes {options}")).succeeds();
            let seen = work.vdisk(&format!("read {path} 0 10M")).succeeds().stdout;
            assert!(seen.iter().all(|b| *b == 0), "{options}: a new disk is empty");
            work.vdisk_fed(&format!("write {path} 5000000"), b"mine").succeeds();
            work.vdisk(&format!("resize {path} 12M")).succeeds();
            let seen = work.vdisk(&format!("read {path} 0 12M")).succeeds().stdout;
            assert_eq!(seen.iter().filter(|b| **b != 0).count(), 4, "{options}");
            work.vdisk(&format!("check {path}")).succeeds();
        }
        device.refill(old);
        work.vdisk(&format!("create {path} 10M --format raw --yes")).fails(&["33554432"]);
        work.vdisk(&format!("create {path} 32M --format raw --yes")).succeeds();
        assert!(device.bytes(&work).iter().all(|b| *b == 0), "a new disk is empty");
        device.detach(&work);
    }
}

#[test]
fn a_device_that_is_too_small_is_refused_before_anything_is_written() {
    if !have(Need::Root) {
        return;
    }
    let work = Work::new();
    put_source(&work, "src.raw");
    let device = Device::new(&work, "dev.img", Old::Noise, 4 << 20);
    let path = device.path.as_str();
    for words in [
        "convert src.raw DEV --yes",
        "convert src.raw DEV --yes --format raw",
        "create DEV 10M --yes --preallocation full",
        "create DEV 10M --yes --format raw",
        "create DEV 10M --yes --cluster-size 2M",
    ] {
        let words = words.replace("DEV", path);
        work.vdisk(&words).fails(&[path, "device of 4194304 bytes", "nothing was written"]);
        assert!(device.bytes(&work) == Old::Noise.bytes(4 << 20), "{words}");
    }
    // How small it becomes is not known before. What is there then is no disk.
    work.vdisk(&format!("create {path} 1M --yes")).succeeds();
    work.put("noise.raw", noise(9, 6 << 20));
    work.vdisk(&format!("convert noise.raw {path} --yes --compress")).fails(&["No space left"]);
    let info = work.vdisk(&format!("info {path}")).succeeds().out();
    assert!(info.contains("file format: raw"), "{info}");
    // What is stored as zeroes takes no room.
    work.put("thin.raw", [noise(1, 2 << 20), vec![0; 20 << 20]].concat());
    work.vdisk(&format!("convert thin.raw {path} --yes")).succeeds();
    work.vdisk(&format!("compare thin.raw {path}")).succeeds();
}

#[test]
fn a_device_in_use_is_refused_and_says_by_what() {
    if !have(Need::Root) {
        return;
    }
    with_own_mounts(|| {
        let work = Work::new();
        put_source(&work, "src.raw");
        let device = Device::new(&work, "dev.img", Old::Ones, 32 << 20);
        let path = device.path.as_str();
        work.run("mkfs.ext4", ["-q", path]).succeeds();
        work.vdisk(&format!("create {path} 10M")).fails(&["ext4", "--yes"]);
        fs::create_dir(work.path("mnt")).unwrap();
        let mounted = work.path("mnt").display().to_string();
        work.run("mount", [path, &mounted]).succeeds();
        for words in ["convert src.raw DEV --yes", "create DEV 10M --yes"] {
            let words = words.replace("DEV", path);
            work.vdisk(&words).fails(&[path, "in use", &mounted, "nothing was written"]);
        }
        work.run("umount", [&mounted]).succeeds();
        work.run("e2fsck", ["-fn", path]).succeeds();
        work.vdisk(&format!("create {path} 10M --yes")).succeeds();
    });
}

/// A snapshot once gave the device another name, and put a file in its place: in `/dev`, in memory.
#[test]
fn no_file_takes_the_place_of_a_device() {
    if !have(Need::Root) {
        return;
    }
    let work = Work::new();
    let device = Device::new(&work, "dev.img", Old::Ones, 32 << 20);
    let number = device.path.trim_start_matches("/dev/loop");
    fs::create_dir(work.path("dev")).unwrap();
    work.run("mknod", ["dev/disk", "b", "7", number]).succeeds();
    work.vdisk("create dev/disk 10M --yes").succeeds();
    work.vdisk("snapshot create dev/disk first").fails(&["dev/disk", "is a device", "clone"]);
    assert_eq!(work.run("ls", ["dev"]).out(), "disk\n");
    work.vdisk_fed("write dev/disk 0", b"goes on").succeeds();
    work.vdisk("clone dev/disk clone.qcow2").succeeds();
    work.vdisk("snapshot create clone.qcow2 first").succeeds();
    assert_eq!(work.vdisk("read clone.qcow2 0 7").succeeds().out(), "goes on");
}

#[test]
fn a_base_on_a_device_is_not_written_over_under_its_clones() {
    if !have(Need::Root) {
        return;
    }
    let work = Work::new();
    put_source(&work, "src.raw");
    let device = Device::new(&work, "dev.img", Old::Ones, 32 << 20);
    let path = device.path.as_str();
    work.vdisk(&format!("convert src.raw {path} --yes")).succeeds();
    work.vdisk(&format!("clone {path} clone.qcow2")).succeeds();
    for words in ["convert src.raw DEV --yes", "create DEV 10M --yes"] {
        work.vdisk(&words.replace("DEV", path)).fails(&[path, "clones"]);
    }
    work.vdisk("compare src.raw clone.qcow2").succeeds();
}
