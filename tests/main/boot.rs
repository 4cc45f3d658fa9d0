//! `vdisk boot`, with a guest of the project's own (tests/guest) that drives its disk by itself.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::pty::openpty;
use nix::sys::signal::Signal;
use nix::sys::termios::tcgetattr;
use nix::unistd::Pid;

use crate::host::{Done, PATIENCE, VDISK, Work};
use crate::require::{Need, have};

const SECTOR: usize = 512;
/// What the guest's tests expect the disk to hold throughout.
const BASE_BYTE: u8 = 0x11;
const DISK: usize = 8 << 20;

/// The guest, built from source once for all tests.
pub fn guest() -> &'static Path {
    static BUILT: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    &BUILT.get_or_init(|| build(&[])).1
}

/// The same guest in a form of its own.
pub fn build(form: &[&str]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let elf = dir.path().join("guest.elf");
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/build");
    let built = Command::new(build).arg(&elf).args(form).output().expect("the build script");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    (dir, elf)
}

/// A raw base full of one byte, with a clone.
pub fn cloned() -> Work {
    let work = Work::new();
    work.put("base.raw", vec![BASE_BYTE; DISK]);
    clone(&work, "clone.qcow2");
    work
}

pub fn can_boot() -> bool {
    have(Need::Kvm)
}

/// Requires that QEMU finds the clone sound, and what it reads there.
fn assert_sound(work: &Work, reads: &[&str]) {
    if have(Need::Qemu) {
        work.qemu_img("check clone.qcow2").succeeds();
        work.qemu_io("clone.qcow2", reads).succeeds();
    }
}

fn clone(work: &Work, name: &str) {
    work.vdisk(&format!("clone base.raw {name}")).succeeds();
}

/// The words that boot the guest for one of its tests.
pub fn words(test: &str, rest: &str) -> Vec<String> {
    let kernel = guest().to_str().unwrap();
    let boot = format!("boot clone.qcow2 --kernel {kernel} --memory 32M {rest} --append");
    let mut words: Vec<String> = boot.split_whitespace().map(str::to_owned).collect();
    words.push(format!("quiet test={test}"));
    words
}

pub fn boot(work: &Work, test: &str, rest: &str) -> Done {
    work.vdisk_args(words(test, rest))
}

/// All bytes of a disk, through the whole chain.
fn flat(work: &Work, disk: &str) -> Vec<u8> {
    work.vdisk(&format!("read {disk} 0 {DISK}")).succeeds().stdout
}

fn sectors(bytes: &[u8], first: usize, count: usize) -> &[u8] {
    &bytes[first * SECTOR..(first + count) * SECTOR]
}

#[track_caller]
fn assert_all(bytes: &[u8], byte: u8, what: &str) {
    let wrong = bytes.iter().position(|b| *b != byte);
    assert_eq!(wrong, None, "{what} should be {byte:#x} throughout");
}

#[track_caller]
fn assert_base_unchanged(work: &Work) {
    assert_all(&work.bytes("base.raw"), BASE_BYTE, "the base");
}

#[test]
fn a_guest_drives_its_disk_and_what_it_wrote_is_in_the_delta() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    let done = boot(&work, "requests", "").succeeds();
    let out = done.out();
    let lines: Vec<&str> = out.lines().collect();
    let sectors_line = format!("sectors: {}", DISK / SECTOR);
    assert_eq!(lines[1..], [&sectors_line, "id: clone.qcow2", "done"], "{out}");

    let disk = flat(&work, "clone.qcow2");
    assert_all(sectors(&disk, 0, 3), 0x11, "before the written sector");
    assert_all(sectors(&disk, 3, 1), 0x22, "the written sector");
    assert_all(sectors(&disk, 4, 996), 0x11, "between");
    assert_all(sectors(&disk, 1000, 10), 0x33, "the written sectors");
    assert_all(sectors(&disk, 1010, 1), 0, "the unmapped sector");
    assert_all(sectors(&disk, 1020, 1), 0, "the zeroed sector");
    assert_all(sectors(&disk, 1021, 107), 0x33, "the rest of the written sectors");
    assert_all(sectors(&disk, 1128, 2048 - 1128), 0x11, "after the written sectors");
    for sector in 2048..4096 {
        let byte = disk[sector * SECTOR];
        assert!([0, 0x11].contains(&byte), "discarded sector {sector} holds {byte:#x}");
    }
    assert_all(sectors(&disk, 4096, DISK / SECTOR - 4096), 0x11, "the end");
    assert_base_unchanged(&work);
    let reads = ["read -P 0x22 1536 512", "read -P 0x33 512000 5120", "read -P 0x11 0 1536"];
    assert_sound(&work, &reads);
}

#[test]
fn what_a_guest_asks_wrongly_is_refused_and_it_can_go_on() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    let out = boot(&work, "refusals", "").succeeds().out();
    assert!(out.ends_with("done\n") && !out.contains("FAIL"), "{out}");
    assert_all(&flat(&work, "clone.qcow2"), 0x11, "the disk");
    assert_base_unchanged(&work);
}

#[test]
fn a_driver_without_features_reads_and_writes() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    let out = boot(&work, "bare", "").succeeds().out();
    assert!(out.ends_with("done\n") && !out.contains("FAIL"), "{out}");
    assert_all(sectors(&flat(&work, "clone.qcow2"), 8, 8), 0x44, "the written sectors");
    assert_base_unchanged(&work);
}

#[test]
fn a_guest_cannot_make_an_image_of_its_raw_disk() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    work.put("own.raw", vec![BASE_BYTE; DISK]);
    let kernel = guest().to_str().unwrap();
    let boot = |more: &str| {
        let words = format!("boot own.raw --kernel {kernel} --memory 32M {more} --append");
        let words = words.split_whitespace().map(str::to_owned);
        work.vdisk_args(words.chain(["quiet test=image".to_owned()]))
    };
    boot("").succeeds();
    assert_all(sectors(&work.bytes("own.raw"), 0, 1), 0x22, "the first sector");
    // Who says that it is raw gives all of it to the guest.
    let out = boot("--format raw").out();
    assert!(out.contains("FAIL write of an image's header"), "{out}");
    assert!(work.bytes("own.raw").starts_with(b"QFI\xfb"));
    // Each disk is what is said of it.
    boot("--disk clone.qcow2 --disk own.raw --disk-format qcow2").fails(&["own.raw"]);
    boot("--disk clone.qcow2 --disk-format qcow2 --disk-format raw").fails(&["--disk-format"]);
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    let before = work.bytes("clone.qcow2");
    let out = boot(&work, "read-only", "--read-only").succeeds().out();
    assert!(out.ends_with("done\n") && !out.contains("FAIL"), "{out}");
    assert!(before == work.bytes("clone.qcow2"), "the file changed");
}

#[test]
fn an_ephemeral_guest_writes_and_leaves_nothing() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    let before = (work.bytes("clone.qcow2"), work.files());
    let out = boot(&work, "requests", "--ephemeral").succeeds().out();
    assert!(out.ends_with("done\n") && !out.contains("FAIL"), "{out}");
    assert!(before == (work.bytes("clone.qcow2"), work.files()), "something was left");
    assert_base_unchanged(&work);
}

#[test]
fn each_of_several_disks_gets_its_own_writes() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    clone(&work, "second.qcow2");
    work.put("third-disk-with-a-long-name.raw", vec![BASE_BYTE; DISK]);
    let more = "--disk second.qcow2 --disk third-disk-with-a-long-name.raw";
    let out = boot(&work, "disks", more).succeeds().out();
    let ids = "disk: clone.qcow2\ndisk: second.qcow2\ndisk: third-disk-with-a-lo\ndisks: 3\ndone\n";
    assert!(out.ends_with(ids), "{out}");
    assert_all(sectors(&flat(&work, "clone.qcow2"), 0, 1), 0x60, "the first disk");
    assert_all(sectors(&flat(&work, "second.qcow2"), 0, 1), 0x61, "the second disk");
    let third = work.bytes("third-disk-with-a-long-name.raw");
    assert_all(sectors(&third, 0, 1), 0x62, "the third disk");
    assert_base_unchanged(&work);
}

#[test]
fn a_guest_finds_acpi_tables_and_powers_off_by_them() {
    if !can_boot() {
        return;
    }
    let out = boot(&cloned(), "acpi", "--cpus 3").succeeds().out();
    assert!(out.ends_with("processors: 3\noff\n"), "{out}");
}

#[test]
fn a_guest_drives_two_queues_of_a_disk_at_once() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    let out = boot(&work, "queues", "--queues 2").succeeds().out();
    assert!(out.ends_with("queues: 2\ndone\n"), "{out}");
    assert_all(sectors(&flat(&work, "clone.qcow2"), 16 * 63 + 8, 8), 0x80 + 64, "the last write");
    assert_sound(&work, &[]);
    // As many as processors, where nothing is said.
    let out = boot(&work, "queues", "--cpus 3").succeeds().out();
    assert!(out.ends_with("queues: 3\ndone\n"), "{out}");
}

#[test]
fn a_guest_turns_the_cache_of_its_disk_to_write_through() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    let out = boot(&work, "cache", "").succeeds().out();
    assert!(out.ends_with("done\n") && !out.contains("FAIL"), "{out}");
    assert_all(sectors(&flat(&work, "clone.qcow2"), 8, 8), 0x44, "the written sectors");
}

#[test]
fn a_guest_gets_random_bytes() {
    if !can_boot() {
        return;
    }
    let out = boot(&cloned(), "rng", "").succeeds().out();
    assert!(out.ends_with("random: 256\ndone\n"), "{out}");
}

#[test]
fn a_guest_has_26_disks_some_of_which_share_an_interrupt() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    let mut more = String::new();
    for number in 1..26 {
        clone(&work, &format!("{number}.qcow2"));
        more.push_str(&format!("--disk {number}.qcow2 "));
    }
    let out = boot(&work, "disks", &more).succeeds().out();
    assert!(out.ends_with("disk: 25.qcow2\ndisks: 26\ndone\n"), "{out}");
    assert_all(sectors(&flat(&work, "25.qcow2"), 0, 1), 0x60 + 25, "the last disk");
}

#[test]
fn a_guest_reaches_the_network_of_an_ordinary_user() {
    if !can_boot() || !have(Need::Passt) {
        return;
    }
    let out = boot(&cloned(), "net", "--net user --timeout 60").succeeds().out();
    assert!(out.ends_with("answered\ndone\n"), "{out}");
}

#[test]
fn a_kernel_with_a_note_for_it_is_entered_by_pvh() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    let (_dir, kernel) = build(&["pvh"]);
    work.put("initrd", b"what the initrd holds\0");
    let kernel = kernel.to_str().unwrap();
    let words = format!("boot clone.qcow2 --kernel {kernel} --memory 32M --initrd initrd --append");
    let words = words.split_whitespace().map(str::to_owned);
    let out = work.vdisk_args(words.chain(["test=requests".to_owned()])).succeeds().out();
    assert!(out.starts_with("by PVH\nram: ") && out.ends_with("done\n"), "{out}");
    assert!(out.contains("initrd: what the initrd holds\n"), "{out}");
}

#[test]
fn the_power_button_reaches_a_guest_by_a_signal_and_by_a_key() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    let mut booted = Booted::test(&work, "button");
    booted.signal(Signal::SIGPWR);
    assert_eq!(booted.status(), Some(0));
    assert!(work.bytes("out").ends_with(b"waiting\npressed\n"));
    let mut terminal = OnTerminal::start(&work, "button");
    terminal.read_until("waiting");
    terminal.type_in(b"\x01p");
    terminal.read_until("pressed");
    assert_eq!(terminal.booted.status(), Some(0));
}

#[test]
fn a_guest_that_takes_too_long_is_ended_and_the_command_fails() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    boot(&work, "wait", "--timeout 2").fails(&["2 seconds"]);
    assert_all(sectors(&flat(&work, "clone.qcow2"), 3, 1), 0x77, "the written sector");
}

#[test]
fn a_guest_that_crashes_ends_the_command_with_status_1() {
    if !can_boot() {
        return;
    }
    let done = boot(&cloned(), "triple-fault", "").fails(&["triple fault"]);
    assert!(done.out().ends_with("falling\n"), "{}", done.out());
}

#[test]
fn a_guest_gets_its_memory_and_its_initrd() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    work.put("initrd", b"what the initrd holds\0");
    let out = boot(&work, "bare", "--initrd initrd").succeeds().out();
    let mib = 1 << 20;
    // All but the hole for firmware between 639 KiB and 1 MiB.
    let ram = format!("ram: {}\n", 32 * mib - (mib - 0x9_fc00));
    assert!(out.starts_with(&(ram + "initrd: what the initrd holds\n")), "{out}");
}

#[test]
fn what_is_typed_reaches_the_guest() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    let typed = "x".repeat(1000) + "q";
    let echo = work.command(VDISK, words("echo", ""));
    let out = echo.finish(Some(typed.into()), Duration::from_secs(60)).succeeds().out();
    assert!(out.ends_with(&format!("ready\n{}\ndone\n", "x".repeat(1000))), "{out}");
}

/// A `vdisk boot` that is killed with this guard.
pub struct Booted(Child);

impl Booted {
    /// Starts a guest that writes and then sleeps; returns when it says that it has written.
    pub fn waiting(work: &Work) -> Booted {
        Booted::test(work, "wait")
    }

    /// Starts a guest for one of its tests; returns when it says that it waits.
    fn test(work: &Work, test: &str) -> Booted {
        let mut command = Command::new(VDISK);
        command.args(words(test, "")).current_dir(work.dir()).stdin(Stdio::null());
        let out = File::create(work.path("out")).unwrap();
        let booted = Booted(command.stdout(out).stderr(Stdio::null()).spawn().unwrap());
        let deadline = Instant::now() + PATIENCE;
        while !work.bytes("out").ends_with(b"waiting\n") {
            assert!(Instant::now() < deadline, "the guest never writes");
            std::thread::sleep(Duration::from_millis(5));
        }
        booted
    }

    /// The process that runs it.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Its exit status, once it has ended.
    pub fn status(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("vdisk boot hangs");
    }
}

impl Drop for Booted {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How much processor time a process takes in `span`.
fn cpu_time(pid: u32, span: Duration) -> Duration {
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields = stat.rsplit(") ").next().unwrap();
        let field = |n: usize| fields.split(' ').nth(n).unwrap().parse::<u64>().unwrap();
        field(11) + field(12)
    };
    let before = ticks();
    std::thread::sleep(span);
    Duration::from_millis((ticks() - before) * 10)
}

#[test]
fn a_signal_ends_the_guest_and_its_writes_are_kept() {
    if !can_boot() {
        return;
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let work = cloned();
        let mut booted = Booted::waiting(&work);
        booted.signal(signal);
        assert_eq!(booted.status(), Some(0), "ended by {signal}");
        assert_all(sectors(&flat(&work, "clone.qcow2"), 3, 1), 0x77, "the written sector");
        assert_sound(&work, &["read -P 0x77 1536 512"]);
        assert_base_unchanged(&work);
    }
}

#[test]
fn the_disk_of_a_guest_takes_a_snapshot_and_grows_while_it_runs() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    let mut booted = Booted::waiting(&work);
    work.vdisk("snapshot create clone.qcow2 now").succeeds();
    work.vdisk("snapshot create clone.qcow2 later --freeze").fails(&["the guest's", "fsfreeze"]);
    let info = work.vdisk("info clone.qcow2").succeeds().out();
    assert!(info.contains("held as: disk 0 of a guest"), "{info}");
    work.vdisk("resize clone.qcow2 +1M").succeeds();
    work.vdisk("snapshot merge clone.qcow2 now").succeeds();
    booted.signal(Signal::SIGTERM);
    assert_eq!(booted.status(), Some(0));
    if have(Need::Qemu) {
        work.qemu_img("check clone.qcow2").succeeds();
    }
    let size = work.vdisk("info clone.qcow2").succeeds().out();
    assert!(size.contains(&(DISK + (1 << 20)).to_string()), "{size}");
    assert_base_unchanged(&work);
}

#[test]
fn a_guest_is_told_that_its_disk_grew_and_uses_what_is_new() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    let mut booted = Booted::test(&work, "grow");
    work.vdisk("resize clone.qcow2 +3M").succeeds();
    assert_eq!(booted.status(), Some(0));
    let (old, new) = (DISK / SECTOR, (DISK + (3 << 20)) / SECTOR);
    let out = String::from_utf8(work.bytes("out")).unwrap();
    let told = format!("interrupt: 2\ngrew from: {old}\nsectors: {new}\ndone\n");
    assert!(out.ends_with(&told), "{out}");
    let last = (new - 1) * SECTOR;
    let read = work.vdisk(&format!("read clone.qcow2 {last} {SECTOR}")).succeeds().stdout;
    assert_all(&read, 0x55, "the last sector");
    assert_sound(&work, &[]);
    assert_base_unchanged(&work);
}

#[test]
fn a_guest_that_sleeps_takes_no_time_also_at_the_end_of_its_input() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    let booted = Booted::waiting(&work);
    // What it does right after its last word may still be counted: look again, within limits.
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut busy = Duration::MAX;
    while busy > Duration::from_millis(50) && Instant::now() < deadline {
        busy = cpu_time(booted.0.id(), Duration::from_millis(500));
    }
    assert!(busy <= Duration::from_millis(50), "half a second of sleep took {busy:?}");
}

/// `vdisk boot` on a terminal of its own.
struct OnTerminal {
    booted: Booted,
    master: OwnedFd,
    slave: OwnedFd,
}

impl OnTerminal {
    fn start(work: &Work, test: &str) -> OnTerminal {
        let pty = openpty(None, None).unwrap();
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let mut command = Command::new(VDISK);
        command.args(words(test, "")).current_dir(work.dir());
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        OnTerminal { booted: Booted(child), master: pty.master, slave: pty.slave }
    }

    /// Reads until the guest has printed `text`.
    fn read_until(&self, text: &str) -> String {
        let mut master = File::from(self.master.try_clone().unwrap());
        let mut seen = String::new();
        while !seen.contains(text) {
            let mut ready = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut ready, 60_000u16), Ok(1), "only {seen:?}");
            let mut bytes = [0; 256];
            let len = master.read(&mut bytes).unwrap();
            seen.push_str(&String::from_utf8_lossy(&bytes[..len]));
        }
        seen
    }

    fn type_in(&self, bytes: &[u8]) {
        nix::unistd::write(&self.master, bytes).unwrap();
    }
}

#[test]
fn the_terminal_is_the_guests_while_it_runs_and_restored_after() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    for end in ["q", "\x01x", "SIGTERM"] {
        let mut terminal = OnTerminal::start(&work, "echo");
        let settings = |terminal: &OnTerminal| tcgetattr(&terminal.slave).unwrap();
        terminal.read_until("ready");
        let raw = settings(&terminal);
        assert!(!raw.local_flags.contains(nix::sys::termios::LocalFlags::ICANON));
        // Ctrl-C is the guest's, and so is the second Ctrl-A.
        terminal.type_in(b"<\x03\x01\x01>");
        assert!(terminal.read_until(">").contains("<\x03\x01>"));
        if end == "SIGTERM" {
            terminal.booted.signal(Signal::SIGTERM);
        } else {
            terminal.type_in(end.as_bytes());
        }
        assert_eq!(terminal.booted.status(), Some(0), "ended by {end:?}");
        let after = settings(&terminal);
        let cooked = nix::sys::termios::LocalFlags::ICANON | nix::sys::termios::LocalFlags::ECHO;
        assert!(after.local_flags.contains(cooked), "ended by {end:?}");
    }
}
