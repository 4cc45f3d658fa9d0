//! Damage where it hurts: in the numbers of headers, tables and extensions.

use crate::dice::Dice;

/// The bits of a table entry that hold an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The number at `at`; 0 past the end.
pub fn get(file: &[u8], at: u64) -> u64 {
    let bytes = usize::try_from(at).ok().and_then(|at| file.get(at..at.checked_add(8)?));
    bytes.map_or(0, |b| b.try_into().map_or(0, u64::from_be_bytes))
}

/// Writes bytes, as far as they lie inside.
pub fn put(file: &mut [u8], at: u64, value: &[u8]) {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    if let Some(bytes) = at.checked_add(value.len()).and_then(|end| file.get_mut(at..end)) {
        bytes.copy_from_slice(value);
    }
}

/// Where an image keeps what, as far as a mutation cares.
struct Places {
    cluster: u64,
    l1: u64,
    l1_entries: u64,
    refcount_table: u64,
    snapshots: u64,
}

impl Places {
    fn of(file: &[u8]) -> Places {
        Places {
            cluster: 1 << (get(file, 16) & 31),
            l1: get(file, 40),
            l1_entries: (get(file, 32) & 0xffff_ffff).max(1),
            refcount_table: get(file, 48),
            snapshots: get(file, 64),
        }
    }

    /// The data of a header extension, by its magic.
    fn extension(file: &[u8], magic: u64) -> Option<u64> {
        let mut at = if get(file, 0) as u32 == 2 { 72 } else { get(file, 96) & 0xffff_ffff };
        for _ in 0..16 {
            let head = get(file, at);
            if head >> 32 == magic {
                return Some(at.saturating_add(8));
            }
            at = at.saturating_add(8).saturating_add((head & 0xffff_ffff).next_multiple_of(8));
        }
        None
    }

    /// The place of some number in some structure of the file.
    fn some(&self, file: &[u8], dice: &mut Dice) -> u64 {
        let within = |dice: &mut Dice| dice.below(self.cluster) / 8 * 8;
        let l1 = self.l1.wrapping_add(dice.below(self.l1_entries) * 8);
        let l2 = get(file, l1) & OFFSET;
        match dice.below(14) {
            0..3 => dice.pick(&[4, 8, 16, 20, 24, 32, 36, 40, 48, 56, 60, 64, 72, 80, 88, 96, 100]),
            3 => 104 + dice.below(512),
            4 => l1,
            5..8 => l2.wrapping_add(within(dice)),
            8 => self.refcount_table.wrapping_add(dice.below(8) * 8),
            9 => (get(file, self.refcount_table) & OFFSET).wrapping_add(within(dice)),
            10 => self.snapshots.wrapping_add(dice.below(40) * 8),
            // An L2 entry of a snapshot.
            11 => {
                let l1 = get(file, self.snapshots);
                (get(file, l1) & OFFSET).wrapping_add(within(dice))
            }
            12 => match Places::extension(file, 0x2385_2875) {
                Some(at) if dice.once_in(2) => at.wrapping_add(dice.below(24)),
                Some(at) => {
                    let directory = get(file, at.wrapping_add(16));
                    let table = get(file, directory);
                    dice.pick(&[directory, directory, table]).wrapping_add(dice.below(12) * 4)
                }
                None => dice.below(file.len() as u64),
            },
            _ => match Places::extension(file, 0x0537_be77) {
                Some(at) => get(file, at).wrapping_add(dice.below(600)),
                None => dice.below(file.len() as u64),
            },
        }
    }
}

/// Damages an image in one to four places.
pub fn mutate(file: &mut Vec<u8>, dice: &mut Dice) {
    let places = Places::of(file);
    for _ in 0..1 + dice.below(4) {
        let at = places.some(file, dice);
        let cluster =
            dice.below(file.len() as u64 / places.cluster + 2).wrapping_mul(places.cluster);
        let value = match dice.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => cluster | 1 << 63,
            3 => cluster,
            4 => dice.next(),
            5 => 1 << dice.below(64),
            6 => cluster | 1 << 62 | dice.next() << 54,
            _ => get(file, at) ^ 1 << dice.below(64),
        };
        match dice.below(4) {
            0 => put(file, at, &value.to_be_bytes()[4..]),
            1 => put(file, at, &value.to_be_bytes()[6..]),
            _ => put(file, at, &value.to_be_bytes()),
        }
    }
    if dice.once_in(6) {
        file.truncate(dice.below(file.len() as u64 + 1) as usize);
    }
}

/// Damages bytes of any format: flips, edges, numbers, and the end cut off.
pub fn scramble(bytes: &mut Vec<u8>, area: usize, dice: &mut Dice) {
    for _ in 0..1 + dice.below(6) {
        let at = dice.below(area.min(bytes.len()).max(1) as u64) as usize;
        let value = dice.next().to_le_bytes();
        let edge = dice.pick(&[0, 1, 0x7f, 0x80, 0xff]);
        let many = dice.pick(&[1, 1, 4, 8]);
        for (i, byte) in bytes.iter_mut().skip(at).take(many).enumerate() {
            *byte = if dice.once_in(2) { edge } else { *byte ^ value[i] & value[7 - i] };
        }
    }
    if dice.once_in(10) {
        bytes.truncate(dice.below(bytes.len() as u64 + 1) as usize);
    }
}
