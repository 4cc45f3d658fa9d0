//! Header extensions: typed where the engine knows them, kept byte for byte where it does not.
//!
//! Specification: qcow2, "Header extensions".

use std::ops::Range;

use zerocopy::byteorder::big_endian::U32;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, Result};

/// End of the extension area.
const END: u32 = 0;
/// Name of the backing file's format.
pub(in crate::qcow2) const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Name of the external data file.
pub(in crate::qcow2) const DATA_FILE: u32 = 0x4441_5441;
/// Where the LUKS header stands.
pub(in crate::qcow2) const CRYPTO_HEADER: u32 = 0x0537_be77;
/// Names of feature bits.
pub(in crate::qcow2) const FEATURE_NAMES: u32 = 0x6803_f857;
/// The bitmap directory.
pub(in crate::qcow2) const BITMAPS: u32 = 0x2385_2875;

/// The order in which the engine writes the extensions it knows; others follow in their own order.
/// What changes stands in the first sector.
const ORDER: [u32; 5] = [BACKING_FORMAT, DATA_FILE, CRYPTO_HEADER, BITMAPS, FEATURE_NAMES];

/// Whether it has to be in the first sector, and never takes much room there: it changes with what
/// stands in the header itself.
pub(in crate::qcow2) fn is_near(extension: &Extension) -> bool {
    matches!(extension.magic, BACKING_FORMAT | CRYPTO_HEADER | BITMAPS)
}

/// What stands before an extension's data.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(in crate::qcow2) struct Head {
    extension_type: U32,
    length: U32,
}

/// Bytes of an extension before its data.
pub(in crate::qcow2) const HEAD: usize = size_of::<Head>();
const _: () = assert!(HEAD == 8);

impl Head {
    pub fn new(extension_type: u32, length: u32) -> Head {
        Head { extension_type: extension_type.into(), length: length.into() }
    }
}

/// One header extension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extension {
    /// The number that says what it is.
    pub magic: u32,
    /// Its bytes, without padding.
    pub data: Vec<u8>,
}

/// Reads the extensions from `area`, which begins `base` bytes into the file and ends where the
/// backing file's name or the first cluster ends.
pub(in crate::qcow2) fn parse(area: &[u8], base: u64) -> Result<Vec<Extension>> {
    let mut found = Vec::new();
    let mut pos = 0;
    while let Some((magic, len)) = head_at(area, pos) {
        if magic == END {
            break;
        }
        let start = pos + HEAD;
        let data =
            start.checked_add(len).and_then(|end| area.get(start..end)).ok_or_else(|| {
                Error::corrupt(format!(
                    "header extension {magic:#010x} of {len} bytes is too large"
                ))
                .at_offset(base + pos as u64)
            })?;
        found.push(Extension { magic, data: data.to_vec() });
        pos = start + len.next_multiple_of(8);
    }
    Ok(found)
}

/// Type and length of data of the extension at `pos` of `area`.
fn head_at(area: &[u8], pos: usize) -> Option<(u32, usize)> {
    let (head, _) = Head::ref_from_prefix(area.get(pos..)?).ok()?;
    Some((head.extension_type.get(), head.length.get() as usize))
}

/// Calls `act` with the magic and the place in `area`, padding included, of each extension and of the
/// mark that ends them. Whether that mark stands in `area`.
pub(in crate::qcow2) fn each(area: &[u8], mut act: impl FnMut(u32, Range<usize>)) -> bool {
    let mut pos = 0usize;
    while let Some((magic, len)) = head_at(area, pos) {
        if magic == END {
            act(END, pos..pos + HEAD);
            return true;
        }
        let end = pos.saturating_add(HEAD).saturating_add(len.next_multiple_of(8));
        act(magic, pos..end);
        pos = end;
    }
    false
}

/// Writes the extensions in the canonical order, with padding and end mark.
pub(in crate::qcow2) fn encode(extensions: &[Extension]) -> Vec<u8> {
    let rank = |e: &&Extension| ORDER.iter().position(|m| *m == e.magic).unwrap_or(ORDER.len());
    let mut sorted: Vec<&Extension> = extensions.iter().collect();
    sorted.sort_by_key(rank);
    let mut out = Vec::new();
    for extension in sorted {
        let head = Head::new(extension.magic, extension.data.len() as u32);
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(&extension.data);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out.extend_from_slice(Head::new(END, 0).as_bytes());
    out
}

/// Which of the three feature fields a bit belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FeatureKind {
    Incompatible = 0,
    Compatible = 1,
    Autoclear = 2,
}

/// The names that this engine records for other programs' messages.
const NAMES: [(FeatureKind, u8, &str); 8] = [
    (FeatureKind::Incompatible, 0, "dirty bit"),
    (FeatureKind::Incompatible, 1, "corrupt bit"),
    (FeatureKind::Incompatible, 2, "external data file"),
    (FeatureKind::Incompatible, 3, "compression type"),
    (FeatureKind::Incompatible, 4, "extended L2 entries"),
    (FeatureKind::Compatible, 0, "lazy refcounts"),
    (FeatureKind::Autoclear, 0, "bitmaps"),
    (FeatureKind::Autoclear, 1, "raw external data"),
];

/// An entry of the feature name table.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct FeatureName {
    feature_type: u8,
    bit: u8,
    name: [u8; 46],
}

const _: () = assert!(size_of::<FeatureName>() == 48);

/// The feature name table of a new image.
pub(in crate::qcow2) fn feature_names() -> Extension {
    let mut data = Vec::with_capacity(NAMES.len() * size_of::<FeatureName>());
    for (kind, bit, name) in NAMES {
        let mut entry = FeatureName { feature_type: kind as u8, bit, name: [0; 46] };
        entry.name[..name.len()].copy_from_slice(name.as_bytes());
        data.extend_from_slice(entry.as_bytes());
    }
    Extension { magic: FEATURE_NAMES, data }
}

/// Says the incompatible bits of `unknown` in words: by the image's own feature name table where
/// it has them, and the rest as a number.
pub(in crate::qcow2) fn name_bits(extensions: &[Extension], unknown: u64) -> String {
    let table = extensions.iter().rfind(|e| e.magic == FEATURE_NAMES);
    let mut rest = unknown;
    let mut names = Vec::new();
    let entries = table.map_or(&[][..], |t| &t.data).chunks(size_of::<FeatureName>());
    for bytes in entries.filter(|e| e.len() > 2) {
        // The last name may be cut short: what is missing would only be padding.
        let mut entry = FeatureName::new_zeroed();
        entry.as_mut_bytes()[..bytes.len()].copy_from_slice(bytes);
        let bit = 1u64.checked_shl(u32::from(entry.bit)).unwrap_or(0);
        if entry.feature_type == FeatureKind::Incompatible as u8 && rest & bit != 0 {
            let name = entry.name.split(|b| *b == 0).next().unwrap_or_default();
            names.push(String::from_utf8_lossy(name).into_owned());
            rest &= !bit;
        }
    }
    if rest != 0 {
        names.push(format!("Unknown incompatible feature: {rest:x}"));
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_extensions_survive_byte_for_byte() {
        let list = vec![
            Extension { magic: 0x1234_5678, data: vec![1, 2, 3] },
            feature_names(),
            Extension { magic: BACKING_FORMAT, data: b"raw".to_vec() },
        ];
        let got = parse(&encode(&list), 112).unwrap();
        assert_eq!(got, [list[2].clone(), list[1].clone(), list[0].clone()]);
    }

    #[test]
    fn an_extension_longer_than_the_area_is_an_error_with_its_offset() {
        let mut bytes = encode(&[Extension { magic: 7, data: vec![0; 16] }]);
        bytes[7] = 200;
        assert_eq!(parse(&bytes, 112).unwrap_err().offset(), Some(112));
    }

    #[test]
    fn bits_are_named_by_the_table_and_the_rest_by_number() {
        assert_eq!(
            name_bits(&[feature_names()], 1 << 63 | 2),
            "corrupt bit, Unknown incompatible feature: 8000000000000000"
        );
    }
}
