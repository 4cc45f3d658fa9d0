//! Many clones, long chains, huge disks: nothing grows that should not.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use crate::host::Work;
use crate::require::{Need, have};
use crate::twin::{clean, json, noise};

#[test]
fn thousands_of_clones_are_made_by_one_command_and_do_not_slow_each_other() {
    let work = Work::new();
    work.vdisk("create base.q 1G").succeeds();
    work.vdisk_fed("write base.q 0", &noise(1, 1 << 20)).succeeds();
    work.put("web-01999.q", "taken");
    work.vdisk_args(["clone", "base.q", "--count", "2000", "--name", "web-{:05}.q"])
        .fails(&["web-01999.q"]);
    assert_eq!(work.files().len(), 2, "none was made");
    fs::remove_file(work.path("web-01999.q")).unwrap();
    let begin = Instant::now();
    work.vdisk_args(["clone", "base.q", "--count", "2000", "--name", "web-{:05}.q"]).succeeds();
    eprintln!("2000 clones: {:?}", begin.elapsed());
    assert_eq!(work.files().len(), 2001, "and no draft is left");
    for clone in ["web-00000.q", "web-00999.q", "web-01999.q"] {
        assert_eq!(work.vdisk(&format!("read {clone} 0 1M")).succeeds().stdout, noise(1, 1 << 20));
    }
    work.vdisk_fed("write web-00007.q 0", b"its own").succeeds();
    assert_eq!(work.vdisk("read web-00008.q 0 1M").succeeds().stdout, noise(1, 1 << 20));
    work.vdisk("unseal base.q").fails(&["web-00000.q", "and 1992 more"]);
    assert!(fs::metadata(work.path("web-00042.q")).unwrap().len() < 1 << 20);
    assert_eq!(work.vdisk("tree .").succeeds().out().lines().count(), 2002);
    work.vdisk("clone base.q twice.q twice.q").fails(&["twice.q"]);
    if have(Need::Qemu) {
        clean(&work, "web-01234.q");
    }
}

#[test]
fn a_chain_of_hundreds_of_layers_opens_and_lists_at_once() {
    let work = Work::new();
    work.vdisk("create disk.q 1T").succeeds();
    for number in 0..256u64 {
        if number % 16 == 0 {
            work.vdisk_fed(&format!("write disk.q {}", number << 30), &noise(number, 4096))
                .succeeds();
        }
        work.vdisk(&format!("snapshot create disk.q s{number}")).succeeds();
    }
    let begin = Instant::now();
    for number in (0..256u64).step_by(16) {
        let read = work.vdisk(&format!("read disk.q {} 4096", number << 30)).succeeds();
        assert_eq!(read.stdout, noise(number, 4096));
    }
    let each = begin.elapsed() / 16;
    eprintln!("opened and read 256 layers: {each:?}");
    // Generous: the machine may be busy.
    assert!(each.as_millis() < 1000, "{each:?}");
    let list = work.vdisk("snapshot list disk.q").succeeds().out();
    assert_eq!(list.lines().count(), 257);
    let tree = work.vdisk("tree disk.q").succeeds().out();
    assert_eq!(tree.lines().count(), 258);
    // A line of snapshots is no staircase.
    assert!(tree.lines().all(|line| line.chars().count() < 100), "{tree}");
}

/// The most memory, in KiB, that the process which holds `disk` has taken so far.
fn peak(work: &Work, disk: &str) -> u64 {
    let info = json(work.vdisk(&format!("info --json {disk}")));
    let pid = info["holders"][0]["pid"].as_u64().expect("somebody holds it");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_huge_disk_takes_bounded_memory_whatever_is_touched() {
    if !have(Need::Fuse) {
        return;
    }
    let work = Work::new();
    work.vdisk("create disk.q 1T").succeeds();
    fs::create_dir(work.path("m")).unwrap();
    let mounted = |options: &str, touch: &dyn Fn(&fs::File)| {
        work.vdisk(&format!("mount --raw {options} disk.q m")).succeeds();
        let disk = fs::File::options().read(true).write(true).open(work.path("m/disk.raw"));
        let disk = disk.unwrap();
        touch(&disk);
        disk.sync_all().unwrap();
        drop(disk);
        let peak = peak(&work, "disk.q");
        work.vdisk("umount m").succeeds();
        peak
    };
    let stripes = |step: u64, disk: &fs::File| {
        for at in (0..1u64 << 40).step_by(step as usize) {
            disk.write_all_at(&at.to_le_bytes(), at).unwrap();
        }
    };
    let written = mounted("", &|disk| stripes(128 << 20, disk));
    for number in 0..12 {
        work.vdisk(&format!("snapshot create disk.q s{number}")).succeeds();
        if number % 4 == 0 {
            mounted("", &|disk| stripes(1 << 30, disk));
        }
    }
    let read = |disk: &fs::File| {
        for at in (0..1u64 << 40).step_by(64 << 20) {
            let mut bytes = [0; 8];
            disk.read_exact_at(&mut bytes, at).unwrap();
            let expected = if at % (128 << 20) == 0 { at } else { 0 };
            assert_eq!(u64::from_le_bytes(bytes), expected);
        }
    };
    let deep = mounted("", &read);
    let little = mounted("--cache-size 1M", &read);
    eprintln!("peak: {written} KiB written, {deep} KiB read, {little} KiB with a cache of 1 MiB");
    assert!(written.max(deep) < 64 << 10 && little < deep);
}

#[test]
fn the_cache_is_a_setting_of_the_command_or_of_the_environment() {
    let work = Work::new();
    work.vdisk("create disk.q 1G").succeeds();
    work.vdisk("read disk.q 0 1 --cache-size 1M").succeeds();
    work.vdisk("read disk.q 0 1 --cache-size 1").fails(&["cache", "256 KiB"]);
    work.vdisk("read disk.q 0 1 --cache-size much").ends(64);
    let with = |value: &str| {
        let vdisk = crate::host::VDISK;
        work.run("env", [&format!("VDISK_CACHE_SIZE={value}"), vdisk, "read", "disk.q", "0", "1"])
    };
    with("2M").succeeds();
    with("all").fails(&["VDISK_CACHE_SIZE"]);
}

/// Runs `vdisk` with `words` where a process may have few files open.
fn with_few_files(work: &Work, flag: &str, words: &str) -> crate::host::Done {
    let vdisk = crate::host::VDISK;
    work.run("sh", ["-c", &format!("ulimit {flag} 64 && exec '{vdisk}' {words}")])
}

#[test]
fn a_chain_may_have_more_layers_than_a_process_usually_has_files_open() {
    let work = Work::new();
    work.vdisk("create disk.q 1M").succeeds();
    work.vdisk_fed("write disk.q 0", b"at the bottom").succeeds();
    for number in 0..100 {
        work.vdisk(&format!("snapshot create disk.q s{number}")).succeeds();
    }
    let read = with_few_files(&work, "-Sn", "read disk.q 0 13").succeeds();
    assert_eq!(read.stdout, b"at the bottom");
    with_few_files(&work, "-n", "read disk.q 0 13").fails(&["layer", "ulimit -n", "flatten"]);
    // What is dropped goes all at once, and leaves no file behind.
    work.vdisk("snapshot delete disk.q s1 --tree --yes --forget").succeeds();
    assert_eq!(work.files().len(), 2, "{:?}", work.files());
    assert_eq!(work.vdisk("read disk.q 0 13").succeeds().stdout, b"at the bottom");
}

#[test]
fn a_program_in_a_container_has_the_limit_of_open_files_that_its_user_has() {
    if !crate::container::able() {
        return;
    }
    let work = crate::container::work();
    let run = with_few_files(&work, "-Sn", "run web.qcow2 -- sh -c 'ulimit -n'").succeeds();
    assert_eq!(run.out().trim(), "64");
}
