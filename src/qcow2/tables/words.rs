//! Tables of 64-bit big-endian entries, as L1, refcount and bitmap tables stand in the file.

use zerocopy::byteorder::big_endian::U64;
use zerocopy::{FromBytes, IntoBytes};

/// The entries that `bytes` hold; what is left at the end is none.
#[inline]
pub(in crate::qcow2) fn words(bytes: &[u8]) -> &[U64] {
    <[U64]>::ref_from_prefix(bytes).map_or(&[], |(words, _)| words)
}

/// The same, to be changed.
pub(in crate::qcow2) fn words_mut(bytes: &mut [u8]) -> &mut [U64] {
    <[U64]>::mut_from_prefix(bytes).map_or(&mut [], |(words, _)| words)
}

/// The entries as numbers.
pub(in crate::qcow2) fn decode(bytes: &[u8]) -> Vec<u64> {
    words(bytes).iter().map(|word| word.get()).collect()
}

/// The bytes of a table with these entries.
pub(in crate::qcow2) fn encode(entries: &[u64]) -> Vec<u8> {
    let words: Vec<U64> = entries.iter().copied().map(U64::new).collect();
    words.as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_that_are_cut_short_are_left_out() {
        let mut bytes = encode(&[1, 1 << 63, 7]);
        assert_eq!(bytes[7..9], [1, 0x80]);
        bytes.truncate(23);
        assert_eq!(decode(&bytes), [1, 1 << 63]);
        words_mut(&mut bytes)[1].set(5);
        assert_eq!((decode(&bytes), decode(&[])), (vec![1, 5], vec![]));
    }
}
