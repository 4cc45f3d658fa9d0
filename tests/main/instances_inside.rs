//! What goes on inside an instance: its control groups, its terminal, its directory, its stop signal; and the unit that
//! starts it again.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::container::{able, eventually, running, work};
use crate::host::Work;
use crate::instances::Room;
use crate::require::{Need, have, skipped};
use crate::someone::{ALL, Ids, Who, give, run, start};

const LENT: Who = Who::Someone(Ids::Lent);

fn room() -> Option<Work> {
    (able() && have(Need::Uidmap)).then(work)
}

/// The control groups of a process, as the host sees them.
fn groups(pid: u32) -> Vec<String> {
    let all = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let mut all: Vec<_> = all.lines().map(str::to_owned).collect();
    all.sort();
    all
}

/// The group of a process in cgroup v2, where that is mounted here.
fn group(pid: u32) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "))?;
    let top = mount.split(' ').nth(4)?.to_owned();
    let own = groups(pid).into_iter().find_map(|line| Some(line.strip_prefix("0::/")?.to_owned()));
    Some(Path::new(&top).join(own?))
}

#[test]
fn another_command_in_a_container_has_its_limits() {
    let Some(work) = room() else { return };
    let room = Room::new(&work, Who::Root, "limits");
    room.start("--memory 64M --cpus 1 --pids 30", "sleep 7011").succeeds();
    eventually("it runs", || !running(&["sleep", "7011"]).is_empty());
    let other = start(&work, Who::Root, ["exec", &room.name, "sleep", "7012"]);
    eventually("the other runs", || !running(&["sleep", "7012"]).is_empty());
    let (own, others) = (running(&["sleep", "7011"]), running(&["sleep", "7012"]));
    assert_eq!(groups(own[0]), groups(others[0]));
    assert_ne!(groups(own[0]), groups(std::process::id()));
    // The kernel kills who wants more.
    room.vdisk("exec NAME dd if=/dev/zero of=/dev/null bs=300M count=1").ends(137);
    room.vdisk("exec NAME dd if=/dev/zero of=/dev/null bs=3M count=1").succeeds();
    let script = "n=0; while [ $n -lt 60 ]; do sleep 9 & n=$((n+1)); done; wait";
    let many = run(&work, Who::Root, ["exec", &*room.name, "sh", "-c", script]);
    assert_ne!(many.code, Some(0), "{}", many.text());
    room.vdisk("kill NAME").succeeds();
    other.wait().ends(137);
}

#[test]
fn a_container_is_frozen_by_its_control_group_and_sees_nothing_of_it() {
    let Some(work) = room() else { return };
    let room = Room::new(&work, Who::Root, "frozen");
    let script = "(while :; do echo >> /root/ticks; sleep 0.01; done) & sleep 7021";
    room.start("", script).succeeds();
    eventually("it runs", || !running(&["sleep", "7021"]).is_empty());
    let pid = running(&["sleep", "7021"])[0];
    let other = start(&work, Who::Root, ["exec", &room.name, "sleep", "7022"]);
    eventually("the other runs", || !running(&["sleep", "7022"]).is_empty());
    room.vdisk("pause NAME").succeeds();
    let dir = group(pid).filter(|dir| dir.join("cgroup.freeze").exists());
    let Some(dir) = dir else {
        skipped("this host has no cgroup v2 in which root may make groups");
        return;
    };
    assert_eq!(group(running(&["sleep", "7022"])[0]).as_ref(), Some(&dir));
    room.vdisk("resume NAME").succeeds();
    let is = |frozen: &str| {
        fs::read_to_string(dir.join("cgroup.events")).unwrap().lines().any(|line| line == frozen)
    };
    let state = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.lines().find_map(|line| line.strip_prefix("State:\t")?.chars().next())
    };
    for _ in 0..3 {
        room.vdisk("pause NAME").succeeds();
        // Nothing was stopped by a signal, which a parent could see.
        assert!(is("frozen 1") && state() != Some('T'), "{:?}", state());
        room.vdisk("exec NAME true").fails_to_run(&["paused"]);
        room.vdisk("resume NAME").succeeds();
        assert!(is("frozen 0"));
    }
    // It is ended, and its process too, while it stands still.
    room.vdisk("pause NAME").succeeds();
    room.vdisk("kill NAME").succeeds();
    other.wait().ends(137);
    room.vdisk("wait NAME").succeeds();
    assert!(!dir.exists());
}

#[test]
fn a_detached_container_has_a_terminal_that_others_come_to() {
    let Some(work) = room() else { return };
    for who in ALL {
        let room = Room::new(&work, who, "seat");
        room.vdisk("run -dt --name NAME web.qcow2 -- sh").succeeds();
        let mut first = start(&work, who, ["attach", &room.name]);
        first.type_in(b"tty; stty size; echo $((6 * 7))\n");
        eventually("it answers", || room.logs().contains("/dev/pts/0\r\n24 80\r\n42\r\n"));
        let mut second = start(&work, who, ["attach", &room.name]);
        second.type_in(b"echo $((6 * 9))\n");
        eventually("it answers the other", || room.logs().contains("\n54\r\n"));
        // Ctrl-A d leaves; it goes on, for the one who has stayed as well.
        first.type_in(b"\x01d");
        let done = first.wait().succeeds();
        assert!(done.out().contains("\n54\r\n"), "{}", done.out());
        second.type_in(b"exit 7\n");
        let done = second.wait().ends(7);
        assert!(!done.out().contains("\n42\r\n"), "{}", done.out());
        assert_eq!(room.vdisk("wait NAME").succeeds().out(), "7\n");
        // The interrupt key is for the program, though it is process 1.
        room.vdisk("run -dt --name NAME web.qcow2 -- sleep 7031").succeeds();
        let mut third = start(&work, who, ["attach", &room.name]);
        third.type_in(b"\x03");
        third.wait().ends(130);
        give(&work);
    }
}

#[test]
fn an_image_says_where_it_is_run_and_how_it_is_stopped() {
    let Some(work) = room() else { return };
    let room = Room::new(&work, LENT, "said");
    let vdisk = |words: &str| room.vdisk(&words.replace("STORE", "--store s"));
    vdisk("import STORE --size 64M root box").succeeds();
    vdisk("image config STORE box --workdir /made/here --stop-signal nonsense").ends(64);
    vdisk("image config STORE box --workdir /made/here --stop-signal SIGUSR1 --user ann")
        .succeeds();
    let said = vdisk("image config STORE box").succeeds().out();
    assert!(said.contains("stop signal: SIGUSR1\n"), "{said}");
    assert!(vdisk("image config STORE box --json").succeeds().out().contains("StopSignal"));
    // The directory is made, as root's; one that a user names is not.
    let words = ["run", "--store", "s", "box", "sh", "-c", "pwd; busybox stat -c %u:%a ."];
    assert_eq!(run(&work, LENT, words).succeeds().out(), "/made/here\n0:755\n");
    vdisk("run STORE --workdir /none box true").fails_to_run(&["/none", "working directory"]);
    let script = "trap 'exit 5' USR1; trap 'exit 6' HUP; echo up; while :; do sleep 0.05; done";
    for (options, status) in [("", "5\n"), ("--stop-signal HUP", "6\n")] {
        let words = format!("run -d --store s --name {} {options} box sh -c", room.name);
        run(&work, LENT, words.split_whitespace().chain([script])).succeeds();
        eventually("it is up", || room.logs().ends_with("up\n"));
        room.vdisk("stop --time 60 NAME").succeeds();
        assert_eq!(room.vdisk("wait NAME").succeeds().out(), status);
        vdisk("rm STORE --yes NAME").succeeds();
    }
}

/// It named an option that only what is detached may have, and did not start.
#[test]
fn a_unit_starts_what_it_was_made_of() {
    let Some(work) = room() else { return };
    let room = Room::new(&work, LENT, "unit");
    room.vdisk("run -td --log-size 1M --name NAME --ephemeral web.qcow2 -- cat /etc/motd")
        .succeeds();
    room.vdisk("wait NAME").succeeds();
    let unit = room.vdisk("generate systemd NAME").succeeds().out();
    let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let words: Vec<&str> = start.split(' ').skip(1).collect();
    assert!(words.contains(&"-t") && !words.contains(&"-d"), "{start}");
    assert_eq!(run(&work, LENT, words).succeeds().out(), "from the base\r\n");
    let stop = unit.lines().find_map(|line| line.strip_prefix("ExecStop=")).unwrap();
    assert!(stop.ends_with(&format!(" stop --time 30 {}", room.name)), "{stop}");
}

#[test]
fn a_plain_run_in_the_foreground_is_found_while_it_lasts() {
    let Some(work) = room() else { return };
    for who in ALL {
        let room = Room::new(&work, who, "plain");
        let script = "trap 'exit 7' TERM; echo up > /root/up; while :; do sleep 0.05; done";
        let plain = start(&work, who, ["run", "web.qcow2", "--", "sh", "-c", script]);
        let record = || {
            let all = room.vdisk("ps --json").succeeds().out();
            let all: serde_json::Value = serde_json::from_str(&all).unwrap();
            let path = work.path("web.qcow2").display().to_string();
            all.as_array().unwrap().iter().find(|r| r["disk"] == path.as_str()).cloned()
        };
        eventually("it is listed", || record().is_some_and(|r| r["phase"] == "running"));
        let id = record().unwrap()["id"].as_str().unwrap().to_owned();
        eventually("it is up", || room.vdisk("exec web.qcow2 cat /root/up").out() == "up\n");
        let waiting = start(&work, who, ["wait", &id]);
        for _ in 0..2 {
            room.vdisk("pause web.qcow2").succeeds();
            assert_eq!(record().unwrap()["phase"], "paused");
            room.vdisk(&format!("resume {id}")).succeeds();
        }
        assert_ne!(room.vdisk("rm --yes web.qcow2").code, Some(0));
        room.vdisk(&format!("stop --time 60 {}", &id[..6])).succeeds();
        plain.wait().ends(7);
        assert_eq!(waiting.wait().succeeds().out(), "7\n");
        assert!(!room.vdisk("ps --all --json").succeeds().out().contains(&id));
        // One that does not start leaves nothing, nor does one that is killed.
        room.vdisk("run web.qcow2 -- none").ends(127);
        let killed = start(&work, who, ["run", "web.qcow2", "--", "sleep", "7041"]);
        eventually("it runs", || record().is_some_and(|r| r["phase"] == "running"));
        let of = record().unwrap();
        let pid = i32::try_from(of["pid"].as_i64().unwrap()).unwrap();
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        killed.wait();
        eventually("nothing runs", || running(&["sleep", "7041"]).is_empty());
        assert!(record().is_none());
        eventually("the disk is free", || {
            room.vdisk("run web.qcow2 -- busybox true").code == Some(0)
        });
        let left = room.vdisk("ps --all --json").succeeds().out();
        assert!(!left.contains(of["id"].as_str().unwrap()), "{left}");
        give(&work);
    }
}
