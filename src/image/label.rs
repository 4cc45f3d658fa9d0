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
//! Unknown tags are passed over. Tag 1 is [`Kept`], tag 2 the parent's [`Witness`].

use byteorder::{BigEndian, ByteOrder};
use uuid::Uuid;

use super::kept::Kept;
use super::witness::Witness;
use crate::error::{Error, Result};

/// A random 128-bit id.
pub type Id = Uuid;

/// Bytes before the name.
const FIXED: usize = 100;
/// The layout that this file describes.
const VERSION: u16 = 1;

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
    pub witness: Option<Witness>,
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
}

impl Label {
    /// The header extension's magic, "vdsk".
    pub const MAGIC: u32 = 0x7664_736b;
    /// The longest name, in bytes.
    pub const MAX_NAME: usize = 200;
    /// The longest description, in bytes.
    pub const MAX_DESCRIPTION: usize = 1000;

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
        }
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
        let nil = Parent { layer: Id::nil(), content: Id::nil(), witness: None };
        let parent = self.parent.unwrap_or(nil);
        let mut bytes = vec![0; FIXED];
        BigEndian::write_u16(&mut bytes[4..], VERSION);
        BigEndian::write_u16(&mut bytes[6..], self.role as u16);
        let ids = [self.disk, self.layer, self.content, parent.layer, parent.content];
        for (place, id) in bytes[8..88].chunks_exact_mut(16).zip(ids) {
            place.copy_from_slice(id.as_bytes());
        }
        BigEndian::write_u64(&mut bytes[88..], self.time);
        BigEndian::write_u16(&mut bytes[96..], self.name.len() as u16);
        BigEndian::write_u16(&mut bytes[98..], self.description.len() as u16);
        bytes.extend_from_slice(self.name.as_bytes());
        bytes.extend_from_slice(self.description.as_bytes());
        if let Some(kept) = &self.kept {
            put_record(&mut bytes, KEPT, &kept.encode());
        }
        if let Some(witness) = &parent.witness {
            put_record(&mut bytes, WITNESS, &witness.encode());
        }
        let crc = crc32fast::hash(&bytes[4..]);
        BigEndian::write_u32(&mut bytes, crc);
        Ok(bytes)
    }

    /// Reads a label back.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt) where it is damaged,
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) where a later version wrote it.
    pub fn decode(bytes: &[u8]) -> Result<Label> {
        let damaged = || Error::corrupt("the header's vdisk label is damaged");
        if bytes.len() < FIXED || BigEndian::read_u32(bytes) != crc32fast::hash(&bytes[4..]) {
            return Err(damaged());
        }
        let version = BigEndian::read_u16(&bytes[4..]);
        if version != VERSION {
            let message = format!("the vdisk label has version {version}: a later vdisk wrote it");
            return Err(Error::unsupported(message));
        }
        let role = Role::ALL.get(usize::from(BigEndian::read_u16(&bytes[6..])));
        let id = |at: usize| Id::from_slice(&bytes[at..at + 16]).map_err(|_| damaged());
        let name_end = FIXED + usize::from(BigEndian::read_u16(&bytes[96..]));
        let end = name_end + usize::from(BigEndian::read_u16(&bytes[98..]));
        let text = |range: std::ops::Range<usize>| {
            let bytes = bytes.get(range).ok_or_else(damaged)?;
            String::from_utf8(bytes.to_vec()).map_err(|_| damaged())
        };
        let witness = record(bytes.get(end..).unwrap_or_default(), WITNESS);
        let witness = witness.and_then(Witness::decode);
        let parent = Parent { layer: id(56)?, content: id(72)?, witness };
        let known = !parent.layer.is_nil() || witness.is_some();
        Ok(Label {
            disk: id(8)?,
            layer: id(24)?,
            content: id(40)?,
            parent: known.then_some(parent),
            role: *role.ok_or_else(damaged)?,
            time: BigEndian::read_u64(&bytes[88..]),
            name: text(FIXED..name_end)?,
            description: text(name_end..end)?,
            kept: record(&bytes[end..], KEPT).map(Kept::decode).transpose()?,
        })
    }
}

/// The tag of [`Label::kept`].
const KEPT: u16 = 1;
/// The tag of [`Parent::witness`].
const WITNESS: u16 = 2;

fn put_record(bytes: &mut Vec<u8>, tag: u16, record: &[u8]) {
    bytes.extend_from_slice(&tag.to_be_bytes());
    bytes.extend_from_slice(&(record.len() as u16).to_be_bytes());
    bytes.extend_from_slice(record);
}

/// The first record with `tag`.
fn record(mut bytes: &[u8], tag: u16) -> Option<&[u8]> {
    while let Some((head, rest)) = bytes.split_at_checked(4) {
        let len = usize::from(BigEndian::read_u16(&head[2..]));
        let (this, next) = rest.split_at_checked(len)?;
        if BigEndian::read_u16(head) == tag {
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
        let witness =
            Some(Witness { len: 9, modified: 8, changed: 7, whole: false, digest: [6; 16] });
        label.parent = Some(Parent { layer: Id::new_v4(), content: Id::nil(), witness });
        label.role = Role::Snapshot;
        (label.name, label.description) = ("monday".into(), "before the update".into());
        label.kept = Some(Kept {
            event: 7,
            layers: 2,
            was: Was::Merged,
            since: 1000,
            until: 2000,
            children: vec![5, 6],
        });
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
    fn a_parent_without_a_label_has_only_a_witness() {
        let witness =
            Some(Witness { len: 9, modified: 8, changed: 7, whole: true, digest: [6; 16] });
        let parent = Some(Parent { layer: Id::nil(), content: Id::nil(), witness });
        let label = Label { parent, ..Label::new() };
        let back = Label::decode(&label.encode().unwrap()).unwrap();
        assert_eq!((back.parent, back.parent.and_then(|p| p.labelled())), (parent, None));
    }
}
