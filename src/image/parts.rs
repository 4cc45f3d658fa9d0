//! A label that does not fit into the sector of its header: a front that does, and the rest.
//!
//! The front says who the layer is. The rest, the long texts and the records, is written elsewhere and
//! made durable before the front that speaks of it. What the front has room for besides, it repeats or
//! keeps itself: that survives where the rest is lost. Numbers of the front are big-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0-3 | CRC-32 of all that follows |
//! | 4-5 | version of this layout, 2 |
//! | 6-99 | as in a whole label |
//! | 100-103, 104-107 | bytes of the rest, and their CRC-32 |
//! | 108-109 | bytes of the name that stand in the front: all or none |
//! | 110-111 | bytes of the base's name, repeated here: all or none |
//! | 112- | that name, and that one |
//!
//! The rest is what follows the name in a whole label, or begins with the name.

use zerocopy::byteorder::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::label::{FIXED, Fixed, Label, SPLIT, VERSION, checksum, seal};

/// The bytes of a front before the names.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Front {
    fixed: Fixed,
    rest_len: U32,
    rest_crc: U32,
    name_len: U16,
    backing_len: U16,
}

/// Bytes of a front without names.
const FRONT: usize = size_of::<Front>();
const _: () = assert!(FRONT == 112);

/// A label in two parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parts {
    pub front: Vec<u8>,
    pub rest: Vec<u8>,
}

/// What a front alone tells of a label whose rest is lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PartialLabel {
    pub label: Label,
    /// Whether it still has its name.
    pub named: bool,
    /// The base's name, where the front repeats it.
    pub backing: Option<String>,
}

impl Label {
    /// The magic of the header extension with the rest of a label, "vdst".
    pub(crate) const REST_MAGIC: u32 = 0x7664_7374;

    /// Splits an encoded label so that its front takes at most `room` bytes; `None` where that is too
    /// little, or where it is no whole label. `backing` is the base's name.
    pub(crate) fn split(whole: &[u8], room: usize, backing: &[u8]) -> Option<Parts> {
        let (fixed, texts) = Fixed::ref_from_prefix(whole).ok()?;
        if room < FRONT || fixed.version != VERSION {
            return None;
        }
        let name = usize::from(fixed.name_len.get());
        let name = if name <= room - FRONT { name } else { 0 };
        let (kept, rest) = texts.split_at_checked(name)?;
        let repeated = if backing.len() <= room - FRONT - name { backing } else { &[] };
        let head = Front {
            fixed: Fixed { version: SPLIT.into(), ..*fixed },
            rest_len: u32::try_from(rest.len()).ok()?.into(),
            rest_crc: crc32fast::hash(rest).into(),
            name_len: (kept.len() as u16).into(),
            backing_len: (repeated.len() as u16).into(),
        };
        let mut front = head.as_bytes().to_vec();
        front.extend_from_slice(kept);
        front.extend_from_slice(repeated);
        seal(&mut front);
        Some(Parts { front, rest: rest.to_vec() })
    }

    /// The whole label that `front` and `rest` are of; `None` where they are not of one.
    pub(crate) fn join(front: &[u8], rest: &[u8]) -> Option<Vec<u8>> {
        let Sound { front, name, .. } = sound(front)?;
        if rest.len() as u64 != u64::from(front.rest_len.get())
            || front.rest_crc != crc32fast::hash(rest)
        {
            return None;
        }
        Some(whole(front.fixed, &[name, rest].concat()))
    }

    /// What is left of a label of which only `front` is there.
    pub(crate) fn partial(front: &[u8]) -> Option<PartialLabel> {
        let Sound { front, name, backing } = sound(front)?;
        let backing = String::from_utf8(backing.to_vec()).ok().filter(|name| !name.is_empty());
        let (label, named) = with_name_only(front.fixed, name)?;
        Some(PartialLabel { label, named, backing })
    }

    /// What is left of a label, written in one piece, of which only the first bytes are as they were:
    /// a sector is written whole or not at all.
    pub(crate) fn torn(first: &[u8]) -> Option<PartialLabel> {
        let (fixed, _) = Fixed::ref_from_prefix(first).ok()?;
        if fixed.version != VERSION {
            return None;
        }
        let name = usize::from(fixed.name_len.get());
        let name = first.get(FIXED..FIXED + name).unwrap_or_default();
        let (label, named) = with_name_only(*fixed, name)?;
        Some(PartialLabel { label, named, backing: None })
    }
}

/// A front that is sound, and the label's and the base's name in it.
struct Sound<'a> {
    front: &'a Front,
    name: &'a [u8],
    backing: &'a [u8],
}

fn sound(bytes: &[u8]) -> Option<Sound<'_>> {
    let (front, names) = Front::ref_from_prefix(bytes).ok()?;
    if front.fixed.crc != checksum(bytes) || front.fixed.version != SPLIT {
        return None;
    }
    let (name, names) = names.split_at_checked(front.name_len.get().into())?;
    let backing = names.get(..usize::from(front.backing_len.get()))?;
    Some(Sound { front, name, backing })
}

/// A whole label of a front's or a label's fixed part and what follows it.
fn whole(fixed: Fixed, texts: &[u8]) -> Vec<u8> {
    let mut whole = Fixed { version: VERSION.into(), ..fixed }.as_bytes().to_vec();
    whole.extend_from_slice(texts);
    seal(&mut whole);
    whole
}

/// The label without description and records, and whether `name` is its name.
fn with_name_only(fixed: Fixed, name: &[u8]) -> Option<(Label, bool)> {
    let named = name.len() == usize::from(fixed.name_len.get());
    let name = if named { name } else { &[] };
    let name_len = (name.len() as u16).into();
    let fixed = Fixed { name_len, description_len: 0.into(), ..fixed };
    Some((Label::decode(&whole(fixed, name)).ok()?, named))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Role;

    fn label() -> Label {
        let description = "words ".repeat(150);
        Label { role: Role::Snapshot, name: "monday".into(), description, ..Label::new() }
    }

    #[test]
    fn a_label_in_two_parts_is_the_same_label() {
        let whole = label().encode().unwrap();
        for room in [FRONT, FRONT + 6, FRONT + 10, 400] {
            let parts = Label::split(&whole, room, b"base.raw").unwrap();
            assert!(parts.front.len() <= room);
            assert_eq!(Label::join(&parts.front, &parts.rest).unwrap(), whole);
            assert!(Label::decode(&parts.front).is_err());
            for at in 0..parts.front.len() {
                let mut bad = parts.front.clone();
                bad[at] ^= 1;
                assert_eq!(Label::join(&bad, &parts.rest), None, "byte {at}");
            }
            assert_eq!(Label::join(&parts.front, &parts.rest[1..]), None);
        }
        assert_eq!(Label::split(&whole, FRONT - 1, b""), None);
    }

    #[test]
    fn a_front_alone_tells_who_the_layer_is() {
        let label = label();
        let whole = label.encode().unwrap();
        let expected = Label { description: String::new(), ..label };
        let parts = Label::split(&whole, 200, b"base.raw").unwrap();
        let remains = Label::partial(&parts.front).unwrap();
        assert_eq!((&remains.label, remains.named), (&expected, true));
        assert_eq!(remains.backing.as_deref(), Some("base.raw"));
        assert_eq!(Label::torn(&whole[..300]).unwrap().label, expected);
        let remains = Label::partial(&Label::split(&whole, FRONT, b"base.raw").unwrap().front);
        let remains = remains.unwrap();
        assert_eq!(
            (remains.label.name.as_str(), remains.named, remains.backing),
            ("", false, None)
        );
    }
}
