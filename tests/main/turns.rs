//! Commands that meet at one disk, and wait for each other.

use std::time::{Duration, Instant};

use crate::host::{Done, PATIENCE, Work};
use crate::require::{Need, have};
use crate::twin::json;

/// How many commands come at once.
const CROWD: usize = 20;

/// Runs a command for each number at the same time.
fn at_once(work: &Work, words: impl Fn(usize) -> String) -> Vec<Done> {
    let running: Vec<_> = (0..CROWD).map(|n| work.vdisk_start(&words(n))).collect();
    running.into_iter().map(|command| command.finish(None, PATIENCE)).collect()
}

fn snapshots(work: &Work, disk: &str) -> Vec<String> {
    let list = json(work.vdisk(&format!("snapshot list --json {disk}")));
    let names = list["snapshots"].as_array().unwrap().iter();
    let mut names: Vec<String> = names.map(|s| s["name"].as_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

fn crowd(word: &str) -> Vec<String> {
    let mut names: Vec<String> = (0..CROWD).map(|n| format!("{word}{n}")).collect();
    names.sort();
    names
}

#[test]
fn twenty_snapshots_at_once_are_twenty_snapshots() {
    let work = Work::new();
    work.vdisk("create disk.qcow2 8M").succeeds();
    work.vdisk_fed("write disk.qcow2 0", b"contents").succeeds();
    let wait = "--wait 50";
    for done in at_once(&work, |n| format!("{wait} snapshot create disk.qcow2 s{n}")) {
        done.succeeds();
    }
    assert_eq!(snapshots(&work, "disk.qcow2"), crowd("s"));
    for done in at_once(&work, |n| format!("{wait} snapshot rename disk.qcow2 s{n} t{n}")) {
        done.succeeds();
    }
    assert_eq!(snapshots(&work, "disk.qcow2"), crowd("t"));
    // Of a line of snapshots each merge changes what the others were planned on.
    for done in at_once(&work, |n| format!("{wait} snapshot merge --yes disk.qcow2 t{n}")) {
        done.succeeds();
    }
    assert_eq!(snapshots(&work, "disk.qcow2"), [""; 0]);
    assert_eq!(work.vdisk("read disk.qcow2 0 8").succeeds().stdout, b"contents");
    work.vdisk("check disk.qcow2").succeeds();
}

#[test]
fn commands_of_every_kind_wait_for_each_other() {
    let work = Work::new();
    work.vdisk("create disk.qcow2 8M").succeeds();
    for done in at_once(&work, |_| "--wait 50 resize disk.qcow2 +1M".to_owned()) {
        done.succeeds();
    }
    let size = json(work.vdisk("info --json disk.qcow2"))["virtual_size"].as_u64();
    assert_eq!(size, Some(8 + CROWD as u64).map(|mib| mib << 20));
    let kinds = |n: usize| match n % 4 {
        0 => format!("--wait 50 snapshot create disk.qcow2 s{n}"),
        1 => "--wait 50 check disk.qcow2".to_owned(),
        2 => "--wait 50 info disk.qcow2".to_owned(),
        _ => "--wait 50 read disk.qcow2 0 4K".to_owned(),
    };
    for done in at_once(&work, kinds) {
        done.succeeds();
    }
    for done in at_once(&work, |n| format!("--wait 50 clone disk.qcow2 c{n}.qcow2")) {
        done.succeeds();
    }
    for n in 0..CROWD {
        work.vdisk(&format!("read c{n}.qcow2 0 1")).succeeds();
    }
}

#[test]
fn who_waited_in_vain_is_told_who_has_the_disk_and_what_he_does() {
    let work = Work::new();
    work.vdisk("create disk.qcow2 8M").succeeds();
    // It has the disk open while it waits for the rest of its input.
    let writer = work.vdisk_start("write disk.qcow2 0");
    let pid = writer.pid();
    let open = |pid: u32| {
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let targets = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
        targets.into_iter().any(|target| target.ends_with("disk.qcow2"))
    };
    let since = Instant::now();
    while !open(pid) {
        assert!(since.elapsed() < PATIENCE, "the disk is not opened");
        std::thread::sleep(Duration::from_millis(5));
    }
    let since = Instant::now();
    let who = format!("vdisk (pid {pid})");
    let what = ["in use by", &who, "write disk.qcow2"];
    work.vdisk("--wait 1 snapshot create disk.qcow2 s").fails(&what);
    assert!(since.elapsed() >= Duration::from_secs(1), "{:?}", since.elapsed());
    work.vdisk("--wait 0 resize disk.qcow2 +1M").fails(&what);
    writer.finish(None, PATIENCE).succeeds();
    work.vdisk("--wait 0 snapshot create disk.qcow2 s").succeeds();
}

#[test]
fn nobody_waits_for_a_mount() {
    if !have(Need::Fuse) {
        return;
    }
    let work = Work::new();
    work.vdisk("create disk.qcow2 8M").succeeds();
    std::fs::create_dir(work.path("at")).unwrap();
    work.vdisk("mount --raw disk.qcow2 at").succeeds();
    let since = Instant::now();
    work.vdisk("--wait 60 commit disk.qcow2").fails(&[]);
    work.vdisk("--wait 60 read disk.qcow2 0 1").fails(&["in use by"]);
    assert!(since.elapsed() < Duration::from_secs(30), "{:?}", since.elapsed());
    work.vdisk("umount at").succeeds();
}

#[test]
fn snapshots_of_a_mounted_disk_wait_for_each_other() {
    if !have(Need::Fuse) {
        return;
    }
    let work = Work::new();
    work.vdisk("create disk.qcow2 8M").succeeds();
    std::fs::create_dir(work.path("at")).unwrap();
    work.vdisk("mount --raw disk.qcow2 at").succeeds();
    for done in at_once(&work, |n| format!("--wait 50 snapshot create disk.qcow2 s{n}")) {
        done.succeeds();
    }
    assert_eq!(snapshots(&work, "disk.qcow2"), crowd("s"));
    work.vdisk("umount at").succeeds();
}
