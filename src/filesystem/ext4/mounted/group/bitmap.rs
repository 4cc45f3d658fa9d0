//! Bits in blocks: set, cleared, and runs of free ones found.

use std::collections::HashMap;

/// Sets `len` bits from `start` on.
pub fn set(bitmap: &mut [u8], start: u64, len: u64) {
    let mut at = start as usize;
    let end = (start.saturating_add(len) as usize).min(bitmap.len() * 8);
    while at < end {
        if at.is_multiple_of(8) && end - at >= 8 {
            bitmap[at / 8] = 0xff;
            at += 8;
        } else {
            bitmap[at / 8] |= 1 << (at % 8);
            at += 1;
        }
    }
}

/// Clears `len` bits from `start` on; returns how many of them were set.
pub fn clear(bitmap: &mut [u8], start: u64, len: u64) -> u64 {
    let mut was = 0;
    let end = (start.saturating_add(len) as usize).min(bitmap.len() * 8);
    for at in start as usize..end {
        let bit = 1 << (at % 8);
        was += u64::from(bitmap[at / 8] & bit != 0);
        bitmap[at / 8] &= !bit;
    }
    was
}

/// Whether a bit is set.
pub fn is_set(bitmap: &[u8], at: u64) -> bool {
    bitmap.get(at as usize / 8).is_some_and(|byte| byte & 1 << (at % 8) != 0)
}

/// Blocks that were freed and are not free yet, by group.
pub type Freed = HashMap<u32, Vec<u8>>;

/// How freed blocks are kept from being given away.
pub struct Shadow;

impl Shadow {
    /// Remembers blocks of a group that were freed.
    pub fn note(freed: &mut Freed, group: u32, bits: usize, start: u64, len: u64) {
        set(freed.entry(group).or_insert_with(|| vec![0; bits / 8]), start, len);
    }
}

/// Which bits are not to be had.
pub struct Taken<'a> {
    /// What the file system says.
    pub bitmap: &'a [u8],
    /// What was freed of late.
    pub shadow: [Option<&'a Vec<u8>>; 2],
}

impl Taken<'_> {
    fn word(&self, index: usize) -> u64 {
        let one = |bytes: &[u8]| {
            let word = bytes.get(index * 8..index * 8 + 8).and_then(|word| word.try_into().ok());
            word.map(u64::from_le_bytes)
        };
        let shadow = self.shadow.iter().flatten().filter_map(|bytes| one(bytes));
        // What lies past the end is nobody's.
        shadow.fold(one(self.bitmap).unwrap_or(u64::MAX), |all, word| all | word)
    }

    /// A run of `want` free bits below `count`, the first from `from` on and then from the begin;
    /// the longest where none is that long. With `first`, whatever is free at `from` is taken.
    pub fn find(&self, from: u64, count: u64, want: u64, first: bool) -> Option<(u64, u64)> {
        let forward = self.scan(from, count, want, first);
        if from == 0 || forward.is_some_and(|(start, len)| len >= want || first && start == from) {
            return forward;
        }
        let behind = self.scan(0, from, want, false);
        match (forward, behind) {
            (Some(one), Some(other)) if other.1 > one.1 => Some(other),
            (None, other) => other,
            (one, _) => one,
        }
    }

    fn scan(&self, from: u64, to: u64, want: u64, first: bool) -> Option<(u64, u64)> {
        let mut best: Option<(u64, u64)> = None;
        let (mut at, mut start) = (from, None);
        while at < to {
            let (index, bit) = ((at / 64) as usize, at % 64);
            let word = self.word(index) >> bit;
            let left = (64 - bit).min(to - at);
            let free = u64::from(word.trailing_zeros()).min(left);
            if free > 0 {
                start.get_or_insert(at);
                at += free;
            }
            let run = start.map_or(0, |start| at - start);
            if let Some(begin) = start
                && (run >= want || free < left || at >= to)
            {
                if best.is_none_or(|(_, most)| run > most) {
                    best = Some((begin, run.min(want)));
                }
                if run >= want || first && begin == from {
                    return best;
                }
                start = None;
            }
            if free < left {
                let full = u64::from((word >> free).trailing_ones()).min(left - free);
                at += full;
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_where_a_plain_search_finds_them() {
        let mut seed = 5u64;
        for _ in 0..2000 {
            let mut map = [0u8; 32];
            for byte in &mut map {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let roll = (seed >> 33) as u8;
                *byte = match roll % 4 {
                    0 => 0,
                    1 => 0xff,
                    _ => (seed >> 41) as u8,
                };
            }
            let (from, want) = ((seed >> 20) % 250, (seed >> 30) % 40 + 1);
            let taken = Taken { bitmap: &map, shadow: [None, None] };
            let free = |at: u64| !is_set(&map, at);
            let run = |start: u64| (start..250).take_while(|at| free(*at)).count() as u64;
            let longest = (0..250).map(|at| run(at).min(want)).max().unwrap_or(0);
            match taken.find(from, 250, want, false) {
                None => assert_eq!(longest, 0),
                Some((start, len)) => {
                    assert!((start..start + len).all(free) && len <= want);
                    // A run that goes over the place where the search begins may be seen in two.
                    let cut = (0..250).map(|at| run(at).min(want));
                    let cut = cut.enumerate().map(|(at, len)| {
                        if (at as u64) < from { len.min(from - at as u64) } else { len }
                    });
                    assert_eq!(len, cut.max().unwrap_or(0));
                }
            }
        }
    }

    #[test]
    fn bits_are_set_and_cleared_and_a_shadow_counts() {
        let mut map = vec![0; 16];
        set(&mut map, 3, 70);
        assert!(!is_set(&map, 2) && is_set(&map, 3) && is_set(&map, 72) && !is_set(&map, 73));
        assert_eq!(clear(&mut map, 0, 10), 7);
        let shadow = vec![0xff; 8];
        let taken = Taken { bitmap: &map, shadow: [Some(&shadow), None] };
        assert_eq!(taken.find(0, 128, 4, true), Some((73, 4)));
    }
}
