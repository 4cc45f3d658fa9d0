//! Anti-forensic splitting: a key spread over many stripes, all of which are needed to have it
//! back. Section 2.4 of the specification.

use zeroize::Zeroizing;

use super::hash::Hash;

/// Spreads `key` over `stripes`, which hold random bytes: as many times the key's length as there
/// are stripes. The last one becomes what makes the merge yield the key.
pub(super) fn split(hash: Hash, key: &[u8], stripes: &mut [u8]) {
    let Some(before) = stripes.len().checked_sub(key.len()) else { return };
    let (random, last) = stripes.split_at_mut(before);
    let mixed = mix(hash, random, key.len());
    last.iter_mut().zip(mixed.iter().zip(key)).for_each(|(to, (a, b))| *to = a ^ b);
}

/// The key of `len` bytes that was spread over `stripes`.
pub(super) fn merge(hash: Hash, stripes: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
    let (random, last) = stripes.split_at(stripes.len().saturating_sub(len));
    let mut key = mix(hash, random, len);
    xor(&mut key, last);
    key
}

fn mix(hash: Hash, stripes: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
    let mut mixed = Zeroizing::new(vec![0; len]);
    for stripe in stripes.chunks_exact(len) {
        xor(&mut mixed, stripe);
        diffuse(hash, &mut mixed);
    }
    mixed
}

/// Every bit of the result depends on every bit of its part: hashes of numbered parts.
fn diffuse(hash: Hash, block: &mut [u8]) {
    for (number, part) in block.chunks_mut(hash.len()).enumerate() {
        let before = Zeroizing::new(part.to_vec());
        hash.digest(&[&(number as u32).to_be_bytes(), &before], part);
    }
}

fn xor(to: &mut [u8], from: &[u8]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to ^= from);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_key_comes_back_and_one_changed_stripe_loses_it() {
        let key: Vec<u8> = (0..50).collect();
        let mut stripes: Vec<u8> = (0..50 * 7).map(|i| (i * i) as u8).collect();
        split(Hash::Sha1, &key, &mut stripes);
        assert_eq!(*merge(Hash::Sha1, &stripes, 50), key);
        stripes[3] ^= 1;
        assert_ne!(*merge(Hash::Sha1, &stripes, 50), key);
    }
}
