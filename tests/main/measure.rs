//! `vdisk measure`: one command in both worlds, on a disk that stays what it was.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::boot::{can_boot, guest};
use crate::container::{able, eventually, running, work};
use crate::host::{Done, VDISK, Work};
use crate::jail::{Prey, assert_jailed, inside, scene};
use crate::require::{Need, have};
use crate::someone::{Who, start};

/// A disk in which a command is what the small guest calls its test, and a store that keeps that guest as
/// a kernel.
fn room(commands: &[(&str, &str)]) -> Option<Work> {
    if !able() || !can_boot() {
        return None;
    }
    let work = work();
    for (name, script) in commands {
        let path = format!("root/bin/{name}");
        work.put(&path, format!("#!/bin/sh\n{script}\n"));
        fs::set_permissions(work.path(&path), PermissionsExt::from_mode(0o755)).unwrap();
    }
    work.run("mke2fs", ["-q", "-F", "-t", "ext4", "-d", "root", "base.raw", "48M"]).succeeds();
    let kernel = work.path("store/kernels/small");
    fs::create_dir_all(&kernel).unwrap();
    fs::copy(guest(), kernel.join("kernel")).unwrap();
    fs::write(kernel.join("initrd-made"), "none\0").unwrap();
    fs::create_dir(work.path("tmp")).unwrap();
    Some(work)
}

fn measure(work: &Work, words: &str) -> Done {
    let tmp = work.path("tmp");
    let line =
        format!("TMPDIR={} exec \"$0\" measure web.qcow2 --store store {words}", tmp.display());
    let done = work.run("sh", ["-c", &line, VDISK]);
    assert_eq!(fs::read_dir(tmp).unwrap().count(), 0, "left behind by {words}");
    done
}

#[test]
fn a_command_is_measured_in_both_worlds_and_the_disk_stays_as_it_is() {
    let script =
        "busybox dd if=/dev/zero of=/root/x bs=1M count=3 2>/dev/null; busybox sync; exit 7";
    let Some(work) = room(&[("test=command", script)]) else { return };
    let before = [work.bytes("base.raw"), work.bytes("web.qcow2")];
    let done = measure(&work, "--json -- test=command").succeeds();
    let told: Value = serde_json::from_str(&done.out()).unwrap();
    for world in ["container", "machine"] {
        let world = &told[world];
        assert_eq!((&world["ran"], &world["exit_status"]), (&true.into(), &7.into()), "{told:#}");
        for time in ["start_seconds", "run_seconds", "stop_seconds", "cpu_seconds"] {
            assert!(world[time].as_f64().unwrap() >= 0.0, "{time} {told:#}");
        }
        assert!(world["start_seconds"].as_f64() > Some(0.0), "{told:#}");
        assert!(world["shared"].as_u64() > Some(1 << 20), "{told:#}");
        assert!(world["memory"].as_u64() > Some(1 << 20), "{told:#}");
    }
    assert!(told["container"]["written"].as_u64() > Some(64 << 10), "{told:#}");
    // 128 sectors, in one cluster or two.
    let written = told["machine"]["written"].as_u64();
    assert!(written >= Some(64 << 10) && written <= Some(128 << 10), "{told:#}");
    assert!(before == [work.bytes("base.raw"), work.bytes("web.qcow2")]);
    let text = measure(&work, "-- test=command").succeeds().out();
    for word in ["virtual machine", "processor time", "exit status", "written"] {
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn the_process_that_reads_what_is_measured_is_jailed() {
    if !able() || !have(Need::Landlock) {
        return;
    }
    let (work, (_elsewhere, prey)) = (work(), scene());
    let prey = Prey { base: work.path("base.raw"), ..prey };
    let words = ["measure", "--jail", "require", "web.qcow2", "--", "sleep", "7721"];
    let measure = start(&work, Who::Root, words);
    eventually("the container runs", || !running(&["sleep", "7721"]).is_empty());
    // Its own jail is closed, and it has made a clone.
    assert_jailed(inside(measure.pid(), "measure-disk"), &["vdisk"], &prey);
    measure.signal(Signal::SIGINT);
    measure.wait().ends(1).says(&["interrupted"]);
    assert!(running(&["sleep", "7721"]).is_empty());
}

#[test]
fn a_world_that_cannot_run_here_says_why_and_in_time() {
    let Some(work) = room(&[("test=wait", "sleep 1000")]) else { return };
    let told = |done: Done| -> Value { serde_json::from_str(&done.out()).unwrap() };
    let since = Instant::now();
    let slow = told(measure(&work, "--timeout 1 --json -- test=wait").ends(1));
    assert!(since.elapsed() < Duration::from_secs(50));
    for world in ["container", "machine"] {
        assert_eq!(slow[world]["ran"], false, "{slow:#}");
        let why = slow[world]["why"].as_str().unwrap();
        assert!(why.contains("within 1s"), "{why}");
    }
    // One of them is enough.
    fs::remove_dir_all(work.path("store/kernels")).unwrap();
    let one = told(measure(&work, "--json -- sh -c true").succeeds());
    assert_eq!(one["container"]["ran"], true, "{one:#}");
    assert!(one["machine"]["why"].as_str().unwrap().contains("kernel add"), "{one:#}");
    let text = measure(&work, "-- none").ends(1).out();
    assert!(text.contains("no container: ") && text.contains("no virtual machine: "), "{text}");
    work.vdisk("measure nothing.qcow2 -- true").fails(&["nothing.qcow2"]);
}
