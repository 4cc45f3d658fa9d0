//! What a layer remembers of the files of the one below it, which its label's ids alone cannot vouch
//! for. It is a record in the label; numbers are big-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0 | what the digest speaks for: 0 parts, 1 all contents |
//! | 1-7 | zero |
//! | 8-15 | length of the files in bytes |
//! | 16-23, 24-31 | when they were last written, and changed at all, in nanoseconds since 1970 |
//! | 32-47 | digest of their contents |

use byteorder::{BigEndian, ByteOrder};

/// Bytes of the record.
const LEN: usize = 48;

/// What is remembered of the files of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Witness {
    /// Their length in bytes, together.
    pub len: u64,
    /// When the last of them was written, in nanoseconds since 1970; 0 where the host does not say.
    pub modified: i64,
    /// When the last of them was changed at all, its name and owner included.
    pub changed: i64,
    /// Whether the digest speaks for all of the contents.
    pub whole: bool,
    /// Of the contents, or of parts of them.
    pub digest: [u8; 16],
}

impl Witness {
    pub(super) fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[0] = u8::from(self.whole);
        BigEndian::write_u64(&mut bytes[8..], self.len);
        BigEndian::write_i64(&mut bytes[16..], self.modified);
        BigEndian::write_i64(&mut bytes[24..], self.changed);
        bytes[32..].copy_from_slice(&self.digest);
        bytes
    }

    /// `None` for a record that a later version made otherwise.
    pub(super) fn decode(bytes: &[u8]) -> Option<Witness> {
        let bytes: &[u8; LEN] = bytes.try_into().ok()?;
        let mut digest = [0; 16];
        digest.copy_from_slice(&bytes[32..]);
        Some(Witness {
            len: BigEndian::read_u64(&bytes[8..]),
            modified: BigEndian::read_i64(&bytes[16..]),
            changed: BigEndian::read_i64(&bytes[24..]),
            whole: match bytes[0] {
                0 => false,
                1 => true,
                _ => return None,
            },
            digest,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_witness_survives_and_another_kind_is_none() {
        let witness = Witness { len: 5, modified: 6, changed: -7, whole: true, digest: [8; 16] };
        let mut bytes = witness.encode();
        assert_eq!(Witness::decode(&bytes), Some(witness));
        bytes[0] = 2;
        assert_eq!(Witness::decode(&bytes), None);
        assert_eq!(Witness::decode(&bytes[1..]), None);
    }
}
