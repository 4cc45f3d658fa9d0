//! Containers whose processes are killed while they write, several at the same moment and in any
//! order: nothing waits for ever, nothing is left on the host, and the disk is sound.
//!
//! `VDISK_KILL_ROUNDS` sets how often each is done, `VDISK_SEED` how the first round goes.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::container::{able, find_dirs, keeper_and_server, running, work};
use crate::dice::Dice;
use crate::host::{PATIENCE, Running, Work};
use crate::require::{Need, have};
use crate::someone::{Ids, Who, give, run, sh, start};

/// Writes all the time, and never waits until it is durable.
const WRITER: &str = "i=0; while :; do i=$(( (i+1) % 8 )); \
    dd if=/dev/urandom of=/root/f$i bs=64k count=24 2>/dev/null; done; exit $KILLED_TEST_";

/// A kind of container.
#[derive(Debug, Clone, Copy)]
struct Kind {
    who: Who,
    options: &'static str,
}

const LENT: Who = Who::Someone(Ids::Lent);
const KINDS: [Kind; 6] = [
    Kind { who: Who::Root, options: "--memory 256M" },
    Kind { who: Who::Root, options: "--user-space" },
    Kind { who: Who::Root, options: "--overlay upper" },
    Kind { who: LENT, options: "" },
    Kind { who: LENT, options: "--overlay upper" },
    Kind { who: Who::Someone(Ids::One), options: "" },
];

fn ready() -> Option<Work> {
    if !able() || !have(Need::Uidmap) {
        return None;
    }
    let work = work();
    give(&work);
    Some(work)
}

fn rounds() -> u64 {
    std::env::var("VDISK_KILL_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(2)
}

fn seed() -> u64 {
    let text = std::env::var("VDISK_SEED").unwrap_or_default();
    let given = text.strip_prefix("0x").and_then(|hex| u64::from_str_radix(hex, 16).ok());
    let seed = given.unwrap_or_else(|| std::process::id().into());
    eprintln!("VDISK_SEED={seed:#x}");
    seed
}

/// What /proc says of a process: its parent, and whether it has not ended.
fn stat(pid: u32) -> Option<(u32, bool)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut words = stat.rsplit_once(") ")?.1.split(' ');
    let state = words.next()?.to_owned();
    let parent = words.next()?.parse().ok()?;
    // A zombie whose threads have not all ended is there still.
    let alone = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count) <= 1;
    Some((parent, !(state == "Z" && alone)))
}

pub fn lives(pid: u32) -> bool {
    stat(pid).is_some_and(|(_, lives)| lives)
}

/// A process and all below it.
pub fn tree(top: u32) -> Vec<u32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let all: Vec<(u32, u32)> = entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            Some((stat(pid)?.0, pid))
        })
        .collect();
    let mut found = vec![top];
    let mut at = 0;
    while let Some(&parent) = found.get(at) {
        found.extend(all.iter().filter(|(of, _)| *of == parent).map(|(_, pid)| *pid));
        at += 1;
    }
    found
}

fn strike(pid: u32) {
    assert!(pid > 1 && pid != std::process::id());
    // It may have gone with another one.
    let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
}

/// A container that writes, and what the host could keep of it.
struct Victim {
    vdisk: Running,
    keeper: u32,
    server: u32,
    loops: Vec<String>,
    /// The numbers of its FUSE connections.
    connections: Vec<String>,
}

impl Victim {
    fn start(work: &Work, kind: Kind, mark: &str) -> Victim {
        let script = format!("{WRITER}{mark}");
        let words = ["run"].into_iter().chain(kind.options.split_whitespace());
        let words = words.chain(["web.qcow2", "--", "sh", "-c", &script]);
        let mut vdisk = start(work, kind.who, words);
        let deadline = Instant::now() + PATIENCE;
        while running(&["sh", "-c", &script]).is_empty() {
            if vdisk.has_ended() {
                panic!("{kind:?}: {}", vdisk.wait().text());
            }
            assert!(Instant::now() < deadline, "{kind:?} does not start");
            thread::sleep(Duration::from_millis(10));
        }
        let (keeper, server) = keeper_and_server(vdisk.pid());
        let (mut loops, mut connections) = (Vec::new(), Vec::new());
        let mounts = fs::read_to_string(format!("/proc/{keeper}/mountinfo")).unwrap();
        for line in mounts.lines().filter(|line| line.contains("/container/root ")) {
            let minor = line.split([' ', ':']).nth(3).unwrap().to_owned();
            if line.contains(" - fuse.") {
                connections.push(minor);
            } else {
                connections.extend(backing_device(&minor));
                loops.push(format!("loop{minor}"));
            }
        }
        assert!(!connections.is_empty(), "{mounts}");
        Victim { vdisk, keeper, server, loops, connections }
    }

    /// Waits until nothing of it is left, and fails where that does not come about.
    fn goes(mut self, pids: &[u32], story: &str) {
        let deadline = Instant::now() + PATIENCE;
        let free = |name: &String| !Path::new(&format!("/sys/block/{name}/loop")).exists();
        loop {
            let ended = self.vdisk.has_ended();
            let left: Vec<_> = pids.iter().filter(|pid| lives(**pid)).collect();
            if ended && left.is_empty() && self.loops.iter().all(free) {
                break;
            }
            if Instant::now() > deadline {
                // Whoever waits for a server that is gone would keep the machine waiting, too.
                self.connections.iter().for_each(|number| abort(number));
                panic!(
                    "{story}: left are the processes {left:?}, of loop devices {:?}",
                    self.loops
                );
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The number of the FUSE connection that has the file behind a loop device.
fn backing_device(number: &str) -> Option<String> {
    let listed = std::process::Command::new("losetup")
        .args(["--noheadings", "--output", "BACK-MAJ:MIN", &format!("/dev/loop{number}")])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    Some(text.trim().rsplit_once(':')?.1.to_owned())
}

fn abort(connection: &str) {
    let dir = Path::new("/sys/fs/fuse/connections");
    if fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none()) {
        let none = None::<&str>;
        let flags = nix::mount::MsFlags::empty();
        let _ = nix::mount::mount(none, dir, Some("fusectl"), flags, none);
    }
    let _ = fs::write(dir.join(connection).join("abort"), "1");
}

/// Requires that the host's file systems can be written out, and show nothing of the container.
fn host_is_well(work: &Work) {
    work.run("sync", ["-f", "/proc/self/exe"]).succeeds();
    work.run("sync", [work.dir().to_str().unwrap()]).succeeds();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let scratch = |line: &&str| line.contains("/container ") || line.contains("/container/");
    assert_eq!(mounts.lines().find(scratch), None);
    assert!(!mounts.contains(work.dir().to_str().unwrap()), "{mounts}");
}

/// Requires that the disk opens, and that its file system is clean as soon as its journal has been
/// replayed, which is all that may have to be done.
fn disk_is_sound(work: &Work, kind: Kind) {
    assert_eq!(sh(work, kind.who, kind.options, "echo there").succeeds().out(), "there\n");
    work.vdisk("convert web.qcow2 flat.raw --format raw").succeeds();
    work.run("e2fsck", ["-fn", "flat.raw"]).succeeds();
    fs::remove_file(work.path("flat.raw")).unwrap();
    // Clusters may have been taken for what was not to be.
    let leaks_at_most = |code| code == Some(0) || code == Some(3);
    let checked = work.qemu_img("check web.qcow2");
    assert!(leaks_at_most(checked.code), "{}", checked.text());
}

fn upper(work: &Work, kind: Kind) {
    let upper = work.path("upper");
    let _ = fs::remove_dir_all(&upper);
    let _ = fs::remove_dir_all(work.path("upper.work"));
    fs::create_dir(&upper).unwrap();
    if kind.who != Who::Root {
        let user = Some(crate::someone::USER);
        std::os::unix::fs::chown(&upper, user, user).unwrap();
    }
}

/// Kills those whom `choose` picks of the host process, the keeper and all that are below, a random
/// time after they have begun to write.
fn killed(name: &str, choose: impl Fn(&mut Dice, &Victim, Vec<u32>) -> Vec<u32>) {
    let Some(work) = ready() else { return };
    let seed = seed();
    for round in 0..rounds() {
        for (number, kind) in KINDS.into_iter().enumerate() {
            let mut dice = Dice::new(seed + round * 16 + number as u64);
            upper(&work, kind);
            give(&work);
            let mark = format!("{name}{round}_{number}");
            let victim = Victim::start(&work, kind, &mark);
            thread::sleep(Duration::from_millis(dice.below(800)));
            let all = tree(victim.vdisk.pid());
            let chosen = choose(&mut dice, &victim, all.clone());
            // At once, or so soon after each other that one is about to end when the next is hit.
            let pause = Duration::from_micros(*dice.pick(&[0, 0, 500, 5_000, 30_000]));
            for pid in &chosen {
                strike(*pid);
                thread::sleep(pause);
            }
            let story = format!("{kind:?}, round {round}, of {all:?} killed {chosen:?}, {pause:?}");
            victim.goes(&all, &story);
            host_is_well(&work);
            disk_is_sound(&work, kind);
        }
    }
}

#[test]
fn a_container_whose_host_process_and_keeper_are_killed_at_once_leaves_nothing_that_waits() {
    killed("both", |dice, victim, _| {
        let (host, keeper) = (victim.vdisk.pid(), victim.keeper);
        if dice.one_in(2) { vec![host, keeper] } else { vec![keeper, host] }
    });
}

#[test]
fn a_container_whose_server_is_killed_alone_or_with_another_leaves_nothing_that_waits() {
    killed("server", |dice, victim, _| {
        let mut chosen = vec![victim.server];
        let other = *dice.pick(&[0, victim.vdisk.pid(), victim.keeper]);
        chosen.extend((other != 0).then_some(other));
        if dice.one_in(2) {
            chosen.reverse();
        }
        chosen
    });
}

#[test]
fn a_container_all_of_whose_processes_are_killed_leaves_nothing_that_waits() {
    killed("all", |dice, _, mut all| {
        for last in (1..all.len()).rev() {
            all.swap(last, dice.below(last as u64 + 1) as usize);
        }
        all
    });
}

#[test]
fn a_container_whose_host_process_is_killed_as_it_unmounts_leaves_nothing_that_waits() {
    let Some(work) = ready() else { return };
    let seed = seed();
    for round in 0..rounds() {
        for (number, kind) in KINDS.into_iter().enumerate() {
            let mut dice = Dice::new(seed + round * 16 + number as u64);
            upper(&work, kind);
            give(&work);
            let victim = Victim::start(&work, kind, &format!("end{round}_{number}"));
            thread::sleep(Duration::from_millis(200 + dice.below(600)));
            let all = tree(victim.vdisk.pid());
            // The program ends, and what it has written is on its way to the disk.
            victim.vdisk.signal(Signal::SIGTERM);
            thread::sleep(Duration::from_micros(dice.below(60_000)));
            strike(victim.vdisk.pid());
            victim.goes(&all, &format!("{kind:?}, round {round}"));
            host_is_well(&work);
            disk_is_sound(&work, kind);
        }
    }
}

#[test]
fn a_container_whose_host_process_or_server_is_killed_while_a_snapshot_has_it_at_rest_leaves_nothing_that_waits()
 {
    let Some(work) = ready() else { return };
    let seed = seed();
    let in_disk = KINDS.into_iter().filter(|kind| !kind.options.contains("overlay"));
    for round in 0..rounds() {
        for (number, kind) in in_disk.clone().enumerate() {
            let mut dice = Dice::new(seed + round * 16 + number as u64);
            give(&work);
            let victim = Victim::start(&work, kind, &format!("rest{round}_{number}"));
            thread::sleep(Duration::from_millis(dice.below(500)));
            let all = tree(victim.vdisk.pid());
            let name = format!("s{round}-{number}");
            let words = ["snapshot", "create", "web.qcow2", &name, "--freeze"];
            let snapshot = start(&work, kind.who, words);
            thread::sleep(Duration::from_micros(dice.below(150_000)));
            strike(*dice.pick(&[victim.vdisk.pid(), victim.server]));
            // Taken or not.
            let done = snapshot.wait();
            assert!(!done.err().contains("panicked"), "{}", done.err());
            victim.goes(&all, &format!("{kind:?}, round {round}"));
            host_is_well(&work);
            run(&work, kind.who, ["check", "web.qcow2"]);
            disk_is_sound(&work, kind);
        }
    }
}

#[test]
fn a_control_group_whose_container_was_killed_goes_with_the_next_one() {
    let Some(work) = ready() else { return };
    let kind = Kind { who: Who::Root, options: "--pids 100" };
    let victim = Victim::start(&work, kind, "group");
    let group = format!("vdisk-{}-0", victim.vdisk.pid());
    let groups = || find_dirs(Path::new("/sys/fs/cgroup"), &group, 8);
    assert!(!groups().is_empty());
    let all = tree(victim.vdisk.pid());
    strike(victim.keeper);
    strike(victim.vdisk.pid());
    victim.goes(&all, "killed");
    // One that is used stays.
    let kind = Kind { who: Who::Root, options: "--pids 100 --ephemeral" };
    let living = Victim::start(&work, kind, "living");
    let used = format!("vdisk-{}-0", living.vdisk.pid());
    let used = || find_dirs(Path::new("/sys/fs/cgroup"), &used, 8);
    assert_eq!(used().len(), 1);
    sh(&work, Who::Root, "--pids 90 --ephemeral", "true").succeeds();
    assert_eq!(used().len(), 1);
    assert!(groups().is_empty(), "{:?}", groups());
    living.vdisk.signal(Signal::SIGTERM);
    living.vdisk.wait().ends(143);
}
