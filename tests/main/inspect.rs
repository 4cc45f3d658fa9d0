//! `info`, `check`, `map` and `compare`: what the command says of a disk, beside what QEMU says.

use crate::host::Work;
use crate::require::{Need, have};

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn info_agrees_with_qemu() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.qemu_img("create -q -f qcow2 base.qcow2 8M").succeeds();
    for options in [
        "compat=0.10",
        "cluster_size=4k,refcount_bits=8",
        "lazy_refcounts=on,extended_l2=on",
        "compression_type=zstd",
    ] {
        work.qemu_img(&format!("create -q -f qcow2 -b base.qcow2 -F qcow2 -o {options} d.qcow2"))
            .succeeds();
        let theirs = json(&work.qemu_img("info --output json d.qcow2").succeeds().out());
        let ours = json(&work.vdisk("info --json d.qcow2").succeeds().out());
        assert_eq!(ours["format"], theirs["format"]);
        assert_eq!(ours["virtual_size"], theirs["virtual-size"]);
        assert_eq!(ours["allocated_size"], theirs["actual-size"]);
        assert_eq!(ours["cluster_size"], theirs["cluster-size"]);
        assert_eq!(ours["backing"]["name"], theirs["backing-filename"]);
        assert_eq!(ours["backing"]["format"], theirs["backing-filename-format"]);
        let (own, their) = (&ours["format_specific"], &theirs["format-specific"]["data"]);
        assert_eq!(own["compression_type"], their["compression-type"], "{options}");
        assert_eq!(own["refcount_bits"], their["refcount-bits"], "{options}");
        for (key, name) in [("lazy_refcounts", "lazy-refcounts"), ("extended_l2", "extended-l2")] {
            assert_eq!(own[key], their[name].as_bool().unwrap_or(false), "{options} {key}");
        }
        let version = if their["compat"] == "0.10" { 2 } else { 3 };
        assert_eq!(own["version"], version);
    }
}

#[test]
fn info_shows_the_chain_and_works_beside_a_holder() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    std::fs::create_dir(work.path("sub")).unwrap();
    work.put("base.raw", [0; 65536]);
    work.qemu_img("create -q -f qcow2 -b ../base.raw -F raw sub/top.qcow2").succeeds();
    let mut holder = work.command("qemu-io", ["sub/top.qcow2"]);
    holder.type_in(b"write -P 1 0 4k\n");
    let deadline = std::time::Instant::now() + crate::host::PATIENCE;
    let held = loop {
        let info = json(&work.vdisk("info --json --chain --follow sub/top.qcow2").succeeds().out());
        if info["holders"].as_array().is_some_and(|h| !h.is_empty()) {
            break info;
        }
        assert!(std::time::Instant::now() < deadline, "{info}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    assert_eq!(held["holders"][0]["pid"], holder.pid());
    assert_eq!(held["holders"][0]["command"], "qemu-io");
    assert_eq!(held["backing"]["path"], "sub/../base.raw");
    assert_eq!(held["chain"][0]["filename"], "sub/top.qcow2");
    assert_eq!(held["chain"][1]["format"], "raw");
    let text = work.vdisk("info sub/top.qcow2").succeeds().out();
    assert!(text.contains("in use by: qemu-io"), "{text}");
    // What only one can do is refused, and says who the other is.
    work.vdisk("check --repair all sub/top.qcow2").fails(&["in use", "qemu-io"]);
    holder.wait().succeeds();
}

#[test]
fn info_shows_who_a_disk_is() {
    let work = Work::new();
    work.vdisk("create a.qcow2 1M").succeeds();
    let info = json(&work.vdisk("info --json a.qcow2").succeeds().out());
    assert_eq!(info["label"]["role"], "head");
    assert_eq!(info["label"]["disk_id"].as_str().map(str::len), Some(36));
    assert!(info["backing"].is_null() && info.get("chain").is_none());
}

#[test]
fn info_lists_snapshots_and_clones() {
    let work = Work::new();
    work.vdisk("create base.qcow2 1M").succeeds();
    work.vdisk("clone base.qcow2 a.qcow2 b.qcow2").succeeds();
    work.vdisk("snapshot create a.qcow2 monday").succeeds();
    work.vdisk("snapshot create a.qcow2 tuesday").succeeds();
    let base = json(&work.vdisk("info --json base.qcow2").succeeds().out());
    assert_eq!(base["label"]["role"], "base");
    let mut clones: Vec<_> =
        base["clones"].as_array().unwrap().iter().filter_map(|c| c.as_str()).collect();
    clones.sort();
    let named = |name: &str| clones.iter().any(|c| c.trim_start_matches("./") == name);
    assert!(clones.len() == 2 && named("a.qcow2") && named("b.qcow2"), "{base}");
    let a = json(&work.vdisk("info --json a.qcow2").succeeds().out());
    let names: Vec<_> = a["snapshots"].as_array().unwrap().iter().map(|s| &s["name"]).collect();
    assert_eq!(names, ["monday", "tuesday"], "{a}");
    assert_eq!(a["clones"], serde_json::json!([]));
    let text = work.vdisk("info a.qcow2").succeeds().out();
    assert!(text.contains("snapshot: monday"), "{text}");
}

#[test]
fn check_tells_leaks_from_corruption_as_qemu_does() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.qemu_img("create -q -f qcow2 a.qcow2 8M").succeeds();
    work.qemu_io("a.qcow2", &["write -P 1 0 1M"]).succeeds();
    work.vdisk("check a.qcow2").succeeds();
    let good = work.bytes("a.qcow2");
    let table = u64::from_be_bytes(good[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(good[table..table + 8].try_into().unwrap()) as usize;

    let mut leaky = good.clone();
    leaky[block + 2 * 100 + 1] = 1;
    leaky.resize(101 << 16, 0);
    work.put("leaky.qcow2", &leaky);
    work.qemu_img("check leaky.qcow2").ends(3);
    let report = work.vdisk("check --json leaky.qcow2").ends(3);
    assert_eq!(json(&report.out())["leaks"], 1);
    report.says(&["Leaked cluster 100"]);
    let text = work.vdisk("check --repair leaks leaky.qcow2").succeeds().out();
    assert!(text.contains("1 leaked clusters"), "{text}");
    work.qemu_img("check leaky.qcow2").succeeds();

    let mut corrupt = good.clone();
    corrupt[block + 2 * 6 + 1] = 0;
    corrupt[79] |= 2;
    work.put("corrupt.qcow2", &corrupt);
    work.qemu_img("check corrupt.qcow2").ends(2);
    work.vdisk("check corrupt.qcow2").ends(2);
    work.vdisk("check --repair leaks corrupt.qcow2").ends(2);
    let info = json(&work.vdisk("info --json corrupt.qcow2").succeeds().out());
    assert_eq!(info["format_specific"]["corrupt"], true);
    work.vdisk_fed("write corrupt.qcow2 0", b"x").fails(&["corrupt", "repair"]);
    let fixed = json(&work.vdisk("check --json --repair all corrupt.qcow2").succeeds().out());
    assert!(fixed["corruptions_fixed"].as_u64() > Some(0), "{fixed}");
    work.qemu_img("check corrupt.qcow2").succeeds();
    work.qemu_io("corrupt.qcow2", &["read -P 1 0 1M", "write -P 2 0 4k"]).succeeds();
}

#[test]
fn check_counts_what_qemu_counts() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.put("src.raw", vec![3; 3 << 20]);
    work.qemu_img("convert -c -O qcow2 -f raw src.raw a.qcow2").succeeds();
    work.qemu_img("resize -q a.qcow2 9M").succeeds();
    work.qemu_io("a.qcow2", &["write -P 1 5M 100k", "write -z 64k 64k"]).succeeds();
    let theirs = json(&work.qemu_img("check --output json a.qcow2").succeeds().out());
    let ours = json(&work.vdisk("check --json a.qcow2").succeeds().out());
    for key in [
        "total_clusters",
        "allocated_clusters",
        "compressed_clusters",
        "fragmented_clusters",
        "image_end_offset",
    ] {
        let theirs = theirs[key.replace('_', "-")].as_u64().unwrap_or(0);
        assert_eq!(ours[key].as_u64(), Some(theirs), "{key}");
    }
}

#[test]
fn check_goes_down_the_chain() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.put("base.raw", vec![0; 1 << 20]);
    work.qemu_img("create -q -f qcow2 -b base.raw -F raw mid.qcow2").succeeds();
    work.qemu_img("create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2").succeeds();
    let mut leaky = work.bytes("mid.qcow2");
    let table = u64::from_be_bytes(leaky[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(leaky[table..table + 8].try_into().unwrap()) as usize;
    leaky[block + 2 * 100 + 1] = 1;
    leaky.resize(101 << 16, 0);
    work.put("mid.qcow2", &leaky);
    work.vdisk("check top.qcow2").succeeds();
    let layers = json(&work.vdisk("check --chain --json top.qcow2").ends(3).out());
    assert_eq!(layers["layers"].as_array().map(Vec::len), Some(2));
    work.vdisk("check --chain --repair leaks top.qcow2").succeeds();
    work.qemu_img("check mid.qcow2").succeeds();
}

#[test]
fn what_cannot_be_checked_ends_with_1() {
    let work = Work::new();
    work.put("a.raw", [0; 65536]);
    work.vdisk("check a.raw").fails(&["a.raw", "raw"]);
    work.vdisk("check missing").fails(&["missing"]);
    work.put("cut.qcow2", b"QFI\xfb\0\0\0\x03");
    work.vdisk("check cut.qcow2").fails(&["cut.qcow2"]);
}

#[test]
fn map_agrees_with_qemu() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.put("src.raw", vec![3; 1 << 20]);
    work.qemu_img("convert -c -O qcow2 -f raw src.raw base.qcow2").succeeds();
    work.qemu_img("create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2 4M").succeeds();
    work.qemu_img("create -q -f qcow2 -o extended_l2=on -b mid.qcow2 -F qcow2 top.qcow2")
        .succeeds();
    work.qemu_io("mid.qcow2", &["write -P 1 512k 200k", "write -z 3M 128k"]).succeeds();
    work.qemu_io("top.qcow2", &["write -P 2 600k 10k", "write -P 2 2M 64k", "discard 64k 64k"])
        .succeeds();
    let theirs = json(&work.qemu_img("map --output json top.qcow2").succeeds().out());
    let ours = json(&work.vdisk("map --json top.qcow2").succeeds().out());
    let (theirs, ours) = (theirs.as_array().unwrap(), ours.as_array().unwrap());
    let mut pos = 0;
    for extent in ours {
        assert_eq!(extent["start"], pos);
        pos += extent["length"].as_u64().unwrap();
    }
    assert_eq!(pos, 4 << 20);
    for at in (0..4u64 << 20).step_by(2048) {
        let find = |all: &[serde_json::Value]| {
            let covers = |e: &&serde_json::Value| {
                let start = e["start"].as_u64().unwrap();
                (start..start + e["length"].as_u64().unwrap()).contains(&at)
            };
            all.iter().find(covers).unwrap().clone()
        };
        let (their, our) = (find(theirs), find(ours));
        assert_eq!(our["zero"], their["zero"], "{at}: {our} {their}");
        assert_eq!(our["data"], their["data"], "{at}: {our} {their}");
        assert_eq!(our["compressed"], their["compressed"], "{at}: {our} {their}");
        if our["data"] == true {
            assert_eq!(our["depth"], their["depth"], "{at}: {our} {their}");
        }
        if let (Some(a), Some(b)) = (our["offset"].as_u64(), their["offset"].as_u64())
            && our["data"] == true
        {
            let skip = |e: &serde_json::Value| at - e["start"].as_u64().unwrap();
            assert_eq!(a + skip(&our), b + skip(&their), "{at}: {our} {their}");
        }
    }
}

#[test]
fn compare_says_where_disks_differ_as_qemu_does() {
    if !have(Need::Qemu) {
        return;
    }
    let work = Work::new();
    work.vdisk("create a.qcow2 8M").succeeds();
    work.vdisk("create b.qcow2 9M").succeeds();
    work.vdisk("compare a.qcow2 b.qcow2").succeeds().says(&["size mismatch"]);
    work.vdisk("compare --strict a.qcow2 b.qcow2").ends(1);
    work.vdisk_fed("write b.qcow2 8500000", b"x").succeeds();
    let done = work.vdisk("compare a.qcow2 b.qcow2").ends(1);
    assert_eq!(done.out(), "Content mismatch at offset 8500000!\n");
    for at in [7_000_001, 6_000_000, 4_999_999, 3] {
        work.vdisk_fed(&format!("write a.qcow2 {at}"), b"y").succeeds();
        for (first, second) in [("a.qcow2", "b.qcow2"), ("b.qcow2", "a.qcow2")] {
            let report = work.vdisk(&format!("compare --json {first} {second}")).ends(1);
            let report = json(&report.out());
            assert_eq!(report["offset"], at);
            assert_eq!(report["identical"], false);
        }
        work.qemu_img("compare a.qcow2 b.qcow2").ends(1);
    }
    work.vdisk("compare a.qcow2 missing").ends(2).says(&["missing"]);
}

/// A file of under a megabyte made `map`, `tree` and `measure` walk for more than 25 seconds.
#[test]
fn a_small_image_that_maps_one_table_over_and_over_costs_little() {
    const L2: usize = 0x2_0000;
    const L1: usize = 0x3_0000;
    const ENTRIES: usize = 100_000;
    let mut image = vec![0u8; L1 + ENTRIES * 8];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &((ENTRIES as u64) << 29).to_be_bytes());
    put(36, &(ENTRIES as u32).to_be_bytes());
    put(40, &(L1 as u64).to_be_bytes());
    put(48, &0x1_0000u64.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    for n in 0..8192 {
        put(L2 + n * 8, &0x1_0000u64.to_be_bytes());
    }
    for n in 0..ENTRIES {
        put(L1 + n * 8, &(L2 as u64).to_be_bytes());
    }
    let work = Work::new();
    work.put("d.qcow2", image);
    for words in [
        "map d.qcow2",
        "tree d.qcow2",
        "info d.qcow2",
        "check d.qcow2",
        "qemu-img measure -O raw d.qcow2",
        "qemu-img map d.qcow2",
    ] {
        let begin = std::time::Instant::now();
        work.vdisk(words);
        assert!(begin.elapsed().as_secs() < 10, "{words} took {:?}", begin.elapsed());
    }
    work.vdisk("map d.qcow2").fails(&["share 1 L2 tables"]);
}
