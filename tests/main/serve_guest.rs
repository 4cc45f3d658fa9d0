//! A disk that is served over vhost-user to a virtual machine of QEMU's, whose BIOS and boot sector
//! (tests/guest/boot.S) drive it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::boot;
use crate::host::{Done, PATIENCE, Running, Work};
use crate::mount::soon;
use crate::require::{Need, have, skipped};
use crate::serve::Served;
use crate::twin::{noise, same_bytes};

const MIB: usize = 1 << 20;
const SECTOR: usize = 512;
/// What the guest copies, from sector 64 to sector 1024.
const LEN: usize = 64 * SECTOR;
const TO: usize = 1024 * SECTOR;
/// Where a guest that goes on for ever writes.
const EVER: usize = 2048 * SECTOR;
/// How QEMU ends when the guest writes 0x10 to its debug port.
const DONE: i32 = 0x21;

fn boot_sector() -> &'static [u8] {
    static BUILT: OnceLock<Vec<u8>> = OnceLock::new();
    BUILT.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("boot");
        let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/build-boot");
        let built =
            Command::new(build).arg(&file).output().expect("the boot sector's build script");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        fs::read(&file).unwrap()
    })
}

/// A test's directory with a base that boots, and `disk.qcow2`, its clone; `mode` is the guest's.
fn bootable(mode: u8) -> (Work, Vec<u8>) {
    let work = Work::new();
    let mut bytes = noise(7, 4 * MIB);
    bytes[..SECTOR].copy_from_slice(boot_sector());
    bytes[SECTOR] = mode;
    work.put("base.raw", &bytes);
    work.vdisk("clone base.raw disk.qcow2").succeeds();
    (work, bytes)
}

/// A virtual machine whose disk is served at the socket `sock`.
fn machine(work: &Work, options: &str) -> Running {
    machine_that("", work, options)
}

/// The same, with more to be said of the socket.
fn machine_that(connects: &str, work: &Work, options: &str) -> Running {
    let words = format!(
        "-accel tcg -machine q35,memory-backend=mem -m 64M -nodefaults -display none -no-reboot \
         -object memory-backend-memfd,id=mem,size=64M,share=on \
         -chardev socket,id=c,path=sock{connects} -device vhost-user-blk-pci,chardev=c,bootindex=1{options} \
         -device isa-debug-exit,iobase=0xf4,iosize=4"
    );
    work.command("qemu-system-x86_64", words.split_whitespace())
}

/// Waits until a guest writes for ever: two clusters are allocated then, and a table.
fn writes(work: &Work) {
    soon("the guest writes", || {
        let info = work.vdisk("info --json disk.qcow2").succeeds().out();
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        info["allocated_size"].as_u64().unwrap() > 3 << 16
    });
}

#[track_caller]
fn ends_well(done: Done) {
    assert_eq!(done.code, Some(DONE), "{}", done.text());
}

fn flat(work: &Work, image: &str) -> Vec<u8> {
    work.qemu_img(&format!("convert -O raw {image} flat.raw")).succeeds();
    work.bytes("flat.raw")
}

/// What the guest makes of the disk.
fn after(bytes: &[u8]) -> Vec<u8> {
    let mut after = bytes.to_vec();
    let copied: Vec<u8> = bytes[64 * SECTOR..64 * SECTOR + LEN].iter().map(|b| b ^ 0x5a).collect();
    after[TO..TO + LEN].copy_from_slice(&copied);
    after
}

fn can_run() -> bool {
    have(Need::QemuSystem) && have(Need::Qemu)
}

#[test]
fn a_guest_of_qemus_boots_from_a_served_clone_and_writes_its_delta() {
    if !can_run() {
        return;
    }
    let (work, bytes) = bootable(b'1');
    let served = Served::start(&work, "vhost-user disk.qcow2 --socket sock --queues 3");
    assert_eq!(served.uri, work.path("sock").display().to_string());
    assert_eq!(fs::metadata(work.path("sock")).unwrap().mode() & 0o777, 0o600);
    ends_well(machine(&work, ",num-queues=1").wait());
    let files = served.open_files();
    // The next ones find it as it was left, and their ways to set up queues are theirs.
    ends_well(machine(&work, ",num-queues=3,queue-size=1024").wait());
    ends_well(machine(&work, ",num-queues=2,packed=off,event_idx=off").wait());
    soon("the last machine's files are closed", || served.open_files() <= files);
    machine(&work, ",num-queues=4").wait().fails(&["queues"]);
    served.stop();
    assert!(!work.path("sock").exists(), "the socket is left behind");
    work.qemu_img("check disk.qcow2").succeeds();
    same_bytes("the disk", &flat(&work, "disk.qcow2"), &after(&bytes));
    same_bytes("the base", &work.bytes("base.raw"), &bytes);
}

#[test]
fn the_disk_of_a_running_guest_takes_snapshots_and_merges() {
    if !can_run() {
        return;
    }
    let (work, bytes) = bootable(b'L');
    let served = Served::start(&work, "vhost-user disk.qcow2 --socket sock --queues 1");
    let guest = machine(&work, "");
    writes(&work);
    for name in ["one", "two", "three"] {
        work.vdisk(&format!("snapshot create disk.qcow2 {name}")).succeeds();
        std::thread::sleep(Duration::from_millis(200));
    }
    work.vdisk("snapshot merge disk.qcow2 two").succeeds();
    work.vdisk("compact disk.qcow2").succeeds();
    let told = work.vdisk("info disk.qcow2").succeeds().out();
    assert!(told.contains("held as: served at "), "{told}");
    work.vdisk("snapshot create disk.qcow2 four --freeze").fails(&["the guest's"]);
    // It compares what it reads with what it wrote, and would have ended.
    let mut guest = guest;
    assert!(!guest.has_ended(), "{}", guest.wait().text());
    guest.signal(Signal::SIGKILL);
    let _ = guest.wait();
    // A disk that grew is seen by the next machine.
    work.vdisk("resize disk.qcow2 8M").succeeds();
    served.stop();
    for name in work.files().iter().filter(|n| n.ends_with(".qcow2")) {
        work.qemu_img(&format!("check {name}")).succeeds();
    }
    let mut now = flat(&work, "disk.qcow2");
    assert_eq!(now.len(), 8 * MIB);
    now.truncate(4 * MIB);
    let number = now[EVER];
    assert!(number != 0 || now[EVER + LEN - 1] != 0);
    // A guest that is killed while it writes leaves two rounds side by side.
    let mut want = after(&bytes);
    assert!(now[EVER..EVER + LEN].iter().all(|b| b.wrapping_sub(number).wrapping_add(1) <= 2));
    want[EVER..EVER + LEN].copy_from_slice(&now[EVER..EVER + LEN]);
    same_bytes("the disk", &now, &want);
    work.vdisk("snapshot revert disk.qcow2 one --yes").succeeds();
    let one = flat(&work, "disk.qcow2");
    same_bytes("what was copied before snapshot one", &one[TO..TO + LEN], &want[TO..TO + LEN]);
}

/// Has QEMU do something, at the socket `qmp`, and returns what it answers.
fn qmp(work: &Work, command: &str) -> serde_json::Value {
    let stream = UnixStream::connect(work.path("qmp")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let answers = BufReader::new(stream.try_clone().unwrap());
    // A greeting comes first; events are told between.
    let mut answers = answers
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(&line.unwrap()).unwrap())
        .filter(|answer| answer.get("return").or(answer.get("error")).is_some());
    let mut answer = serde_json::Value::Null;
    for command in [r#"{"execute":"qmp_capabilities"}"#, command] {
        (&stream).write_all(command.as_bytes()).unwrap();
        answer = answers.next().expect("an answer");
    }
    answer
}

/// A disk that grows is seen at once where QEMU is told to read the device's configuration again.
#[test]
fn a_running_guest_of_qemus_is_told_that_its_served_disk_grew() {
    if !can_run() {
        return;
    }
    let work = boot::cloned();
    let (_dir, kernel) = boot::build(&["pvh"]);
    let served = Served::start(&work, "vhost-user clone.qcow2 --socket sock --queues 1");
    let words = format!(
        "-accel tcg -M microvm,acpi=off,memory-backend=mem -m 64M -nodefaults -no-user-config -display none \
         -no-reboot -object memory-backend-memfd,id=mem,size=64M,share=on -serial file:out \
         -global virtio-mmio.force-legacy=false -kernel {} -append test=grow -chardev socket,id=c,path=sock \
         -device vhost-user-blk,chardev=c,id=web -qmp unix:qmp,server=on,wait=off",
        kernel.display()
    );
    let mut guest = work.command("qemu-system-x86_64", words.split_whitespace());
    let said = || fs::read_to_string(work.path("out")).unwrap_or_default();
    let mut says = |what: &str| {
        let until = Instant::now() + 2 * PATIENCE;
        loop {
            let over = guest.has_ended() || said().contains("FAIL");
            if said().contains(what) {
                return;
            }
            assert!(!over, "{}", said());
            assert!(Instant::now() < until, "the guest does not go on: {}", said());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    says("waiting\n");
    work.vdisk("resize clone.qcow2 11M").succeeds();
    let answer = qmp(&work, r#"{"execute":"device-sync-config","arguments":{"id":"web"}}"#);
    if answer["error"]["class"] == "CommandNotFound" {
        skipped("only QEMU 9.2 and newer can be told that a served disk grew");
        return;
    }
    assert!(answer.get("return").is_some(), "{answer}");
    let (old, new) = (8 * MIB / SECTOR, 11 * MIB / SECTOR);
    says(&format!("grew from: {old}\nsectors: {new}\ndone\n"));
    drop(guest);
    served.stop();
    work.qemu_img("check clone.qcow2").succeeds();
    let now = flat(&work, "clone.qcow2");
    same_bytes("the last sector", &now[11 * MIB - SECTOR..], &[0x55; SECTOR]);
}

#[test]
fn a_guest_of_a_read_only_disk_cannot_write() {
    if !can_run() {
        return;
    }
    let (work, bytes) = bootable(b'1');
    let before = work.bytes("disk.qcow2");
    let served = Served::start(&work, "vhost-user disk.qcow2 --socket sock --read-only");
    let code = machine(&work, ",num-queues=1").wait().code;
    // What the guest writes where a request fails.
    assert_eq!(code, Some(0x23));
    served.stop();
    let words = "vhost-user disk.qcow2 --socket sock --ephemeral";
    let served = Served::start(&work, words);
    ends_well(machine(&work, ",num-queues=1").wait());
    served.stop();
    assert!(work.bytes("disk.qcow2") == before, "the disk was changed");
    same_bytes("the disk", &flat(&work, "disk.qcow2"), &bytes);
}

#[test]
fn a_server_that_is_ended_or_killed_under_a_guest_leaves_a_disk_that_opens() {
    if !can_run() {
        return;
    }
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let (work, bytes) = bootable(b'L');
        let served = Served::start(&work, "vhost-user disk.qcow2 --socket sock --queues 1");
        let _guest = machine(&work, "");
        writes(&work);
        if signal == Signal::SIGTERM {
            served.stop();
            work.qemu_img("check disk.qcow2").succeeds();
        } else {
            served.signal(signal);
            drop(served);
            let code = work.qemu_img("check disk.qcow2").code;
            assert!(matches!(code, Some(0 | 3)), "qemu-img check ends with {code:?}");
        }
        let now = flat(&work, "disk.qcow2");
        same_bytes("what nobody writes", &now[..TO], &bytes[..TO]);
        same_bytes("the rest", &now[EVER + LEN..], &bytes[EVER + LEN..]);
    }
}

/// QEMU has the next server begin where the last one came to, by what the guest sees: a request that
/// was done behind the back of a closed connection was done twice, and the guest got two answers.
#[test]
fn a_guest_goes_on_when_its_server_is_ended_or_killed_and_started_again() {
    if !can_run() {
        return;
    }
    let (work, bytes) = bootable(b'L');
    let start = || Served::start(&work, "vhost-user disk.qcow2 --socket sock --queues 1");
    let mut served = start();
    let mut guest = machine_that(",reconnect-ms=50", &work, "");
    writes(&work);
    // What the guest writes now, in place of what was there.
    let number = || {
        work.qemu_img("convert -U -O raw disk.qcow2 now.raw").succeeds();
        work.bytes("now.raw")[EVER]
    };
    for round in 0..10 {
        // In the midst of a request, mostly: the guest waits for nothing else.
        if round % 2 == 0 {
            served.stop();
        } else {
            served.signal(Signal::SIGKILL);
            drop(served);
        }
        let last = number();
        served = start();
        soon("the guest writes on", || {
            // It compares what it reads with what it wrote, and hears of what fails.
            assert!(!guest.has_ended(), "the guest has ended after {round} servers");
            number() != last
        });
    }
    guest.signal(Signal::SIGKILL);
    let _ = guest.wait();
    served.stop();
    let code = work.qemu_img("check disk.qcow2").code;
    assert!(matches!(code, Some(0 | 3)), "qemu-img check ends with {code:?}");
    let now = flat(&work, "disk.qcow2");
    same_bytes("what was copied", &now[..EVER], &after(&bytes)[..EVER]);
    same_bytes("the rest", &now[EVER + LEN..], &bytes[EVER + LEN..]);
}

#[test]
fn who_speaks_no_vhost_user_is_left_and_the_next_one_is_served() {
    if !can_run() {
        return;
    }
    let (work, _) = bootable(b'1');
    let served = Served::start(&work, "vhost-user disk.qcow2 --socket sock");
    for said in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 64], &[255; 4096], &[1, 0, 0, 0, 1, 0]] {
        let mut stream = UnixStream::connect(work.path("sock")).unwrap();
        let _ = stream.write_all(said);
    }
    ends_well(machine(&work, ",num-queues=1").wait());
    // One that says nothing keeps the others waiting, and the server ends all the same.
    let _silent = UnixStream::connect(work.path("sock")).unwrap();
    let began = Instant::now();
    served.stop();
    assert!(began.elapsed() < Duration::from_secs(20));
    work.vdisk("serve vhost-user disk.qcow2 --socket sock --queues 0").ends(64);
    work.vdisk("serve vhost-user disk.qcow2 --socket sock --queues 65").ends(64);
    work.vdisk("serve vhost-user disk.qcow2").ends(64);
}
