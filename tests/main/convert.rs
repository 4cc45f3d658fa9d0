//! `convert` and `resize`: new files that QEMU agrees with, from everything that QEMU makes.

use crate::host::Work;
use crate::require::{Need, have};

/// Puts a raw disk `name` of `size` bytes with noise, text and holes.
fn put_source(work: &Work, name: &str, size: usize) {
    let mut bytes = vec![0; size];
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for number in 0..40 {
        let at = next() as usize % size;
        let end = (at + next() as usize % 90_000).min(size);
        for (i, byte) in bytes[at..end].iter_mut().enumerate() {
            *byte = if number % 2 == 0 { next() as u8 } else { (i / 7 % 50) as u8 };
        }
    }
    bytes[size - 1] = 1;
    work.put(name, bytes);
}

#[test]
fn every_cluster_size_and_compression_holds_what_the_source_holds() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    // The last cluster is cut short.
    put_source(&work, "src.raw", (5 << 20) - 1536);
    for cluster in ["512", "4K", "64K", "2M"] {
        for options in [
            "",
            "--compress",
            "--compress --compression zstd",
            "--extended-l2",
            "--extended-l2 --compress",
        ] {
            if options.contains("extended") && !["64K", "2M"].contains(&cluster) {
                continue;
            }
            let out = "out.qcow2";
            work.vdisk(&format!("convert src.raw {out} --cluster-size {cluster} {options}"))
                .succeeds();
            let checked = work.qemu_img(&format!("check {out}")).succeeds().out();
            assert!(checked.contains("No errors"), "{cluster} {options}: {checked}");
            work.qemu_img(&format!("compare -f raw -F qcow2 src.raw {out}")).succeeds();
            work.vdisk(&format!("compare src.raw {out}")).succeeds();
            let check = work.vdisk(&format!("check {out} --json")).succeeds().out();
            let compressed = !check.contains("\"compressed_clusters\": 0,");
            assert_eq!(compressed, options.contains("compress"), "{cluster} {options}");
            work.vdisk(&format!("convert --format raw {out} back.raw")).succeeds();
            assert!(work.bytes("back.raw") == work.bytes("src.raw"), "{cluster} {options}");
            std::fs::remove_file(work.path(out)).unwrap();
            std::fs::remove_file(work.path("back.raw")).unwrap();
        }
    }
}

#[test]
fn compressed_clusters_are_written_over_by_both() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.put("src.raw", vec![9; 4 << 20]);
    work.vdisk("convert --compress src.raw a.qcow2").succeeds();
    work.vdisk_fed("write a.qcow2 100000", &[5; 200_000]).succeeds();
    work.qemu_io("a.qcow2", &["write -P 6 1M 10k", "write -z 2M 1M", "read -P 5 100000 200000"])
        .succeeds();
    work.vdisk_fed("write a.qcow2 3M", &[7; 100]).succeeds();
    work.qemu_img("check a.qcow2").succeeds();
    work.vdisk("check a.qcow2").succeeds();
    let mut want = vec![9; 4 << 20];
    want[100_000..300_000].fill(5);
    want[1 << 20..(1 << 20) + 10_240].fill(6);
    want[2 << 20..3 << 20].fill(0);
    want[3 << 20..(3 << 20) + 100].fill(7);
    work.put("want.raw", want);
    work.vdisk("compare a.qcow2 want.raw").succeeds();
    work.qemu_img("compare -f qcow2 -F raw a.qcow2 want.raw").succeeds();
}

#[test]
fn every_format_and_kind_that_qemu_writes_is_read() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    put_source(&work, "src.raw", 6 << 20);
    for (format, options) in [
        ("qcow2", "compat=0.10"),
        ("qcow2", "compat=1.1,cluster_size=512"),
        ("qcow2", "cluster_size=2M,refcount_bits=1"),
        ("qcow2", "extended_l2=on"),
        ("qcow2", "lazy_refcounts=on,refcount_bits=64"),
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=streamOptimized"),
        ("vmdk", "subformat=monolithicFlat"),
        ("vmdk", "subformat=twoGbMaxExtentSparse"),
        ("vpc", "subformat=dynamic,force_size=on"),
        ("vhdx", "subformat=dynamic"),
        ("vdi", "static=off"),
    ] {
        let name = format!("in-{}.{format}", options.replace([',', '='], "-"));
        work.qemu_img(&format!("convert -f raw -O {format} -o {options} src.raw {name}"))
            .succeeds();
        let info = work.vdisk(&format!("info {name} --json")).succeeds().out();
        assert!(info.contains(&format!("\"format\": \"{format}\"")), "{info}");
        work.vdisk(&format!("convert {name} out.qcow2")).succeeds();
        work.qemu_img("compare -f raw -F qcow2 src.raw out.qcow2").succeeds();
        work.qemu_img("check out.qcow2").succeeds();
        std::fs::remove_file(work.path("out.qcow2")).unwrap();
    }
}

#[test]
fn compressed_images_of_qemu_are_read() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    put_source(&work, "src.raw", 6 << 20);
    for options in ["compression_type=zlib", "compression_type=zstd,cluster_size=2M"] {
        work.qemu_img(&format!("convert -c -f raw -O qcow2 -o {options} src.raw in.qcow2"))
            .succeeds();
        work.vdisk("compare src.raw in.qcow2").succeeds();
    }
}

#[test]
fn a_chain_is_flattened() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.put("base.raw", vec![1; 3 << 20]);
    work.qemu_img("create -q -f qcow2 -b base.raw -F raw mid.qcow2 5M").succeeds();
    work.qemu_img("create -q -f qcow2 -o cluster_size=4k -b mid.qcow2 -F qcow2 top.qcow2 6M")
        .succeeds();
    work.qemu_io("mid.qcow2", &["write -P 2 1M 1M", "write -P 3 4M 512k"]).succeeds();
    work.qemu_io("top.qcow2", &["write -z 1536k 100k", "write -P 4 5M 10k"]).succeeds();
    work.vdisk("convert top.qcow2 flat.qcow2").succeeds();
    work.qemu_img("compare top.qcow2 flat.qcow2").succeeds();
    assert!(!work.qemu_img("info flat.qcow2").out().contains("backing file"));
}

#[test]
fn zeroes_take_no_space() {
    let work = Work::new();
    let mut bytes = vec![0; 64 << 20];
    bytes[33 << 20] = 1;
    work.put("src.raw", &bytes);
    for (format, most) in [("qcow2", 1 << 20), ("raw", 1 << 20)] {
        let out = format!("out.{format}");
        work.vdisk(&format!("convert src.raw {out} --format {format}")).succeeds();
        use std::os::unix::fs::MetadataExt;
        let taken = std::fs::metadata(work.path(&out)).unwrap().blocks() * 512;
        assert!(taken <= most, "{format}: {taken}");
        work.vdisk(&format!("compare src.raw {out}")).succeeds();
    }
}

#[test]
fn a_target_that_exists_and_a_source_that_does_not_are_refused() {
    let work = Work::new();
    work.put("src.raw", [1; 4096]);
    work.put("there", "precious");
    work.vdisk("convert src.raw there").fails(&["there", "exists"]);
    assert_eq!(work.bytes("there"), b"precious");
    work.vdisk("convert missing new.qcow2").fails(&["missing"]);
    work.vdisk("convert src.raw new.qcow2 --format vmdk").fails(&["vmdk"]);
    work.vdisk("convert src.raw new.raw --format raw --compress").fails(&["compress"]);
    work.vdisk("convert src.raw new.qcow2 --cluster-size 3000").fails(&["power of two"]);
    assert_eq!(work.files(), ["src.raw", "there"]);
}

#[test]
fn a_killed_convert_leaves_nothing() {
    let work = Work::new();
    put_source(&work, "src.raw", 64 << 20);
    let convert = work.vdisk_start("convert src.raw out.qcow2 --compress");
    std::thread::sleep(std::time::Duration::from_millis(60));
    convert.signal(nix::sys::signal::Signal::SIGKILL);
    let done = convert.wait();
    if done.code == Some(0) {
        work.vdisk("compare src.raw out.qcow2").succeeds();
    } else {
        assert_eq!(work.files(), ["src.raw"]);
    }
}

#[test]
fn resizing_grows_and_shrinks_and_nothing_comes_back() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    for (name, options) in [
        ("a.qcow2", "--format qcow2"),
        ("b.qcow2", "--cluster-size 512"),
        ("c.qcow2", "--extended-l2"),
        ("d.raw", "--format raw"),
    ] {
        work.vdisk(&format!("create {name} 2M {options}")).succeeds();
        work.vdisk_fed(&format!("write {name} 0"), &vec![7; 2 << 20]).succeeds();
        work.vdisk(&format!("resize {name} +1M")).succeeds();
        work.vdisk(&format!("resize {name} 1M")).fails(&["--shrink"]);
        work.vdisk(&format!("resize {name} -2000000 --shrink")).succeeds();
        work.vdisk(&format!("resize {name} 4M")).succeeds();
        let mut want = vec![0; 4 << 20];
        // A disk has whole sectors: the last one that is asked for stays.
        want[..((3usize << 20) - 2_000_000).next_multiple_of(512)].fill(7);
        work.put("want", &want);
        work.vdisk(&format!("compare --strict {name} want")).succeeds();
        if name.ends_with("qcow2") {
            work.qemu_img(&format!("check {name}")).succeeds();
            work.qemu_img(&format!("compare -s -f qcow2 -F raw {name} want"));
            let info = work.qemu_img(&format!("info {name}")).succeeds().out();
            assert!(info.contains("(4194304 bytes)"), "{info}");
        }
    }
}

#[test]
fn a_longer_base_does_not_show_through_a_resized_clone() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.put("base.raw", vec![1; 2 << 20]);
    work.qemu_img("create -q -f qcow2 -b base.raw -F raw top.qcow2 2M").succeeds();
    work.vdisk("resize top.qcow2 1000000 --shrink").succeeds();
    work.vdisk("resize top.qcow2 3M").succeeds();
    let mut want = vec![0; 3 << 20];
    // A disk has whole sectors: the last one that is asked for stays.
    want[..1_000_000usize.next_multiple_of(512)].fill(1);
    work.put("want", &want);
    work.vdisk("compare --strict top.qcow2 want").succeeds();
    work.qemu_img("compare -f qcow2 -F raw top.qcow2 want").succeeds();
    work.qemu_img("check top.qcow2").succeeds();
}

/// A copy that stands on nothing lost what is run in the disk.
#[test]
fn a_full_copy_says_what_is_run_in_it() {
    let work = Work::new();
    work.vdisk("create base.qcow2 1M").succeeds();
    let words = "image config base.qcow2 --env A=b --cmd serve --workdir /srv --label k=v";
    work.vdisk(words).succeeds();
    let config = |disk: &str| work.vdisk(&format!("image config {disk} --json")).succeeds().out();
    let before = config("base.qcow2");
    assert!(before.contains("A=b") && before.contains("serve"), "{before}");
    work.vdisk("clone base.qcow2 web.qcow2").succeeds();
    work.vdisk("snapshot create web.qcow2 old").succeeds();
    work.vdisk("image config web.qcow2 --cmd other").succeeds();
    let after = config("web.qcow2");
    assert!(after.contains("A=b") && after.contains("other"), "{after}");
    let copies = [
        ("clone --full web.qcow2 a.qcow2", &after),
        ("clone --full web.qcow2 b.qcow2 --snapshot old", &before),
        ("convert web.qcow2 c.qcow2 --compress", &after),
        ("convert web.qcow2 d.qcow2 --snapshot old --cluster-size 4K", &before),
        // What does not say it itself stands on what does.
        ("qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 plain.qcow2", &before),
        ("convert plain.qcow2 e.qcow2", &before),
    ];
    for (words, expected) in copies {
        work.vdisk(words).succeeds();
        let copy = words.split(' ').find(|word| word.len() == 7 && word.ends_with(".qcow2"));
        assert_eq!(config(copy.unwrap_or("plain.qcow2")), *expected, "{words}");
    }
    // What a guest wrote is no word of the disk's, and a raw copy has none.
    work.vdisk("convert base.qcow2 f.raw --format raw").succeeds();
    work.vdisk("convert web.qcow2 g.qcow2 --source-format raw").succeeds();
    assert_eq!(config("g.qcow2").trim(), "{}");
    for disk in ["a.qcow2", "c.qcow2", "d.qcow2"] {
        work.vdisk(&format!("check {disk}")).succeeds();
    }
}
