//! A disk as it was at a snapshot: for every command that reads one, and beside its raw mount.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use crate::host::Work;
use crate::mount::soon;
use crate::require::{Need, have};
use crate::serve::Served;
use crate::twin::{noise, same_bytes};

const MIB: usize = 1 << 20;

#[test]
fn every_command_that_reads_a_disk_reads_it_at_a_snapshot() {
    if !have(Need::Nbd) {
        return;
    }
    let work = Work::new();
    work.vdisk("create d 1M").succeeds();
    let mut old = noise(1, 300_000);
    work.vdisk_fed("write d 0", &old).succeeds();
    work.vdisk("snapshot create d one").succeeds();
    work.vdisk_fed("write d 0", &noise(2, 400_000)).succeeds();
    old.resize(MIB, 0);

    same_bytes("read", &work.vdisk("read d 0 1M --snapshot one").succeeds().stdout, &old);
    work.vdisk("convert d old.raw --format raw --snapshot one").succeeds();
    same_bytes("convert", &work.bytes("old.raw"), &old);
    work.vdisk("compare d old.raw --snapshot-a one").succeeds();
    work.vdisk("compare old.raw d --snapshot-b one").succeeds();
    work.vdisk("compare d d --snapshot one").succeeds();
    work.vdisk("compare d d --snapshot-a one").ends(1);
    work.vdisk("clone --full d full --snapshot one").succeeds();
    work.vdisk("clone d --snapshot one c1 c2").succeeds();
    work.vdisk("clone d --snapshot one --count 2 --name n{}").succeeds();
    for disk in ["full", "c1", "c2", "n0", "n1"] {
        same_bytes(disk, &work.vdisk(&format!("read {disk} 0 1M")).succeeds().stdout, &old);
    }
    work.vdisk("check d --snapshot one").succeeds();
    let files = |words: &str| {
        let out = work.vdisk(words).succeeds().out();
        assert!(!out.contains("\"d\""), "{words}: {out}");
    };
    files("map --json d --snapshot one");
    files("info --json d --snapshot one");
    let served = Served::start(&work, "nbd d --socket s --snapshot one");
    work.run("nbdcopy", [served.uri.as_str(), "copied.raw"]).succeeds();
    served.stop();
    same_bytes("served", &work.bytes("copied.raw"), &old);
    for words in ["read d 0 1", "map d", "info d", "check d", "convert d x", "clone d x"] {
        work.vdisk(&format!("{words} --snapshot none")).fails(&["none", "one"]);
    }
    // The disk has gone its own way all the time, and may be in use.
    let served = Served::start(&work, "nbd d --socket s");
    work.vdisk("clone d --snapshot one c3").succeeds();
    same_bytes("c3", &work.vdisk("read c3 0 1M").succeeds().stdout, &old);
    same_bytes("in use", &work.vdisk("read d 0 1M --snapshot one").succeeds().stdout, &old);
    work.vdisk("check d --snapshot one").succeeds();
    served.stop();
    same_bytes("d", &work.vdisk("read d 0 400000").succeeds().stdout, &noise(2, 400_000));
}

#[test]
fn a_raw_mount_shows_what_becomes_of_the_snapshots_meanwhile() {
    if !have(Need::Fuse) {
        return;
    }
    let work = Work::new();
    fs::create_dir(work.path("at")).unwrap();
    work.vdisk("create d 1M").succeeds();
    work.vdisk("mount --raw d at").succeeds();
    let names = || {
        let mut names: Vec<String> = fs::read_dir(work.path("at/snapshots"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert!(names().is_empty());
    assert!(!work.path("at/snapshots/one.raw").exists());
    let disk = File::options().write(true).open(work.path("at/disk.raw")).unwrap();
    let mut moments = Vec::new();
    for (number, name) in ["one", "two", "three"].iter().enumerate() {
        disk.write_all_at(&noise(number as u64, 100_000), 0).unwrap();
        disk.sync_all().unwrap();
        moments.push(noise(number as u64, 100_000));
        work.vdisk(&format!("snapshot create d {name}")).succeeds();
        // At once, by its name and in the list.
        let bytes = work.bytes(format!("at/snapshots/{name}.raw"));
        same_bytes(name, &bytes[..100_000], &moments[number]);
    }
    assert_eq!(names(), ["one.raw", "three.raw", "two.raw"]);
    // One that is open stays what it is, whatever happens to the others.
    let open = File::open(work.path("at/snapshots/one.raw")).unwrap();
    work.vdisk("snapshot rename d three drei").succeeds();
    work.vdisk("snapshot merge d two").succeeds();
    assert_eq!(names(), ["drei.raw", "one.raw"]);
    assert!(!work.path("at/snapshots/two.raw").exists());
    soon("the old name goes", || !work.path("at/snapshots/three.raw").exists());
    same_bytes("drei", &work.bytes("at/snapshots/drei.raw")[..100_000], &moments[2]);
    let mut bytes = vec![0; 100_000];
    open.read_exact_at(&mut bytes, 0).unwrap();
    same_bytes("one", &bytes, &moments[0]);
    drop((open, disk));
    work.vdisk("umount at").succeeds();
}
