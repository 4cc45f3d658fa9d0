//! The label that a layer carries: who it is, in which disk, on what it stands.
//!
//! It is the payload of a header extension that other programs keep as it is. There is no catalogue
//! beside the files that could disagree with it. Numbers are big-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0-3 | CRC-32 of all that follows |
//! | 4-5 | version of this layout, 1 |
//! | 6-7 | role, as [`Role`] numbers them |
//! | 8-23 | id of the disk |
//! | 24-39 | id of the layer |
//! | 40-55 | id of the contents |
//! | 56-71 | id of the parent layer, 0 without one |
//! | 72-87 | id of the parent's contents, 0 where nothing vouches for them |
//! | 88-95 | when the snapshot was taken, in milliseconds since 1970 |
//! | 96-97, 98-99 | bytes of the name, of the description, which follow |
//!
//! Records may stand behind the description: a tag and a length of 2 bytes each, then the bytes.
//! Unknown tags are passed over. Tag 1 is [`Kept`], tag 2 the parent's [`BaseStamp`], tag 3 the
//! layer's [`Clones`], tag 4 its configuration, tag 5 the [`Uptime`] of what is kept.
//!
//! A label that is too long for its sector is stored in two parts (see [`super::parts`]); who encodes
//! and decodes one need not know.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::clones::Clones;
use super::id::Id;
use super::kept::{Kept, Uptime};
use super::stamp::BaseStamp;
use crate::error::{Error, Result};

/// The bytes before the name.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Fixed {
    pub crc: U32,
    pub version: U16,
    pub role: U16,
    pub disk: [u8; 16],
    pub layer: [u8; 16],
    pub content: [u8; 16],
    pub parent_layer: [u8; 16],
    pub parent_content: [u8; 16],
    pub time: U64,
    pub name_len: U16,
    pub description_len: U16,
}

/// What stands before a record.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RecordHead {
    tag: U16,
    len: U16,
}

/// The layout of a label's front, which [`super::parts`] reads.
pub(super) const SPLIT: u16 = 2;
/// Bytes before the name.
pub(super) const FIXED: usize = size_of::<Fixed>();
const _: () = assert!(FIXED == 100 && size_of::<RecordHead>() == 4);

/// The checksum of a label, or of its front, that stands in its first bytes: of all behind them.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes.get(size_of::<U32>()..).unwrap_or_default())
}

/// Writes the checksum down.
pub(super) fn seal(bytes: &mut [u8]) {
    let crc = checksum(bytes);
    if let Ok((place, _)) = U32::mut_from_prefix(bytes) {
        place.set(crc);
    }
}

/// The layout that this file describes.
pub(super) const VERSION: u16 = 1;

/// What part a layer plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The writable top of a disk.
    Head,
    /// A frozen layer with a name.
    Snapshot,
    /// A head that clones stand on: sealed.
    Base,
    /// A frozen layer into which its child is being folded: no restore point any more.
    Merging,
    /// A frozen layer that its children hold all of by now, and are being moved off.
    Leaving,
    /// What the user dropped, kept aside for a time: [`Label::kept`] says how it comes back.
    Dropped,
    /// A frozen layer without a name: no restore point, and only there for what stands on it.
    Unnamed,
    /// As [`Role::Dropped`], while the other layers that go with it are still being marked.
    Dropping,
    /// As [`Role::Dropped`], while it and those that went with it are being brought back.
    Returning,
    /// A frozen layer that is being folded into its children, and loses what they hold already.
    Rising,
}

impl Role {
    /// All roles; the place of each is its number in the label.
    const ALL: [Role; 10] = [
        Role::Head,
        Role::Snapshot,
        Role::Base,
        Role::Merging,
        Role::Leaving,
        Role::Dropped,
        Role::Unnamed,
        Role::Dropping,
        Role::Returning,
        Role::Rising,
    ];

    /// Its name, for people and for JSON.
    pub fn name(self) -> &'static str {
        match self {
            Role::Head => "head",
            Role::Snapshot => "snapshot",
            Role::Base => "base",
            Role::Merging | Role::Rising => "merging",
            Role::Leaving => "leaving",
            Role::Dropped | Role::Dropping | Role::Returning => "dropped",
            Role::Unnamed => "unnamed",
        }
    }
}

/// The layer below, as the layer above remembers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parent {
    /// The parent's layer id; nil where it carries no label.
    pub layer: Id,
    /// The parent's content id when this layer was put on it; nil where nothing vouched for it.
    pub content: Id,
    /// What tells whether the parent's files changed, where its label does not tell all.
    pub stamp: Option<BaseStamp>,
}

impl Parent {
    /// The layer id, where the parent has one.
    pub fn labelled(&self) -> Option<Id> {
        Some(self.layer).filter(|id| !id.is_nil())
    }
}

/// Who a layer is. See the module for its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    /// The disk it belongs to.
    pub disk: Id,
    /// The layer itself.
    pub layer: Id,
    /// Its contents; given anew when it is frozen or sealed.
    pub content: Id,
    /// The layer below, where there is one that is known again.
    pub parent: Option<Parent>,
    /// What part it plays.
    pub role: Role,
    /// When it became a snapshot, in milliseconds since 1970; 0 if it is none.
    pub time: u64,
    /// The snapshot's name; empty if it is none.
    pub name: String,
    /// What the user said about the snapshot.
    pub description: String,
    /// What brings back a layer that was dropped.
    pub kept: Option<Kept>,
    /// The clones that were made on it, from the first one on.
    pub clones: Option<Clones>,
    /// What is run in the disk: the `config` of an OCI image's configuration, as JSON. New heads take it over.
    pub config: Option<Vec<u8>>,
}

impl Label {
    /// The header extension's magic, "vdsk".
    pub const MAGIC: u32 = 0x7664_736b;
    /// The longest name, in bytes.
    pub const MAX_NAME: usize = 200;
    /// The longest description, in bytes.
    pub const MAX_DESCRIPTION: usize = 1000;
    /// The longest configuration, in bytes.
    pub const MAX_CONFIG: usize = 8192;

    /// The label of a new disk's only layer.
    pub fn new() -> Label {
        Label {
            disk: Id::new_v4(),
            layer: Id::new_v4(),
            content: Id::new_v4(),
            parent: None,
            role: Role::Head,
            time: 0,
            name: String::new(),
            description: String::new(),
            kept: None,
            clones: None,
            config: None,
        }
    }

    /// Whether clones stand on the layer, as far as it knows.
    pub fn is_marked(&self) -> bool {
        self.clones.as_ref().is_some_and(Clones::any)
    }

    /// The label's bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) where the name or description is too long.
    pub fn encode(&self) -> Result<Vec<u8>> {
        if self.name.len() > Label::MAX_NAME || self.description.len() > Label::MAX_DESCRIPTION {
            return Err(Error::invalid(format!(
                "a snapshot's name has {} bytes at most, its description {}",
                Label::MAX_NAME,
                Label::MAX_DESCRIPTION
            )));
        }
        if self.config.as_ref().is_some_and(|config| config.len() > Label::MAX_CONFIG) {
            let most = Label::MAX_CONFIG;
            return Err(Error::invalid(format!("a disk's configuration has {most} bytes at most")));
        }
        let nil = Parent { layer: Id::nil(), content: Id::nil(), stamp: None };
        let parent = self.parent.unwrap_or(nil);
        let fixed = Fixed {
            crc: 0.into(),
            version: VERSION.into(),
            role: (self.role as u16).into(),
            disk: self.disk.into_bytes(),
            layer: self.layer.into_bytes(),
            content: self.content.into_bytes(),
            parent_layer: parent.layer.into_bytes(),
            parent_content: parent.content.into_bytes(),
            time: self.time.into(),
            name_len: (self.name.len() as u16).into(),
            description_len: (self.description.len() as u16).into(),
        };
        let mut bytes = fixed.as_bytes().to_vec();
        bytes.extend_from_slice(self.name.as_bytes());
        bytes.extend_from_slice(self.description.as_bytes());
        if let Some(kept) = &self.kept {
            put_record(&mut bytes, KEPT, &kept.encode());
            if let Some(uptime) = kept.uptime {
                put_record(&mut bytes, UPTIME, &uptime.encode());
            }
        }
        if let Some(stamp) = &parent.stamp {
            put_record(&mut bytes, BASE_STAMP, &stamp.encode());
        }
        if let Some(clones) = &self.clones {
            put_record(&mut bytes, CLONES, &clones.encode());
        }
        if let Some(config) = &self.config {
            put_record(&mut bytes, CONFIG, config);
        }
        seal(&mut bytes);
        Ok(bytes)
    }

    /// Reads a label back.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt) where it is damaged,
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) where a later version wrote it.
    pub fn decode(bytes: &[u8]) -> Result<Label> {
        let damaged = || Error::corrupt("the header's vdisk label is damaged");
        let (fixed, _) = Fixed::ref_from_prefix(bytes).map_err(|_| damaged())?;
        if fixed.crc != checksum(bytes) {
            return Err(damaged());
        }
        let version = fixed.version.get();
        if version == SPLIT {
            // Its rest would have been put to it.
            return Err(damaged());
        }
        if version != VERSION {
            let message = format!("the vdisk label has version {version}: a later vdisk wrote it");
            return Err(Error::unsupported(message));
        }
        let role = Role::ALL.get(usize::from(fixed.role.get()));
        let name_end = FIXED + usize::from(fixed.name_len.get());
        let end = name_end + usize::from(fixed.description_len.get());
        let text = |range: std::ops::Range<usize>| {
            let bytes = bytes.get(range).ok_or_else(damaged)?;
            String::from_utf8(bytes.to_vec()).map_err(|_| damaged())
        };
        let stamp = record(bytes.get(end..).unwrap_or_default(), BASE_STAMP);
        let stamp = stamp.and_then(BaseStamp::decode);
        let parent = Parent {
            layer: Id::from_bytes(fixed.parent_layer),
            content: Id::from_bytes(fixed.parent_content),
            stamp,
        };
        let known = !parent.layer.is_nil() || stamp.is_some();
        Ok(Label {
            disk: Id::from_bytes(fixed.disk),
            layer: Id::from_bytes(fixed.layer),
            content: Id::from_bytes(fixed.content),
            parent: known.then_some(parent),
            role: *role.ok_or_else(damaged)?,
            time: fixed.time.get(),
            name: text(FIXED..name_end)?,
            description: text(name_end..end)?,
            kept: record(&bytes[end..], KEPT).map(Kept::decode).transpose()?.map(|kept| Kept {
                uptime: record(&bytes[end..], UPTIME).and_then(Uptime::decode),
                ..kept
            }),
            clones: record(&bytes[end..], CLONES).map(Clones::decode).transpose()?,
            config: record(&bytes[end..], CONFIG).map(<[u8]>::to_vec),
        })
    }
}

/// The tag of [`Label::kept`].
const KEPT: u16 = 1;
/// The tag of [`Parent::stamp`].
const BASE_STAMP: u16 = 2;
/// The tag of [`Label::clones`].
const CLONES: u16 = 3;
/// The tag of [`Label::config`].
const CONFIG: u16 = 4;
/// The tag of [`Kept::uptime`].
const UPTIME: u16 = 5;

fn put_record(bytes: &mut Vec<u8>, tag: u16, record: &[u8]) {
    let head = RecordHead { tag: tag.into(), len: (record.len() as u16).into() };
    bytes.extend_from_slice(head.as_bytes());
    bytes.extend_from_slice(record);
}

/// The first record with `tag`.
fn record(mut bytes: &[u8], tag: u16) -> Option<&[u8]> {
    while let Ok((head, behind)) = RecordHead::ref_from_prefix(bytes) {
        let (this, next) = behind.split_at_checked(head.len.get().into())?;
        if head.tag == tag {
            return Some(this);
        }
        bytes = next;
    }
    None
}

impl Default for Label {
    fn default() -> Label {
        Label::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Was;

    #[test]
    fn a_label_survives_and_damage_is_noticed() {
        let mut label = Label::new();
        let stamp = Some(BaseStamp {
            len: 9,
            modified: 8,
            changed: 7,
            whole: false,
            follows: true,
            digest: [6; 16],
        });
        label.parent = Some(Parent { layer: Id::new_v4(), content: Id::nil(), stamp });
        label.role = Role::Snapshot;
        (label.name, label.description) = ("monday".into(), "before the update".into());
        label.kept = Some(Kept {
            event: 7,
            layers: 2,
            was: Was::Merged,
            since: 1000,
            until: 2000,
            uptime: Some(Uptime { boot: 3, ms: 4 }),
            children: vec![5, 6],
        });
        label.clones = Some(Clones { more: true, ..Clones::default() });
        label.config = Some(b"{}".to_vec());
        let bytes = label.encode().unwrap();
        assert_eq!(Label::decode(&bytes).unwrap(), label);
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            assert!(Label::decode(&bad).is_err(), "byte {at}");
        }
        for (number, role) in Role::ALL.into_iter().enumerate() {
            assert_eq!(role as usize, number);
        }
    }

    #[test]
    fn a_parent_without_a_label_has_only_a_stamp() {
        let stamp = Some(BaseStamp {
            len: 9,
            modified: 8,
            changed: 7,
            whole: true,
            follows: false,
            digest: [6; 16],
        });
        let parent = Some(Parent { layer: Id::nil(), content: Id::nil(), stamp });
        let label = Label { parent, ..Label::new() };
        let back = Label::decode(&label.encode().unwrap()).unwrap();
        assert_eq!((back.parent, back.parent.and_then(|p| p.labelled())), (parent, None));
    }
}
