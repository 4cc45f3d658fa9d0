//! The entries of a directory: short names, and the long ones that stand before them.

use std::char::{REPLACEMENT_CHARACTER, decode_utf16};

/// Length in bytes of an entry.
pub const LEN: usize = 32;

const FREE: u8 = 0xe5;
const VOLUME: u8 = 0x08;
const DIRECTORY: u8 = 0x10;
/// The attributes of a part of a long name.
const LONG: u8 = 0x0f;
/// Set in the number of a long name's last part, which stands first.
const LAST: u8 = 0x40;
/// Parts of a long name, of 13 units each.
const MOST_PARTS: u8 = 20;

/// A file or directory as its directory has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its long name, or else its short one.
    pub name: String,
    short: String,
    /// Whether it is a directory.
    pub is_directory: bool,
    /// Its first cluster.
    pub cluster: u32,
    /// In bytes.
    pub size: u32,
}

impl Entry {
    /// Whether this is one of its names.
    pub fn is_called(&self, name: &str) -> bool {
        [&self.name, &self.short].iter().any(|own| own.to_lowercase() == name.to_lowercase())
    }
}

/// The parts of a long name that were seen so far, and of which short name they say they are.
#[derive(Default)]
struct Long {
    units: Vec<u16>,
    /// The number of the part that comes next.
    next: u8,
    sum: u8,
}

impl Long {
    fn add(&mut self, raw: &[u8; LEN]) {
        let (number, sum) = (raw[0] & !LAST, raw[13]);
        let begins = raw[0] & LAST != 0;
        if number == 0 || number > MOST_PARTS || !begins && (self.next, self.sum) != (number, sum) {
            *self = Long::default();
            return;
        }
        if begins {
            self.units.clear();
        }
        let pair = |at: &usize| u16::from_le_bytes([raw[*at], raw[*at + 1]]);
        let places = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];
        let part: Vec<u16> = places.iter().map(pair).collect();
        // The last part is seen first.
        self.units.splice(0..0, part);
        (self.next, self.sum) = (number - 1, sum);
    }

    /// The name, if all of it was seen and it is that of this short one.
    fn name(&self, short: &[u8; 11]) -> Option<String> {
        let sum = short.iter().fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
        if self.units.is_empty() || self.next != 0 || self.sum != sum {
            return None;
        }
        let units = self.units.iter().copied().take_while(|unit| *unit != 0);
        Some(decode_utf16(units).map(|c| c.unwrap_or(REPLACEMENT_CHARACTER)).collect())
    }
}

/// The entries in a directory's bytes, but for itself and the one above.
pub fn entries(bytes: &[u8]) -> Vec<Entry> {
    let (mut found, mut long) = (Vec::new(), Long::default());
    for raw in bytes.as_chunks::<LEN>().0 {
        match (raw[0], raw[11]) {
            (0, _) => break,
            (FREE, _) => long = Long::default(),
            (_, attributes) if attributes & 0x3f == LONG => long.add(raw),
            (_, attributes) if attributes & VOLUME != 0 => long = Long::default(),
            _ => {
                let long = std::mem::take(&mut long);
                found.extend(entry(raw, &long));
            }
        }
    }
    found
}

fn entry(raw: &[u8; LEN], long: &Long) -> Option<Entry> {
    let name = raw.first_chunk::<11>()?;
    let short = short(name, raw[12]);
    if short == "." || short == ".." {
        return None;
    }
    let word = |at: usize| u32::from(u16::from_le_bytes([raw[at], raw[at + 1]]));
    let name = long.name(name).unwrap_or_else(|| short.clone());
    // What no file can be called leads nowhere.
    (!name.is_empty() && !name.contains(['/', '\0'])).then(|| Entry {
        name,
        short,
        is_directory: raw[11] & DIRECTORY != 0,
        cluster: word(20) << 16 | word(26),
        size: word(28) | word(30) << 16,
    })
}

/// A short name as it is written, in the case that Windows NT notes beside it.
fn short(raw: &[u8; 11], case: u8) -> String {
    let part = |bytes: &[u8], is_lower: bool| {
        let text = String::from_utf8_lossy(bytes).trim_end_matches(' ').to_owned();
        if is_lower { text.to_ascii_lowercase() } else { text }
    };
    let mut raw = *raw;
    if raw[0] == 0x05 {
        // Else it would be a free entry.
        raw[0] = FREE;
    }
    let (base, extension) = raw.split_at(8);
    let (base, extension) = (part(base, case & 0x08 != 0), part(extension, case & 0x10 != 0));
    if extension.is_empty() { base } else { format!("{base}.{extension}") }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// An entry with a short name.
    pub fn entry(name: &[u8; 11], attributes: u8, cluster: u16, size: u32) -> [u8; LEN] {
        let mut raw = [0; LEN];
        raw[..11].copy_from_slice(name);
        raw[11] = attributes;
        raw[26..28].copy_from_slice(&cluster.to_le_bytes());
        raw[28..].copy_from_slice(&size.to_le_bytes());
        raw
    }

    #[test]
    fn short_names_have_their_case_and_special_entries_are_left_out() {
        let mut lower = entry(b"VMLINUZ    ", 0x20, 7, 9);
        lower[12] = 0x08;
        let bytes = [
            entry(b"ESP        ", 0x08, 0, 0),
            entry(b".          ", 0x10, 3, 0),
            entry(b"..         ", 0x10, 0, 0),
            entry(b"\xe5ONE    TXT", 0x20, 5, 1),
            lower,
            entry(b"INITRD  IMG", 0x20, 8, 10),
            [0; LEN],
            entry(b"BEHIND  END", 0x20, 8, 10),
        ];
        let found = entries(&bytes.concat());
        let names: Vec<_> = found.iter().map(|e| (e.name.as_str(), e.cluster, e.size)).collect();
        assert_eq!(names, [("vmlinuz", 7, 9), ("INITRD.IMG", 8, 10)]);
        assert!(found[1].is_called("initrd.img") && !found[1].is_called("initrd"));
    }

    #[test]
    fn a_long_name_counts_where_it_is_whole_and_of_its_short_one() {
        let short = entry(b"VMLIN~1    ", 0x20, 2, 1);
        let sum = short[..11].iter().fold(0u8, |sum, b| sum.rotate_right(1).wrapping_add(*b));
        let parts = |sum: u8| {
            let units: Vec<u16> = "vmlinuz-6.1.0-37".encode_utf16().chain([0]).collect();
            let part = |number: u8, units: &[u16]| {
                let mut raw = [0xff; LEN];
                (raw[0], raw[11], raw[12], raw[13], raw[26], raw[27]) =
                    (number, LONG, 0, sum, 0, 0);
                let places = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];
                for (at, unit) in places.into_iter().zip(units) {
                    raw[at..at + 2].copy_from_slice(&unit.to_le_bytes());
                }
                raw
            };
            [part(2 | LAST, &units[13..]), part(1, &units[..13])]
        };
        let of = |entries: &[[u8; LEN]]| super::entries(&entries.concat())[0].name.clone();
        let [last, first] = parts(sum);
        assert_eq!(of(&[last, first, short]), "vmlinuz-6.1.0-37");
        assert_eq!(of(&[last, short]), "VMLIN~1");
        assert_eq!(of(&[first, last, short]), "VMLIN~1");
        let [last, first] = parts(sum ^ 1);
        assert_eq!(of(&[last, first, short]), "VMLIN~1");
    }
}
