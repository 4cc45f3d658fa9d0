//! Numbers out of a structure that was read from an image: no index, no panic, and an error that
//! names the place in the file.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::storage::Storage;

/// A structure's bytes and where in the file they stood.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    bytes: &'a [u8],
    base: u64,
}

macro_rules! number {
    ($name:ident, $type:ty, $from:ident) => {
        /// The number `at` bytes into the structure.
        pub(super) fn $name(&self, at: usize) -> Result<$type> {
            self.array(at).map(<$type>::$from)
        }
    };
}

impl<'a> Fields<'a> {
    /// `base` is the file offset of the first byte.
    pub(super) fn new(bytes: &'a [u8], base: u64) -> Fields<'a> {
        Fields { bytes, base }
    }

    /// `len` bytes from `at`.
    pub(super) fn bytes(&self, at: usize, len: usize) -> Result<&'a [u8]> {
        at.checked_add(len).and_then(|end| self.bytes.get(at..end)).ok_or_else(|| {
            Error::corrupt("a structure of the image ends too early")
                .at_offset(self.base.saturating_add(at as u64))
        })
    }

    /// `N` bytes from `at`.
    pub(super) fn array<const N: usize>(&self, at: usize) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(at, N)?);
        Ok(array)
    }

    number!(le16, u16, from_le_bytes);
    number!(le32, u32, from_le_bytes);
    number!(le64, u64, from_le_bytes);
    number!(be16, u16, from_be_bytes);
    number!(be32, u32, from_be_bytes);
    number!(be64, u64, from_be_bytes);
}

/// Reads `len` bytes at `offset`, and allocates only when the file has that many; `what` names
/// them in the error.
pub(super) fn read(
    storage: &Arc<dyn Storage>,
    offset: u64,
    len: u64,
    what: &str,
) -> Result<Vec<u8>> {
    within(offset, len, storage.len()?, what)?;
    let mut bytes = vec![0; len as usize];
    storage.read_exact_at(offset, &mut bytes)?;
    Ok(bytes)
}

/// Fails unless `len` bytes at `offset` lie within a file of `file` bytes.
pub(super) fn within(offset: u64, len: u64, file: u64, what: &str) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= file => Ok(()),
        _ => Err(Error::corrupt(format!(
            "{what} ({len} bytes) reaches past the end of the file ({file} bytes)"
        ))
        .at_offset(offset)),
    }
}

/// Text of 16-bit units, cut at the first zero.
pub(super) fn utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> String {
    let units = bytes.chunks_exact(2).filter_map(|pair| Some(unit(pair.try_into().ok()?)));
    char::decode_utf16(units.take_while(|&u| u != 0))
        .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect()
}

/// A path as Windows programs record it, as one that this host may have: separators turned, a
/// leading `.\` dropped.
pub(super) fn native_path(name: &str) -> String {
    let name = name.replace('\\', "/");
    name.strip_prefix("./").unwrap_or(&name).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_past_the_end_is_an_error_with_its_offset() {
        let fields = Fields::new(&[1, 2, 3, 4], 0x200);
        assert_eq!(fields.le32(0).unwrap(), 0x0403_0201);
        assert_eq!(fields.be16(2).unwrap(), 0x0304);
        assert_eq!(fields.le32(1).unwrap_err().offset(), Some(0x201));
        assert!(fields.bytes(usize::MAX, 2).is_err());
    }

    #[test]
    fn a_windows_name_becomes_a_path() {
        let units: Vec<u8> =
            ".\\a\\b.vhd\0x".encode_utf16().flat_map(|u| u.to_be_bytes()).collect();
        assert_eq!(native_path(&utf16(&units, u16::from_be_bytes)), "a/b.vhd");
    }
}
