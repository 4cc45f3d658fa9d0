//! The jail around commands: at the end of each, its work done, calls are made in its place as code that took it
//! over would make them, and are refused. Which commands there are, the program itself says.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use nix::libc;

use crate::boot_kernel::kernel;
use crate::host::{VDISK, Work};
use crate::images::{layout, same_files};
use crate::jail::{Prey, assert_bounded, let_through, scene};
use crate::puppet::Ending;
use crate::registry_server::Server;
use crate::require::{Need, have};
use crate::serve::Served;

/// Commands that open nothing when the jail is closed, and with what.
const READING: [&str; 8] = [
    "read disks/clone.qcow2 0 4096",
    "write disks/clone.qcow2 4096",
    "map disks/clone.qcow2",
    "check disks/clone.qcow2",
    "check disks/plain.qcow2 --repair all",
    "compare disks/clone.qcow2 bases/base.raw",
    "convert disks/clone.qcow2 out/flat.qcow2",
    "convert disks/clone.qcow2 out/flat.raw --format raw",
];

/// Commands that follow names wherever they lead, and write nowhere.
const LOOKING: [&str; 2] = ["info disks/clone.qcow2 --chain", "tree disks"];

/// Commands that change disks at rest, one after the other.
const CHANGING: [&str; 37] = [
    "snapshot create disks/clone.qcow2 one",
    "snapshot list disks/clone.qcow2",
    "snapshot rename disks/clone.qcow2 one uno",
    "snapshot diff disks/clone.qcow2 uno",
    "snapshot revert disks/clone.qcow2 uno --yes",
    "snapshot create disks/clone.qcow2 two",
    "snapshot merge disks/clone.qcow2 two --yes",
    "snapshot delete disks/clone.qcow2 uno --yes",
    "snapshot undo disks/clone.qcow2 --yes",
    "snapshot forget disks/clone.qcow2 --yes",
    "clone disks/lone.qcow2 out/more.qcow2",
    "clone some out/larger.qcow2 --size 128M --store images",
    "clone disks/clone.qcow2 out/whole.qcow2 --full",
    "rebase disks/clone.qcow2 --flatten",
    "rebase disks/other.qcow2 --backing disks/plain.qcow2 --backing-format qcow2",
    "resize disks/clone.qcow2 +1M",
    "compact disks/clone.qcow2",
    "compact disks/clone.qcow2 --dry-run",
    "apply upper disks/files.qcow2",
    "ls disks/files.qcow2:/",
    "cat disks/files.qcow2:/in",
    "cp in disks/files.qcow2:/also",
    "rm disks/files.qcow2:/also",
    "export disks/files.qcow2 oci:out/layout:some",
    "export disks/files.qcow2 out/files.tar",
    "rm disks/clone.qcow2 --yes",
    "unseal disks/plain.qcow2 --even-if-cloned",
    "create disks/made.qcow2 8M --data-file made.data",
    "create disks/made.raw 8M --format raw",
    "kernel add some kernel --store out/store",
    "kernel list --store out/store",
    "kernel rm some --store out/store",
    "image config out/more.qcow2 --cmd /bin/true",
    "image config out/more.qcow2",
    "image list --store out/store",
    "image config some --store images --cmd /bin/true",
    "image show some --store images",
];

/// The same, where clones are looked for wherever they were made.
const PRUNING: [&str; 2] = ["image rm some --store images", "image prune --store images --yes"];

/// The drop-in's commands, one after the other.
const DROP_IN: [&str; 22] = [
    "info disks/plain.qcow2",
    "map disks/plain.qcow2",
    "check disks/plain.qcow2",
    "measure -O qcow2 disks/plain.qcow2",
    "compare disks/plain.qcow2 disks/delta.qcow2",
    "convert -O qcow2 disks/delta.qcow2 out/flat.qcow2",
    "convert -O raw --image-opts driver=qcow2,file.filename=disks/delta.qcow2 out/flat.raw",
    "dd if=disks/delta.qcow2 of=out/dd.raw",
    "create -q -f qcow2 -b ../disks/plain.qcow2 -F qcow2 out/more.qcow2",
    // Which word is a file, only who reads the options knows.
    "create -qf qcow2 out/clustered.qcow2 8M",
    "create -q -f qcow2 -o data_file=sockets/a.data out/apart.qcow2 8M",
    "convert -UO qcow2 -odata_file=sockets/b.data disks/delta.qcow2 out/copied.qcow2",
    "convert -nO qcow2 disks/plain.qcow2 out/flat.qcow2",
    "dd -nO qcow2 if=disks/plain.qcow2 of=out/flat.qcow2",
    "snapshot -c one disks/delta.qcow2",
    "amend -f qcow2 -o lazy_refcounts=on disks/delta.qcow2",
    "bitmap --add disks/delta.qcow2 marks",
    "bench -q -c 16 -d 4 -s 4096 disks/plain.qcow2",
    "bench -w -c 16 -d 2 --flush-interval 4 disks/delta.qcow2",
    "resize disks/delta.qcow2 16M",
    "commit -q out/more.qcow2",
    "rebase -u -b out/flat.qcow2 -F qcow2 disks/delta.qcow2",
];

/// Commands that other tests try, and which.
const ELSEWHERE: [(&str, &str); 12] = [
    ("boot", "the_process_that_runs_a_guest_is_jailed_and_the_guest_goes_on"),
    ("commit", "commands_that_change_disks_at_rest_are_jailed_when_they_do"),
    ("import", "an_import_is_jailed_when_it_reads"),
    ("measure", "the_process_that_reads_what_is_measured_is_jailed"),
    ("mount", "the_server_of_a_mount_by_the_kernels_driver_is_jailed_and_the_mount_goes_on"),
    ("pull", "commands_that_speak_with_registries_are_jailed_when_they_do"),
    ("push", "commands_that_speak_with_registries_are_jailed_when_they_do"),
    ("qemu-img", "commands_of_the_drop_in_are_jailed_and_say_nothing_of_it"),
    ("roll", "the_process_that_changes_disks_for_a_roll_is_jailed"),
    ("run", "the_server_of_a_containers_root_is_jailed_and_the_container_goes_on"),
    ("serve-nbd", "a_server_of_nbd_is_jailed_and_serves_on"),
    ("serve-vhost-user", "a_server_of_vhost_user_is_jailed"),
];

/// Commands that work in no jail, and why. They refuse to where one is required.
const WITHOUT: [(&str, &str); 15] = [
    ("attach none", "passes bytes between a terminal and an instance"),
    ("completions bash", "reads nothing"),
    ("exec none -- true", "starts a program in a container, and reads no disk"),
    ("generate systemd none", "reads what vdisk has written down of an instance"),
    ("inspect none", "reads what vdisk has written down of an instance"),
    ("kill none", "asks an instance"),
    ("logs none", "prints what vdisk has kept"),
    ("pause none", "asks an instance"),
    ("ps", "reads what vdisk has written down of instances"),
    ("resume none", "asks an instance"),
    ("start none", "starts `run` or `boot`, which are in theirs"),
    ("stats", "reads numbers of the kernel's"),
    ("stop none", "asks an instance"),
    ("umount at", "has the kernel unmount, and may run the program that may do so"),
    ("wait none", "asks an instance"),
];

/// The name that a command has among the man pages: of its first word, or of both where it has two.
fn page(words: &str, pages: &BTreeSet<String>) -> String {
    let mut words = words.split(' ');
    let (first, second) = (words.next().unwrap(), words.next().unwrap_or_default());
    let both = format!("{first}-{second}");
    if pages.contains(&both) { both } else { first.to_owned() }
}

#[test]
fn every_command_is_tried_in_its_jail_or_has_a_reason_to_have_none() {
    let (work, _) = scene();
    work.vdisk("manual man").succeeds();
    let names = fs::read_dir(work.path("man")).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let pages: BTreeSet<String> = names
        .filter_map(|name| Some(name.strip_prefix("vdisk-")?.strip_suffix(".1")?.to_owned()))
        .collect();
    let has_more = |page: &String| pages.iter().any(|other| other.starts_with(&format!("{page}-")));
    let commands: BTreeSet<&String> = pages.iter().filter(|page| !has_more(page)).collect();
    assert!(commands.len() > 40, "{commands:?}");
    let tried = READING.iter().chain(&LOOKING).chain(&CHANGING).chain(&PRUNING).copied();
    let with: BTreeSet<String> =
        tried.chain(ELSEWHERE.map(|(name, _)| name)).map(|words| page(words, &pages)).collect();
    let without: BTreeSet<String> = WITHOUT.iter().map(|(words, _)| page(words, &pages)).collect();
    for command in &commands {
        let (with, without) = (with.contains(*command), without.contains(*command));
        assert!(with != without, "{command}: in a jail {with}, in none {without}");
    }
    let unknown = |name: &&String| !commands.contains(name);
    let stale: Vec<_> = with.iter().chain(&without).filter(unknown).collect();
    assert!(stale.is_empty(), "no commands: {stale:?}");
    let tests = [
        include_str!("fleet.rs"),
        include_str!("jail.rs"),
        include_str!("jail_commands.rs"),
        include_str!("jail_mounts.rs"),
        include_str!("measure.rs"),
    ];
    for (name, test) in ELSEWHERE {
        let heading = format!("#[test]\nfn {test}()");
        assert!(tests.iter().any(|file| file.contains(&heading)), "{name}: {test}");
    }
    for (words, reason) in WITHOUT {
        let mut words: Vec<_> = words.split(' ').collect();
        words.splice(1..1, ["--jail", "require"]);
        let refused = work.run(VDISK, &words);
        assert_ne!(refused.code, Some(0), "{words:?}");
        assert!(
            refused.err().contains("the jail that was asked for"),
            "{words:?}: {}",
            refused.err()
        );
        assert!(!reason.is_empty());
    }
    work.vdisk("ps").succeeds();
}

#[test]
fn commands_that_read_or_write_disks_are_jailed_when_they_do() {
    if !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    work.vdisk("create disks/plain.qcow2 8M").succeeds();
    for words in READING {
        let words: Vec<_> = words.split(' ').chain(["--jail", "require"]).collect();
        let ending = Ending::of(VDISK, &words, work.dir(), None);
        assert_bounded(ending.process());
        let through = let_through(&prey, |number, words| ending.call(number, words));
        assert!(through.is_empty(), "{words:?}: {through:?}");
    }
    // They follow names wherever they lead, and write nowhere.
    for words in LOOKING {
        let words: Vec<_> = words.split(' ').chain(["--jail", "require"]).collect();
        let through = through_at_the_end(&work, &prey, &words);
        assert!(matches!(through[..], [("read a file", 0..)]), "{words:?}: {through:?}");
    }
}

#[test]
fn commands_that_change_disks_at_rest_are_jailed_when_they_do() {
    if !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    work.vdisk("create disks/plain.qcow2 8M").succeeds();
    work.vdisk("create disks/lone.qcow2 8M").succeeds();
    work.vdisk("clone bases/base.raw disks/other.qcow2").succeeds();
    work.run("mke2fs", ["-q", "-t", "ext4", "disks/files.raw", "16M"]).succeeds();
    work.put("in", "some bytes");
    work.put("kernel", kernel(1));
    work.vdisk("cp in disks/files.raw:/in").succeeds();
    fs::create_dir(work.path("upper")).unwrap();
    work.vdisk("clone disks/files.raw disks/files.qcow2").succeeds();
    work.run("tar", ["-cf", "root.tar", "upper"]).succeeds();
    work.vdisk("import root.tar some --size 64M --store images").succeeds();
    for words in CHANGING {
        let words: Vec<_> = words.split(' ').chain(["--jail", "require"]).collect();
        let through = through_at_the_end(&work, &prey, &words);
        assert!(through.is_empty(), "{words:?}: {through:?}");
    }
    // What it is written into is in reach.
    let words = ["commit", "out/more.qcow2", "--jail", "require"];
    assert!(through_at_the_end(&work, &prey, &words).is_empty());
    for words in PRUNING {
        let words: Vec<_> = words.split(' ').chain(["--jail", "require"]).collect();
        let through = through_at_the_end(&work, &prey, &words);
        assert!(matches!(through[..], [("read a file", 0..)]), "{words:?}: {through:?}");
    }
}

#[test]
fn commands_that_speak_with_registries_are_jailed_when_they_do() {
    if !have(Need::Registry) || !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    layout(&work);
    let server = Server::open(&work);
    let host = &server.host;
    work.vdisk("import oci:lay:b app --store s").succeeds();
    work.vdisk("clone app disks/app.qcow2 --store s").succeeds();
    // What is sent as a disk is made ready in the directory for temporary files, in which this test is.
    let plain = "--tls-verify=false";
    work.vdisk(&format!("push disks/clone.qcow2 {host}/a/disk --as disk {plain}")).succeeds();
    for (words, suffered) in [
        // What they have to do, and nothing else: it opens a way out, and none on this host.
        (format!("push disks/app.qcow2 {host}/some/app --store s"), &["a socket to the world"][..]),
        // What came is unpacked when nobody is spoken with any more.
        (format!("pull {host}/some/app --store t"), &[]),
        (format!("pull {host}/a/disk --to out"), &["a socket to the world"]),
    ] {
        let words: Vec<_> = words.split(' ').chain([plain, "--jail", "require"]).collect();
        let through = through_at_the_end(&work, &prey, &words);
        let names: Vec<_> = through.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, suffered, "{words:?}: {through:?}");
    }
    work.vdisk("compare disks/clone.qcow2 out/clone.qcow2").succeeds();
    work.vdisk(&format!("clone {host}/some/app e.qcow2 --store t")).succeeds();
    same_files(&work, "e.qcow2", "lay:b");
}

/// What is not refused at the end of a command that is in a jail and does what it is to do.
fn through_at_the_end(work: &Work, prey: &Prey, words: &[&str]) -> Vec<(&'static str, i64)> {
    let ending = Ending::of(VDISK, words, work.dir(), None);
    assert_bounded(ending.process());
    let through = let_through(prey, |number, words| ending.call(number, words));
    let status = ending.status;
    assert_eq!(status, 0, "{words:?}: {}", ending.err());
    through
}

#[test]
fn a_copy_out_of_a_disk_is_jailed_and_makes_what_it_finds() {
    if !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    for dir in ["tree", "tree/deep"] {
        fs::create_dir(work.path(dir)).unwrap();
    }
    work.put("tree/deep/program", "runs as its owner");
    fs::set_permissions(work.path("tree/deep/program"), fs::Permissions::from_mode(0o4755))
        .unwrap();
    std::os::unix::fs::symlink("deep/program", work.path("tree/link")).unwrap();
    work.run("mke2fs", ["-q", "-t", "ext4", "-d", "tree", "disks/files.raw", "16M"]).succeeds();
    let words = ["cp", "--archive", "disks/files.raw:/.", "out", "--jail", "require"];
    let through = through_at_the_end(&work, &prey, &words);
    assert!(through.is_empty(), "{through:?}");
    let mode = fs::metadata(work.path("out/link")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o4755);
}

#[test]
fn commands_of_the_drop_in_are_jailed_and_say_nothing_of_it() {
    if !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    work.vdisk("qemu-img create -q -f qcow2 disks/plain.qcow2 8M").succeeds();
    work.vdisk("qemu-img create -q -f qcow2 -b plain.qcow2 -F qcow2 disks/delta.qcow2").succeeds();
    let help = work.vdisk("qemu-img --help").succeeds().out();
    let known = help.lines().find_map(|line| line.strip_prefix("Commands: ")).unwrap();
    let known: BTreeSet<_> = known.split(' ').collect();
    let tried: BTreeSet<_> = DROP_IN.iter().map(|words| words.split(' ').next().unwrap()).collect();
    assert_eq!(tried, known);
    for words in DROP_IN {
        let words: Vec<_> = ["qemu-img"].into_iter().chain(words.split(' ')).collect();
        let through = through_at_the_end(&work, &prey, &words);
        assert!(matches!(through[..], [("read a file", 0..)]), "{words:?}: {through:?}");
    }
}

#[test]
fn an_import_is_jailed_when_it_reads() {
    if !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    let tar = work.run("tar", ["-cf", "root.tar", "disks"]).succeeds();
    drop(tar);
    let words = ["import", "root.tar", "some", "--size", "64M", "--store", "store"];
    let ending = Ending::of(VDISK, &words, work.dir(), None);
    assert_bounded(ending.process());
    let through = let_through(&prey, |number, words| ending.call(number, words));
    assert!(through.is_empty(), "{through:?}");
    drop(ending);
    work.vdisk("clone some clone.qcow2 --store store").succeeds();
}

#[test]
fn a_kernel_is_looked_for_in_a_jail() {
    if !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    fs::create_dir_all(work.path("root/boot")).unwrap();
    work.put("root/boot/vmlinuz-1", kernel(1));
    work.run("mke2fs", ["-q", "-t", "ext4", "-d", "root", "disks/files.raw", "32M"]).succeeds();
    work.run("mke2fs", ["-q", "-t", "ext4", "disks/none.raw", "32M"]).succeeds();
    for disk in ["disks/files.raw", "disks/none.raw"] {
        let words = ["boot", disk, "--show", "--append", "root=/dev/vda", "--jail", "require"];
        let ending = Ending::of_copy(VDISK, &words, work.dir());
        assert_bounded(ending.process());
        let through = let_through(&prey, |number, words| ending.call(number, words));
        assert!(through.is_empty(), "{through:?}");
        let status = ending.status;
        assert_eq!(status, 0, "{}", ending.err());
    }
    let shown = work.vdisk("boot disks/files.raw --show --append root=/dev/vda").succeeds().out();
    assert!(shown.contains("kernel: /boot/vmlinuz-1"), "{shown}");
    work.vdisk("boot disks/none.raw --show").fails(&["disks/none.raw: no kernel was found"]);
}

#[test]
fn a_command_says_what_it_wants_of_a_jail() {
    let (work, _) = scene();
    let done = work.vdisk("read disks/clone.qcow2 0 1 --jail off").succeeds();
    assert!(done.err().is_empty(), "{}", done.err());
    work.vdisk("read disks/clone.qcow2 0 1 --jail some").ends(64);
    if have(Need::Landlock) {
        let done = work.vdisk("read disks/clone.qcow2 0 1 --jail require").succeeds();
        assert_eq!((done.stdout, done.stderr.len()), (vec![0x11], 0));
    }
}

#[test]
fn on_a_kernel_without_landlock_a_command_goes_on_and_says_so_once_unless_it_is_told_not_to() {
    let (work, prey) = scene();
    let lacking = Some(libc::SYS_landlock_create_ruleset);
    let run = |mode: &str| {
        let words = ["convert", "disks/clone.qcow2", &format!("out/{mode}"), "--jail", mode];
        Ending::of(VDISK, &words, work.dir(), lacking)
    };
    let ending = run("best");
    assert_eq!(ending.status, 0);
    assert_bounded(ending.process());
    // Which files are opened is not bounded, and all else is.
    let through = let_through(&prey, |number, words| ending.call(number, words));
    let names: Vec<_> = through.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["read a file", "write the base", "make a file", "remove a file"]);
    let err = ending.err();
    assert!(err.lines().count() == 1 && err.contains("no Landlock"), "{err}");
    let ending = run("require");
    assert_eq!(ending.status, 1);
    let err = ending.err();
    assert!(err.contains("no Landlock") && !work.path("out/require").exists(), "{err}");
    let ending = run("off");
    assert_eq!((ending.status, ending.err().as_str()), (0, ""));
}

#[test]
fn the_drop_in_asks_servers_from_within_its_jail() {
    if !have(Need::Landlock) {
        return;
    }
    let (work, prey) = scene();
    work.vdisk("create out/whole.qcow2 8M").succeeds();
    let served = Served::start(&work, "nbd disks/clone.qcow2 --socket sockets/sock");
    // It reads where names lead, and a process beside it connects.
    let server = "nbd:unix:sockets/sock";
    let uri = format!("nbd+unix:///?socket={}", work.path("sockets/sock").display());
    for words in [
        vec!["info", server],
        vec!["info", "null-co://"],
        vec!["map", server],
        vec!["compare", server, &uri],
        vec!["convert", "-n", "-O", "qcow2", server, "out/whole.qcow2"],
        vec!["convert", "-O", "raw", &uri, "out/whole.raw"],
        vec!["convert", "-n", "-O", "raw", "out/whole.qcow2", server],
        vec!["dd", &format!("if={server}"), "of=out/dd.raw"],
    ] {
        let words: Vec<_> = ["qemu-img"].into_iter().chain(words).collect();
        let through = through_at_the_end(&work, &prey, &words);
        assert!(matches!(through[..], [("read a file", 0..)]), "{words:?}: {through:?}");
    }
    let refused = work.vdisk("qemu-img info nbd:unix:sockets/none").ends(1);
    assert!(refused.err().contains("Failed to connect to 'sockets/none'"), "{}", refused.err());
    served.stop();
    work.vdisk("compare out/whole.qcow2 out/whole.raw").succeeds();
    work.vdisk("compare out/whole.qcow2 out/dd.raw").succeeds();
}
