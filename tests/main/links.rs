//! Disks that are named through links: a symbolic link means the file that it leads to, and a file
//! with several names is never one disk under one and another under the other.

use std::fs;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::Path;

use crate::host::Work;
use crate::mount::overwrite;
use crate::require::{Need, have};
use crate::twin::{clean, noise};

/// `real/d.qcow2`, and links to it: one from above, one to that link, and one to its directory.
fn linked() -> Work {
    let work = Work::new();
    fs::create_dir(work.path("real")).unwrap();
    work.vdisk("create real/d.qcow2 1M").succeeds();
    symlink("real/d.qcow2", work.path("l.qcow2")).unwrap();
    symlink(work.path("l.qcow2"), work.path("m.qcow2")).unwrap();
    symlink("real", work.path("dir")).unwrap();
    work
}

const NAMES: [&str; 4] = ["real/d.qcow2", "l.qcow2", "m.qcow2", "dir/d.qcow2"];

/// Requires that the links are links, that nothing stands beside them, and that all names show the
/// same disk, which begins with `expected`.
#[track_caller]
fn all_show(work: &Work, expected: &[u8], words: &str) {
    for link in ["l.qcow2", "m.qcow2", "dir"] {
        let meta = fs::symlink_metadata(work.path(link)).unwrap();
        assert!(meta.is_symlink(), "{link} after {words}");
    }
    assert_eq!(work.files(), ["dir", "l.qcow2", "m.qcow2", "real"], "after {words}");
    for name in NAMES {
        let read = work.vdisk(&format!("read {name} 0 {}", expected.len())).succeeds();
        assert_eq!(read.stdout, expected, "{name} after {words}");
    }
}

#[test]
fn every_command_means_the_file_that_a_link_leads_to() {
    // The real file became the snapshot's layer, and was written by its real name.
    for name in NAMES {
        let work = linked();
        let run = |words: &str| work.vdisk(&words.replace("DISK", name)).succeeds();
        let write =
            |bytes: &[u8], at: &str| work.vdisk_fed(&format!("write {at} 0"), bytes).succeeds();
        write(b"AAAA", name);
        run("snapshot create DISK s");
        all_show(&work, b"AAAA", "snapshot create");
        write(b"CCCC", "real/d.qcow2");
        run("snapshot create DISK t --description words");
        write(b"DDDD", name);
        run("snapshot revert DISK t --yes");
        all_show(&work, b"CCCC", "snapshot revert");
        run("snapshot undo DISK --yes");
        all_show(&work, b"DDDD", "snapshot undo");
        run("snapshot rename DISK t u");
        run("snapshot revert DISK s --keep v");
        all_show(&work, b"AAAA", "snapshot revert --keep");
        run("snapshot delete DISK v --yes");
        write(b"EEEE", name);
        run("snapshot merge DISK s");
        all_show(&work, b"EEEE", "snapshot merge");
        run("snapshot forget DISK");
        run("snapshot create DISK w");
        run("snapshot delete DISK w --yes --forget");
        all_show(&work, b"EEEE", "snapshot delete");
        for words in ["resize DISK 2M", "compact DISK", "check DISK", "info DISK", "tree ."] {
            run(words);
        }
        let list = run("snapshot list --json DISK").out();
        let list: serde_json::Value = serde_json::from_str(&list).unwrap();
        for row in list["snapshots"].as_array().unwrap() {
            let file = row["file"].as_str().unwrap();
            assert!(work.path(file).is_file(), "{file}");
        }
        all_show(&work, b"EEEE", "the rest");
        for file in fs::read_dir(work.path("real")).unwrap() {
            clean(&work, file.unwrap().path().to_str().unwrap());
        }
    }
}

#[test]
fn a_clone_named_by_a_link_is_committed_and_rebased_in_its_place() {
    for link in ["c.qcow2", "far/c.qcow2"] {
        let work = Work::new();
        for dir in ["real", "far"] {
            fs::create_dir(work.path(dir)).unwrap();
        }
        work.vdisk("create base.qcow2 1M").succeeds();
        work.vdisk_fed("write base.qcow2 0", b"base").succeeds();
        work.vdisk("clone base.qcow2 real/c.qcow2").succeeds();
        symlink(work.path("real/c.qcow2"), work.path(link)).unwrap();
        work.vdisk_fed(&format!("write {link} 4"), b"clone").succeeds();
        work.vdisk(&format!("snapshot create {link} s")).succeeds();
        work.vdisk("create other.qcow2 1M").succeeds();
        work.vdisk(&format!("snapshot merge {link} s")).succeeds();
        work.vdisk(&format!("rebase {link} --backing other.qcow2")).succeeds();
        for name in [link, "real/c.qcow2"] {
            let read = work.vdisk(&format!("read {name} 0 9")).succeeds();
            assert_eq!(read.stdout, b"baseclone", "{name}");
        }
        work.vdisk(&format!("commit {link}")).succeeds();
        assert_eq!(work.vdisk("read other.qcow2 0 9").succeeds().stdout, b"baseclone");
        work.vdisk(&format!("rebase {link} --flatten")).succeeds();
        assert_eq!(work.vdisk(&format!("read {link} 0 9")).succeeds().stdout, b"baseclone");
        assert!(fs::symlink_metadata(work.path(link)).unwrap().is_symlink());
        assert_eq!(fs::read_dir(work.path("far")).unwrap().count(), usize::from(link != "c.qcow2"));
    }
}

#[test]
fn a_disk_in_use_is_the_same_by_all_its_names() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    for (number, name) in NAMES.into_iter().enumerate() {
        let work = linked();
        fs::create_dir(work.path("real/raw")).unwrap();
        work.vdisk(&format!("mount --raw {name} real/raw")).succeeds();
        for (snapshot, by) in NAMES.into_iter().enumerate() {
            overwrite(&work.path("real/raw/disk.raw"), &noise(snapshot as u64, 4096));
            work.vdisk(&format!("snapshot create {by} s{snapshot}")).succeeds();
            work.vdisk_fed(&format!("write {by} 0"), b"x").fails(&["in use"]);
        }
        work.vdisk(&format!("snapshot merge {} s1", NAMES[3 - number])).succeeds();
        work.vdisk("umount real/raw").succeeds();
        all_show(&work, &noise(3, 4096), "snapshots of a disk in use");
        work.vdisk("snapshot revert m.qcow2 s0 --yes").succeeds();
        all_show(&work, &noise(0, 4096), "snapshot revert");
    }
}

#[test]
fn a_link_that_leads_nowhere_is_named_with_what_it_leads_to() {
    let work = Work::new();
    symlink("gone/d.qcow2", work.path("l.qcow2")).unwrap();
    symlink("b", work.path("a")).unwrap();
    symlink("a", work.path("b")).unwrap();
    for words in ["snapshot create l.qcow2 s", "read l.qcow2 0 1", "resize l.qcow2 1M"] {
        work.vdisk(words).fails(&["l.qcow2", "gone/d.qcow2", "no such file"]);
    }
    work.vdisk("snapshot create a s").fails(&["a:", "symbolic links"]);
    for words in ["create l.qcow2 1M", "create a 1M"] {
        work.vdisk(words).fails(&["exists"]);
    }
    assert!(!work.path("gone").exists());
}

#[test]
fn what_qemu_made_through_a_link_is_opened_through_it() {
    if !have(Need::Qemu) {
        return;
    }
    // QEMU takes a base's name from where the link is.
    let work = Work::new();
    fs::create_dir(work.path("real")).unwrap();
    work.vdisk("create base.qcow2 1M").succeeds();
    work.vdisk_fed("write base.qcow2 0", b"base").succeeds();
    symlink("real/d.qcow2", work.path("l.qcow2")).unwrap();
    fs::write(work.path("real/d.qcow2"), "").unwrap();
    work.qemu_img("create -q -f qcow2 -b base.qcow2 -F qcow2 l.qcow2").succeeds();
    assert_eq!(work.vdisk("read l.qcow2 0 4").succeeds().stdout, b"base");
    work.vdisk_fed("write l.qcow2 4", b"more").succeeds();
    work.qemu_io("l.qcow2", &["read -P 0x62 0 1", "read -P 0x6d 4 1"]).succeeds();
    // And a layer below may be a link as well: its own base is beside the file.
    symlink("real/c.qcow2", work.path("k.qcow2")).unwrap();
    work.vdisk("clone base.qcow2 real/c.qcow2").succeeds();
    work.qemu_img("create -q -f qcow2 -b k.qcow2 -F qcow2 -u top.qcow2 1M").succeeds();
    assert_eq!(work.vdisk("read top.qcow2 0 4").succeeds().stdout, b"base");
}

/// A file's bytes, whoever asks.
fn bytes(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

#[test]
fn a_head_with_another_name_is_not_frozen_under_it() {
    // The other name was the snapshot's layer afterwards, and who wrote to it made it a head again.
    let work = Work::new();
    work.vdisk("create d.qcow2 1M").succeeds();
    work.vdisk("snapshot create d.qcow2 first").succeeds();
    work.vdisk_fed("write d.qcow2 0", b"one").succeeds();
    fs::hard_link(work.path("d.qcow2"), work.path("other.qcow2")).unwrap();
    let before = (work.files(), bytes(&work.path("d.qcow2")));
    for words in [
        "snapshot create d.qcow2 s",
        "snapshot create other.qcow2 s",
        "snapshot revert d.qcow2 first --yes",
        "snapshot revert d.qcow2 first --keep k",
        "snapshot delete d.qcow2 first --yes",
    ] {
        work.vdisk(words).fails(&["2 names", "hard links"]);
        assert_eq!((work.files(), bytes(&work.path("d.qcow2"))), before, "{words}");
    }
    // What writes in place is the same under all names.
    work.vdisk_fed("write other.qcow2 0", b"two").succeeds();
    assert_eq!(work.vdisk("read d.qcow2 0 3").succeeds().stdout, b"two");
    fs::remove_file(work.path("other.qcow2")).unwrap();
    work.vdisk("snapshot create d.qcow2 s").succeeds();
}

#[test]
fn a_layer_that_was_moved_and_left_a_link_does_not_become_the_head() {
    let work = Work::new();
    fs::create_dir(work.path("far")).unwrap();
    work.vdisk("create d.qcow2 4M").succeeds();
    work.vdisk_fed("write d.qcow2 0", &noise(1, 3 << 20)).succeeds();
    work.vdisk("snapshot create d.qcow2 s").succeeds();
    work.vdisk_fed("write d.qcow2 0", b"little").succeeds();
    let layer = work.files().into_iter().find(|name| name.contains('@')).unwrap();
    fs::rename(work.path(&layer), work.path("far").join(&layer)).unwrap();
    symlink(Path::new("far").join(&layer), work.path(&layer)).unwrap();
    work.vdisk("snapshot merge d.qcow2 s").fails(&["is a link"]);
    assert!(fs::symlink_metadata(work.path("d.qcow2")).unwrap().is_file());
    assert_eq!(work.vdisk("read d.qcow2 0 6").succeeds().stdout, b"little");
    work.vdisk("snapshot revert d.qcow2 s --yes").succeeds();
    assert_eq!(work.vdisk("read d.qcow2 0 6").succeeds().stdout, &noise(1, 6)[..]);
}

#[test]
fn a_device_is_not_replaced_by_a_file() {
    if !have(Need::Root) {
        return;
    }
    let work = Work::new();
    fs::File::create(work.path("space")).unwrap().set_len(4 << 20).unwrap();
    let device = work.run("losetup", ["-f", "--show", "space"]).succeeds().out();
    let device = device.trim();
    work.vdisk(&format!("qemu-img create -q -f qcow2 {device} 1M")).succeeds();
    symlink(device, work.path("l.qcow2")).unwrap();
    for name in [device, "l.qcow2"] {
        work.vdisk_fed(&format!("write {name} 0"), b"kept").succeeds();
        work.vdisk(&format!("snapshot create {name} s")).fails(&["is a device"]);
        assert_eq!(work.vdisk(&format!("read {name} 0 4")).succeeds().stdout, b"kept");
    }
    assert!(fs::metadata(device).unwrap().file_type().is_block_device());
    work.run("losetup", ["-d", device]).succeeds();
}

#[test]
fn a_disk_in_use_with_another_name_is_not_frozen_under_it() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let work = Work::new();
    work.vdisk("create d.qcow2 1M").succeeds();
    fs::create_dir(work.path("raw")).unwrap();
    fs::hard_link(work.path("d.qcow2"), work.path("other.qcow2")).unwrap();
    work.vdisk("mount --raw d.qcow2 raw").succeeds();
    work.vdisk("snapshot create d.qcow2 s").fails(&["2 names", "hard links"]);
    overwrite(&work.path("raw/disk.raw"), b"goes on");
    fs::remove_file(work.path("other.qcow2")).unwrap();
    work.vdisk("snapshot create d.qcow2 s").succeeds();
    work.vdisk("umount raw").succeeds();
    assert_eq!(work.vdisk("read d.qcow2 0 7").succeeds().stdout, b"goes on");
}

#[test]
fn a_frozen_layer_with_another_name_stays_as_it_is() {
    let work = Work::new();
    work.vdisk("create d.qcow2 4M").succeeds();
    work.vdisk_fed("write d.qcow2 0", &noise(1, 3 << 20)).succeeds();
    work.vdisk("snapshot create d.qcow2 s").succeeds();
    let layer = work.files().into_iter().find(|name| name.contains('@')).unwrap();
    fs::hard_link(work.path(&layer), work.path("other.qcow2")).unwrap();
    let before = bytes(&work.path(&layer));
    // Opened for writing, it was taken for a head that had not quite been frozen.
    work.vdisk_fed("write other.qcow2 0", b"x").fails(&["frozen layer", "hard links"]);
    work.vdisk("snapshot create other.qcow2 t").fails(&["frozen layer", "hard links"]);
    work.vdisk("resize other.qcow2 8M").fails(&["frozen layer"]);
    assert_eq!(bytes(&work.path(&layer)), before);
    // A merge would write into it.
    work.vdisk_fed("write d.qcow2 0", b"little").succeeds();
    work.vdisk("snapshot merge d.qcow2 s").fails(&["2 names", "hard links"]);
    work.vdisk("snapshot merge d.qcow2 s --in-batches").fails(&["2 names", "hard links"]);
    assert_eq!(bytes(&work.path(&layer)), before);
    assert_eq!(work.vdisk("read d.qcow2 0 6").succeeds().stdout, b"little");
}
