//! What a guest, a container or an image's author writes never decides which files are opened: a raw
//! disk stays one, and an image reaches no file outside its directory that it was not put on.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::Command;

use crate::host::{Done, Work};
use crate::require::{Need, have};
use crate::serve::Served;
use crate::twin::{noise, same_bytes};

const MIB: usize = 1 << 20;
const SECRET: u8 = b's';
/// What the gate says.
const OUTSIDE: [&str; 2] = ["outside its directory", "--follow"];

/// A directory `in` for disks, and a file of the host's outside it.
fn with_secret() -> Work {
    let work = Work::new();
    fs::create_dir(work.path("in")).unwrap();
    fs::create_dir(work.path("out")).unwrap();
    work.put("out/secret", vec![SECRET; MIB]);
    work
}

fn secret(work: &Work) -> String {
    work.path("out/secret").to_str().unwrap().to_owned()
}

/// A qcow2 image that stands on the file `name`, taken to be raw, as a guest could write it.
fn standing_on(work: &Work, image: &str, name: &str) {
    work.qemu_img(&format!("create -q -f qcow2 -u -F raw -b {name} {image} 1M")).succeeds();
}

/// A qcow2 image that keeps its data in the file `name`.
fn kept_in(work: &Work, image: &str, name: &str) {
    let dir = work.path(image).parent().unwrap().to_owned();
    let placeholder = "p".repeat(name.len());
    let options = format!("data_file={placeholder},data_file_raw=on");
    let made = ["create", "-q", "-f", "qcow2", "-o", &options, "made.qcow2", "1M"];
    let made = Command::new("qemu-img").args(made).current_dir(&dir).status().unwrap();
    assert!(made.success());
    let mut bytes = fs::read(dir.join("made.qcow2")).unwrap();
    fs::remove_file(dir.join("made.qcow2")).unwrap();
    fs::remove_file(dir.join(&placeholder)).unwrap();
    let at = bytes.windows(name.len()).position(|w| w == placeholder.as_bytes()).unwrap();
    bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
    work.put(image, bytes);
}

#[track_caller]
fn tells_nothing(done: &Done) {
    let told = done.stdout.windows(64).any(|bytes| bytes.iter().all(|b| *b == SECRET));
    assert!(!told, "the secret is told: {}", done.text());
}

/// Every way in which a command opens the disk `in/d`.
fn all_ways(work: &Work, options: &str) -> Vec<(String, Done)> {
    let words = [
        "read in/d 0 64K",
        "info --chain in/d",
        "map in/d",
        "check --chain in/d",
        "convert in/d in/copy.raw --format raw",
        "compare in/d out/secret --format-b raw",
        "clone --full in/d in/full.qcow2",
        "clone in/d in/clone.qcow2",
        "resize in/d +1M",
        "compact in/d",
        "rebase in/d --flatten",
        "commit in/d",
        "mount --raw --read-only in/d at",
        "serve nbd in/d --socket s",
        "serve vhost-user in/d --socket s",
        "boot in/d --kernel in/d",
    ];
    let mut done: Vec<(String, Done)> =
        words.iter().map(|w| ((*w).to_owned(), work.vdisk(&format!("{w} {options}")))).collect();
    let write = "write in/d 0";
    done.push((write.to_owned(), work.vdisk_fed(&format!("{write} {options}"), b"PWNED")));
    let run = format!("run {options} in/d -- true");
    done.push((run.clone(), work.vdisk(&run)));
    done
}

#[test]
fn no_command_follows_a_name_out_of_the_images_directory() {
    if !have(Need::Qemu) || !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let work = with_secret();
    fs::create_dir(work.path("at")).unwrap();
    let absolute = secret(&work);
    symlink("../out/secret", work.path("in/link")).unwrap();
    symlink("../out", work.path("in/sub")).unwrap();
    let before = work.bytes("out/secret");
    for name in [absolute.as_str(), "../out/secret", "link", "sub/secret"] {
        standing_on(&work, "in/d", name);
        for (words, done) in all_ways(&work, "") {
            assert!(done.code != Some(0), "{words}");
            done.says(&OUTSIDE);
            tells_nothing(&done);
            assert!(work.bytes("out/secret") == before, "{words}: the file was written");
        }
    }
    assert!(!work.path("in/clone.qcow2").exists() && !work.path("in/copy.raw").exists());
    // The user knows the image: he says so in either way.
    for said in ["--follow", "--format qcow2"] {
        let done = work.vdisk(&format!("read in/d 0 64K {said}")).succeeds();
        assert!(done.stdout == before[..64 << 10], "{said}");
        work.vdisk(&format!("check --chain in/d {said}")).succeeds();
    }
    work.vdisk("convert in/d in/copy.raw --format raw --follow").succeeds();
    work.vdisk("convert in/d in/copy2.raw --format raw --source-format qcow2").succeeds();
    work.vdisk("compare in/d in/copy.raw --follow").succeeds();
    work.vdisk("compare in/d in/copy.raw --format-a qcow2 --format-b raw").succeeds();
    // What is said of the one disk is not said of the other.
    work.vdisk("compare in/copy.raw in/d --format-a raw").ends(2).says(&OUTSIDE);
    work.vdisk("rebase in/d --backing in/copy.raw --format qcow2").fails(&OUTSIDE);
    work.vdisk("rebase in/d --backing in/copy.raw --backing-format raw --format qcow2").succeeds();
    work.vdisk("read in/d 0 64K").succeeds();
}

#[test]
fn no_command_follows_a_data_file_out_of_the_images_directory() {
    if !have(Need::Qemu) || !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let work = with_secret();
    fs::create_dir(work.path("at")).unwrap();
    let absolute = secret(&work);
    symlink("../out/secret", work.path("in/link")).unwrap();
    let before = work.bytes("out/secret");
    for name in [absolute.as_str(), "../out/secret", "link"] {
        kept_in(&work, "in/d", name);
        let mut ways = all_ways(&work, "");
        ways.push(("snapshot".to_owned(), work.vdisk("snapshot create in/d s")));
        ways.push(("check".to_owned(), work.vdisk("check --repair all in/d")));
        for (words, done) in ways {
            // An image that stands on nothing has nothing to commit, and that comes first.
            let why = if words.starts_with("commit") { &[][..] } else { &OUTSIDE[..] };
            assert!(done.code != Some(0), "{words}");
            done.says(why);
            tells_nothing(&done);
            assert!(work.bytes("out/secret") == before, "{words}: the file was written");
        }
    }
    let read = work.vdisk("read in/d 0 64K --follow").succeeds().stdout;
    assert!(read == before[..64 << 10]);
    // Beside the image and below it is where an image's data belong.
    fs::create_dir(work.path("in/below")).unwrap();
    for name in ["beside", "below/data"] {
        work.put(format!("in/{name}"), noise(3, MIB));
        kept_in(&work, "in/d", name);
        let read = work.vdisk("read in/d 0 1M").succeeds().stdout;
        same_bytes(name, &read, &noise(3, MIB));
    }
}

#[test]
fn a_base_beside_the_image_or_below_it_is_reached_by_a_name_that_says_so() {
    if !have(Need::Qemu) {
        return;
    }
    let work = with_secret();
    fs::create_dir(work.path("in/below")).unwrap();
    for (name, at) in [
        ("base.raw", "in/base.raw"),
        ("./base.raw", "in/base.raw"),
        ("below/base.raw", "in/below/base.raw"),
    ] {
        work.put(at, noise(4, MIB));
        standing_on(&work, "in/d", name);
        same_bytes(name, &work.vdisk("read in/d 0 1M").succeeds().stdout, &noise(4, MIB));
    }
    let absolute = work.path("in/base.raw");
    for name in [absolute.to_str().unwrap(), "below/../base.raw", "../in/base.raw"] {
        standing_on(&work, "in/d", name);
        work.vdisk("read in/d 0 1M").fails(&OUTSIDE);
        let read = work.vdisk("read in/d 0 1M --follow").succeeds().stdout;
        same_bytes(name, &read, &noise(4, MIB));
        work.vdisk("rebase in/d --accept-base --follow").succeeds();
        same_bytes(name, &work.vdisk("read in/d 0 1M").succeeds().stdout, &noise(4, MIB));
    }
}

#[test]
fn what_vdisk_put_on_a_base_elsewhere_is_followed_by_its_label() {
    let work = with_secret();
    work.put("out/base.raw", noise(1, 3 * MIB));
    work.vdisk("create out/base.qcow2 3M").succeeds();
    work.vdisk_fed("write out/base.qcow2 0", &noise(2, MIB)).succeeds();
    work.vdisk("clone out/base.raw in/raw.qcow2").succeeds();
    work.vdisk("clone out/base.qcow2 in/qcow2.qcow2").succeeds();
    work.vdisk("snapshot create in/raw.qcow2 one").succeeds();
    work.vdisk("clone in/raw.qcow2 out/again.qcow2").succeeds();
    let raw = noise(1, 3 * MIB);
    for disk in ["in/raw.qcow2", "out/again.qcow2"] {
        same_bytes(disk, &work.vdisk(&format!("read {disk} 0 3M")).succeeds().stdout, &raw);
    }
    let read = work.vdisk("read in/qcow2.qcow2 0 1M").succeeds().stdout;
    same_bytes("the clone of a qcow2 base", &read, &noise(2, MIB));
    for disk in ["in/raw.qcow2", "in/qcow2.qcow2"] {
        work.vdisk(&format!("info --chain {disk}")).succeeds();
        work.vdisk(&format!("check --chain {disk}")).succeeds();
    }
    // Touched, it has the same contents; written, it is another file, and the user is told how to
    // take it.
    work.run("touch", ["out/base.raw"]).succeeds();
    work.vdisk("read in/raw.qcow2 0 512").succeeds();
    let base = File::options().write(true).open(work.path("out/base.raw")).unwrap();
    base.write_all_at(b"changed", 0).unwrap();
    work.vdisk("read in/raw.qcow2 0 512").fails(&["has changed", "--accept-base --follow"]);
    work.vdisk("rebase in/raw.qcow2 --accept-base").fails(&OUTSIDE);
    work.vdisk("rebase in/raw.qcow2 --accept-base --follow").succeeds();
    let read = work.vdisk("read in/raw.qcow2 0 7").succeeds();
    assert_eq!(read.stdout, b"changed");
}

#[test]
fn a_base_elsewhere_is_accepted_once_and_for_all() {
    if !have(Need::Qemu) {
        return;
    }
    let work = with_secret();
    work.qemu_img("create -q -f qcow2 out/base.qcow2 1M").succeeds();
    work.qemu_io("out/base.qcow2", &["write -P 115 0 64k"]).succeeds();
    for (base, format) in [("out/secret", "raw"), ("out/base.qcow2", "qcow2")] {
        let absolute = work.path(base);
        let absolute = absolute.to_str().unwrap();
        work.qemu_img(&format!("create -q -f qcow2 -F {format} -b {absolute} in/d")).succeeds();
        work.vdisk("read in/d 0 64K").fails(&["--accept-base --follow"]);
        work.vdisk("rebase in/d --accept-base --follow").succeeds();
        let read = work.vdisk("read in/d 0 64K").succeeds().stdout;
        assert!(read.iter().all(|b| *b == SECRET), "{base}");
        work.vdisk("snapshot create in/d s").succeeds();
        work.vdisk("read in/d 0 64K").succeeds();
        // Put on it by name alone, too.
        work.qemu_img(&format!("create -q -f qcow2 in/{format} 1M")).succeeds();
        let words = format!("rebase in/{format} --unsafe --backing {base}");
        work.vdisk(&format!("{words} --backing-format {format}")).succeeds();
        let read = work.vdisk(&format!("read in/{format} 0 64K")).succeeds().stdout;
        assert!(read.iter().all(|b| *b == SECRET), "{base}");
        work.vdisk("snapshot delete in/d s --yes --forget").succeeds();
        fs::remove_file(work.path("in/d")).unwrap();
    }
}

/// Whoever may look at a directory knows a file's length and times, and the name of a label's field.
#[test]
fn a_label_that_knows_a_files_length_and_times_proves_nothing() {
    let work = with_secret();
    fs::create_dir(work.path("own")).unwrap();
    work.put("own/secret", vec![b'x'; MIB]);
    work.vdisk("clone own/secret in/d").succeeds();
    assert_eq!(work.vdisk("read in/d 0 4").succeeds().stdout, b"xxxx");
    let mut bytes = work.bytes("in/d");
    let name = b"../own/secret";
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap();
    bytes[at..at + name.len()].copy_from_slice(b"../out/secret");
    work.put("in/d", bytes);
    work.run("touch", ["-r", "own/secret", "out/secret"]).succeeds();
    for words in ["read in/d 0 64K", "rebase in/d --accept-base", "rebase in/d --flatten"] {
        let done = work.vdisk(words);
        tells_nothing(&done.fails(&["secret", "--follow"]));
    }
    for words in ["read --accept-base in/d 0 64K", "info --chain in/d", "check --chain in/d"] {
        let done = work.vdisk(words);
        tells_nothing(&done.fails(&OUTSIDE));
    }
}

#[test]
fn an_image_on_a_device_reaches_no_other_device() {
    if !have(Need::Qemu) || !have(Need::Root) {
        return;
    }
    let work = with_secret();
    let attach = |file: &str| {
        let done = work.run("losetup", ["-f", "--show", file]).succeeds();
        done.out().trim().to_owned()
    };
    let other = attach("out/secret");
    let name = Path::new(&other).file_name().unwrap().to_str().unwrap().to_owned();
    standing_on(&work, "in/d", &name);
    let image = File::options().write(true).open(work.path("in/d")).unwrap();
    image.set_len(MIB as u64).unwrap();
    let own = attach("in/d");
    tells_nothing(&work.vdisk(&format!("read {own} 0 64K")).fails(&OUTSIDE));
    // A device is a base like any other for whoever puts a clone on it.
    work.vdisk(&format!("clone {other} in/clone.qcow2 --format raw")).succeeds();
    let read = work.vdisk("read in/clone.qcow2 0 64K").succeeds().stdout;
    assert!(read.iter().all(|b| *b == SECRET));
}

#[test]
fn a_vmdk_reaches_no_file_outside_its_directory() {
    if !have(Need::Qemu) {
        return;
    }
    let work = with_secret();
    work.qemu_img("create -q -f vmdk -o subformat=monolithicFlat in/d 1M").succeeds();
    fs::remove_file(work.path("in/d-flat.vmdk")).ok();
    let extent = fs::read_dir(work.path("in")).unwrap().flatten().find(|e| e.file_name() != "d");
    if let Some(extent) = extent {
        fs::remove_file(extent.path()).unwrap();
    }
    let text = String::from_utf8(work.bytes("in/d")).unwrap();
    let quoted = |line: &str| line.split('"').nth(1).map(str::to_owned);
    let old = text.lines().find(|l| l.starts_with("RW ")).and_then(quoted).unwrap();
    symlink("../out/secret", work.path("in/link")).unwrap();
    for name in [secret(&work).as_str(), "../out/secret", "link"] {
        work.put("in/d", text.replace(&format!("\"{old}\""), &format!("\"{name}\"")));
        tells_nothing(&work.vdisk("read in/d 0 64K").fails(&["directory"]));
        tells_nothing(&work.vdisk("clone in/d in/c.qcow2").fails(&["directory"]));
    }
    assert!(work.vdisk("read in/d 0 64K --follow").succeeds().stdout[0] == SECRET);
    // Its base.
    work.qemu_img("convert -f raw -O vmdk out/secret out/base.vmdk").succeeds();
    let base = work.path("out/base.vmdk");
    let base = base.to_str().unwrap();
    work.qemu_img(&format!("create -q -f vmdk -F vmdk -b {base} in/delta.vmdk")).succeeds();
    tells_nothing(&work.vdisk("read in/delta.vmdk 0 64K").fails(&OUTSIDE));
    let read = work.vdisk("read in/delta.vmdk 0 64K --format vmdk").succeeds().stdout;
    assert!(read.iter().all(|b| *b == SECRET));
}

/// Writes the sum over `len` bytes at `start` to `at`, as VHD has it.
fn sum(bytes: &mut [u8], start: usize, len: usize, at: usize) {
    bytes[at..at + 4].fill(0);
    let sum: u32 = bytes[start..start + len].iter().map(|b| u32::from(*b)).sum();
    bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
}

#[test]
fn a_differencing_vhd_reaches_no_base_outside_its_directory() {
    if !have(Need::Qemu) {
        return;
    }
    let work = with_secret();
    work.qemu_img("convert -f raw -O vpc -o force_size=on out/secret out/base.vhd").succeeds();
    work.qemu_img("create -q -f vpc -o force_size=on in/made 1M").succeeds();
    let mut bytes = work.bytes("in/made");
    let absolute = work.path("out/base.vhd");
    for name in [absolute.to_str().unwrap(), "../out/base.vhd"] {
        let end = bytes.len() - 512;
        for footer in [0, end] {
            // It is a differencing disk, and names its base.
            bytes[footer + 60..footer + 64].copy_from_slice(&4u32.to_be_bytes());
            sum(&mut bytes, footer, 512, footer + 64);
        }
        let wide: Vec<u8> = name.encode_utf16().flat_map(u16::to_be_bytes).collect();
        bytes[512 + 64..512 + 576].fill(0);
        bytes[512 + 64..512 + 64 + wide.len()].copy_from_slice(&wide);
        sum(&mut bytes, 512, 1024, 512 + 36);
        work.put("in/d", &bytes);
        tells_nothing(&work.vdisk("read in/d 0 64K").fails(&OUTSIDE));
        tells_nothing(&work.vdisk("clone in/d in/c.qcow2").fails(&OUTSIDE));
        let read = work.vdisk("read in/d 0 64K --format vpc").succeeds().stdout;
        assert!(read.iter().all(|b| *b == SECRET));
    }
}

#[test]
fn a_commit_writes_to_no_file_elsewhere_of_which_only_the_contents_are_known() {
    let work = with_secret();
    work.vdisk("clone out/secret in/d").succeeds();
    work.vdisk_fed("write in/d 0", b"PWNED").succeeds();
    let before = work.bytes("out/secret");
    work.vdisk("commit in/d").fails(&OUTSIDE);
    assert!(work.bytes("out/secret") == before);
    work.vdisk("commit in/d --follow").succeeds();
    assert!(work.bytes("out/secret").starts_with(b"PWNED"));
    work.vdisk("read in/d 0 512").succeeds();
    // An id says more than contents.
    work.vdisk("create out/base.qcow2 1M").succeeds();
    work.vdisk("clone out/base.qcow2 in/e").succeeds();
    work.vdisk_fed("write in/e 0", b"mine").succeeds();
    work.vdisk("commit in/e").succeeds();
    assert_eq!(work.vdisk("read in/e 0 4").succeeds().stdout, b"mine");
}

/// A guest makes device files and set-uid programs in its own disk; on the host they would be keys.
#[test]
fn a_mounted_disks_device_files_and_set_uid_programs_are_only_files() {
    if !have(Need::Fuse) || !have(Need::Root) {
        return;
    }
    let work = Work::new();
    fs::create_dir(work.path("at")).unwrap();
    work.vdisk("create --format raw d 16M").succeeds();
    work.run("mkfs.ext4", ["-q", "d"]).succeeds();
    work.vdisk("mount d at").succeeds();
    work.run("mknod", ["at/zero", "c", "1", "5"]).succeeds();
    let opened = File::open(work.path("at/zero")).unwrap_err();
    assert_eq!(opened.raw_os_error(), Some(libc::EACCES), "{opened}");
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let at = work.path("at");
    let line = table.lines().find(|line| line.split(' ').nth(4) == at.to_str()).unwrap();
    assert!(line.contains("nosuid") && line.contains("nodev"), "{line}");
    work.vdisk("umount at").succeeds();
}

#[test]
fn the_drop_in_follows_names_as_qemu_does() {
    if !have(Need::Qemu) {
        return;
    }
    let work = with_secret();
    standing_on(&work, "in/d", &secret(&work));
    for words in ["convert -O raw in/d in/copy.raw", "convert -f qcow2 -O raw in/d in/copy.raw"] {
        work.vdisk(&format!("qemu-img {words}")).succeeds();
        assert!(work.bytes("in/copy.raw") == work.bytes("out/secret"));
    }
    work.vdisk("qemu-img info --backing-chain in/d").succeeds();
}

/// The first bytes of every format that a file is known by.
fn marks() -> Vec<(&'static str, Vec<u8>)> {
    let mut vdi = vec![0; 0x44];
    vdi[0x40..].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
    vec![
        ("qcow2", b"QFI\xfb\0\0\0\x03".to_vec()),
        ("vmdk", b"KDMV\x01\0\0\0".to_vec()),
        ("vmdk", b"COWD\x01\0\0\0".to_vec()),
        ("vmdk", b"# Disk DescriptorFile\nversion=1\n".to_vec()),
        ("vpc", b"conectix".to_vec()),
        ("vhdx", b"vhdxfile".to_vec()),
        ("vdi", vdi),
        ("luks", b"LUKS\xba\xbe\0\x01".to_vec()),
    ]
}

fn format_of(work: &Work, disk: &str) -> String {
    let info = work.vdisk(&format!("info --json {disk}")).succeeds().out();
    serde_json::from_str::<serde_json::Value>(&info).unwrap()["format"].as_str().unwrap().to_owned()
}

#[test]
fn a_disk_that_was_taken_for_raw_stays_one_whatever_is_written() {
    let work = Work::new();
    for (format, mark) in marks() {
        let _ = fs::remove_file(work.path("d"));
        work.vdisk("create --format raw d 512K").succeeds();
        // At once, in the midst of more, and byte by byte from behind.
        work.vdisk_fed("write d 0", &mark).fails(&["--format raw", format]);
        let mut more = mark.clone();
        more.resize(300_000, 7);
        work.vdisk_fed("write d 0", &more).fails(&["--format raw", format]);
        let mut refused = 0;
        for (at, byte) in mark.iter().enumerate().rev().filter(|(_, byte)| **byte != 0) {
            let done = work.vdisk_fed(&format!("write d {at}"), &[*byte]);
            refused += usize::from(done.code != Some(0));
            if done.code != Some(0) {
                done.fails(&["--format raw"]);
            }
        }
        assert!(refused > 0, "{format} was put together");
        assert_eq!(work.vdisk("map d").succeeds().code, Some(0));
        // Next to it, anything goes; and zeroes anywhere.
        work.vdisk_fed("write d 4096", &mark).succeeds();
        work.vdisk_fed("write d 0", &[0; 8192]).succeeds();
        // Who says what it is may write what he likes, and is not asked again.
        work.vdisk_fed("write d 0 --format raw", &mark).succeeds();
        let read = work.vdisk(&format!("read d 0 {} --format raw", mark.len())).succeeds();
        assert!(read.stdout == mark, "{format}");
        work.vdisk("map d --format raw").succeeds();
    }
    // A descriptor is one in a small file only, but not to all programs; and shrinking must not make
    // one of a disk.
    work.vdisk("create --format raw e 2M").succeeds();
    let descriptor = b"# Disk DescriptorFile\nversion=1\n";
    work.vdisk_fed("write e 0", descriptor).fails(&["--format raw", "vmdk"]);
    work.vdisk_fed("write e 0 --format raw", descriptor).succeeds();
    work.vdisk_fed("write e 100", b"it is written on").succeeds();
    work.vdisk("resize --shrink e 64K").fails(&["--format raw", "vmdk"]);
    assert_eq!(format_of(&work, "e"), "raw");
    work.vdisk("resize --shrink e 64K --format raw").succeeds();
}

#[test]
fn no_user_of_a_raw_disk_makes_it_an_image() {
    if !have(Need::Fuse) || !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    fs::create_dir(work.path("at")).unwrap();
    work.qemu_img("create -q -f qcow2 header 1M").succeeds();
    let header = work.bytes("header");
    let untouched = |what: &str| assert!(work.bytes("d")[..512].iter().all(|b| *b == 0), "{what}");
    work.vdisk("create --format raw d 4M").succeeds();

    work.vdisk("mount --raw d at").succeeds();
    let file = File::options().write(true).open(work.path("at/disk.raw")).unwrap();
    file.write_all_at(&header[..4096], 0).unwrap();
    file.sync_all().unwrap_err();
    drop(file);
    untouched("a raw mount");
    // Its user is told that what he wrote is not there.
    work.vdisk("umount at").fails(&["not everything"]);
    let _ = work.vdisk("umount at");

    let served = Served::start(&work, "nbd d --socket s");
    let plant = ["-f", "raw", &served.uri, "-c", "write -s header 0 64k"];
    let refused = work.run("qemu-io", plant).ends(1).text();
    assert!(refused.contains("not permitted"), "{refused}");
    // What follows is served as before.
    let more = ["-f", "raw", &served.uri, "-c", "write -P 1 512 64k", "-c", "write -z 0 64k"];
    work.run("qemu-io", more).succeeds();
    served.stop();
    untouched("NBD");

    // Declared, all of it is the guest's.
    let served = Served::start(&work, "nbd d --socket s --format raw");
    let plant = ["-f", "raw", &served.uri, "-c", "write -s header 0 64k"];
    work.run("qemu-io", plant).succeeds();
    served.stop();
    same_bytes("d", &work.bytes("d")[..512], &header[..512]);
    let read = work.vdisk("read d 0 512 --format raw").succeeds().stdout;
    same_bytes("d", &read, &header[..512]);
}

#[test]
fn a_declared_raw_disk_is_nothing_else_whatever_its_guest_wrote() {
    if !have(Need::Qemu) || !have(Need::Root) || !have(Need::Fuse) {
        return;
    }
    let work = with_secret();
    fs::create_dir(work.path("at")).unwrap();
    standing_on(&work, "in/d", &secret(&work));
    let planted = work.bytes("in/d");
    let raw = |words: &str| work.vdisk(&format!("{words} --format raw"));
    let info = raw("info --json --chain in/d").succeeds().out();
    assert!(info.contains("\"raw\"") && !info.contains("qcow2"), "{info}");
    for words in ["snapshot create in/d s", "snapshot list in/d", "commit in/d", "unseal in/d"] {
        raw(words).fails(&["raw disk"]);
    }
    raw("read in/d 0 64K --snapshot s").fails(&["raw disk"]);
    // It holds no file system, and nothing in it is taken for a disk.
    raw("mount in/d at").fails(&["in/d"]);
    raw("clone in/d in/c.qcow2").succeeds();
    raw("clone --full in/d in/full.qcow2").succeeds();
    for disk in ["in/c.qcow2", "in/full.qcow2"] {
        let read = work.vdisk(&format!("read {disk} 0 64K")).succeeds().stdout;
        same_bytes(disk, &read, &planted[..64 << 10]);
    }
    assert!(work.bytes("in/d") == planted, "the base was written");
    // Whatever goes down the clone's chain knows what its base is, and asks nobody.
    let info = work.vdisk("info --json --chain in/c.qcow2").succeeds().out();
    assert!(info.contains("\"raw\"") && !info.contains("out/secret"), "{info}");
    let tree = work.vdisk("tree --json in/c.qcow2").succeeds().out();
    assert!(tree.contains("\"raw\"") && !tree.contains("out/secret"), "{tree}");
    let tree = work.vdisk("tree --json in").succeeds().out();
    assert!(!tree.contains("out/secret"), "{tree}");
    work.vdisk("check --chain in/c.qcow2").succeeds();
    work.vdisk("rebase in/c.qcow2 --accept-base").succeeds();
    work.vdisk("rebase in/c.qcow2 --flatten").succeeds();
    let read = work.vdisk("read in/c.qcow2 0 64K").succeeds().stdout;
    same_bytes("flattened", &read, &planted[..64 << 10]);
}

#[test]
fn an_image_of_another_format_than_is_said_is_refused() {
    let work = Work::new();
    work.vdisk("create --format raw d 1M").succeeds();
    work.vdisk("create q 1M").succeeds();
    for words in ["read d 0 1", "info d", "snapshot create d s", "commit d"] {
        work.vdisk(&format!("{words} --format qcow2")).fails(&["d"]);
    }
    work.vdisk("read d 0 1 --format vhd").ends(64);
    work.vdisk("snapshot create q s --format qcow2").succeeds();
    work.vdisk("resize q +1M --format qcow2").succeeds();
    work.vdisk("compact q --format qcow2").succeeds();
    work.vdisk("clone q c --format qcow2").succeeds();
    work.vdisk("commit c --format qcow2").succeeds();
}
