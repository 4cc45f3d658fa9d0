//! What a layer knows of the clones that stand on it, and of itself since they do. It is a record in
//! the label, small in itself; numbers are big-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0 | flags: 1 what its files look like follows, 2 they are being changed, 4 the digest speaks for all contents, 8 there are clones that are not listed |
//! | 1 | how many clones are listed |
//! | 2-9, 10-17, 18-25 | length in bytes, time of the last write in nanoseconds since 1970, inode of its files |
//! | 26-41 | digest of their contents |
//!
//! Then each clone that is listed: the first 8 bytes of its disk's id, 0 for one that carries no
//! label, the length of its path in one byte, 0 where there was no room for it, and the path,
//! relative to the layer's directory.
//!
//! The record is there from the birth of the first clone on, also when none is left: that all clones
//! were counted is worth knowing.

use zerocopy::byteorder::big_endian::{I64, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::id::Id;
use crate::error::{Error, Result};

/// The bytes before the clones.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Fixed {
    flags: u8,
    count: u8,
    len: U64,
    modified: I64,
    inode: U64,
    digest: [u8; 16],
}

/// The bytes before a clone's path.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct PlaceHead {
    disk: U64,
    path_len: u8,
}

const _: () = assert!(size_of::<Fixed>() == 42 && size_of::<PlaceHead>() == 9);
/// The most bytes of all clones together: the label stays within a sector.
const ROOM: usize = 96;

const HAS_STAMP: u8 = 1;
const CHANGING: u8 = 2;
const WHOLE: u8 = 4;
const MORE: u8 = 8;

/// A clone that was made on a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The first bytes of its disk's id; 0 for one without a label.
    pub disk: u64,
    /// Where it was made, relative to the layer's directory; empty where there was no room to say.
    pub path: String,
}

/// What a layer's files looked like when vdisk last finished with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileStamp {
    /// Their length in bytes, together.
    pub len: u64,
    /// When the last of them was written, in nanoseconds since 1970.
    pub modified: i64,
    /// The number of the first one's inode: a copy has another one.
    pub inode: u64,
    /// Whether the digest speaks for all of the contents.
    pub whole: bool,
    /// Of the contents, or of parts of them.
    pub digest: [u8; 16],
}

/// What a layer knows of its own files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Seen {
    /// Nothing: no clone relies on it.
    #[default]
    Nothing,
    /// vdisk is changing them, or was stopped while it did, so that they show what they showed.
    Changing,
    /// What they look like.
    As(FileStamp),
}

/// The clones of a layer. See the module for its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Clones {
    /// Those that are listed.
    pub places: Vec<Place>,
    /// Whether there are others.
    pub more: bool,
    /// What the layer's files look like, for those who stand on it.
    pub seen: Seen,
}

impl Clones {
    /// The first bytes of a disk's id.
    pub fn short(disk: Id) -> u64 {
        disk.as_u64_pair().0
    }

    /// Whether somebody stands on the layer, as far as it knows.
    pub fn any(&self) -> bool {
        self.more || !self.places.is_empty()
    }

    /// Notes a clone, as well as there is room. A listed one of the same disk at the same place, or
    /// at none, is the same.
    pub fn add(&mut self, place: Place) {
        let same = |p: &Place| p.disk == place.disk && (p.path == place.path || p.path.is_empty());
        if place.disk != 0
            && let Some(known) = self.places.iter_mut().find(|p| same(p))
        {
            known.path = place.path;
        } else if !self.places.contains(&place) {
            self.places.push(place);
        }
        while self.len() > ROOM && self.shed() {}
    }

    /// Says less of the clones, for want of room; `false` where nothing less can be said.
    pub fn shed(&mut self) -> bool {
        if let Some(place) =
            self.places.iter_mut().rev().find(|p| p.disk != 0 && !p.path.is_empty())
        {
            place.path.clear();
            return true;
        }
        self.more |= !self.places.is_empty();
        self.places.pop().is_some()
    }

    /// Bytes of the clones in the record.
    fn len(&self) -> usize {
        self.places.iter().map(|p| size_of::<PlaceHead>() + p.path.len()).sum()
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut own = self.clone();
        // One byte holds the length of a path.
        let long = |p: &Place| p.path.len() > usize::from(u8::MAX);
        while (own.len() > ROOM || own.places.iter().any(long)) && own.shed() {}
        let mut fixed = Fixed::new_zeroed();
        fixed.flags = if own.more { MORE } else { 0 };
        fixed.count = own.places.len() as u8;
        match own.seen {
            Seen::Nothing => {}
            Seen::Changing => fixed.flags |= CHANGING,
            Seen::As(stamp) => {
                fixed.flags |= HAS_STAMP | if stamp.whole { WHOLE } else { 0 };
                fixed.len = stamp.len.into();
                fixed.modified = stamp.modified.into();
                fixed.inode = stamp.inode.into();
                fixed.digest = stamp.digest;
            }
        }
        let mut bytes = fixed.as_bytes().to_vec();
        for place in &own.places {
            let head = PlaceHead { disk: place.disk.into(), path_len: place.path.len() as u8 };
            bytes.extend_from_slice(head.as_bytes());
            bytes.extend_from_slice(place.path.as_bytes());
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Clones> {
        let damaged = || Error::corrupt("the header's vdisk label is damaged");
        let (fixed, mut behind) = Fixed::ref_from_prefix(bytes).map_err(|_| damaged())?;
        let stamp = FileStamp {
            len: fixed.len.get(),
            modified: fixed.modified.get(),
            inode: fixed.inode.get(),
            whole: fixed.flags & WHOLE != 0,
            digest: fixed.digest,
        };
        let seen = match fixed.flags & (HAS_STAMP | CHANGING) {
            0 => Seen::Nothing,
            HAS_STAMP => Seen::As(stamp),
            _ => Seen::Changing,
        };
        let mut places = Vec::new();
        for _ in 0..fixed.count {
            let (head, path) = PlaceHead::ref_from_prefix(behind).map_err(|_| damaged())?;
            let (path, next) = path.split_at_checked(head.path_len.into()).ok_or_else(damaged)?;
            let path = String::from_utf8(path.to_vec()).map_err(|_| damaged())?;
            places.push(Place { disk: head.disk.get(), path });
            behind = next;
        }
        Ok(Clones { places, more: fixed.flags & MORE != 0, seen })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(disk: u64, path: &str) -> Place {
        Place { disk, path: path.to_owned() }
    }

    #[test]
    fn what_has_no_room_is_counted_and_never_forgotten() {
        let mut clones = Clones::default();
        assert!(!clones.any());
        for number in 1..40 {
            clones.add(place(number, &format!("../somewhere/clone-{number}.qcow2")));
            let back = Clones::decode(&clones.encode()).unwrap();
            assert_eq!(back, clones);
            assert!(clones.encode().len() <= size_of::<Fixed>() + ROOM);
            assert!(clones.places.iter().any(|p| p.disk == 1) && clones.any());
            assert_eq!(clones.more, number > (ROOM / 9) as u64);
        }
        assert!(Clones::decode(&clones.encode()[..50]).is_err());
    }

    #[test]
    fn a_clone_is_listed_once_and_one_without_a_label_by_its_place() {
        let mut clones = Clones::default();
        for place in [place(7, "a"), place(7, "a"), place(0, "b"), place(0, "b"), place(0, "c")] {
            clones.add(place);
        }
        assert_eq!(clones.places, [place(7, "a"), place(0, "b"), place(0, "c")]);
        // A copy of it elsewhere is another one.
        clones.add(place(7, "d"));
        assert_eq!(clones.places.len(), 4);
        clones.add(place(0, &"long".repeat(200)));
        assert!(clones.more, "there is no room, and no id to remember it by");
    }

    #[test]
    fn the_sight_survives() {
        let stamp = FileStamp { len: 1, modified: -2, inode: 3, whole: true, digest: [4; 16] };
        for seen in [Seen::Nothing, Seen::Changing, Seen::As(stamp)] {
            let clones = Clones { seen, ..Clones::default() };
            assert_eq!(Clones::decode(&clones.encode()).unwrap(), clones);
        }
    }
}
