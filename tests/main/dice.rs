//! Random numbers, paths and bytes for calls on files, few enough of each that calls meet.

use std::path::PathBuf;

/// Random numbers that a seed repeats.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// From a seed.
    pub fn new(seed: u64) -> Dice {
        let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..4 {
            dice.next();
        }
        dice
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// One below `most`.
    pub fn below(&mut self, most: u64) -> u64 {
        (self.next() >> 16) % most
    }

    /// Whether one of `of` comes.
    pub fn one_in(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }

    /// One of these.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }

    /// A path of one to four names, of few: so that it often leads somewhere.
    pub fn path(&mut self) -> PathBuf {
        const NAMES: [&str; 7] = ["a", "b", "c", "d", "e", "fil\u{e9} x", "g"];
        let depth = 1 + self.below(8).saturating_sub(4).min(3);
        (0..depth).map(|_| *self.pick(&NAMES)).collect()
    }

    pub fn offset(&mut self) -> u64 {
        match self.below(4) {
            0 => self.below(100),
            1 => self.below(20) * 4096,
            2 => self.below(70_000),
            _ => self.below(5) * 65536,
        }
    }

    pub fn bytes(&mut self) -> Vec<u8> {
        let len = match self.below(4) {
            0 => self.below(20),
            1 => 4096,
            2 => self.below(9000),
            _ => self.below(300_000),
        };
        let byte = self.next() as u8;
        (0..len).map(|i| byte.wrapping_add((i / 7) as u8)).collect()
    }

    pub fn mode(&mut self) -> u32 {
        *self.pick(&[0o644, 0o600, 0o755, 0o444, 0o4755, 0o2755, 0o2644, 0o777, 0o1777, 0o700, 0])
    }
}
