//! GUIDs as Microsoft's structures hold them: the first three groups are little-endian.

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A GUID as it stands in a file.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(transparent)]
pub struct RawGuid([u8; 16]);

impl From<RawGuid> for Guid {
    fn from(raw: RawGuid) -> Guid {
        Guid::from_bytes(raw.0)
    }
}

impl From<Guid> for RawGuid {
    fn from(guid: Guid) -> RawGuid {
        RawGuid(guid.to_bytes())
    }
}

/// A GUID; its number reads like its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guid(pub u128);

impl Guid {
    /// The GUID that stands in a file as `bytes`.
    pub fn from_bytes(bytes: [u8; 16]) -> Guid {
        let mut b = bytes;
        b[..4].reverse();
        b[4..6].reverse();
        b[6..8].reverse();
        Guid(u128::from_be_bytes(b))
    }

    /// A new one.
    pub fn random() -> Guid {
        Guid(uuid::Uuid::new_v4().as_u128())
    }

    /// Its bytes as they stand in a file.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut b = self.0.to_be_bytes();
        b[..4].reverse();
        b[4..6].reverse();
        b[6..8].reverse();
        b
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.0;
        write!(
            f,
            "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
            n >> 96,
            n >> 80 & 0xffff,
            n >> 64 & 0xffff,
            n >> 48 & 0xffff,
            n & 0xffff_ffff_ffff
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guid_reads_like_its_text() {
        let bytes = [
            0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd,
            0x4a, 0x08,
        ];
        let guid = Guid::from_bytes(bytes);
        assert_eq!(guid.to_bytes(), bytes);
        assert_eq!(guid.to_string(), "2dc27766-f623-4200-9d64-115e9bfd4a08");
        assert_eq!(guid, Guid(0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08));
    }
}
