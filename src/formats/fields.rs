//! Structures that were read from an image: no index, no panic, and an error that names the place in
//! the file.

use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, Result};
use crate::storage::Storage;

/// A structure without padding, as it stands in a file.
pub(super) trait Plain: FromBytes + IntoBytes + Immutable + KnownLayout + Unaligned {}

impl<T: FromBytes + IntoBytes + Immutable + KnownLayout + Unaligned> Plain for T {}

/// The structure at the beginning of `bytes`, which stood at file offset `base`.
pub(super) fn structure<T: Plain>(bytes: &[u8], base: u64) -> Result<&T> {
    T::ref_from_prefix(bytes).map_or_else(|_| Err(too_early(base)), |(found, _)| Ok(found))
}

/// The structure `at` bytes into those that stood at file offset `base`.
pub(super) fn structure_at<T: Plain>(bytes: &[u8], at: usize, base: u64) -> Result<&T> {
    structure(bytes.get(at..).unwrap_or_default(), base.saturating_add(at as u64))
}

/// The first `count` structures of `bytes`, which stood at file offset `base`.
pub(super) fn structures<T: Plain>(bytes: &[u8], count: usize, base: u64) -> Result<&[T]> {
    let found = <[T]>::ref_from_prefix_with_elems(bytes, count);
    found.map_or_else(|_| Err(too_early(base)), |(found, _)| Ok(found))
}

/// `len` bytes `at` bytes into those that stood at file offset `base`.
pub(super) fn bytes_at(bytes: &[u8], at: usize, len: usize, base: u64) -> Result<&[u8]> {
    let found = at.checked_add(len).and_then(|end| bytes.get(at..end));
    found.ok_or_else(|| too_early(base.saturating_add(at as u64)))
}

fn too_early(offset: u64) -> Error {
    Error::corrupt("a structure of the image ends too early").at_offset(offset)
}

/// Reads the structure at `offset`; `what` names it in the error.
pub(super) fn read_structure<T: Plain>(
    storage: &dyn Storage,
    offset: u64,
    what: &str,
) -> Result<T> {
    within(offset, size_of::<T>() as u64, storage.len()?, what)?;
    let mut found = T::new_zeroed();
    storage.read_exact_at(offset, found.as_mut_bytes())?;
    Ok(found)
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

/// A backing file's name, as an image records it.
pub(super) fn name(storage: &Arc<dyn Storage>, at: u64, len: u64) -> Result<String> {
    let bytes = read(storage, at, len, "the backing file's name")?;
    String::from_utf8(bytes)
        .map_err(|_| Error::unsupported("the backing file's name is not UTF-8").at_offset(at))
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
    fn a_structure_past_the_end_is_an_error_with_its_offset() {
        use zerocopy::byteorder::little_endian::{U16, U32};
        let bytes = [1, 2, 3, 4];
        assert_eq!(structure::<U32>(&bytes, 0x200).unwrap().get(), 0x0403_0201);
        assert_eq!(structure_at::<U16>(&bytes, 2, 0x200).unwrap().get(), 0x0403);
        assert_eq!(structures::<U16>(&bytes, 2, 0x200).unwrap()[1].get(), 0x0403);
        assert_eq!(structure_at::<U32>(&bytes, 1, 0x200).unwrap_err().offset(), Some(0x201));
        assert_eq!(structures::<U16>(&bytes, 3, 0x200).unwrap_err().offset(), Some(0x200));
        assert!(structures::<U16>(&bytes, usize::MAX, 0).is_err());
        assert!(bytes_at(&bytes, usize::MAX, 2, 0).is_err());
    }

    #[test]
    fn a_windows_name_becomes_a_path() {
        let units: Vec<u8> =
            ".\\a\\b.vhd\0x".encode_utf16().flat_map(|u| u.to_be_bytes()).collect();
        assert_eq!(native_path(&utf16(&units, u16::from_be_bytes)), "a/b.vhd");
    }
}
