//! The hashes of names by which large directories are sorted (kernel:
//! Documentation/filesystems/ext4/directory.rst).

/// A name's place among the others: the hash that the index knows, and one that tells names apart
/// which share it.
pub type Hash = (u32, u32);

/// The kind of hash that an index says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    version: u8,
    unsigned: bool,
}

impl Kind {
    /// The kind with that number; `None` for one that is not known here.
    pub fn new(number: u8, unsigned: bool) -> Option<Kind> {
        match number {
            0..=2 => Some(Kind { version: number, unsigned }),
            3..=5 => Some(Kind { version: number - 3, unsigned: true }),
            _ => None,
        }
    }
}

/// The hash of a name.
pub fn hash(name: &[u8], kind: Kind, seed: &[u32; 4]) -> Hash {
    const START: [u32; 4] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
    let mut state = if seed.iter().all(|word| *word == 0) { START } else { *seed };
    let (major, minor) = match kind.version {
        0 => (legacy(name, kind.unsigned), 0),
        1 => {
            for chunk in chunks(name, 32) {
                half_md4(&mut state, &words(chunk, kind.unsigned));
            }
            (state[1], state[2])
        }
        _ => {
            for chunk in chunks(name, 16) {
                tea(&mut state, &words(chunk, kind.unsigned));
            }
            (state[0], state[1])
        }
    };
    // The highest one says that a directory ends.
    let major = major & !1;
    (if major == 0x7fff_ffff << 1 { 0x7fff_fffe << 1 } else { major }, minor)
}

fn extended(byte: u8, unsigned: bool) -> u32 {
    if unsigned { byte.into() } else { i32::from(byte as i8) as u32 }
}

/// Pieces of a name with what is left of it at each; one where the name is empty.
fn chunks(name: &[u8], size: usize) -> impl Iterator<Item = &[u8]> {
    (0..name.len().max(1)).step_by(size).map(|at| name.get(at..).unwrap_or_default())
}

/// A piece of a name as words, filled up with its length.
fn words<const N: usize>(name: &[u8], unsigned: bool) -> [u32; N] {
    let len = name.len() as u32;
    let pad = len | len << 8;
    let pad = pad | pad << 16;
    let mut out = [pad; N];
    let name = name.get(..N * 4).unwrap_or(name);
    for (index, chunk) in name.chunks(4).enumerate() {
        let value = chunk
            .iter()
            .fold(pad, |value, byte| extended(*byte, unsigned).wrapping_add(value << 8));
        if let Some(word) = out.get_mut(index) {
            *word = value;
        }
    }
    out
}

fn legacy(name: &[u8], unsigned: bool) -> u32 {
    let (mut old, mut older) = (0x12a3_fe2d_u32, 0x37ab_e8f9_u32);
    for byte in name {
        let mixed = old ^ extended(*byte, unsigned).wrapping_mul(7_152_373);
        let next = older.wrapping_add(mixed);
        let next = if next & 0x8000_0000 != 0 { next.wrapping_sub(0x7fff_ffff) } else { next };
        (older, old) = (old, next);
    }
    old << 1
}

fn half_md4(state: &mut [u32; 4], input: &[u32; 8]) {
    const SECOND: u32 = 0x5a82_7999;
    const THIRD: u32 = 0x6ed9_eba1;
    let [mut a, mut b, mut c, mut d] = *state;
    let f = |x: u32, y: u32, z: u32| z ^ (x & (y ^ z));
    let g = |x: u32, y: u32, z: u32| (x & y).wrapping_add((x ^ y) & z);
    let h = |x: u32, y: u32, z: u32| x ^ y ^ z;
    let mut round =
        |order: [usize; 8], shifts: [u32; 4], k: u32, mix: &dyn Fn(u32, u32, u32) -> u32| {
            for (index, word) in order.into_iter().enumerate() {
                let sum = a.wrapping_add(mix(b, c, d)).wrapping_add(input[word].wrapping_add(k));
                let turned = sum.rotate_left(shifts[index % 4]);
                (a, b, c, d) = (d, turned, b, c);
            }
        };
    round([0, 1, 2, 3, 4, 5, 6, 7], [3, 7, 11, 19], 0, &f);
    round([1, 3, 5, 7, 0, 2, 4, 6], [3, 5, 9, 13], SECOND, &g);
    round([3, 7, 2, 6, 1, 5, 0, 4], [3, 9, 11, 15], THIRD, &h);
    for (word, more) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(more);
    }
}

fn tea(state: &mut [u32; 4], input: &[u32; 4]) {
    const DELTA: u32 = 0x9e37_79b9;
    let (mut one, mut two, mut sum) = (state[0], state[1], 0u32);
    let [a, b, c, d] = *input;
    for _ in 0..16 {
        sum = sum.wrapping_add(DELTA);
        let mix = |x: u32, p: u32, q: u32| {
            (x << 4).wrapping_add(p) ^ x.wrapping_add(sum) ^ (x >> 5).wrapping_add(q)
        };
        one = one.wrapping_add(mix(two, a, b));
        two = two.wrapping_add(mix(one, c, d));
    }
    state[0] = state[0].wrapping_add(one);
    state[1] = state[1].wrapping_add(two);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_that_other_tools_give() {
        let of = |name: &str, version| {
            hash(name.as_bytes(), Kind::new(version, false).unwrap(), &[0; 4])
        };
        assert_eq!(of("hello", 0), (0x3225_2546, 0));
        assert_eq!(of("hello", 1), (0x1746_da32, 0x4200_13b5));
        let long = "a-name-that-is-longer-than-thirty-two-bytes-in-all";
        assert_eq!(of(long, 1), (0x8202_a988, 0xa705_0da0));
        assert_eq!(of("hello-a-longer-name-than-sixteen", 2), (0x45a4_9cb0, 0x8a68_e0ae));
    }
}
