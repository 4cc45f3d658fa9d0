//! File systems as an attacker, or a broken disk, would make them: an error or an answer, never a
//! panic, a hang or a huge allocation.

use super::compare::compare;
use super::{Ext4, Moments};
use crate::error::Result;
use crate::filesystem::ram::Ram;

const BLOCK: usize = 1024;
const BLOCKS: usize = 64;

/// Numbers that look random, from a seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.roll() % end
    }

    /// Mostly a number that makes sense.
    fn near(&mut self, end: u64) -> u64 {
        if self.below(300) == 0 { self.roll() } else { self.below(end) }
    }
}

fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
    disk[at..at + bytes.len()].copy_from_slice(bytes);
}

fn inode(disk: &mut [u8], number: usize, dice: &mut Dice) {
    let at = 4 * BLOCK + (number - 1) * 256;
    let mode: u16 = match dice.below(4) {
        _ if number == 2 => 0x4000,
        _ if number == 8 => 0x8000,
        0 | 1 => 0x4000,
        2 => 0x8000,
        _ => 0xa000,
    };
    put(disk, at, &(mode | 0o644).to_le_bytes());
    let size = if number == 8 { 16 << 10 } else { dice.near(8 << 10) };
    put(disk, at + 4, &(size as u32).to_le_bytes());
    put(disk, at + 0x6c, &((size >> 32) as u32).to_le_bytes());
    let flags: u32 = [0x8_0000, 0x8_0000, 0x8_0000, 0, 0x1000_0000][dice.below(5) as usize];
    put(disk, at + 0x20, &flags.to_le_bytes());
    put(disk, at + 0x80, &32u16.to_le_bytes());
    if flags == 0x8_0000 {
        let depth = if dice.below(4) == 0 { dice.near(6) as u16 } else { 0 };
        for (place, value) in [(0x28, 0xf30a), (0x2a, dice.near(5) as u16), (0x2e, depth)] {
            put(disk, at + place, &value.to_le_bytes());
        }
        for entry in 0..4 {
            let at = at + 0x34 + entry * 12;
            put(disk, at, &(dice.near(16) as u32).to_le_bytes());
            put(disk, at + 4, &(dice.near(9) as u16).to_le_bytes());
            put(disk, at + 6, &0u16.to_le_bytes());
            put(disk, at + 8, &(12u64.wrapping_add(dice.near(28)) as u32).to_le_bytes());
        }
    } else {
        for entry in 0..15 {
            put(
                disk,
                at + 0x28 + entry * 4,
                &(12u64.wrapping_add(dice.near(28)) as u32).to_le_bytes(),
            );
        }
    }
}

fn directory(block: &mut [u8], dice: &mut Dice) {
    let mut at = 0;
    while at + 12 <= block.len() {
        let len = (12 + 4 * dice.below(8) as usize).min(block.len() - at);
        let len = if dice.below(600) == 0 { dice.roll() as usize & 0xffff } else { len };
        put(block, at, &(dice.near(33) as u32).to_le_bytes());
        put(block, at + 4, &(len as u16).to_le_bytes());
        block[at + 6] = dice.near(5) as u8;
        (8..12).for_each(|place| block[at + place] = b'a' + dice.below(8) as u8);
        at += len.max(12);
    }
}

/// A journal with descriptors, revocations and commits in some order.
fn journal(disk: &mut [u8], first: usize, dice: &mut Dice) {
    let mut head = |block: usize, kind: u32, sequence: u32| {
        let at = (first + block) * BLOCK;
        for (place, value) in [(0, 0xc03b_3998u32), (4, kind), (8, sequence)] {
            put(disk, at + place, &value.to_be_bytes());
        }
    };
    let kinds: Vec<u32> = (1..16).map(|_| [1, 1, 5, 2, 9][dice.below(5) as usize]).collect();
    head(0, 4, 0);
    kinds.iter().enumerate().for_each(|(n, kind)| head(n + 1, *kind, 7));
    let at = first * BLOCK;
    let fields = [
        (0xc, BLOCK as u64),
        (0x10, dice.near(17)),
        (0x14, dice.near(3)),
        (0x18, 7),
        (0x1c, dice.near(16)),
        (0x28, [0, 0x2, 0x12, 0x10, 0x8, 0x20][dice.below(6) as usize]),
    ];
    for (place, value) in fields {
        put(disk, at + place, &(value as u32).to_be_bytes());
    }
}

fn disk(dice: &mut Dice) -> Vec<u8> {
    let mut disk: Vec<u8> = (0..BLOCK * BLOCKS).map(|_| dice.roll() as u8).collect();
    disk[1024..2048].fill(0);
    let recover = if dice.below(2) == 0 { 0x4 } else { 0 };
    let fields: [(usize, u32); 10] = [
        (0x0, 32),
        (0x4, dice.near(BLOCKS as u64 + 8) as u32),
        (0x14, 1),
        (0x20, 8192),
        (0x28, 32),
        (0x4c, 1),
        (0x58, 256),
        (0x60, 0x42 | recover),
        (0xe0, 8),
        (0x104, 0),
    ];
    fields.iter().for_each(|(at, value)| put(&mut disk, 1024 + at, &value.to_le_bytes()));
    put(&mut disk, 1024 + 0x38, &0xef53u16.to_le_bytes());
    put(&mut disk, 2048 + 8, &4u32.to_le_bytes());
    (1..=32).for_each(|number| inode(&mut disk, number, dice));
    for block in 12..40 {
        directory(&mut disk[block * BLOCK..(block + 1) * BLOCK], dice);
    }
    journal(&mut disk, 40, dice);
    // The journal's inode is sound.
    let at = 4 * BLOCK + 7 * 256;
    put(&mut disk, at + 0x20, &0x8_0000u32.to_le_bytes());
    let root = [0x0a, 0xf3, 1, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 40, 0, 0, 0];
    put(&mut disk, at + 0x28, &root);
    disk
}

fn walk(before: &Ram, after: &Ram, steps: &std::cell::Cell<u32>) -> Result<usize> {
    let stop = || {
        steps.set(steps.get() + 1);
        steps.get() > 200_000
    };
    let (before, after) =
        (Ext4::open(before, 0, u64::MAX, &stop)?, Ext4::open(after, 0, u64::MAX, &stop)?);
    let moments = Moments { before: &before, after: &after, written: &|_, _| true };
    Ok(compare(&moments)?.len())
}

#[test]
fn no_file_system_makes_the_walk_panic_or_last() {
    let (mut walked, mut found, mut longest) = (0, 0, 0);
    for seed in 1..=4000 {
        let mut dice = Dice(seed);
        let (one, mut two) = (disk(&mut dice), disk(&mut dice));
        if dice.below(2) == 0 {
            // Nearly the same one.
            two = one.clone();
            (0..8).for_each(|_| two[dice.below((BLOCKS * BLOCK) as u64) as usize] ^= 1);
        }
        let steps = std::cell::Cell::new(0);
        if let Ok(rows) = walk(&Ram(one), &Ram(two), &steps) {
            (walked, found) = (walked + 1, found + rows);
        }
        longest = longest.max(steps.get());
    }
    eprintln!("{walked} walked to the end, {found} files differ, {longest} steps at most");
    assert!(walked > 40 && found > 40, "the test reaches nothing");
}
