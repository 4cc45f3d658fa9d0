//! The bodies of the fuzz targets over what is inside disks, with a seed: damaged file systems and archives, and
//! what the targets have found.

use std::io::Write;

use crate::dice::{Dice, rounds};
use crate::hostile::patiently;
use crate::{inside, mutation};

/// Damage as the targets read it.
fn damage(dice: &mut Dice) -> Vec<u8> {
    let records = 1 + dice.below(16) as usize;
    (0..2 + 8 * records).map(|_| dice.next() as u8).collect()
}

#[test]
fn damaged_file_systems_cost_neither_panic_nor_patience() {
    rounds(6, |dice| {
        let bytes = damage(dice);
        patiently(|| inside::filesystem(&bytes));
        patiently(|| inside::fat(&bytes));
    });
}

/// A file of exabytes: its end was looked for a block at a time, for ages, past all that a file can have.
#[test]
fn the_end_of_a_file_of_a_damaged_size_is_found() {
    let found = [
        0x01, 0x05, 0x45, 0x7c, 0x76, 0x9f, 0x39, 0xd8, 0x64, 0x41, 0x99, 0xc0, 0xe5, 0xbd, 0xbc,
        0xfb, 0xc8, 0x5b, 0x37, 0x32, 0x6e, 0x34, 0x25, 0x1f, 0xc1, 0xb0, 0xea, 0x6b, 0x44, 0xf1,
        0x30, 0x43, 0x6d, 0xd7, 0x29, 0xfe, 0x69, 0xbd, 0x9e, 0x8c, 0xeb, 0xa6, 0xa0, 0x7d, 0x1d,
        0xec, 0x25, 0xb1, 0xbd, 0xbc,
    ];
    patiently(|| inside::filesystem(&found));
}

/// Two tables of partitions: a boot record with a chain of extended ones, and a GPT.
fn tables() -> [Vec<u8>; 2] {
    let mut chain = vec![0; 16 << 10];
    for (record, next) in [(0usize, 8u32), (8, 4), (12, 8)] {
        let record = &mut chain[record * 512..][..512];
        record[446 + 4] = 0x83;
        record[446 + 8..][..8].copy_from_slice(&[1, 0, 0, 0, 4, 0, 0, 0]);
        record[462 + 4] = 5;
        record[462 + 8..][..4].copy_from_slice(&next.to_le_bytes());
        record[462 + 12] = 8;
        record[510..].copy_from_slice(&[0x55, 0xaa]);
    }
    let mut gpt = vec![0; 16 << 10];
    gpt[512..520].copy_from_slice(b"EFI PART");
    for (at, value) in [(12, 92u32), (72, 2), (80, 4), (84, 128)] {
        gpt[512 + at..][..4].copy_from_slice(&value.to_le_bytes());
    }
    gpt[1024..1040].fill(7);
    gpt[1024 + 32..][..16].copy_from_slice(&[8, 0, 0, 0, 0, 0, 0, 0, 15, 0, 0, 0, 0, 0, 0, 0]);
    [chain, gpt]
}

#[test]
fn damaged_partition_tables_cost_neither_panic_nor_patience() {
    let tables = tables();
    rounds(2, |dice| {
        let mut bytes = tables[dice.below(2) as usize].clone();
        mutation::scramble(&mut bytes, 1400, dice);
        patiently(|| inside::partitions(&bytes));
    });
}

/// A small archive with a file of each kind.
fn archive() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("dir")).unwrap();
    std::fs::write(at("dir/file"), [7; 3000]).unwrap();
    std::fs::hard_link(at("dir/file"), at("more")).unwrap();
    std::os::unix::fs::symlink("dir/file", at("link")).unwrap();
    std::fs::write(at(&"n".repeat(150)), "a long name").unwrap();
    std::fs::write(at("dir/.wh.gone"), "").unwrap();
    let mut tar = std::process::Command::new("tar");
    tar.args(["-cf", "-", "--format=pax", "-C"]).arg(dir.path()).arg(".");
    let out = tar.output().unwrap();
    assert!(out.status.success());
    out.stdout
}

#[test]
fn damaged_archives_cost_neither_panic_nor_patience() {
    let whole = archive();
    rounds(3, |dice| {
        let mut bytes = whole.clone();
        mutation::scramble(&mut bytes, whole.len(), dice);
        if dice.once_in(2) {
            bytes = summed(bytes);
        }
        if dice.once_in(4) {
            let mut packed = flate2::write::GzEncoder::new(Vec::new(), Default::default());
            packed.write_all(&bytes).unwrap();
            bytes = packed.finish().unwrap();
        }
        patiently(|| inside::archive(&bytes));
    });
}

/// The same with headers whose checksums are right.
fn summed(mut bytes: Vec<u8>) -> Vec<u8> {
    for header in bytes.chunks_exact_mut(512).filter(|header| &header[257..262] == b"ustar") {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    bytes
}
