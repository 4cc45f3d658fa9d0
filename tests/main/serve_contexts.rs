//! What NBD's server tells backup programs of a disk, judged by libnbd and by qemu-nbd of the same disk.

use std::time::{Duration, Instant};

use crate::host::Work;
use crate::require::{Need, have};
use crate::serve::Served;

const MIB: u64 = 1 << 20;

/// `disk.qcow2` on a base: each has parts of its own, and a bitmap has seen the last of them.
fn disk() -> Work {
    let work = Work::new();
    let written = |disk: &str, offset: u64, len: u64| {
        let bytes = vec![0x5a; usize::try_from(len).unwrap()];
        work.vdisk_fed(&format!("write {disk} {offset}"), &bytes).succeeds();
    };
    work.vdisk("create base.qcow2 8M").succeeds();
    written("base.qcow2", 0, MIB);
    written("base.qcow2", 3 * MIB, MIB);
    work.vdisk("clone base.qcow2 disk.qcow2").succeeds();
    written("disk.qcow2", MIB / 2, MIB);
    work.vdisk("qemu-img bitmap --add disk.qcow2 since -g 64K").succeeds();
    written("disk.qcow2", 5 * MIB, 128 << 10);
    written("disk.qcow2", 64 << 10, 64 << 10);
    work
}

/// A context's stretches as libnbd tells them: neighbours of one kind as one.
fn map(work: &Work, uri: &str, context: &str) -> Vec<(u64, u64)> {
    let out = work.run("nbdinfo", ["--json", &format!("--map={context}"), uri]).succeeds().out();
    let rows: serde_json::Value = serde_json::from_str(&out).unwrap();
    let mut found: Vec<(u64, u64)> = Vec::new();
    for row in rows.as_array().unwrap() {
        let (len, kind) = (row["length"].as_u64().unwrap(), row["type"].as_u64().unwrap());
        match found.last_mut() {
            Some((before, same)) if *same == kind => *before += len,
            _ => found.push((len, kind)),
        }
    }
    found
}

/// The same of qemu-nbd, which ends after its one client.
fn qemus(work: &Work, options: &str, context: &str) -> Vec<(u64, u64)> {
    let words = format!("-r -f qcow2 --socket {} {options} disk.qcow2", work.path("q").display());
    let server = work.command("qemu-nbd", words.split_whitespace());
    let end = Instant::now() + Duration::from_secs(30);
    while !work.path("q").exists() {
        assert!(Instant::now() < end, "qemu-nbd does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    let uri = format!("nbd+unix:///?socket={}", work.path("q").display());
    let found = map(work, &uri, context);
    drop(server);
    let _ = std::fs::remove_file(work.path("q"));
    found
}

#[test]
fn the_layer_of_each_part_is_told_as_qemu_nbd_tells_it() {
    if !have(Need::Nbd) || !have(Need::Qemu) {
        return;
    }
    let work = disk();
    let context = "qemu:allocation-depth";
    let served = Served::start(&work, "nbd disk.qcow2 --allocation-depth --socket s");
    let told = map(&work, &served.uri, context);
    let k = 1024;
    let expected = [
        (64 * k, 2),
        (64 * k, 1),
        (384 * k, 2),
        (1024 * k, 1),
        (1536 * k, 0),
        (1024 * k, 2),
        (1024 * k, 0),
        (128 * k, 1),
        (2944 * k, 0),
    ];
    assert_eq!(told, expected);
    let listed = work.run("nbdinfo", [served.uri.as_str()]).succeeds().out();
    assert!(listed.contains(context) && listed.contains("base:allocation"), "{listed}");
    served.stop();
    assert_eq!(qemus(&work, "--allocation-depth", context), told);
    // Nobody who has not asked for it is told.
    let served = Served::start(&work, "nbd disk.qcow2 --socket s");
    let listed = work.run("nbdinfo", [served.uri.as_str()]).succeeds().out();
    assert!(!listed.contains(context), "{listed}");
    served.stop();
}

#[test]
fn a_dirty_bitmap_is_told_as_qemu_nbd_tells_it() {
    if !have(Need::Nbd) || !have(Need::Qemu) {
        return;
    }
    let work = disk();
    let context = "qemu:dirty-bitmap:since";
    let words = "nbd disk.qcow2 --read-only --bitmap since --allocation-depth --socket s";
    let served = Served::start(&work, words);
    let told = map(&work, &served.uri, context);
    let k = 1024;
    assert_eq!(told, [(64 * k, 0), (64 * k, 1), (4992 * k, 0), (128 * k, 1), (2944 * k, 0)]);
    served.stop();
    assert_eq!(qemus(&work, "--bitmap since", context), told);
    work.vdisk("serve nbd disk.qcow2 --bitmap since --socket s").refuses(&["--read-only"]);
    work.vdisk("serve nbd disk.qcow2 --read-only --bitmap no --socket s").fails(&["no bitmap no"]);
}
