//! Instances: what runs under a name is found, stopped, paused, restarted and told of truthfully, whoever
//! dies first; and an image is run as its configuration says.

use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::boot::{can_boot, cloned, words as guest};
use crate::container::{able, eventually, running, work};
use crate::host::{Done, Work};
use crate::require::{Need, have};
use crate::someone::{ALL, Ids, Who, give, run, start};

const LENT: Who = Who::Someone(Ids::Lent);

/// Instances of one user, which end with the test. Root's are in one place for the whole host: their
/// names are no other test's.
pub struct Room<'a> {
    work: &'a Work,
    who: Who,
    pub name: String,
}

impl<'a> Room<'a> {
    pub fn new(work: &'a Work, who: Who, name: &str) -> Room<'a> {
        if who != Who::Root {
            give(work);
        }
        Room { work, who, name: format!("t-{name}-{}", std::process::id()) }
    }

    pub fn vdisk(&self, words: &str) -> Done {
        run(self.work, self.who, words.replace("NAME", &self.name).split_whitespace())
    }

    /// Starts a shell script, detached.
    pub fn start(&self, options: &str, script: &str) -> Done {
        let words = format!("run -d --name {} {options} web.qcow2 -- sh -c", self.name);
        run(self.work, self.who, words.split_whitespace().chain([script]))
    }

    /// Its record, where there is one.
    fn record(&self) -> Option<Value> {
        let all = self.vdisk("ps --all --json").succeeds().out();
        let all: Value = serde_json::from_str(&all).unwrap();
        all.as_array().unwrap().iter().find(|r| r["name"] == self.name.as_str()).cloned()
    }

    /// What it has printed, without what vdisk says of its own.
    pub fn logs(&self) -> String {
        let all = self.vdisk("logs NAME").out();
        all.split_inclusive('\n').filter(|line| !line.starts_with("vdisk: warning:")).collect()
    }

    /// Its line of what is listed.
    fn line(&self) -> String {
        let all = self.vdisk("ps").succeeds().out();
        all.lines().find(|line| line.contains(&self.name)).expect("it is listed").to_owned()
    }

    #[track_caller]
    fn becomes(&self, phase: &str) {
        eventually(&format!("it is {phase}"), || {
            self.record().is_some_and(|r| r["phase"] == phase)
        });
    }

    fn pid(&self, of: &str) -> Pid {
        let record = self.record().unwrap();
        Pid::from_raw(i32::try_from(record[of].as_i64().unwrap()).unwrap())
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.vdisk("stop --time 0 NAME");
        self.vdisk("rm --yes NAME");
    }
}

fn room() -> Option<Work> {
    (able() && have(Need::Uidmap)).then(work)
}

/// Requires that the disk is free and sound.
#[track_caller]
fn free(work: &Work) {
    eventually("the disk is free", || work.qemu_img("check web.qcow2").code == Some(0));
}

#[test]
fn a_detached_container_is_listed_printed_stopped_and_waited_for() {
    let Some(work) = room() else { return };
    for who in ALL {
        let room = Room::new(&work, who, "listed");
        let script = "trap 'echo asked; exit 7' TERM; trap 'echo heard' USR1; echo hello; echo there >&2; while :; do sleep 0.1; done";
        let id = room.start("", script).succeeds().out().trim().to_owned();
        let record = room.record().unwrap();
        assert_eq!((&record["phase"], &record["id"]), (&"running".into(), &id.as_str().into()));
        let line = room.line();
        assert!(line.contains("running") && line.contains("container"), "{line}");
        eventually("it prints", || room.logs() == "hello\nthere\n");
        // Any signal reaches it.
        room.vdisk("kill NAME usr1").succeeds();
        eventually("it hears", || room.logs() == "hello\nthere\nheard\n");
        // By the first digits of its id, and by its disk.
        for word in [&id[..7], "web.qcow2"] {
            assert!(
                room.vdisk(&format!("inspect {word}")).succeeds().out().contains(&id),
                "{word}"
            );
        }
        let used: Value =
            serde_json::from_str(&room.vdisk("stats --json NAME").succeeds().out()).unwrap();
        assert!(used[0]["memory"].as_u64().unwrap() > 0 && used[0]["processes"].as_u64() > Some(2));
        let unit = room.vdisk("generate systemd NAME").succeeds().out();
        assert!(unit.contains(&format!(" run --name {} web.qcow2 -- sh -c", room.name)), "{unit}");
        let waiting = start(&work, who, ["wait", &room.name]);
        let following = start(&work, who, ["logs", "--follow", &room.name]);
        let attached = start(&work, who, ["attach", &room.name]);
        let open = format!("/proc/{}/fd", attached.pid());
        eventually("it is attached", || {
            let mut files = fs::read_dir(&open).into_iter().flatten().flatten();
            files.any(|file| fs::read_link(file.path()).is_ok_and(|at| at.ends_with("log")))
        });
        room.vdisk("stop NAME").succeeds();
        assert_eq!(waiting.wait().succeeds().out(), "7\n", "{who:?}");
        let followed = following.wait().succeeds().out();
        assert!(followed.ends_with("hello\nthere\nheard\nasked\n"), "{followed}");
        let attached = attached.wait();
        assert_eq!((attached.code, attached.out().as_str()), (Some(7), "asked\n"), "{who:?}");
        assert_eq!(room.vdisk("wait NAME").succeeds().out(), "7\n");
        let record = room.record().unwrap();
        assert_eq!((&record["phase"], &record["status"]), (&"exited".into(), &7.into()));
        assert!(!room.vdisk("ps").succeeds().out().contains(&room.name));
        room.vdisk("rm NAME").succeeds();
        assert_eq!(room.record(), None);
        free(&work);
    }
}

/// Its end could be heard of before its start: then it was said not to have run at all.
#[test]
fn a_container_that_ends_at_once_has_run() {
    let Some(work) = room() else { return };
    let room = Room::new(&work, Who::Root, "brief");
    for _ in 0..20 {
        room.vdisk("run --ephemeral --detach --name NAME web.qcow2 -- busybox true").succeeds();
        assert_eq!(room.vdisk("wait NAME").succeeds().out(), "0\n");
        room.vdisk("rm NAME").succeeds();
    }
    free(&work);
}

#[test]
fn a_name_is_one_instances_only_and_free_again_when_that_has_ended() {
    let Some(work) = room() else { return };
    let room = Room::new(&work, LENT, "unique");
    room.start("--ephemeral", "sleep 1000").succeeds();
    room.start("--ephemeral", "true").fails_to_run(&[&room.name, "runs already"]);
    room.vdisk("rm --yes NAME").fails(&["runs", "stop"]);
    room.vdisk("kill NAME").succeeds();
    assert_eq!(room.vdisk("wait NAME").succeeds().out(), "137\n");
    // Several at once: one of them gets the name.
    let words = format!("run -d --name {} --ephemeral web.qcow2 sleep 1000", room.name);
    let many: Vec<_> = (0..4).map(|_| start(&work, LENT, words.split_whitespace())).collect();
    let ended: Vec<_> = many.into_iter().map(|one| one.wait().code).collect();
    assert_eq!(ended.iter().filter(|code| **code == Some(0)).count(), 1, "{ended:?}");
}

#[test]
fn nothing_is_left_of_what_is_to_be_removed_and_what_does_not_start_is_said() {
    let Some(work) = room() else { return };
    for who in [Who::Root, LENT] {
        let room = Room::new(&work, who, "gone");
        room.start("--rm", "sleep 0.3; exit 3").succeeds();
        assert_eq!(room.vdisk("wait NAME").succeeds().out(), "3\n");
        assert_eq!(room.record(), None);
        let refused = room.vdisk("run -d --name NAME --restart always web.qcow2 /bin/none");
        assert_eq!(refused.code, Some(127), "{}", refused.text());
        refused.says(&["/bin/none"]);
        assert_eq!(room.record(), None);
        // In the foreground it is the same instance, and its status is the command's.
        let words = ["run", "--rm", "--name", &room.name, "web.qcow2", "sh", "-c", "exit 5"];
        run(&work, who, words).ends(5);
        free(&work);
    }
}

#[test]
fn what_does_not_stop_when_it_is_asked_is_ended() {
    let Some(work) = room() else { return };
    for who in [Who::Root, LENT] {
        let room = Room::new(&work, who, "deaf");
        room.start("", "trap '' TERM; echo x > /root/deaf; echo deaf; sleep 1234.5").succeeds();
        eventually("it is deaf", || room.logs() == "deaf\n");
        room.vdisk("stop --time 0.5 NAME").succeeds();
        assert_eq!(room.vdisk("wait NAME").succeeds().out(), "137\n");
        assert_eq!(running(&["sleep", "1234.5"]), Vec::<u32>::new());
        free(&work);
        assert_eq!(work.vdisk("cat web.qcow2:/root/deaf").succeeds().out(), "x\n");
    }
}

#[test]
fn what_ends_by_itself_is_started_again_as_its_policy_says() {
    let Some(work) = room() else { return };
    let count = "echo >> /root/turns; n=$(busybox wc -l < /root/turns)";
    let room = Room::new(&work, LENT, "again");
    room.start("--restart on-failure", &format!("{count}; [ $n -ge 3 ]")).succeeds();
    room.becomes("exited");
    let record = room.record().unwrap();
    assert_eq!((&record["restarts"], &record["status"]), (&2.into(), &0.into()));
    room.start("--restart always", &format!("{count}; [ $n -lt 6 ] || sleep 1000")).succeeds();
    eventually("three more turns", || {
        room.record().is_some_and(|r| r["phase"] == "running" && r["restarts"] == 2)
    });
    // What is stopped stays so.
    room.vdisk("stop NAME").succeeds();
    assert_eq!(room.record().unwrap()["phase"], "exited");
    free(&work);
    assert_eq!(work.vdisk("cat web.qcow2:/root/turns").succeeds().stdout, b"\n".repeat(6));
}

#[test]
fn a_killed_process_leaves_no_lie_and_a_disk_that_can_be_used() {
    let Some(work) = room() else { return };
    for who in [Who::Root, LENT] {
        for (of, phase) in [("pid", "lost"), ("turn", "exited")] {
            let room = Room::new(&work, who, "killed");
            room.start("", "echo x > /root/kept; busybox sync; echo up; sleep 4321.5").succeeds();
            eventually("it is up", || room.logs() == "up\n");
            kill(room.pid(of), Signal::SIGKILL).unwrap();
            room.becomes(phase);
            eventually("nothing runs", || running(&["sleep", "4321.5"]).is_empty());
            assert!(!room.vdisk("ps").succeeds().out().contains(&room.name));
            free(&work);
            assert_eq!(work.vdisk("cat web.qcow2:/root/kept").succeeds().out(), "x\n");
            give(&work);
            room.start("", "sleep 1000").succeeds();
        }
    }
}

#[test]
fn a_paused_container_stands_still_and_its_snapshot_can_be_taken() {
    let Some(work) = room() else { return };
    for who in ALL {
        let room = Room::new(&work, who, "paused");
        let script = "(while :; do echo >> /root/ticks; sleep 0.01; done) & sleep 1000";
        room.start("", script).succeeds();
        room.vdisk("pause NAME").succeeds();
        assert_eq!(room.record().unwrap()["phase"], "paused");
        let turn = room.pid("turn");
        // Root's stand still in a control group that is frozen, where there can be one.
        if who != Who::Root {
            let states = states(turn.as_raw());
            let stand = states.iter().all(|s| "TZ".contains(*s));
            assert!(!states.is_empty() && stand, "{who:?}: {states:?}");
        }
        let name = format!("{who:?}").replace(['(', ')'], "");
        room.vdisk(&format!("snapshot create web.qcow2 {name}")).succeeds();
        room.vdisk("resume NAME").succeeds();
        eventually("it goes on", || self::states(turn.as_raw()).iter().all(|s| *s != 'T'));
        // What is paused can be stopped.
        room.vdisk("pause NAME").succeeds();
        room.vdisk("stop --time 1 NAME").succeeds();
        free(&work);
    }
}

/// The states of the programs named `sleep` or `sh` that descend from a process.
fn states(of: i32) -> Vec<char> {
    let stat = |pid: i32| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let parent = |pid| stat(pid).rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok();
    let descends = |mut pid: i32| loop {
        match parent(pid) {
            Some(up) if up == of => return true,
            Some(0) | None => return false,
            Some(up) => pid = up,
        }
    };
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| stat(*pid).contains("(sh)") || stat(*pid).contains("(sleep)"))
        .filter(|pid| descends(*pid))
        .filter_map(|pid| stat(pid).rsplit_once(')')?.1.trim_start().chars().next())
        .collect()
}

#[test]
fn another_command_runs_in_a_container_with_its_program_s_rights_and_no_more() {
    let Some(work) = room() else { return };
    for who in ALL {
        let room = Room::new(&work, who, "exec");
        let options = "--env A=b --workdir /tmp --hostname box";
        let look = "grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:)' /proc/self/status";
        let look = format!("busybox {look} | busybox grep -v Groups");
        room.start(options, &format!("{look}; echo up; sleep 1000")).succeeds();
        eventually("it is up", || room.logs().ends_with("up\n"));
        let exec = |words: &[&str], script: &str| {
            let words = ["exec"].iter().chain(words).copied().chain([&*room.name, "sh", "-c"]);
            run(&work, who, words.chain([script]))
        };
        let own = room.logs();
        assert_eq!(exec(&[], &format!("{look}; echo up")).succeeds().out(), own, "{who:?}");
        // Its files, its directory, its variables, its host name, its processes.
        let said = exec(
            &["--env", "C=d"],
            "echo $A$C; pwd; hostname; echo x > /root/from-exec; cat /proc/1/comm",
        );
        assert_eq!(said.succeeds().out(), "bd\n/tmp\nbox\nsleep\n", "{who:?}");
        for space in ["pid", "mnt", "net", "ipc", "uts", "cgroup", "user"] {
            exec(&[], &format!("[ $(busybox readlink /proc/1/ns/{space}) = $(busybox readlink /proc/self/ns/{space}) ]"))
                .succeeds();
        }
        exec(&[], "exit 9").ends(9);
        exec(&[], "kill -9 $$").ends(137);
        room.vdisk("exec NAME none").ends(127).says(&["none"]);
        exec(&["--tty"], "tty").succeeds();
        // A program of it that is paused with the rest, and ended with the rest.
        let long = start(&work, who, ["exec", &room.name, "sleep", "765.5"]);
        eventually("it runs", || !running(&["sleep", "765.5"]).is_empty());
        room.vdisk("kill NAME").succeeds();
        long.wait().ends(137);
        room.vdisk("wait NAME").succeeds();
        room.vdisk("exec NAME true").fails_to_run(&["does not run"]);
        free(&work);
        assert_eq!(work.vdisk("cat web.qcow2:/root/from-exec").succeeds().out(), "x\n");
    }
}

#[test]
fn an_image_is_run_as_it_says_in_a_clone_that_goes_or_is_kept() {
    let Some(work) = room() else { return };
    fs::create_dir_all(work.path("root/srv")).unwrap();
    // Its files belong to whoever imports it.
    for who in [Who::Root, LENT] {
        give(&work);
        let store = format!("store-{who:?}").replace(['(', ')'], "");
        let room = Room::new(&work, who, "image");
        let vdisk = |words: &str| room.vdisk(&words.replace("STORE", &format!("--store {store}")));
        vdisk("import STORE --size 64M root box").succeeds();
        vdisk("run STORE box").fails_to_run(&["a command is needed"]);
        let config = ["--env", "GREETING=hello", "--workdir", "/srv", "--user", "ann"];
        let words = ["image", "config", "--store", &store, "box", "--entrypoint", "/bin/sh -c"];
        run(&work, who, words.into_iter().chain(config)).succeeds();
        let words = ["run", "--store", &store, "box", "echo $GREETING; pwd; id -u"];
        let said = run(&work, who, words);
        assert_eq!(said.succeeds().out(), "hello\n/srv\n7\n");
        let own = [
            "run",
            "--store",
            &store,
            "--user",
            "0",
            "--env",
            "GREETING=x",
            "--entrypoint",
            "",
            "box",
        ];
        let script = "echo $GREETING; echo y > /root/y";
        let said = run(&work, who, own.into_iter().chain(["sh", "-c", script]));
        assert_eq!(said.succeeds().out(), "x\n");
        // The first clone is gone, and this one stays under its name.
        for turn in 1..=2 {
            let words = ["run", "--name", &room.name, "--user", "0", "--store", &store, "box"];
            let script = "echo >> /root/turns; cat /root/y; busybox wc -l < /root/turns";
            let said = run(&work, who, words.into_iter().chain([script]));
            assert_eq!(said.succeeds().out(), format!("{turn}\n"));
        }
        let clone = work.path(&store).join("instances").join(format!("{}.qcow2", room.name));
        assert!(clone.exists());
        assert_eq!(room.record().unwrap()["stop_signal"], 15);
        vdisk("rm STORE NAME").fails(&["--yes"]);
        vdisk("rm STORE --yes NAME").succeeds();
        assert!(!clone.exists() && room.record().is_none());
        vdisk("run STORE --rm --name NAME --entrypoint /bin/sh box -c true").succeeds();
        assert!(!clone.exists() && room.record().is_none());
    }
}

#[test]
fn a_virtual_machine_is_an_instance_like_a_container() {
    if !can_boot() {
        return;
    }
    let work = cloned();
    let room = Room::new(&work, Who::Root, "machine");
    let boot = |test: &str| {
        let mut words = guest(test, "");
        let own = ["-d", "--name", &room.name].map(str::to_owned);
        words.splice(1..1, own);
        work.vdisk_args(words)
    };
    boot("button").succeeds();
    let line = room.line();
    assert!(line.contains("machine") && line.contains("running"), "{line}");
    room.vdisk("exec NAME true").fails_to_run(&["virtual machine", "attach"]);
    room.vdisk("pause NAME").succeeds();
    assert_eq!(room.record().unwrap()["phase"], "paused");
    work.vdisk("snapshot create clone.qcow2 paused").succeeds();
    room.vdisk("kill NAME USR1").fails(&["no signals"]);
    // Its power button, after it was let go on.
    room.vdisk("stop --time 30 NAME").succeeds();
    assert_eq!(room.vdisk("wait NAME").succeeds().out(), "0\n");
    assert!(!room.vdisk("logs NAME").succeeds().out().is_empty());
    boot("button").succeeds();
    room.vdisk("kill NAME").succeeds();
    assert_eq!(room.vdisk("wait NAME").succeeds().out(), "137\n");
    boot("button").succeeds();
    kill(room.pid("pid"), Signal::SIGKILL).unwrap();
    room.becomes("lost");
    eventually("the disk is free", || work.vdisk("check clone.qcow2").code == Some(0));
    assert!(Path::new("/run/vdisk/instances").exists());
}
