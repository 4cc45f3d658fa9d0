//! Images that the real qemu-img makes here and now, random patterns in them.

use std::path::{Path, PathBuf};

use super::{difference, extents, flat, open_file, run};
use crate::image::Mapping;
use crate::require::{Need, have};

/// Formats and creation options that QEMU writes.
const KINDS: [(&str, &str); 23] = [
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
    ("vmdk", "subformat=streamOptimized"),
    ("vmdk", "subformat=monolithicFlat"),
    ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vmdk", "subformat=twoGbMaxExtentFlat"),
    ("vpc", "subformat=dynamic"),
    ("vpc", "subformat=fixed"),
    ("vpc", "subformat=dynamic,force_size=on"),
    ("vpc", "subformat=fixed,force_size=on"),
    ("vhdx", "subformat=dynamic"),
    ("vhdx", "subformat=fixed"),
    ("vhdx", "subformat=dynamic,block_size=1M,log_size=2M"),
    ("vhdx", "subformat=dynamic,block_state_zero=off,block_size=2M"),
    ("vdi", "static=off"),
    ("vdi", "static=on"),
    ("vdi", ""),
    ("vhdx", ""),
    ("qcow", ""),
    ("qed", ""),
    ("qed", "cluster_size=4k,table_size=2"),
    ("parallels", ""),
    ("parallels", "cluster_size=64k"),
];

struct Bed(tempfile::TempDir);

impl Bed {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A raw disk of `size` bytes with data scattered over it, the same for the same seed.
    fn raw(&self, size: usize, seed: u64) -> PathBuf {
        let mut state = seed;
        let mut random = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize
        };
        let mut disk = vec![0u8; size];
        for _ in 0..40 {
            let (at, len) = (random() % size, 1 + random() % 200_000);
            let end = size.min(at + len);
            let byte = random() as u8;
            disk[at..end].iter_mut().enumerate().for_each(|(i, b)| *b = byte ^ (i / 512) as u8);
        }
        disk[size - 700..].fill(0x77);
        let path = self.path("disk.raw");
        std::fs::write(&path, disk).unwrap();
        path
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn every_kind_of_image_that_qemu_converts_to_reads_back_the_same() {
    if !have(Need::Qemu) {
        return;
    }
    for (round, (format, options)) in KINDS.iter().enumerate() {
        let bed = Bed(tempfile::tempdir().unwrap());
        // Not whole clusters, blocks or chunks.
        let raw = bed.raw((9 << 20) + 512 * (1 + 7 * round), round as u64);
        let image = bed.path("image");
        let options = if options.is_empty() { "" } else { options };
        let mut args = vec!["convert", "-f", "raw", "-O", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([text(&raw), text(&image)]);
        run("qemu-img", &args);
        let ours = open_file(format, &image);
        let back = bed.path("back.raw");
        run("qemu-img", &["convert", "-f", format, "-O", "raw", text(&image), text(&back)]);
        let expected = std::fs::read(&back).unwrap();
        assert_eq!(ours.size(), expected.len() as u64, "{format} {options}");
        assert_eq!(difference(&flat(&*ours, &[]), &expected), None, "{format} {options}");
        let source = std::fs::read(&raw).unwrap();
        assert_eq!(difference(&expected[..source.len()], &source), None, "{format} {options}");
    }
}

#[test]
fn an_image_that_qemu_wrote_in_place_reads_the_same() {
    if !have(Need::Qemu) {
        return;
    }
    for (format, options) in KINDS {
        // Stream-optimised images are written once.
        if options.contains("streamOptimized") || options.is_empty() {
            continue;
        }
        let bed = Bed(tempfile::tempdir().unwrap());
        let image = bed.path("image");
        run("qemu-img", &["create", "-q", "-f", format, "-o", options, text(&image), "40M"]);
        for command in [
            "write -P 1 3M 100k",
            "write -P 2 17M 2M",
            "write -P 3 512 512",
            "write -z 17408k 512k",
            "write -P 4 39999k 3k",
            "discard 18M 1M",
        ] {
            // What a format cannot do it need not do: the contents are compared with its own view.
            let _ = run("qemu-io", &["-f", format, "-c", command, text(&image)]);
        }
        let back = bed.path("back.raw");
        run("qemu-img", &["convert", "-f", format, "-O", "raw", text(&image), text(&back)]);
        let ours = open_file(format, &image);
        let theirs = std::fs::read(&back).unwrap();
        assert_eq!(difference(&flat(&*ours, &[]), &theirs), None, "{format} {options}");
        assert!(theirs.contains(&4), "{format} {options}");
    }
}

#[test]
fn a_zeroed_grain_hides_the_parent_and_an_absent_one_does_not() {
    if !have(Need::Qemu) {
        return;
    }
    let bed = Bed(tempfile::tempdir().unwrap());
    let (base, delta) = (bed.path("base.vmdk"), bed.path("delta.vmdk"));
    run("qemu-img", &["create", "-q", "-f", "vmdk", text(&base), "4M"]);
    run("qemu-io", &["-f", "vmdk", "-c", "write -P 9 0 4M", text(&base)]);
    let options = "zeroed_grain=on";
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "vmdk",
            "-b",
            text(&base),
            "-F",
            "vmdk",
            "-o",
            options,
            text(&delta),
        ],
    );
    run(
        "qemu-io",
        &["-f", "vmdk", "-c", "write -P 7 1M 64k", "-c", "write -z 2M 256k", text(&delta)],
    );
    let ours = open_file("vmdk", &delta);
    let backing = ours.backing().unwrap();
    assert_eq!((backing.name.as_str(), backing.format.as_deref()), (text(&base), Some("vmdk")));
    let kinds: Vec<_> = extents(&*ours).unwrap().iter().map(|e| (e.len >> 10, e.mapping)).collect();
    assert!(
        matches!(
            kinds[..],
            [
                (1024, Mapping::Unallocated),
                (64, Mapping::Data { .. }),
                (960, Mapping::Unallocated),
                (256, Mapping::Zero { .. }),
                (1792, Mapping::Unallocated)
            ]
        ),
        "{kinds:?}"
    );
    let back = bed.path("back.raw");
    run("qemu-img", &["convert", "-f", "vmdk", "-O", "raw", text(&delta), text(&back)]);
    let below = flat(&*open_file("vmdk", &base), &[]);
    assert_eq!(difference(&flat(&*ours, &below), &std::fs::read(&back).unwrap()), None);
}

#[test]
fn contiguous_blocks_map_as_one_extent() {
    if !have(Need::Qemu) {
        return;
    }
    for (format, options, most) in [
        ("vmdk", "subformat=monolithicSparse", 1),
        ("vdi", "static=off", 1),
        ("vhdx", "block_size=1M", 1),
        // Each block's bitmap stands between it and the next.
        ("vpc", "force_size=on", 8),
    ] {
        let bed = Bed(tempfile::tempdir().unwrap());
        let image = bed.path("image");
        run("qemu-img", &["create", "-q", "-f", format, "-o", options, text(&image), "16M"]);
        run("qemu-io", &["-f", format, "-c", "write -P 5 0 16M", text(&image)]);
        let extents = extents(&*open_file(format, &image)).unwrap();
        assert!(extents.len() <= most, "{format}: {extents:?}");
    }
}

#[test]
fn a_disk_in_several_files_joins_at_their_borders() {
    if !have(Need::Qemu) {
        return;
    }
    let bed = Bed(tempfile::tempdir().unwrap());
    let image = bed.path("image.vmdk");
    let options = "subformat=twoGbMaxExtentSparse";
    run("qemu-img", &["create", "-q", "-f", "vmdk", "-o", options, text(&image), "5G"]);
    let border = "write -P 8 2147450880 64k";
    run("qemu-io", &["-f", "vmdk", "-c", border, "-c", "write -P 6 5368643584 64k", text(&image)]);
    let ours = open_file("vmdk", &image);
    assert_eq!(ours.size(), 5 << 30);
    let extents = extents(&*ours).unwrap();
    let data: Vec<_> =
        extents.iter().filter(|extent| matches!(extent.mapping, Mapping::Data { .. })).collect();
    // Grains of 64 KiB: half of one on each side of the border, one at the end.
    let places: Vec<_> = data.iter().map(|extent| (extent.start.0, extent.len)).collect();
    let border = 2u64 << 30;
    assert_eq!(places, [(border - 65536, 65536), (border, 65536), ((5 << 30) - 65536, 65536)]);
    for (extent, at, byte) in [(data[0], 32768, 8), (data[1], 0, 8), (data[2], 0, 6)] {
        let mut buf = [0u8; 32768];
        let from = extent.start + at;
        ours.read(extent, from, &mut [std::io::IoSliceMut::new(&mut buf)]).unwrap();
        assert!(buf.iter().all(|&b| b == byte), "{extent:?}");
    }
}

#[test]
fn the_largest_disks_open_and_map_at_once() {
    if !have(Need::Qemu) {
        return;
    }
    for (format, options, size) in [
        ("vhdx", "block_size=256M", 64u64 << 40),
        ("vhdx", "block_size=32M", 1 << 40),
        ("vpc", "force_size=on", 2040 << 30),
    ] {
        let bed = Bed(tempfile::tempdir().unwrap());
        let image = bed.path("image");
        let bytes = (size).to_string();
        run("qemu-img", &["create", "-q", "-f", format, "-o", options, text(&image), &bytes]);
        let last = format!("write -P 9 {} 512", size - 512);
        run("qemu-io", &["-f", format, "-c", &last, text(&image)]);
        let ours = open_file(format, &image);
        assert_eq!(ours.size(), size);
        let extents = extents(&*ours).unwrap();
        assert!(extents.len() < 20, "{format}: {} extents", extents.len());
        let data = extents.last().unwrap();
        let mut end = [0u8; 512];
        let at = crate::addr::GuestOffset(size - 512);
        ours.read(data, at, &mut [std::io::IoSliceMut::new(&mut end)]).unwrap();
        assert_eq!(end, [9; 512]);
    }
}
