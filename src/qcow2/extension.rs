//! Header extensions: typed where the engine knows them, kept byte for byte where it does not.
//!
//! Specification: qcow2, "Header extensions".

use crate::error::{Error, Result};

/// End of the extension area.
const END: u32 = 0;
/// Name of the backing file's format.
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Name of the external data file.
pub(super) const DATA_FILE: u32 = 0x4441_5441;
/// Where the LUKS header stands.
pub(super) const CRYPTO_HEADER: u32 = 0x0537_be77;
/// Names of feature bits.
pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
/// The bitmap directory.
pub(super) const BITMAPS: u32 = 0x2385_2875;

/// The order in which the engine writes the extensions it knows; others follow in their own order.
const ORDER: [u32; 5] = [BACKING_FORMAT, DATA_FILE, CRYPTO_HEADER, FEATURE_NAMES, BITMAPS];

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
pub(super) fn parse(area: &[u8], base: u64) -> Result<Vec<Extension>> {
    let mut found = Vec::new();
    let mut pos = 0;
    while let Some(head) = area.get(pos..pos + 8) {
        let magic = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        let len = u32::from_be_bytes([head[4], head[5], head[6], head[7]]) as usize;
        if magic == END {
            break;
        }
        let start = pos + 8;
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

/// Whether the mark that ends the extensions stands in `area`.
pub(super) fn has_end(area: &[u8]) -> bool {
    let mut pos = 0usize;
    while let Some(head) = area.get(pos..).and_then(|rest| rest.get(..8)) {
        let word =
            |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        if word(0) == END {
            return true;
        }
        pos = pos.saturating_add(8).saturating_add((word(4) as usize).next_multiple_of(8));
    }
    false
}

/// Writes the extensions in the canonical order, with padding and end mark.
pub(super) fn encode(extensions: &[Extension]) -> Vec<u8> {
    let rank = |e: &&Extension| ORDER.iter().position(|m| *m == e.magic).unwrap_or(ORDER.len());
    let mut sorted: Vec<&Extension> = extensions.iter().collect();
    sorted.sort_by_key(rank);
    let mut out = Vec::new();
    for extension in sorted {
        out.extend_from_slice(&extension.magic.to_be_bytes());
        out.extend_from_slice(&(extension.data.len() as u32).to_be_bytes());
        out.extend_from_slice(&extension.data);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out.extend_from_slice(&[0; 8]);
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

/// Bytes of one entry of the feature name table.
const NAME_ENTRY: usize = 48;

/// The feature name table of a new image.
pub(super) fn feature_names() -> Extension {
    let mut data = Vec::with_capacity(NAMES.len() * NAME_ENTRY);
    for (kind, bit, name) in NAMES {
        let mut entry = [0; NAME_ENTRY];
        entry[0] = kind as u8;
        entry[1] = bit;
        entry[2..2 + name.len()].copy_from_slice(name.as_bytes());
        data.extend_from_slice(&entry);
    }
    Extension { magic: FEATURE_NAMES, data }
}

/// Says the incompatible bits of `unknown` in words: by the image's own feature name table where
/// it has them, and the rest as a number.
pub(super) fn name_bits(extensions: &[Extension], unknown: u64) -> String {
    let table = extensions.iter().rfind(|e| e.magic == FEATURE_NAMES);
    let mut rest = unknown;
    let mut names = Vec::new();
    let entries = table.map_or(&[][..], |t| &t.data).chunks(NAME_ENTRY);
    // The last name may be cut short: what is missing would only be padding.
    for entry in entries.filter(|e| e.len() > 2) {
        let bit = 1u64.checked_shl(u32::from(entry[1])).unwrap_or(0);
        if entry[0] == FeatureKind::Incompatible as u8 && rest & bit != 0 {
            let name = entry[2..].split(|b| *b == 0).next().unwrap_or_default();
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
