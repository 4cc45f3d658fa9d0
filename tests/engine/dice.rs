//! Seeded randomness and the size of random tests.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A small generator (splitmix64): the same seed, the same run, on every machine.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// The seed of this run: `VDISK_SEED`, the clock's where that says `fresh`, or always the same.
pub fn seed() -> u64 {
    match std::env::var("VDISK_SEED") {
        Ok(text) if text == "fresh" => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            Dice::new(now.as_nanos() as u64).next()
        }
        Ok(text) => {
            let text = text.trim();
            let hex = text.strip_prefix("0x").map(|hex| u64::from_str_radix(hex, 16));
            hex.unwrap_or_else(|| text.parse()).expect("VDISK_SEED is a number")
        }
        Err(_) => 20_261_121,
    }
}

/// How long a random test goes on.
pub struct Budget {
    cases: Option<u64>,
    until: Instant,
}

impl Budget {
    /// `VDISK_PROPTEST_CASES` cases, or as many as fit into `seconds`.
    pub fn new(seconds: u64) -> Budget {
        let cases = std::env::var("VDISK_PROPTEST_CASES").ok();
        Budget {
            cases: cases.map(|n| n.parse().expect("VDISK_PROPTEST_CASES is a number")),
            until: Instant::now() + Duration::from_secs(seconds),
        }
    }

    /// Whether case number `done`, from 0, is to be run.
    pub fn goes_on(&self, done: u64) -> bool {
        match self.cases {
            Some(cases) => done < cases,
            None => done == 0 || Instant::now() < self.until,
        }
    }
}

/// Operations on disks and trees that the random tests of this process have done.
static OPERATIONS: AtomicU64 = AtomicU64::new(0);

/// Counts one operation.
pub fn operation() {
    OPERATIONS.fetch_add(1, Ordering::Relaxed);
}

/// Says what a random test did.
pub fn say_done(rounds: u64, seed: u64) {
    let operations = OPERATIONS.load(Ordering::Relaxed);
    eprintln!(
        "{rounds} rounds, VDISK_SEED={seed:#x}\n{operations} operations so far, by all tests"
    );
}

/// Runs `one` with a seed of its own each time, for some seconds: a failure is run again alone.
pub fn rounds(seconds: u64, mut one: impl FnMut(&mut Dice)) {
    let seed = seed();
    let budget = Budget::new(seconds);
    let mut done = 0;
    while budget.goes_on(done) {
        let seed = if done == 0 { seed } else { seed.wrapping_add(done) };
        let _confess = Confess(seed);
        one(&mut Dice::new(seed));
        done += 1;
    }
    say_done(done, seed);
}

/// Says the seed when the test panics.
pub struct Confess(pub u64);

impl Drop for Confess {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("to run this again: VDISK_SEED={:#x}", self.0);
        }
    }
}
