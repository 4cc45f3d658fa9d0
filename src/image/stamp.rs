//! What a layer remembers of the files of the one below it, which its label's ids alone cannot vouch
//! for. It is a record in the label; numbers are big-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0 | what the digest speaks for: 0 parts, 1 all contents |
//! | 1 | whether the layer below says of itself what its files look like after vdisk changed them: 0, 1 |
//! | 2-7 | zero |
//! | 8-15 | length of the files in bytes |
//! | 16-23, 24-31 | when they were last written, and changed at all, in nanoseconds since 1970 |
//! | 32-47 | digest of their contents |

use zerocopy::byteorder::big_endian::{I64, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The record's bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Record {
    whole: u8,
    follows: u8,
    zero: [u8; 6],
    len: U64,
    modified: I64,
    changed: I64,
    digest: [u8; 16],
}

const _: () = assert!(size_of::<Record>() == 48);

/// What is remembered of the files of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BaseStamp {
    /// Their length in bytes, together.
    pub len: u64,
    /// When the last of them was written, in nanoseconds since 1970; 0 where the host does not say.
    pub modified: i64,
    /// When the last of them was changed at all, its name and owner included.
    pub changed: i64,
    /// Whether the digest speaks for all of the contents.
    pub whole: bool,
    /// Whether the layer's own label says what its files look like, since before this was taken:
    /// what vdisk changes in them without changing what they show is known by that.
    pub follows: bool,
    /// Of the contents, or of parts of them.
    pub digest: [u8; 16],
}

impl BaseStamp {
    pub(super) fn encode(&self) -> Vec<u8> {
        let record = Record {
            whole: self.whole.into(),
            follows: self.follows.into(),
            zero: [0; 6],
            len: self.len.into(),
            modified: self.modified.into(),
            changed: self.changed.into(),
            digest: self.digest,
        };
        record.as_bytes().to_vec()
    }

    /// `None` for a record that a later version made otherwise.
    pub(super) fn decode(bytes: &[u8]) -> Option<BaseStamp> {
        let record = Record::ref_from_bytes(bytes).ok()?;
        Some(BaseStamp {
            len: record.len.get(),
            modified: record.modified.get(),
            changed: record.changed.get(),
            whole: match record.whole {
                0 => false,
                1 => true,
                _ => return None,
            },
            follows: record.follows == 1,
            digest: record.digest,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_survives_and_another_kind_is_none() {
        let stamp = BaseStamp {
            len: 5,
            modified: 6,
            changed: -7,
            whole: true,
            follows: true,
            digest: [8; 16],
        };
        let mut bytes = stamp.encode();
        assert_eq!(BaseStamp::decode(&bytes), Some(stamp));
        bytes[0] = 2;
        assert_eq!(BaseStamp::decode(&bytes), None);
        assert_eq!(BaseStamp::decode(&bytes[1..]), None);
    }
}
