//! The drop-in for qemu-img writes into what exists: devices, files and exports full of old bytes.
//! Nothing that was there before is taken for zeroes, and nothing is touched past the source's end.

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::devices::{Device, Old, put_source};
use crate::host::{Done, Work};
use crate::require::{Need, have};
use crate::twin::noise;

const DEVICE: usize = 32 << 20;

fn ours(work: &Work, words: &str) -> Done {
    work.vdisk(&format!("qemu-img {words}"))
}

#[test]
fn no_new_disk_on_a_device_shows_what_was_there() {
    if !(have(Need::Root) && have(Need::Qemu)) {
        return;
    }
    let work = Work::new();
    let source = put_source(&work, "src.raw");
    for old in [Old::Ones, Old::Noise] {
        let device = Device::new(&work, "dev.img", old, DEVICE);
        let path = device.path.as_str();
        for options in [
            "-O raw",
            "-O raw -S 0",
            "-O raw -S 64k",
            "-O qcow2",
            "-O qcow2 -c",
            "-O qcow2 -o preallocation=metadata",
            "-O qcow2 -o cluster_size=512,refcount_bits=1",
            "-O qcow2 -o extended_l2=on",
            "-O qcow2 -o compat=0.10",
            "-O vdi",
            "-O vdi -o static=on",
            "-O vpc",
            "-O vpc -o subformat=fixed",
            "-O vpc -o force_size=on",
            "-O vmdk",
            "-O vmdk -o subformat=streamOptimized",
            "-O vhdx",
            "-O vhdx -o block_size=1M,block_state_zero=off",
            "-O vhdx -o subformat=fixed",
        ] {
            device.refill(old);
            ours(&work, &format!("convert -f raw {options} src.raw {path}")).succeeds();
            let now = device.bytes(&work);
            let format = options.split(' ').nth(1).unwrap();
            if format == "raw" {
                assert!(now[..source.len()] == source, "{options}: old bytes show");
                let rest = &old.bytes(DEVICE)[source.len()..];
                assert!(now[source.len()..] == *rest, "{options}: past the source");
                continue;
            }
            work.qemu_img(&format!("compare -f raw -F {format} src.raw {path}")).succeeds();
            if !options.contains("fixed") {
                // Nothing at the beginning of that tells its format.
                work.vdisk(&format!("compare src.raw {path}")).succeeds();
            }
            if format != "vpc" {
                work.qemu_img(&format!("check -f {format} {path}")).succeeds();
            }
        }
        device.refill(old);
        ours(&work, &format!("convert -f raw -O raw src.raw src.raw {path}")).succeeds();
        let now = device.bytes(&work);
        assert!(now[..source.len() * 2] == [&source[..], &source[..]].concat());
        device.detach(&work);
    }
}

#[test]
fn an_empty_disk_on_a_device_is_sound_and_empty() {
    if !(have(Need::Root) && have(Need::Qemu)) {
        return;
    }
    let work = Work::new();
    put_source(&work, "src.raw");
    for old in [Old::Ones, Old::Noise] {
        let device = Device::new(&work, "dev.img", old, DEVICE);
        let path = device.path.as_str();
        for options in [
            "-f qcow2",
            "-f qcow2 -o cluster_size=512",
            "-f qcow2 -o cluster_size=2M",
            "-f qcow2 -o preallocation=metadata",
            "-f qcow2 -o extended_l2=on,refcount_bits=64",
            "-f vdi",
            "-f vdi -o static=on",
            "-f vmdk",
            "-f vpc",
            "-f vpc -o subformat=fixed",
            "-f vhdx",
            "-f vhdx -o subformat=fixed",
        ] {
            device.refill(old);
            ours(&work, &format!("create -q {options} {path} 10M")).succeeds();
            let format = options.split(' ').nth(1).unwrap();
            if format != "vpc" {
                work.qemu_img(&format!("check -f {format} {path}")).succeeds();
            }
            work.qemu_img(&format!("convert -f {format} -O raw {path} out.raw")).succeeds();
            assert!(work.bytes("out.raw").iter().all(|b| *b == 0), "{options}: not empty");
        }
        for format in ["raw", "qcow2", "vdi", "vpc", "vmdk", "vhdx"] {
            device.refill(old);
            ours(&work, &format!("dd -f raw -O {format} if=src.raw of={path} bs=64k")).succeeds();
            work.qemu_img(&format!("compare -f raw -F {format} src.raw {path}"));
            let read = work.qemu_img(&format!("convert -f {format} -O raw {path} out.raw"));
            read.succeeds();
            assert!(work.bytes("out.raw")[..10 << 20] == work.bytes("src.raw"), "dd {format}");
        }
        device.detach(&work);
    }
}

/// The end of a device is not where an image on it ends: new blocks go behind the last one that its
/// tables name, and not to where the device does.
#[test]
fn an_image_on_a_device_is_written_where_it_stands() {
    if !(have(Need::Root) && have(Need::Qemu)) {
        return;
    }
    let work = Work::new();
    let source = put_source(&work, "src.raw");
    let mut first = vec![0; source.len()];
    first[8 << 20..].copy_from_slice(&noise(9, 2 << 20));
    work.put("first.raw", &first);
    let device = Device::new(&work, "dev.img", Old::Noise, 64 << 20);
    let path = device.path.as_str();
    for (format, options) in [
        ("vdi", "static=off"),
        ("vdi", "static=on"),
        ("vpc", "force_size=on"),
        ("vpc", "force_size=on,subformat=fixed"),
        ("vmdk", "subformat=monolithicSparse"),
        ("vhdx", "block_size=1M"),
        ("vhdx", "subformat=fixed"),
    ] {
        device.refill(Old::Noise);
        let made = format!("convert -f raw -O {format} -o {options} first.raw {path}");
        ours(&work, &made).succeeds();
        let is = |raw: &str| {
            work.qemu_img(&format!("compare -f raw -F {format} {raw} {path}")).succeeds();
            ours(&work, &format!("compare -f raw -F {format} {raw} {path}")).succeeds();
            if format != "vpc" {
                work.qemu_img(&format!("check -f {format} {path}")).succeeds();
            }
        };
        is("first.raw");
        ours(&work, &format!("convert -n -f raw -O {format} src.raw {path}")).succeeds();
        is("src.raw");
        ours(&work, &format!("dd -n -f raw -O {format} bs=64k if=first.raw of={path}")).succeeds();
        is("first.raw");
        // A few bytes of a block: the rest of it is new, and zero.
        ours(&work, &made).succeeds();
        work.qemu_img(&format!("create -q -f qcow2 -b {path} -F {format} top.qcow2")).succeeds();
        work.qemu_io("top.qcow2", &["write -P 7 2M 4k", "write -P 9 5M 512"]).succeeds();
        work.qemu_img("convert -f qcow2 -O raw top.qcow2 want.raw").succeeds();
        ours(&work, "commit top.qcow2").succeeds();
        is("want.raw");
    }
    // Written once, and known for it by its tables.
    device.refill(Old::Noise);
    let made = "convert -f raw -O vmdk -o subformat=streamOptimized first.raw";
    ours(&work, &format!("{made} {path}")).succeeds();
    let again = ours(&work, &format!("convert -n -f raw -O vmdk src.raw {path}"));
    again.fails(&["streamOptimized images are written once"]);
}

#[test]
fn what_a_device_cannot_do_is_told_in_qemus_words() {
    if !(have(Need::Root) && have(Need::Qemu)) {
        return;
    }
    let work = Work::new();
    put_source(&work, "src.raw");
    let device = Device::new(&work, "dev.img", Old::Ones, 4 << 20);
    let path = device.path.as_str();
    for words in [
        "create -f raw DEV 10M",
        "convert -f raw -O raw src.raw DEV",
        "convert -n -f raw -O raw src.raw DEV",
        "dd -f raw -O raw if=src.raw of=DEV bs=1M",
        "create -f raw -o preallocation=falloc DEV 2M",
        "create -f raw -o preallocation=metadata DEV 2M",
        "convert -f raw -O raw -o preallocation=full src.raw DEV",
        "create -f qcow2 -o preallocation=falloc DEV 2M",
        "convert -f raw -O qcow2 -o preallocation=full src.raw DEV",
        "convert -f raw -O vdi src.raw DEV",
        "resize -f raw DEV 64M",
        "resize -f raw --shrink DEV 1M",
        "resize -f raw DEV 4M",
        "convert -n -c -f raw -O raw src.raw DEV",
    ] {
        device.refill(Old::Ones);
        let words = words.replace("DEV", path);
        let theirs = work.qemu_img(&words);
        device.refill(Old::Ones);
        let own = ours(&work, &words);
        assert_eq!((own.code, own.text()), (theirs.code, theirs.text()), "{words}");
    }
}

/// Once, all of the target was made zero first, past the end of the source too, and clusters that
/// could have been overwritten were given away for new ones.
#[test]
fn a_longer_target_keeps_what_stands_past_the_source() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    put_source(&work, "src.raw");
    work.put("base.raw", vec![3; DEVICE]);
    let kinds =
        ["compat=1.1", "compat=0.10", "extended_l2=on", "cluster_size=4k", "cluster_size=2M"];
    let bases = ["", "-b base.raw -F raw"];
    for (kind, base) in kinds.iter().flat_map(|kind| bases.map(|base| (kind, base))) {
        for options in ["", "-S 0", "-S 64k", "-B base.raw -F raw"] {
            if options.starts_with("-B") && base.is_empty() {
                continue;
            }
            let new = format!("create -q -f qcow2 -o {kind} {base} theirs.qcow2 32M");
            work.qemu_img(&new).succeeds();
            work.qemu_io("theirs.qcow2", &["write -P 5 1M 20M"]).succeeds();
            work.put("own.qcow2", work.bytes("theirs.qcow2"));
            let words = format!("convert -n -f raw -O qcow2 {options} src.raw");
            let theirs = work.qemu_img(&format!("{words} theirs.qcow2"));
            let own = ours(&work, &format!("{words} own.qcow2"));
            assert_eq!((own.code, own.text()), (theirs.code, theirs.text()), "{kind} {words}");
            // Where each part of the disk stands, without the file's name.
            let places = ["theirs.qcow2", "own.qcow2"].map(|name| {
                let map = work.qemu_img(&format!("map {name}")).succeeds().out().replace(name, "");
                map.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
            });
            assert_eq!(places[1], places[0], "{kind} {base} {options}");
            work.qemu_img("compare own.qcow2 theirs.qcow2").succeeds();
            work.qemu_img("check own.qcow2").succeeds();
        }
        // QEMU cannot put compressed clusters where others are.
        work.qemu_img(&format!("create -q -f qcow2 -o {kind} {base} own.qcow2 32M")).succeeds();
        work.qemu_io("own.qcow2", &["write -P 5 1M 20M"]).succeeds();
        ours(&work, "convert -n -c -f raw -O qcow2 src.raw own.qcow2").succeeds();
        work.qemu_img("compare own.qcow2 theirs.qcow2").succeeds();
        work.qemu_img("check own.qcow2").succeeds();
    }
}

#[test]
fn a_raw_file_and_a_device_keep_what_stands_past_the_source() {
    if !(have(Need::Root) && have(Need::Qemu)) {
        return;
    }
    let work = Work::new();
    let source = put_source(&work, "src.raw");
    let device = Device::new(&work, "dev.img", Old::Noise, DEVICE);
    let old = Old::Noise.bytes(DEVICE);
    for options in ["", "-S 0", "--target-is-zero", "--target-is-zero -S 0", "-m 1", "-W"] {
        device.refill(Old::Noise);
        work.put("file.raw", &old);
        for target in [device.path.as_str(), "file.raw"] {
            let words = format!("convert -n -f raw -O raw {options} src.raw {target}");
            ours(&work, &words).succeeds();
            let now = if target == "file.raw" { work.bytes(target) } else { device.bytes(&work) };
            assert!(now[source.len()..] == old[source.len()..], "{words}: past the source");
            let trusted = options == "--target-is-zero";
            let middle = 4 << 20..5 << 20;
            let want = if trusted { &old[middle.clone()] } else { &source[middle.clone()] };
            assert!(now[middle] == *want, "{words}");
            assert!(trusted || now[..source.len()] == source, "{words}");
        }
    }
    let words = "convert -n --target-is-zero -B b -F raw -f raw -O qcow2 src.raw t.qcow2";
    ours(&work, words).fails(&["Cannot use --target-is-zero", "backing file"]);
    work.put("short.raw", vec![7; 5 << 20]);
    for words in [
        "convert -n -f raw -O raw src.raw short.raw",
        "dd -n -f raw -O raw if=src.raw of=short.raw",
    ] {
        ours(&work, words).fails(&["output file is smaller than input file"]);
        assert!(work.bytes("short.raw") == vec![7; 5 << 20], "nothing was written");
    }
}

#[test]
fn an_export_full_of_old_bytes_takes_every_format() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    let source = put_source(&work, "src.raw");
    for options in [
        "raw",
        "qcow2",
        "vdi",
        "vpc",
        "vmdk",
        "vhdx",
        "vdi -o static=on",
        "vpc -o subformat=fixed",
        "vhdx -o subformat=fixed",
    ] {
        work.put("old.raw", noise(3, DEVICE));
        let server = work.vdisk_start("serve nbd old.raw --format raw --socket in");
        let until = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(work.path("in")).is_err() {
            assert!(Instant::now() < until, "the server does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        let words = format!("convert -f raw -O {options} src.raw nbd+unix:///?socket=in");
        let done = ours(&work, &words);
        server.signal(Signal::SIGTERM);
        server.wait();
        done.succeeds();
        let format = options.split(' ').next().unwrap();
        work.qemu_img(&format!("convert -f {format} -O raw old.raw out.raw")).succeeds();
        assert!(work.bytes("out.raw")[..source.len()] == source, "{options}");
        let _ = std::fs::remove_file(work.path("in"));
    }
}

#[test]
fn a_disk_on_a_device_grows_into_zeroes() {
    if !(have(Need::Root) && have(Need::Qemu)) {
        return;
    }
    let work = Work::new();
    let device = Device::new(&work, "dev.img", Old::Noise, DEVICE);
    let path = device.path.as_str();
    for options in ["", "--preallocation=metadata"] {
        device.refill(Old::Noise);
        ours(&work, &format!("create -q -f qcow2 -o cluster_size=4k {path} 5M")).succeeds();
        work.qemu_io(path, &["write -P 3 0 5M"]).succeeds();
        ours(&work, &format!("resize -f qcow2 --shrink {path} 2M")).succeeds();
        ours(&work, &format!("resize -f qcow2 {options} {path} 20M")).succeeds();
        work.qemu_io(path, &["read -P 3 0 2M", "read -P 0 2M 18M"]).succeeds();
        work.qemu_img(&format!("check -f qcow2 {path}")).succeeds();
        for mode in ["falloc", "full"] {
            let words = format!("resize -f qcow2 --preallocation={mode} {path} 25M");
            ours(&work, &words).fails(&["unsupported for this non-regular file"]);
        }
    }
}

#[test]
fn devices_that_hold_nothing_are_disks_of_nothing() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    for device in ["/dev/null", "/dev/zero", "/dev/full"] {
        for words in [
            "info -f raw DEV",
            "info DEV",
            "info --output=json DEV",
            "map -f raw DEV",
            "check -f raw DEV",
            "measure -f raw -O qcow2 DEV",
            "compare -f raw -F raw DEV DEV",
            "convert -f raw -O raw DEV out",
            "dd if=DEV of=out",
            "create -f qcow2 -b DEV -F raw over",
            "convert -f raw -O raw /etc/passwd DEV",
        ] {
            let words = words.replace("DEV", device);
            let theirs = work.qemu_img(&words);
            let own = ours(&work, &words);
            assert_eq!((own.code, own.text()), (theirs.code, theirs.text()), "{words}");
        }
        assert_eq!(work.bytes("out"), b"");
        work.vdisk(&format!("info {device}")).succeeds();
    }
    work.vdisk("info /dev/random").fails(&["/dev/random"]);
}
