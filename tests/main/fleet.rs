//! Fleets: many instances by one command, put on another image and back, whatever stops that in between.

use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::boot::{can_boot, words as guest};
use crate::container::{able, eventually, work};
use crate::dice::Dice;
use crate::host::{Done, PATIENCE, Running, Work};
use crate::jail::{assert_jailed, inside};
use crate::jail_mounts::prey_elsewhere;
use crate::require::{Need, have};
use crate::someone::{Ids, Who, give, run, start};

const LENT: Who = Who::Someone(Ids::Lent);
/// Ends when it is asked, and says which image it came from.
const SERVE: &str =
    "trap 'exit 0' TERM; cat /etc/version; : > /root/up; while :; do sleep 0.05; done";

/// Images `one` and `two` in a store, and instances of one name's kind, which end with the test.
struct Fleet {
    work: Work,
    who: Who,
    name: String,
}

impl Fleet {
    fn new(who: Who, name: &str) -> Option<Fleet> {
        if !able() || !have(Need::Uidmap) {
            return None;
        }
        let work = work();
        if who != Who::Root {
            give(&work);
        }
        let fleet = Fleet { work, who, name: format!("f-{name}-{}", std::process::id()) };
        for image in ["one", "two"] {
            fleet.work.put("root/etc/version", format!("{image}\n"));
            fleet.vdisk(&format!("import STORE --size 64M root {image}")).succeeds();
            let words =
                ["image", "config", "--store", "store", image, "--entrypoint", "/bin/sh -c"];
            run(&fleet.work, who, words).succeeds();
        }
        Some(fleet)
    }

    fn words(&self, words: &str) -> Vec<String> {
        let words = words.replace("NAME", &self.name).replace("STORE", "--store store");
        words.split_whitespace().map(str::to_owned).collect()
    }

    fn vdisk(&self, words: &str) -> Done {
        run(&self.work, self.who, self.words(words))
    }

    fn start(&self, words: &str) -> Running {
        start(&self.work, self.who, self.words(words))
    }

    /// Runs that many of the image `one`.
    fn run(&self, count: u32) -> Vec<String> {
        let words = format!("run STORE --count {count} --name NAME-{{}} one");
        let words = self.words(&words).into_iter().chain([SERVE.to_owned()]);
        let ids = run(&self.work, self.who, words).succeeds().out();
        let ids = ids.lines().map(str::to_owned).collect();
        (0..count).for_each(|number| self.is_up(number));
        ids
    }

    fn is_up(&self, number: u32) {
        eventually("it is up", || {
            self.vdisk(&format!("exec NAME-{number} cat /root/up")).code == Some(0)
        });
    }

    /// All of them, by name.
    fn records(&self) -> Vec<Value> {
        let all = self.vdisk("ps --all --json").succeeds().out();
        let all: Value = serde_json::from_str(&all).unwrap();
        let own = |record: &&Value| record["name"].as_str().unwrap().starts_with(&self.name);
        let mut all: Vec<Value> = all.as_array().unwrap().iter().filter(own).cloned().collect();
        all.sort_by_key(|record| record["name"].as_str().unwrap().to_owned());
        all
    }

    fn phases(&self) -> Vec<String> {
        self.records().iter().map(|r| r["phase"].as_str().unwrap().to_owned()).collect()
    }

    fn disk(&self, number: u32) -> PathBuf {
        self.work.path("store/instances").join(format!("{}-{number}.qcow2", self.name))
    }

    /// What a file in the disk of one says that does not run.
    fn file(&self, number: u32, path: &str) -> String {
        let disk = self.disk(number);
        let words = ["cat".to_owned(), format!("{}:{path}", disk.display())];
        run(&self.work, self.who, words).out()
    }

    /// What one that runs finds in a file.
    fn finds(&self, number: u32, path: &str) -> String {
        self.vdisk(&format!("exec NAME-{number} cat {path}")).out()
    }

    /// Lets one write what is only its own.
    fn write(&self, number: u32) {
        let name = format!("{}-{number}", self.name);
        let script = format!("echo mine-{number} > /root/mine; busybox sync");
        let words = ["exec", &name, "sh", "-c", &script];
        run(&self.work, self.who, words).succeeds();
    }

    /// Requires that QEMU finds nothing wrong with a disk that nobody has.
    #[track_caller]
    fn sound(&self, number: u32) {
        let disk = self.disk(number);
        let done = self.work.run("qemu-img", ["check", "-q", disk.to_str().unwrap()]);
        assert_eq!(done.code, Some(0), "{}", done.text());
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for record in self.records() {
            let name = record["name"].as_str().unwrap().to_owned();
            run(&self.work, self.who, ["stop", "--time", "0", &name]);
            run(&self.work, self.who, ["rm", "--yes", &name]);
        }
    }
}

#[test]
fn many_are_started_by_one_command() {
    for who in [Who::Root, LENT] {
        let Some(fleet) = Fleet::new(who, "many") else { return };
        let ids = fleet.run(5);
        let records = fleet.records();
        for (number, record) in records.iter().enumerate() {
            assert_eq!(record["name"], format!("{}-{number}", fleet.name).as_str());
            assert_eq!(
                (&record["id"], &record["phase"]),
                (&ids[number].as_str().into(), &"running".into())
            );
            // As it would be started alone.
            let words = record["words"].to_string();
            assert!(!words.contains("count") && !words.contains('{'), "{words}");
        }
        assert_eq!(records.len(), 5);
        let disks: Vec<&Value> = records.iter().map(|record| &record["disk"]).collect();
        assert!((1..5).all(|n| disks[n] != disks[0]), "{disks:?}");
        fleet.vdisk("run STORE --count 9 --name NAME-{} one true").fails_to_run(&[
            &format!("{}-0", fleet.name),
            "runs already",
            "none was started",
        ]);
        assert_eq!(fleet.records().len(), 5);
        // One that is stopped is started again as it was.
        fleet.vdisk("stop NAME-3").succeeds();
        assert_eq!(fleet.vdisk("start NAME-3").succeeds().out().trim(), ids[3]);
        assert_eq!(fleet.phases(), ["running"; 5]);
        // Without a name they are throw-away clones.
        let words = fleet.words("run STORE --count 2 --rm one").into_iter();
        let more = run(&fleet.work, who, words.chain([SERVE.to_owned()])).succeeds().out();
        let more: Vec<&str> = more.lines().collect();
        assert_eq!(more.len(), 2);
        run(&fleet.work, who, ["stop"].iter().chain(&more)).succeeds();
        assert_eq!(fleet.records().len(), 5);
    }
}

#[test]
fn what_does_not_start_of_many_is_said_and_the_rest_is_not_begun() {
    let Some(fleet) = Fleet::new(Who::Root, "some") else { return };
    fleet
        .vdisk("run STORE --count 40 --name NAME-{:02} --entrypoint /bin/none one")
        .fails_to_run(&["/bin/none", "did not start", "not begun"]);
    assert_eq!(fleet.records(), Vec::<Value>::new());
    let left = fs::read_dir(fleet.work.path("store/instances")).unwrap().count();
    assert_eq!(left, 0, "clones of what never ran");
    fleet.vdisk("run STORE --name NAME-{} one true").fails_to_run(&["--count"]);
    fleet.vdisk("run STORE --count 2 --name NAME one true").fails_to_run(&["{}"]);
    fleet.vdisk("run STORE --count 0 one true").ends(64);
    fleet.vdisk("run STORE --count 2 --name -{} one true").ends(64);
}

#[test]
fn a_fleet_is_put_on_another_image_and_back_with_all_that_it_had_written() {
    for who in [Who::Root, LENT] {
        let Some(fleet) = Fleet::new(who, "there") else { return };
        let ids = fleet.run(3);
        (0..3).for_each(|number| fleet.write(number));
        fleet.vdisk("stop NAME-1").succeeds();
        let roll = |more: &str| fleet.vdisk(&format!("roll STORE NAME-* {more}"));
        // Nothing is lost that nobody agreed to lose, and a look changes nothing.
        roll("--to two").fails(&["3 instances", "--yes", "nothing was done"]);
        let shown = roll("--to two --dry-run").succeeds().out();
        assert!(shown.lines().count() == 3 && shown.contains("stays stopped"), "{shown}");
        let shown: Value =
            serde_json::from_str(&roll("--to two --dry-run --json").succeeds().out()).unwrap();
        assert_eq!(shown["instances"][1]["state"], "exited");
        assert_eq!(
            (&shown["dry_run"], &shown["instances"][0]["starts"]),
            (&true.into(), &true.into())
        );
        assert_eq!(fleet.finds(0, "/etc/version"), "one\n");
        assert_eq!(roll("--back --dry-run").succeeds().out().matches("nothing").count(), 3);

        let said = roll("--to two --batch 2 --yes --json").succeeds().out();
        let said: Value = serde_json::from_str(&said).unwrap();
        let results = said["instances"].as_array().unwrap().iter().map(|one| &one["result"]);
        assert!(results.clone().all(|result| result == "done"), "{said}");
        assert_eq!(fleet.phases(), ["running", "exited", "running"]);
        for (number, record) in fleet.records().iter().enumerate() {
            assert_eq!(
                (&record["id"], &record["image"]),
                (&ids[number].as_str().into(), &"two".into())
            );
            fleet
                .vdisk(&format!("image config STORE {}", record["disk"].as_str().unwrap()))
                .succeeds();
        }
        for number in [0, 2] {
            fleet.is_up(number);
            assert_eq!(fleet.finds(number, "/etc/version"), "two\n");
            assert_eq!(fleet.finds(number, "/root/mine"), "");
        }
        assert_eq!(
            (fleet.file(1, "/etc/version"), fleet.file(1, "/root/mine")),
            ("two\n".into(), "".into())
        );
        // There is nothing more to do.
        let again = roll("--to two --dry-run").succeeds().out();
        assert_eq!(again.matches("there already").count(), 3, "{again}");
        roll("--to two").succeeds();

        roll("--back").fails(&["--yes"]);
        roll("--back --yes --batch 3").succeeds();
        assert_eq!(fleet.phases(), ["running", "exited", "running"]);
        for number in [0, 2] {
            fleet.is_up(number);
            assert_eq!(fleet.finds(number, "/etc/version"), "one\n");
            assert_eq!(fleet.finds(number, "/root/mine"), format!("mine-{number}\n"));
        }
        assert_eq!(fleet.file(1, "/root/mine"), "mine-1\n");
        assert!(fleet.records().iter().all(|record| record["image"] == "one"));
        // What they stood on in between is nobody's any more.
        fleet.vdisk("stop NAME-0 NAME-2").succeeds();
        (0..3).for_each(|number| fleet.sound(number));
        fleet.vdisk("image rm STORE two").succeeds();
        let pruned = fleet.vdisk("image prune STORE --yes --json").succeeds().out();
        assert_eq!(pruned.matches("/layers/").count(), 1, "{pruned}");
        assert_eq!(fleet.file(0, "/root/mine"), "mine-0\n");
    }
}

#[test]
fn what_an_instance_wrote_is_kept_as_a_snapshot_where_that_is_asked_for() {
    let Some(fleet) = Fleet::new(Who::Root, "kept") else { return };
    fleet.run(2);
    fleet.write(0);
    let disk = fleet.disk(0);
    let at = |snapshot: &str, path: &str| {
        let file = format!("{}:{path}", disk.display());
        run(&fleet.work, fleet.who, ["cat", &file, "--snapshot", snapshot]).out()
    };
    // Nothing is dropped: nobody is asked.
    fleet.vdisk("roll STORE --to two NAME-* --keep first").succeeds();
    assert_eq!(
        (at("first", "/root/mine"), at("first", "/etc/version")),
        ("mine-0\n".into(), "one\n".into())
    );
    fleet.is_up(0);
    assert_eq!(fleet.finds(0, "/etc/version"), "two\n");
    fleet.vdisk("roll STORE --to one NAME-0 --keep first").fails(&["first"]);
    fleet.write(0);
    fleet.vdisk("roll STORE --back NAME-* --keep second").succeeds();
    fleet.is_up(0);
    assert_eq!(fleet.finds(0, "/etc/version"), "one\n");
    assert_eq!(fleet.finds(0, "/root/mine"), "mine-0\n");
    assert_eq!(
        (at("second", "/root/mine"), at("second", "/etc/version")),
        ("mine-0\n".into(), "two\n".into())
    );
    fleet.vdisk("stop NAME-0 NAME-1").succeeds();
    fleet.sound(0);
    // It is found again under its image's name, though snapshots stand between.
    fleet.vdisk("run STORE --name NAME-0 one true").succeeds();
    fleet.vdisk("run STORE --name NAME-0 two true").fails_to_run(&["another image", "roll"]);
}

#[test]
fn a_roll_stops_at_the_first_that_is_not_healthy() {
    let Some(fleet) = Fleet::new(LENT, "healthy") else { return };
    fleet.run(3);
    (0..3).for_each(|number| fleet.write(number));
    let roll = |to: &str, check: &str, time: &str| {
        let words =
            fleet.words(&format!("roll STORE {to} NAME-* --yes --health-timeout {time} --health"));
        run(&fleet.work, fleet.who, words.into_iter().chain([check.to_owned()]))
    };
    let program = fleet.work.path("vdisk").display().to_string();
    let look = "\"$VDISK\" exec \"$VDISK_INSTANCE\" cat /root/up";
    let check =
        format!("[ \"$VDISK_INSTANCE\" != {}-1 ] && {look} && [ -d /proc/$VDISK_PID ]", fleet.name);
    assert!(program.ends_with("/vdisk"));
    let told = roll("--to two", &check, "2").fails(&[
        "is not healthy",
        "1 are done, 1 were not begun",
        "--back",
    ]);
    assert!(told.err().contains(&format!("{}-1", fleet.name)), "{}", told.err());
    let versions = |expected: [&str; 3]| {
        for (number, version) in (0..).zip(expected) {
            fleet.is_up(number);
            assert_eq!(fleet.finds(number, "/etc/version"), format!("{version}\n"));
        }
    };
    versions(["two", "two", "one"]);
    // One that never answers is not waited for.
    let since = Instant::now();
    roll("--to two", "sleep 1000", "0.5").fails(&["is not healthy", "did not end"]);
    assert!(since.elapsed() < PATIENCE / 2);
    roll("--back", look, "20").succeeds();
    versions(["one", "one", "one"]);
    assert_eq!(fleet.finds(1, "/root/mine"), "mine-1\n");
    roll("--to two", look, "20").succeeds();
    versions(["two", "two", "two"]);
}

/// The process that stops, starts and asks reads no disk: another does, and code that takes that over does no harm.
#[test]
fn the_process_that_changes_disks_for_a_roll_is_jailed() {
    if !have(Need::Landlock) {
        return;
    }
    for who in [Who::Root, LENT] {
        let Some(fleet) = Fleet::new(who, "jailed") else { return };
        let (_elsewhere, prey) = prey_elsewhere();
        fleet.run(1);
        fleet.write(0);
        let check = "touch asked && until [ -e go ]; do sleep 0.05; done";
        for (way, version) in [("--to two", "two\n"), ("--back", "one\n")] {
            let words = fleet.words(&format!("roll STORE {way} NAME-0 --yes --jail require"));
            let health = ["--health-timeout", "600", "--health", check].map(str::to_owned);
            let roll = start(&fleet.work, who, words.into_iter().chain(health));
            eventually("it is asked how it is", || fleet.work.path("asked").exists());
            assert_jailed(inside(roll.pid(), "roll-disk"), &["vdisk"], &prey);
            fleet.work.put("go", "");
            roll.wait().succeeds();
            fleet.is_up(0);
            assert_eq!(fleet.finds(0, "/etc/version"), version);
            ["asked", "go"].iter().for_each(|name| fs::remove_file(fleet.work.path(name)).unwrap());
        }
        assert_eq!(fleet.finds(0, "/root/mine"), "mine-0\n");
    }
}

#[test]
fn what_does_not_start_on_the_new_image_comes_back() {
    let Some(fleet) = Fleet::new(Who::Root, "broken") else { return };
    fleet.run(2);
    fleet.write(0);
    run(
        &fleet.work,
        fleet.who,
        ["image", "config", "--store", "store", "two", "--entrypoint", "/bin/none"],
    )
    .succeeds();
    fleet
        .vdisk("roll STORE --to two NAME-* --yes")
        .fails(&["/bin/none", "0 are done, 1 were not begun"]);
    assert_eq!(fleet.phases(), ["exited", "running"]);
    fleet.vdisk("roll STORE --back NAME-* --yes").succeeds();
    assert_eq!(fleet.phases(), ["running", "running"]);
    fleet.is_up(0);
    assert_eq!(fleet.finds(0, "/root/mine"), "mine-0\n");
    fleet.vdisk("roll STORE --to none NAME-* --yes").fails(&["none"]);
    fleet.vdisk("roll STORE --to two NAME-x* --yes").fails(&["no instance"]);
    fleet.vdisk("roll STORE NAME-* --yes").ends(64);
    fleet.vdisk("roll STORE --to two --back NAME-* --yes").ends(64);
    // An image's name may mean another image by now.
    fleet.vdisk("image rm STORE one").succeeds();
    run(
        &fleet.work,
        fleet.who,
        ["image", "config", "--store", "store", "two", "--entrypoint", "/bin/sh -c"],
    )
    .succeeds();
    fleet.vdisk("roll STORE --to two NAME-1 --yes").succeeds();
    fleet.vdisk("roll STORE --back NAME-1 --yes").succeeds();
    fleet.is_up(1);
    assert_eq!(fleet.finds(1, "/etc/version"), "one\n");
}

#[test]
fn a_disk_of_the_user_s_is_put_on_another_base_and_back() {
    let Some(fleet) = Fleet::new(Who::Root, "own") else { return };
    let work = &fleet.work;
    for base in ["old", "new"] {
        work.put("root/etc/version", format!("{base}\n"));
        work.run("mke2fs", ["-q", "-F", "-t", "ext4", "-d", "root", &format!("{base}.raw"), "48M"])
            .succeeds();
        work.vdisk(&format!("convert {base}.raw {base}.qcow2")).succeeds();
    }
    work.vdisk("clone old.qcow2 own.qcow2").succeeds();
    let words = fleet.words("run -d --name NAME-0 own.qcow2 -- sh -c");
    run(work, fleet.who, words.into_iter().chain([SERVE.to_owned()])).succeeds();
    fleet.is_up(0);
    fleet.write(0);
    fleet.vdisk("roll --to new.qcow2 NAME-0 --yes").succeeds();
    fleet.is_up(0);
    assert_eq!(fleet.finds(0, "/etc/version"), "new\n");
    work.vdisk("rm old.qcow2 --yes").fails(&["own"]);
    let kept = work.vdisk("snapshot list own.qcow2").succeeds().err();
    assert!(kept.contains("roll to another base"), "{kept}");
    fleet.vdisk("roll --back NAME-0 --yes").succeeds();
    fleet.is_up(0);
    assert_eq!(fleet.finds(0, "/root/mine"), "mine-0\n");
    fleet.vdisk("stop NAME-0").succeeds();
    // One that stands on nothing has no base that could be another.
    work.vdisk("clone --full own.qcow2 full.qcow2").succeeds();
    let words = fleet.words("run -d --name NAME-0 full.qcow2 sleep 1000");
    run(work, fleet.who, words).succeeds();
    fleet.vdisk("roll --to new.qcow2 NAME-0 --yes").fails(&["full.qcow2", "is no clone"]);
    assert_eq!(fleet.phases(), ["running"]);
}

#[test]
fn a_disk_stays_as_large_as_it_was_made_and_one_without_a_record_is_rolled_too() {
    let Some(fleet) = Fleet::new(Who::Root, "larger") else { return };
    let id = fleet.run(1).remove(0);
    fleet.vdisk("stop NAME-0").succeeds();
    let disk = fleet.disk(0).display().to_string();
    let size = || {
        let info = fleet.work.vdisk(&format!("info --json {disk}")).succeeds().out();
        serde_json::from_str::<Value>(&info).unwrap()["virtual_size"].as_u64()
    };
    fleet.work.vdisk(&format!("resize {disk} 128M --files")).succeeds();
    fleet.vdisk("roll STORE --to two NAME-* --yes").succeeds();
    assert_eq!(size(), Some(128 << 20));
    fleet.vdisk("start NAME-0").succeeds();
    fleet.is_up(0);
    let blocks = fleet.vdisk("exec NAME-0 busybox df -m /").succeeds().out();
    let words: Vec<&str> = blocks.lines().last().unwrap().split_whitespace().collect();
    assert!(words[1].parse::<u64>().unwrap() > 100, "{blocks}");
    fleet.vdisk("stop NAME-0").succeeds();
    fleet.vdisk("roll STORE --back NAME-* --yes").succeeds();
    assert_eq!(size(), Some(128 << 20));
    // As a restart of the host leaves it.
    fs::remove_dir_all(PathBuf::from("/run/vdisk/instances").join(id)).unwrap();
    let shown = fleet.vdisk("roll STORE --to two NAME-* --dry-run").succeeds().out();
    assert!(shown.contains("no record") && shown.contains("stays stopped"), "{shown}");
    fleet.vdisk("roll STORE --to two NAME-* --yes").succeeds();
    assert_eq!((fleet.file(0, "/etc/version"), size()), ("two\n".into(), Some(128 << 20)));
    fleet.sound(0);
}

#[test]
fn virtual_machines_are_rolled_as_containers_are() {
    let Some(fleet) = Fleet::new(Who::Root, "machine").filter(|_| can_boot()) else { return };
    let work = &fleet.work;
    for (base, byte) in [("old.raw", 0x11), ("new.raw", 0x77)] {
        work.put(base, vec![byte; 4 << 20]);
    }
    work.vdisk("clone old.raw clone.qcow2").succeeds();
    work.vdisk_fed("write clone.qcow2 0", &[0x33; 512]).succeeds();
    let mut words = guest("button", "");
    words.splice(1..1, fleet.words("-d --name NAME-0"));
    work.vdisk_args(words).succeeds();
    let first = |byte: u8| {
        assert_eq!(fleet.phases(), ["running"]);
        // Its power button.
        fleet.vdisk("stop --time 30 NAME-0").succeeds();
        assert_eq!(fleet.vdisk("wait NAME-0").succeeds().out(), "0\n");
        let read = work.vdisk("read clone.qcow2 0 512").succeeds().stdout;
        assert_eq!(read, [byte; 512]);
        fleet.vdisk("start NAME-0").succeeds();
    };
    let check = "test \"$VDISK_KIND\" = machine";
    let roll = |to: &str| {
        let words = fleet.words(&format!("roll {to} NAME-0 --time 30 --yes --health"));
        run(work, fleet.who, words.into_iter().chain([check.to_owned()]))
    };
    roll("--to new.raw").succeeds();
    first(0x77);
    roll("--back").succeeds();
    first(0x33);
    fleet.vdisk("stop --time 30 NAME-0").succeeds();
}

/// Killed at moments that are spread over a whole roll, and over a whole way back: what is said next, once
/// more the same or the other way, ends right.
#[test]
fn a_roll_that_is_killed_at_any_moment_goes_on_or_goes_back() {
    let Some(fleet) = Fleet::new(Who::Root, "killed") else { return };
    let seed = std::env::var("VDISK_SEED").ok().and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("VDISK_SEED={seed}");
    let mut dice = Dice::new(seed);
    fleet.run(3);
    (0..3).for_each(|number| fleet.write(number));
    fleet.vdisk("stop NAME-2").succeeds();
    let there = "roll STORE --to two NAME-* --batch 2 --yes";
    let kept = "roll STORE --to two NAME-* --batch 2 --keep was --yes";
    let back = "roll STORE --back NAME-* --batch 2 --yes";
    let since = Instant::now();
    fleet.vdisk(there).succeeds();
    let whole = since.elapsed();
    fleet.vdisk(back).succeeds();
    for turn in 0..12 {
        let way = if turn % 3 == 2 { kept } else { there };
        stopped(&fleet, way, whole, &mut dice);
        if dice.one_in(2) {
            fleet.vdisk(way).succeeds();
            judge(&fleet, "two");
            stopped(&fleet, back, whole, &mut dice);
        }
        fleet.vdisk(back).succeeds();
        judge(&fleet, "one");
        // What was kept is the same, and goes.
        let disk = fleet.disk(0).display().to_string();
        let listed = fleet.work.vdisk(&format!("snapshot list {disk} --json")).succeeds().out();
        if listed.contains("\"was\"") {
            let file = format!("{disk}:/root/mine");
            let was = fleet.work.vdisk(&format!("cat {file} --snapshot was"));
            assert_eq!(was.succeeds().out(), "mine-0\n");
        }
        for number in 0..3 {
            let disk = fleet.disk(number).display().to_string();
            fleet.work.vdisk(&format!("snapshot merge {disk} was"));
        }
    }
    fleet.vdisk("stop NAME-0 NAME-1").succeeds();
    (0..3).for_each(|number| fleet.sound(number));
}

/// Starts a command and kills it, alone, at a moment within `whole`.
fn stopped(fleet: &Fleet, words: &str, whole: Duration, dice: &mut Dice) {
    let running = fleet.start(words);
    let micros = u64::try_from(whole.as_micros()).unwrap();
    sleep(Duration::from_micros(dice.below(micros)));
    running.signal(Signal::SIGKILL);
    let _ = running.wait();
}

/// Requires that all are as they were, but for the image.
#[track_caller]
fn judge(fleet: &Fleet, image: &str) {
    let log = || fleet.vdisk("logs NAME-0").text() + &fleet.vdisk("logs NAME-1").text();
    assert_eq!(
        fleet.phases(),
        ["running", "running", "exited"],
        "{:#?} {}",
        fleet.records(),
        log()
    );
    for number in 0..2 {
        fleet.is_up(number);
        assert_eq!(fleet.finds(number, "/etc/version"), format!("{image}\n"));
    }
    assert_eq!(fleet.file(2, "/etc/version"), format!("{image}\n"));
    if image == "one" {
        let own = (0..2).map(|number| fleet.finds(number, "/root/mine"));
        assert_eq!(
            own.collect::<String>() + &fleet.file(2, "/root/mine"),
            "mine-0\nmine-1\nmine-2\n"
        );
    }
    let named = |record: &Value| record["image"] == image;
    assert!(fleet.records().iter().all(named), "{:#?}", fleet.records());
}
