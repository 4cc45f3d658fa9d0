//! `vdisk run` by an ordinary user: the same container as root's, with no right that he has not.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::container::{able, eventually, keeper_and_server, running, work};
use crate::container_killed::{lives, tree};
use crate::host::Work;
use crate::require::{Need, have, skipped};
use crate::someone::{ALL, Ids, LENT, USER, Who, give, run, sh, start, start_after};

const LENT_IDS: Who = Who::Someone(Ids::Lent);
const ONE_ID: Who = Who::Someone(Ids::One);

fn ready() -> Option<Work> {
    if !able() || !have(Need::Uidmap) {
        return None;
    }
    let work = work();
    give(&work);
    Some(work)
}

/// Requires that the kernel's own check finds nothing in the file system of a disk.
#[track_caller]
fn sound(work: &Work) {
    work.vdisk("convert web.qcow2 flat.raw --format raw").succeeds();
    work.run("e2fsck", ["-fn", "flat.raw"]).succeeds();
    fs::remove_file(work.path("flat.raw")).unwrap();
    work.qemu_img("check web.qcow2").succeeds();
}

#[test]
fn an_ordinary_user_runs_a_container_and_the_disk_keeps_the_ids_that_it_asked_for() {
    let Some(work) = ready() else { return };
    let base = work.bytes("base.raw");
    for (who, name) in [(LENT_IDS, "lent"), (ONE_ID, "one")] {
        let script = format!(
            "set -e; id -u; cd /root
             echo x > {name}; busybox chmod 6755 {name}; busybox chown 33:34 {name}
             busybox ln -s {name} link-{name}; busybox chown -h 35:36 link-{name}
             busybox mkdir -p dir-{name}/a; busybox chown -R 37:38 dir-{name}
             echo y > back; busybox chown 5:5 back; busybox chown 0:0 back"
        );
        assert_eq!(sh(&work, who, "", &script).succeeds().out(), "0\n");
        // Root, and with it whatever boots the disk, sees whose they are.
        let names = format!("{name} link-{name} dir-{name} dir-{name}/a back");
        let look = format!("cd /root; busybox stat -c '%u:%g %a' {names}");
        let seen = sh(&work, Who::Root, "", &look).succeeds().out();
        assert_eq!(seen, "33:34 755\n35:36 777\n37:38 755\n37:38 755\n0:0 644\n", "{name}");
        sound(&work);
        give(&work);
    }
    assert!(work.bytes("base.raw") == base, "the base has changed");
}

#[test]
fn whose_a_file_is_to_be_is_noted_however_it_is_named() {
    let Some(work) = ready() else { return };
    // A directory's own descriptor, a path from it, the root, a name that is none, a link to itself.
    let script = "cd /tmp; echo > a; busybox mkdir d; echo > d/b; busybox ln -s /tmp/a l
        busybox ln -s loop loop
        busybox chown 1:1 ../tmp/./a && busybox chown 2:1 l && busybox chown :3 d/b
        busybox chown 4:4 / && busybox chown 5:5 . ; busybox chown 6 none; busybox chown 6 loop
        busybox chown 7 /dev/null; busybox chown 7 /dev/shm; true";
    let done = sh(&work, ONE_ID, "", script).succeeds();
    done.says(&["none: No such file", "loop: Too many levels", "/dev/shm: Invalid argument"]);
    let look = "busybox stat -c '%u:%g' /tmp/a /tmp/d/b / /tmp";
    let seen = sh(&work, Who::Root, "", look).succeeds().out();
    assert_eq!(seen, "2:1\n0:3\n4:4\n5:5\n");
    // Who may not give files away may not do so by way of us.
    let refused = sh(&work, ONE_ID, "--cap-drop chown", "busybox chown 9 /tmp/a").ends(1);
    refused.says(&["/tmp/a"]);
    assert_eq!(sh(&work, Who::Root, "", look).succeeds().out(), seen);
    sound(&work);
}

#[test]
fn an_overlay_takes_all_changes_and_the_disk_stays() {
    let Some(work) = ready() else { return };
    work.vdisk("snapshot create web.qcow2 s").succeeds();
    sh(&work, Who::Root, "", "echo later > /etc/motd").succeeds();
    give(&work);
    let before = work.bytes("web.qcow2");
    for (number, who) in ALL.into_iter().enumerate() {
        let upper = format!("upper{number}");
        fs::create_dir(work.path(&upper)).unwrap();
        if who != Who::Root {
            std::os::unix::fs::chown(work.path(&upper), Some(USER), Some(USER)).unwrap();
        }
        let options = format!("--overlay {upper}");
        let script = "cat /etc/motd; echo mine > /etc/motd; busybox rm /etc/passwd; echo n > /new";
        assert_eq!(sh(&work, who, &options, script).succeeds().out(), "later\n");
        let again = sh(&work, who, &options, "cat /etc/motd /new; busybox ls /etc").succeeds();
        assert_eq!(again.out(), "mine\nn\nhosts\nmotd\n");
        assert_eq!(work.bytes(format!("{upper}/new")), b"n\n");
        assert!(work.bytes("web.qcow2") == before, "{who:?}: the disk has changed");
    }
    fs::create_dir(work.path("of-snapshot")).unwrap();
    let options = "--overlay of-snapshot --snapshot s";
    assert_eq!(sh(&work, Who::Root, options, "cat /etc/motd").succeeds().out(), "from the base\n");
}

#[test]
fn an_overlay_notes_owners_whom_the_container_does_not_know_and_apply_gives_them() {
    let Some(work) = ready() else { return };
    let script =
        "busybox chown 33:34 /etc/motd; echo lower > /root/low; busybox chown 41:42 /root/low";
    sh(&work, Who::Root, "", script).succeeds();
    give(&work);
    let upper = work.path("upper");
    fs::create_dir(&upper).unwrap();
    std::os::unix::fs::chown(&upper, Some(USER), Some(USER)).unwrap();
    let script = "set -e; cd /root; busybox stat -c %u:%g /etc/motd low; echo changed >> low
        echo new > new; busybox chmod 6755 new; busybox chown 35:36 new; busybox chmod 640 new
        busybox mkdir -p dir/a; busybox chown -R 37:38 dir; busybox ln -s new link
        busybox chown -h 39:40 link; echo back > back; busybox chown 5:5 back; busybox chown 0:0 back
        echo part > part; busybox chown :7 part; busybox stat -c %u:%g new dir";
    let out = sh(&work, ONE_ID, "--overlay upper", script).succeeds().out();
    assert_eq!(out, "0:0\n".repeat(4));
    let note = |name: &str| {
        let mut value = [0; 100];
        let key = "user.containers.override_stat";
        let len = rustix::fs::lgetxattr(upper.join(name), key, &mut value).ok()?;
        Some(String::from_utf8_lossy(&value[..len]).into_owned())
    };
    let notes = ["", "root/low", "root/new", "root/dir/a", "root/back", "root/part"].map(note);
    let wanted = [
        Some("0:0:0755"),
        Some("41:42:0644"),
        Some("35:36:0640"),
        Some("37:38:0755"),
        None,
        Some("0:7:0644"),
    ];
    assert_eq!(notes.each_ref().map(Option::as_deref), wanted);
    run(&work, ONE_ID, ["apply", "upper", "web.qcow2"]).succeeds();
    let look =
        "cd /root; busybox stat -c '%u:%g %a' low new dir dir/a back part /etc/motd; cat low";
    let seen = sh(&work, Who::Root, "", look).succeeds().out();
    let wanted = "41:42 644\n35:36 640\n37:38 755\n37:38 755\n0:0 644\n0:7 644\n33:34 644\n";
    assert_eq!(seen, wanted.to_owned() + "lower\nchanged\n");
    sound(&work);
}

#[test]
fn a_read_only_container_changes_nothing() {
    let Some(work) = ready() else { return };
    sh(&work, Who::Root, "", "true").succeeds();
    give(&work);
    let before = work.bytes("web.qcow2");
    for who in ALL {
        let script = "echo x > /etc/motd || echo x > /dev/shm/x && cat /dev/shm/x";
        assert_eq!(sh(&work, who, "--read-only", script).succeeds().out(), "x\n");
        assert!(work.bytes("web.qcow2") == before, "{who:?}: the disk has changed");
    }
}

#[test]
fn an_ordinary_users_container_is_as_shut_as_roots() {
    let Some(work) = ready() else { return };
    for who in ALL {
        let script = "busybox grep -E '^(Cap|NoNew|Seccomp:)' /proc/self/status; busybox ls /dev
            test -z \"$(busybox ls /sys/firmware)\"
            ! echo x > /proc/sys/kernel/hostname; ! echo x > /proc/sysrq-trigger
            ! mknod /tmp/disk b 7 0; ! mount -t tmpfs none /tmp; ! busybox unshare -m true
            ! busybox umount /proc/keys; echo > /dev/null";
        let out = sh(&work, who, "", script).succeeds().out();
        for part in ["CapEff:\t00000000800405fb", "CapBnd:\t00000000800405fb", "Seccomp:\t2"] {
            assert!(out.contains(part), "{who:?}: {out}");
        }
        assert!(out.contains("NoNewPrivs:\t0") && !out.contains("loop"), "{who:?}: {out}");
        let words = "--cap-drop all --cap-add NET_RAW --security-opt no-new-privileges";
        let less = sh(&work, who, words, "busybox grep -E '^(CapB|NoNew)' /proc/self/status");
        assert_eq!(less.succeeds().out(), "CapBnd:\t0000000000002000\nNoNewPrivs:\t1\n");
        let open = "--security-opt seccomp=unconfined";
        let open = sh(&work, who, open, "busybox grep Seccomp: /proc/self/status").succeeds();
        // The calls by which owners are noted are handed over all the same.
        let filters = if who == ONE_ID { "Seccomp:\t2\n" } else { "Seccomp:\t0\n" };
        assert_eq!(open.out(), filters);
    }
    sh(&work, LENT_IDS, "--user ann", "test $(id -u) = 7; echo x > /tmp/x").ends(1);
    sh(&work, ONE_ID, "--user ann", "true").fails_to_run(&["no user but root", "/etc/subuid"]);
}

#[test]
fn volumes_show_the_hosts_files_at_the_containers_own_places() {
    let Some(work) = ready() else { return };
    fs::create_dir_all(work.path("shared")).unwrap();
    work.put("shared/file", "from the host\n");
    std::os::unix::fs::chown(work.path("shared"), Some(USER), Some(USER)).unwrap();
    let at = |name: &str| work.path(name).display().to_string();
    // Links in the disk lead to the disk.
    let out = at("outside");
    fs::create_dir(&out).unwrap();
    let links = format!("busybox ln -s {out} /out; busybox ln -s ../../../.. /up");
    sh(&work, Who::Root, "", &links).succeeds();
    give(&work);
    for who in ALL {
        let source = at("shared");
        let options = format!(
            "-v {source}:/made/here -v {source}:/ro:ro -v {source}/file:/one:ro \
             -v {source}:/out/x -v {source}:/up/y"
        );
        let script = "cat /made/here/file /ro/file /one; echo w > /made/here/w; ! echo w > /ro/x
            ! echo w > /one; busybox ls /y; busybox ls -d /out/x; busybox mount";
        let out_text = sh(&work, who, &options, script).ends(0).out();
        assert!(out_text.starts_with(&"from the host\n".repeat(3)), "{who:?}: {out_text}");
        let made = out_text.lines().find(|line| line.contains(" on /made/here ")).unwrap();
        assert!(made.contains("nosuid") && made.contains("nodev"), "{made}");
        assert_eq!(work.bytes("shared/w"), b"w\n");
        fs::remove_file(work.path("shared/w")).unwrap();
        assert_eq!(fs::read_dir(&out).unwrap().count(), 0, "a link led out of the container");
        for (options, why) in [
            (format!("-v {source}:/"), "/"),
            (format!("-v {source}:/proc/sys"), "/proc"),
            (format!("-v {source}:/sys/kernel"), "/sys"),
            (format!("-v {source}:/etc/motd"), "directory"),
            (format!("-v {source}:/new/../x"), ".."),
            (format!("-v {source}/none:/x"), "none"),
        ] {
            sh(&work, who, &options, "true").fails_to_run(&[why]);
        }
        sh(&work, who, "-v relative", "true").ends(64);
    }
}

#[test]
fn device_nodes_and_set_user_id_files_of_the_disk_give_no_rights_on_the_host() {
    let Some(work) = ready() else { return };
    fs::create_dir(work.path("shared")).unwrap();
    fs::set_permissions(work.path("shared"), std::os::unix::fs::PermissionsExt::from_mode(0o777))
        .unwrap();
    // As whoever wrote the disk may have put them there.
    let shared = work.path("shared").display().to_string();
    let evil = "mknod -m 666 /memory c 1 1; mknod -m 666 /null c 1 3
        busybox cp /bin/busybox /busybox-root; busybox chmod 4755 /busybox-root";
    sh(&work, Who::Root, "--cap-add mknod", evil).succeeds();
    give(&work);
    for who in [Who::Root, LENT_IDS] {
        let script = "! cat /memory; ! echo > /null; /busybox-root touch /s/made";
        let options = format!("--user ann -v {shared}:/s");
        // busybox drops what set-user-id gave it for most of its programs: either owner will do.
        let done = sh(&work, who, &options, script);
        done.succeeds().says(&["'/memory': Permission denied", "/null: Permission denied"]);
        let made = fs::metadata(work.path("shared/made")).unwrap().uid();
        let (anns, roots) = if who == Who::Root { (7, 0) } else { (LENT + 6, USER) };
        assert!([anns, roots].contains(&made), "{made}");
        fs::remove_file(work.path("shared/made")).unwrap();
    }
}

#[test]
fn nobody_else_reaches_the_files_of_an_ordinary_users_container() {
    let Some(work) = ready() else { return };
    let vdisk = start(&work, LENT_IDS, ["run", "web.qcow2", "--", "sleep", "8101"]);
    eventually("the program starts", || !running(&["sleep", "8101"]).is_empty());
    let program = running(&["sleep", "8101"])[0];
    let motd = format!("/proc/{program}/root/etc/motd");
    // Not even root, whom the file system's server could otherwise keep waiting.
    let error = fs::read(&motd).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::libc::EACCES), "{error}");
    let other = ["--reuid", "54322", "--regid", "54322", "--clear-groups", "cat", &motd];
    work.run("setpriv", other).fails(&["Permission denied"]);
    let open = format!("/proc/{program}/fd");
    for entry in fs::read_dir(open).unwrap().flatten() {
        let number = entry.file_name().into_string().unwrap();
        assert!(["0", "1", "2"].contains(&number.as_str()), "{number} is open inside");
    }
    vdisk.signal(Signal::SIGTERM);
    vdisk.wait().ends(143);
}

#[test]
fn whichever_process_of_a_users_container_is_killed_nothing_is_left() {
    let Some(work) = ready() else { return };
    for (round, victim) in ["host", "keeper", "program", "server"].into_iter().enumerate() {
        for (side, who) in [LENT_IDS, ONE_ID].into_iter().enumerate() {
            let seconds = format!("82{round}{side}");
            let script = format!(
                "echo {victim}{side} | dd of=/etc/kept conv=fsync 2>/dev/null; \
                busybox setsid sleep 9{seconds} & exec sleep {seconds}"
            );
            let vdisk = start(&work, who, ["run", "web.qcow2", "--", "sh", "-c", &script]);
            eventually("the program starts", || !running(&["sleep", &seconds]).is_empty());
            let program = running(&["sleep", &seconds])[0];
            let parent = |pid: u32| {
                let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
                let line = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap();
                line.trim().parse::<u32>().unwrap()
            };
            let keeper = parent(program);
            let host = parent(keeper);
            let (_, server) = keeper_and_server(host);
            let all = [host, keeper, program, server];
            let pid = match victim {
                "host" => host,
                "keeper" => keeper,
                "server" => server,
                _ => program,
            };
            assert_ne!(pid, std::process::id());
            let number = nix::unistd::Pid::from_raw(pid.cast_signed());
            nix::sys::signal::kill(number, Signal::SIGKILL).unwrap();
            let done = vdisk.wait();
            assert!(done.code != Some(0), "{victim}: {}", done.text());
            let left = || {
                let mut left = running(&["sleep", &seconds]);
                left.extend(running(&["sleep", &format!("9{seconds}")]));
                left.extend(all.iter().filter(|pid| Path::new(&format!("/proc/{pid}")).exists()));
                left
            };
            eventually(&format!("all ends after the {victim}"), || left().is_empty());
            let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
            assert!(!mounts.contains(work.dir().to_str().unwrap()), "{mounts}");
            let kept = sh(&work, who, "", "cat /etc/kept").succeeds().out();
            assert_eq!(kept, format!("{victim}{side}\n"));
            sound(&work);
            give(&work);
        }
    }
}

#[test]
fn a_users_disk_in_a_container_takes_a_snapshot_from_outside() {
    let Some(work) = ready() else { return };
    let script = "echo before > /root/when; exec sleep 8301";
    let vdisk = start(&work, LENT_IDS, ["run", "web.qcow2", "--", "sh", "-c", script]);
    eventually("the program starts", || !running(&["sleep", "8301"]).is_empty());
    run(&work, LENT_IDS, ["snapshot", "create", "web.qcow2", "s"]).succeeds();
    let info = run(&work, LENT_IDS, ["info", "web.qcow2"]).succeeds().out();
    assert!(info.contains("held as: the root of a container"), "{info}");
    vdisk.signal(Signal::SIGTERM);
    vdisk.wait().ends(143);
    sh(&work, LENT_IDS, "", "echo after > /root/when").succeeds();
    run(&work, LENT_IDS, ["snapshot", "revert", "web.qcow2", "s", "--yes"]).succeeds();
    assert_eq!(sh(&work, ONE_ID, "", "cat /root/when").succeeds().out(), "before\n");
    sound(&work);
}

#[test]
fn what_is_missing_for_an_ordinary_user_is_said() {
    let Some(work) = ready() else { return };
    sh(&work, LENT_IDS, "--memory 64M", "true").fails_to_run(&["may not limit memory", "root"]);
    // The host's /dev/fuse is opened up by the other commands only.
    let shut = fs::metadata("/dev/fuse").is_ok_and(|meta| {
        use std::os::unix::fs::PermissionsExt;
        meta.permissions().mode() & 0o006 == 0
    });
    if shut {
        let vdisk = work.path("vdisk").display().to_string();
        let tmp = format!("TMPDIR={}", work.path("tmp").display());
        let words = ["--reuid", "54321", "--regid", "54321", "--clear-groups", "env", &tmp, &vdisk];
        let words = words.into_iter().chain(["run", "web.qcow2", "--", "true"]);
        work.run("setpriv", words).fails_to_run(&["/dev/fuse", "chmod"]);
    }
    let done = sh(&work, ONE_ID, "", "true").succeeds();
    done.says(&["only user is root", "/etc/subuid"]);
    assert!(sh(&work, LENT_IDS, "", "true").succeeds().err().is_empty());
    let disk = ["run", "empty.qcow2", "--", "true"];
    work.vdisk("create empty.qcow2 16M").succeeds();
    give(&work);
    run(&work, LENT_IDS, disk).fails_to_run(&["empty.qcow2", "file system"]);
}

#[test]
fn the_disk_is_read_and_written_no_faster_than_it_may_be() {
    let Some(work) = ready() else { return };
    for who in [Who::Root, LENT_IDS] {
        let script = "dd if=/dev/zero of=/root/zeroes bs=64k count=128 2>/dev/null; busybox sync";
        let begun = Instant::now();
        sh(&work, who, "--io-bps 4M", &script.replace("/dev/zero", "/dev/urandom")).succeeds();
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(1700), "{who:?}: {took:?}");
        give(&work);
    }
    let both = "--io-bps 4M --overlay upper";
    sh(&work, Who::Root, both, "true").ends(64);
}

#[test]
fn without_a_run_directory_containers_work_elsewhere() {
    let Some(work) = ready() else { return };
    let script = "mount -t tmpfs -o ro none /run && exec \"$0\" run web.qcow2 -- cat /etc/motd";
    let words = ["-m", "sh", "-c", script, crate::host::VDISK];
    assert_eq!(work.run("unshare", words).succeeds().out(), "from the base\n");
    assert!(Path::new("/proc/self").exists());
}

/// A function of the shell's that hides a program.
const HIDE: &str = "hide() { [ ! -e /usr/bin/$1 ] || mount --bind /dev/null /usr/bin/$1; };";

/// Who runs a container, with which program to carry its connections, and whether the other is to be
/// hidden for that.
fn carried() -> impl Iterator<Item = (Who, (&'static str, bool))> {
    let carriers = [("pasta", Need::Pasta, false), ("slirp4netns", Need::Slirp, true)];
    let carriers = carriers.into_iter().filter(|(_, need, _)| have(*need));
    let carriers: Vec<_> = carriers.map(|(name, _, hide)| (name, hide)).collect();
    ALL.into_iter().flat_map(move |who| carriers.clone().into_iter().map(move |one| (who, one)))
}

#[test]
fn a_published_port_leads_into_the_container() {
    let Some(work) = ready() else { return };
    for (number, (who, (carrier, hide))) in carried().enumerate() {
        let port = 20_000 + (std::process::id() % 5_000) as u16 * 8 + number as u16;
        let publish = format!("127.0.0.1:{port}:80");
        let script = "cat /proc/[0-9]*/comm >&2; cat /etc/resolv.conf
            echo served | busybox nc -l -p 80";
        let words = ["run", "-p", &publish, "web.qcow2", "--", "sh", "-c", script];
        let carries = |pid: u32| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            // pasta is passt by another name, and there is one for each kind of processor.
            name.trim_end() == carrier || (carrier == "pasta" && name.starts_with("pas"))
        };
        let hide = if hide { format!("{HIDE} hide pasta") } else { String::new() };
        let vdisk = start_after(&work, who, &hide, words);
        let mut heard = String::new();
        let mut carriers = Vec::new();
        eventually("somebody answers", || {
            use std::io::Read;
            let Ok(mut stream) = std::net::TcpStream::connect(("127.0.0.1", port)) else {
                return false;
            };
            carriers = tree(vdisk.pid()).into_iter().filter(|pid| carries(*pid)).collect();
            heard.clear();
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            stream.read_to_string(&mut heard).is_ok() && !heard.is_empty()
        });
        assert_eq!(heard, "served\n", "{who:?}");
        let done = vdisk.wait().succeeds();
        let server = if carrier == "pasta" { "169.254.1.1" } else { "10.0.2.3" };
        assert!(done.out().contains(&format!("nameserver {server}\n")), "{}", done.out());
        assert!(!carriers.is_empty(), "{carrier} does not carry for {who:?}");
        // What carries is not the container's to see, or to end.
        let seen = done.err();
        let shut = !["pasta", "passt", "slirp"].iter().any(|name| seen.contains(name));
        assert!(shut, "{seen}");
        eventually("the carrier ends", || !carriers.iter().any(|pid| lives(*pid)));
    }
    let neither = format!("{HIDE} hide pasta; hide slirp4netns");
    let words = ["run", "--net", "user", "web.qcow2", "--", "true"];
    let done = start_after(&work, LENT_IDS, &neither, words).wait();
    done.fails_to_run(&["passt", "slirp4netns", "installed"]);
    let own = sh(&work, LENT_IDS, "", "ip -o link | busybox wc -l").succeeds().out();
    assert_eq!(own, "1\n", "without a word there is no network");
    let both = sh(&work, LENT_IDS, "--net none -p 1:1", "true");
    both.fails_to_run(&["--net user"]);
    let host = sh(&work, LENT_IDS, "--net host", "busybox readlink /proc/self/ns/net");
    let net = fs::read_link("/proc/self/ns/net").unwrap();
    assert_eq!(Path::new(host.succeeds().out().trim()), net);
}

/// A control group in which others can be made that limit memory.
fn limits_memory() -> Option<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let in_v1 = own.lines().find_map(|line| line.split_once(":memory:"));
    if let Some((_, own)) = in_v1 {
        return Some(Path::new("/sys/fs/cgroup/memory").join(own.trim_start_matches('/')));
    }
    let top = Path::new("/sys/fs/cgroup");
    let controllers = fs::read_to_string(top.join("cgroup.subtree_control")).unwrap_or_default();
    controllers.split_whitespace().any(|name| name == "memory").then(|| top.to_owned())
}

#[test]
fn a_control_group_that_was_lent_to_a_user_limits_his_containers() {
    let Some(work) = ready() else { return };
    let Some(parent) = limits_memory() else {
        skipped("this host can limit memory neither in cgroup v1 nor in v2");
        return;
    };
    let lent = parent.join(format!("vdisk-test-{}", std::process::id()));
    fs::create_dir(&lent).unwrap();
    for entry in fs::read_dir(&lent).unwrap().flatten() {
        std::os::unix::fs::chown(entry.path(), Some(USER), Some(USER)).unwrap();
    }
    std::os::unix::fs::chown(&lent, Some(USER), Some(USER)).unwrap();
    // Its user comes to be in it before he starts the container, which is made below it.
    let enter = format!("echo $$ > {}/cgroup.procs", lent.display());
    let take = "exec dd if=/dev/zero of=/dev/null bs=96M count=1";
    let with = |limit| {
        let words = ["run", "--memory", limit, "web.qcow2", "--", "sh", "-c", take];
        start_after(&work, LENT_IDS, &enter, words).wait()
    };
    let (enough, done) = (with("256M"), with("24M"));
    let left = fs::read_dir(&lent).unwrap().flatten().filter(|entry| entry.path().is_dir());
    let left: Vec<_> = left.map(|entry| entry.path()).collect();
    let removed = fs::remove_dir(&lent);
    enough.succeeds();
    // The kernel kills who wants more.
    done.ends(137);
    assert!(left.is_empty() && removed.is_ok(), "{left:?} {removed:?}");
}

#[test]
fn a_container_that_does_not_come_to_be_leaves_nothing() {
    let Some(work) = ready() else { return };
    for (who, limit) in [(Who::Root, "--memory=64M"), (LENT_IDS, "--read-only")] {
        let vdisk = start(&work, who, ["run", limit, "missing.qcow2", "--", "true"]);
        let pid = vdisk.pid();
        let done = vdisk.wait().fails_to_run(&["missing.qcow2"]);
        assert_eq!(done.err().lines().count(), 1, "{}", done.err());
        let group = format!("vdisk-{pid}-0");
        assert!(crate::container::find_dirs(Path::new("/sys/fs/cgroup"), &group, 8).is_empty());
    }
}
