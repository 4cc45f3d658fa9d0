//! What disks may be called: every byte that the host allows in a name, at every length, and what
//! is recorded in an image means the same file here and in QEMU.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use crate::host::{Done, Work};
use crate::mount::overwrite;
use crate::require::{Need, have};

/// Words of a command line; `{}` stands for a name that no line could hold.
fn vdisk(work: &Work, line: &str, name: &OsStr) -> Done {
    work.vdisk_args(words(line, name))
}

fn qemu_img(work: &Work, line: &str, name: &OsStr) -> Done {
    work.run("qemu-img", words(line, name))
}

fn words(line: &str, name: &OsStr) -> Vec<OsString> {
    let word = |word: &str| match word.split_once("{}") {
        Some((before, after)) => {
            let parts = [before.as_bytes(), name.as_bytes(), after.as_bytes()];
            OsString::from_vec(parts.concat())
        }
        None => word.into(),
    };
    line.split_whitespace().map(word).collect()
}

/// Goes once through a disk's life under a name: it and its layers are named in headers by snapshots,
/// clones and a rebase. What stands at the end is read by both programs.
fn live_through(work: &Work, name: &OsStr, qemu: bool) {
    let run = |line: &str| vdisk(work, line, name).succeeds();
    let fed = |line: &str, bytes: &[u8]| {
        work.command(crate::host::VDISK, words(line, name))
            .finish(Some(bytes.to_vec()), crate::host::PATIENCE)
            .succeeds()
    };
    run("create ./{} 256K");
    fed("write ./{} 0", b"base");
    run("clone ./{} c-{}");
    fed("write c-{} 4", b"clone");
    run("snapshot create c-{} s");
    fed("write c-{} 0", b"gone");
    run("snapshot revert c-{} s --yes");
    let read = |expected: &[u8]| assert_eq!(run("read c-{} 0 9").stdout, expected, "{name:?}");
    read(b"baseclone");
    if qemu {
        qemu_img(work, "check -q ./c-{}", name).succeeds();
        qemu_img(work, "convert -O raw ./c-{} flat", name).succeeds();
        assert_eq!(&work.bytes("flat")[..9], b"baseclone", "{name:?} in QEMU");
        fs::remove_file(work.path("flat")).unwrap();
    }
    run("snapshot merge c-{} s");
    read(b"baseclone");
    run("create z-{} 256K");
    run("rebase z-{} --backing ./{} --unsafe");
    assert_eq!(run("read z-{} 0 4").stdout, b"base", "{name:?}");
}

fn empty(work: &Work) {
    for entry in fs::read_dir(work.dir()).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
}

#[test]
fn a_disk_may_have_every_character_in_its_name() {
    // `b:1.qcow2` was recorded as it is: a protocol to all who read it.
    let qemu = have(Need::Qemu);
    let work = Work::new();
    let plain: Vec<u8> = (1..128).filter(|b: &u8| b.is_ascii_alphanumeric()).collect();
    live_through(&work, OsStr::from_bytes(&plain), qemu);
    for byte in (1..128u8).filter(|b| !b.is_ascii_alphanumeric() && *b != b'/') {
        empty(&work);
        live_through(&work, OsStr::from_bytes(&[b'b', byte, b'1']), qemu);
    }
}

#[test]
fn a_disk_may_be_called_like_a_protocol_an_option_or_a_number_of_bytes() {
    let qemu = have(Need::Qemu);
    let long = "x".repeat(253);
    for name in [
        "file:x",
        "json:{}",
        "nbd:localhost:1",
        "nbd+unix:",
        "-b",
        ":",
        "::",
        "a:",
        "~",
        "a@b",
        "a@0123456789ab.qcow2",
        "%s%n",
        "a,b=c",
        "ünïcödé-日本語.qcow2",
        "..a",
        &long,
    ] {
        let work = Work::new();
        live_through(&work, name.as_ref(), qemu);
    }
}

#[test]
fn a_name_as_long_as_the_host_allows_leaves_room_for_a_layers() {
    // `snapshot create` failed on a name of more than 242 bytes: its layer's would be too long.
    let cases = [
        ("n".repeat(255), ""),
        ("n".repeat(249), ".qcow2"),
        ("n".repeat(243), ".qcow2"),
        ("ü".repeat(124), ".qcow2"),
        ("n".to_owned(), &*format!(".{}", "e".repeat(253))),
        ("n".to_owned(), &*format!(".{}", "ü".repeat(126))),
    ]
    .map(|(stem, end)| stem + end);
    for name in &cases {
        assert!(name.len() > 245 && name.len() <= 255, "{name}");
        let work = Work::new();
        let name = OsStr::new(name);
        let run = |line: &str| vdisk(&work, line, name).succeeds();
        let state = |expected: &[u8]| assert_eq!(run("read {} 0 3").stdout, expected, "{name:?}");
        run("create {} 1M");
        let write = |bytes: &[u8]| {
            let running = work.command(crate::host::VDISK, words("write {} 0", name));
            running.finish(Some(bytes.to_vec()), crate::host::PATIENCE).succeeds();
        };
        write(b"one");
        run("snapshot create {} a");
        write(b"two");
        run("snapshot create {} b");
        run("snapshot revert {} a --yes");
        state(b"one");
        run("snapshot undo {} --yes");
        state(b"two");
        run("snapshot merge {} a");
        state(b"two");
        let list = run("snapshot list {}").out();
        assert!(list.contains('b') && work.files().iter().all(|name| name.len() <= 255), "{list}");
        if have(Need::Qemu) {
            qemu_img(&work, "check -q {}", name).succeeds();
        }
        // Under whatever name it has, a layer is a layer.
        let layer = work.files().into_iter().find(|name| name.contains('@')).unwrap();
        let before = work.bytes(&layer);
        vdisk(&work, "resize {} 2M", OsStr::new(&layer)).fails(&["frozen layer"]);
        vdisk(&work, "clone {} c", OsStr::new(&layer)).succeeds();
        // But for its header, which tells that a clone stands on it.
        assert!(work.bytes(&layer)[65536..] == before[65536..], "{name:?}");
        assert_eq!(work.vdisk("read c 0 3").succeeds().stdout, b"two");
    }
}

#[test]
fn a_directory_may_have_a_colon_too() {
    let work = Work::new();
    for dir in ["a:b", "nbd:"] {
        fs::create_dir(work.path(dir)).unwrap();
        work.vdisk(&format!("create {dir}/base.qcow2 1M")).succeeds();
        work.vdisk_fed(&format!("write {dir}/base.qcow2 0"), b"here").succeeds();
        work.vdisk(&format!("clone {dir}/base.qcow2 {dir}/c.qcow2 d-{dir}.qcow2")).succeeds();
        work.vdisk(&format!("clone {dir}/base.qcow2 --count 2 --name {dir}/n:{{}}")).succeeds();
        for disk in [format!("{dir}/c.qcow2"), format!("d-{dir}.qcow2"), format!("{dir}/n:1")] {
            work.vdisk(&format!("snapshot create {disk} s")).succeeds();
            assert_eq!(work.vdisk(&format!("read {disk} 0 4")).succeeds().stdout, b"here");
            if have(Need::Qemu) {
                work.qemu_img(&format!("check -q ./{disk}")).succeeds();
                work.qemu_img(&format!("info --backing-chain ./{disk}")).succeeds();
            }
        }
    }
}

#[test]
fn a_data_file_may_have_a_colon_in_its_name() {
    let work = Work::new();
    for data in ["d:1", "file:d", "nbd:d"] {
        work.vdisk(&format!("create {data}.qcow2 1M --data-file {data}")).succeeds();
        work.vdisk_fed(&format!("write {data}.qcow2 0"), b"data").succeeds();
        assert_eq!(&work.bytes(data)[..4], b"data");
        if have(Need::Qemu) {
            work.qemu_img(&format!("check -q ./{data}.qcow2")).succeeds();
        }
    }
    assert!(!work.path("d").exists());
}

#[test]
fn a_disk_in_use_may_have_any_name() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let work = Work::new();
    fs::create_dir(work.path("raw")).unwrap();
    for name in [&b"vm-21:43"[..], b"a,b c\n\"d\\'", b"d\xff\xfe", &[b'n'; 255]] {
        let name = OsStr::from_bytes(name);
        let run = |line: &str| vdisk(&work, line, name).succeeds();
        run("create {} 1M");
        run("mount --raw {} raw");
        run("snapshot create {} s");
        overwrite(&work.path("raw/disk.raw"), b"live");
        run("info --json {}");
        run("snapshot create {} t");
        run("snapshot merge {} t");
        run("umount raw");
        assert_eq!(run("read {} 0 4").stdout, b"live", "{name:?}");
        run("snapshot revert {} s --yes");
        assert_eq!(run("read {} 0 4").stdout, [0; 4], "{name:?}");
    }
}

#[test]
fn a_name_that_is_not_utf8_is_a_disks_but_no_bases_and_nothing_is_half_done() {
    // `clone` sealed the base, and then found out that no image can name it.
    let work = Work::new();
    for byte in 128..=255u8 {
        let name = OsString::from_vec(vec![b'b', byte, b'1']);
        let run = |line: &str| vdisk(&work, line, &name).succeeds();
        run("create {} 256K");
        let before = work.bytes(&name);
        vdisk(&work, "clone {} c.qcow2", &name).fails(&["not UTF-8"]);
        assert!(!work.path("c.qcow2").exists());
        assert_eq!(work.bytes(&name), before, "{name:?} is as it was");
        run("snapshot create {} s");
        run("snapshot revert {} s --yes");
    }
    let name = OsStr::from_bytes(b"b\xff1");
    work.vdisk("create z.qcow2 256K").succeeds();
    let before = (work.bytes("z.qcow2"), work.bytes(name));
    for line in ["rebase z.qcow2 --backing {}", "rebase z.qcow2 --backing {} --unsafe"] {
        vdisk(&work, line, name).fails(&["not UTF-8"]);
        assert_eq!((work.bytes("z.qcow2"), work.bytes(name)), before, "{line}");
    }
    for line in [
        "info --json {}",
        "map --json {}",
        "check --json {}",
        "tree --json .",
        "info {}",
        "tree .",
        "snapshot list --json {}",
        "snapshot merge --dry-run --json {} s",
        "compact --json {}",
        "compact --dry-run --json {}",
        "rebase {} --flatten --json",
        "snapshot diff {} s --json",
    ] {
        vdisk(&work, line, name).succeeds();
    }
    // In a directory of such a name its disks stand on each other all the same.
    fs::create_dir(work.path(name).with_extension("d")).unwrap();
    let run = |line: &str| vdisk(&work, line, name).succeeds();
    run("create {}.d/base 256K");
    run("clone {}.d/base {}.d/c");
    run("snapshot create {}.d/c s");
    vdisk(&work, "clone {}.d/base beside", name).fails(&["not UTF-8"]);
    vdisk(&work, "resize {}.d/base 1M", name).fails(&["is a base", "clones stand on it"]);
}

#[test]
fn a_clone_whose_name_is_not_utf8_is_seen_beside_its_base() {
    let work = Work::new();
    let name = OsStr::from_bytes(b"c\xff");
    work.vdisk("create base 256K").succeeds();
    vdisk(&work, "clone base {}", name).succeeds();
    work.vdisk("unseal base").fails(&["clones stand on it"]);
}

#[test]
fn the_drop_in_takes_no_name_for_another() {
    // What is not UTF-8 was replaced, and the file of that other name made, with status 0.
    let work = Work::new();
    let name = OsStr::from_bytes(b"d\xff");
    vdisk(&work, "qemu-img create -q -f qcow2 {} 1M", name).fails(&["not UTF-8"]);
    assert_eq!(work.files(), [""; 0]);
    let lines: Vec<String> = ["a\"b", "a\nb"].map(str::to_owned).into();
    for name in lines {
        for kind in ["monolithicFlat", "monolithicSparse", "twoGbMaxExtentSparse"] {
            let line = format!("qemu-img create -q -f vmdk -o subformat={kind} {{}}.vmdk 1M");
            vdisk(&work, &line, OsStr::new(&name)).fails(&["cannot be called"]);
            assert_eq!(work.files(), [""; 0], "{name:?} {kind}");
        }
    }
}

#[test]
fn a_vmdk_may_have_a_colon_in_its_name() {
    if !have(Need::Qemu) {
        return;
    }
    for kind in ["monolithicFlat", "monolithicSparse", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"]
    {
        for (maker, number) in [("ours", 1), ("theirs", 2)] {
            let work = Work::new();
            let line = format!("create -q -f vmdk -o subformat={kind} ./v:{number}.vmdk 1M");
            match maker {
                "ours" => work.vdisk(&format!("qemu-img {line}")).succeeds(),
                _ => work.qemu_img(&line).succeeds(),
            };
            let image = format!("./v:{number}.vmdk");
            work.qemu_io(&image, &["write -P 7 0 64k"]).succeeds();
            work.vdisk(&format!("qemu-img info {image}")).succeeds();
            assert_eq!(work.vdisk(&format!("read {image} 0 4")).succeeds().stdout, [7; 4]);
            work.vdisk(&format!("clone {image} c.qcow2")).succeeds();
            assert_eq!(work.vdisk("read c.qcow2 0 4").succeeds().stdout, [7; 4]);
            work.qemu_io("c.qcow2", &["read -P 7 0 64k"]).succeeds();
        }
    }
}
