//! The header as it stands in the file: 592 bytes, big-endian. Section 2.3 of the specification.

use std::mem::offset_of;

use zerocopy::byteorder::big_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::cipher::Spec;
use super::hash::Hash;
use super::{STRIPES, slot_bytes};
use crate::error::{Error, Result};

pub(super) const SECTOR: u64 = 512;
pub(super) const DIGEST: usize = 20;
pub(super) const SALT: usize = 32;
pub(super) const UUID: usize = 40;
/// Passphrases that a header has room for.
pub const SLOTS: usize = 8;

const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";

/// "struct phdr".
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 6],
    version: U16,
    cipher_name: [u8; NAME],
    cipher_mode: [u8; NAME],
    hash_spec: [u8; NAME],
    payload_offset: U32,
    key_bytes: U32,
    mk_digest: [u8; DIGEST],
    mk_digest_salt: [u8; SALT],
    mk_digest_iterations: U32,
    uuid: [u8; UUID],
    key_slots: [RawSlot; SLOTS],
}

/// "struct key slot".
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSlot {
    active: U32,
    iterations: U32,
    salt: [u8; SALT],
    key_material_offset: U32,
    stripes: U32,
}

/// The beginning of a header, enough to tell where data begin.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Front {
    magic: [u8; 6],
    version: U16,
    names: [[u8; NAME]; 3],
    payload_offset: U32,
}

const LEN: usize = size_of::<RawHeader>();
const _: () = assert!(LEN == 592 && size_of::<RawSlot>() == 48);
const _: () = assert!(offset_of!(Front, payload_offset) == offset_of!(RawHeader, payload_offset));
/// Bytes of a name.
const NAME: usize = 32;
const FIRST_SLOT: usize = offset_of!(RawHeader, key_slots);
const SLOT: usize = size_of::<RawSlot>();
/// The one version that is known.
const VERSION: u16 = 1;
const ENABLED: u32 = 0x00ac_71f3;
const DISABLED: u32 = 0x0000_dead;

/// What a LUKS header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub(super) spec: Spec,
    pub(super) hash: Hash,
    /// The first sector of data, where LUKS is a format of its own.
    pub(super) payload: u32,
    pub(super) digest: [u8; DIGEST],
    pub(super) digest_salt: [u8; SALT],
    pub(super) digest_iterations: u32,
    pub(super) uuid: [u8; UUID],
    pub(super) slots: [Slot; SLOTS],
}

/// A place for the master key under one passphrase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Slot {
    pub(super) active: bool,
    pub(super) iterations: u32,
    pub(super) salt: [u8; SALT],
    /// The first sector of its key material.
    pub(super) material: u32,
    pub(super) stripes: u32,
}

impl Slot {
    fn parse(raw: &RawSlot) -> Result<Slot> {
        let active = match raw.active.get() {
            ENABLED => true,
            DISABLED => false,
            state => return Err(Error::corrupt(format!("a key slot in state {state:#x}"))),
        };
        Ok(Slot {
            active,
            iterations: raw.iterations.get(),
            salt: raw.salt,
            material: raw.key_material_offset.get(),
            stripes: raw.stripes.get(),
        })
    }

    fn encode(self) -> RawSlot {
        RawSlot {
            active: if self.active { ENABLED } else { DISABLED }.into(),
            iterations: self.iterations.into(),
            salt: self.salt,
            key_material_offset: self.material.into(),
            stripes: self.stripes.into(),
        }
    }

    /// Where `len` bytes of its key material stand in the area.
    pub(super) fn range(&self, len: usize) -> std::ops::Range<usize> {
        let start = self.material as usize * SECTOR as usize;
        start..start + len
    }
}

impl Header {
    /// Parses a header and checks that the material of its active slots lies within `area`, behind
    /// the header. Errors carry the offset within `area`.
    pub fn parse(area: &[u8]) -> Result<Header> {
        let bytes = area.get(..LEN).ok_or_else(|| {
            Error::corrupt(format!("a LUKS header needs {LEN} bytes, there are {}", area.len()))
        })?;
        let raw = RawHeader::ref_from_bytes(bytes).map_err(|_| super::too_short())?;
        if raw.magic != MAGIC {
            return Err(Error::corrupt("not a LUKS header").at_offset(0));
        }
        check_version(raw.version)?;
        let (cipher, mode) = (text(&raw.cipher_name), text(&raw.cipher_mode));
        let spec = Spec::parse(cipher, mode, raw.key_bytes.get())
            .map_err(|error| error.at_offset(offset_of!(RawHeader, cipher_name) as u64))?;
        let hash = Hash::parse(text(&raw.hash_spec))
            .map_err(|error| error.at_offset(offset_of!(RawHeader, hash_spec) as u64))?;
        let mut header = Header {
            spec,
            hash,
            payload: raw.payload_offset.get(),
            digest: raw.mk_digest,
            digest_salt: raw.mk_digest_salt,
            digest_iterations: raw.mk_digest_iterations.get(),
            uuid: raw.uuid,
            slots: [Slot::default(); SLOTS],
        };
        for (index, (slot, raw)) in header.slots.iter_mut().zip(&raw.key_slots).enumerate() {
            *slot = Slot::parse(raw)
                .and_then(|slot| check_slot(slot, spec, area.len()))
                .map_err(|error| error.at_offset((FIRST_SLOT + SLOT * index) as u64))?;
        }
        header.check_overlap()?;
        if header.digest_iterations == 0 {
            return Err(Error::corrupt("the key's digest has no rounds").at_offset(offset_of!(
                RawHeader,
                mk_digest_iterations
            )
                as u64));
        }
        Ok(header)
    }

    /// Changing one slot must not touch another's key.
    fn check_overlap(&self) -> Result<()> {
        let len = slot_bytes(self.spec.key_len());
        let mut ranges = self.slots.map(|slot| slot.range(len));
        ranges.sort_by_key(|range| range.start);
        let overlap = ranges.windows(2).any(|pair| match pair {
            [a, b] => a.end > b.start,
            _ => false,
        });
        if overlap {
            return Err(Error::corrupt("the key material of two slots overlaps")
                .at_offset(FIRST_SLOT as u64));
        }
        Ok(())
    }

    /// Writes the header at the beginning of `area`.
    pub(super) fn write(&self, area: &mut [u8]) -> Result<()> {
        let (cipher, mode) = self.spec.names();
        let raw = RawHeader {
            magic: MAGIC,
            version: VERSION.into(),
            cipher_name: padded(cipher),
            cipher_mode: padded(mode),
            hash_spec: padded(self.hash.name()),
            payload_offset: self.payload.into(),
            key_bytes: (self.spec.key_len() as u32).into(),
            mk_digest: self.digest,
            mk_digest_salt: self.digest_salt,
            mk_digest_iterations: self.digest_iterations.into(),
            uuid: self.uuid,
            key_slots: self.slots.map(Slot::encode),
        };
        let place = area.get_mut(..LEN).ok_or_else(super::too_short)?;
        place.copy_from_slice(raw.as_bytes());
        Ok(())
    }

    /// Cipher, mode and key length.
    pub fn spec(&self) -> Spec {
        self.spec
    }

    /// What passphrases are hashed with.
    pub fn hash(&self) -> Hash {
        self.hash
    }

    /// Where data begin, in bytes from the header, where LUKS is a format of its own. In a qcow2
    /// file it says nothing.
    pub fn payload_offset(&self) -> u64 {
        u64::from(self.payload) * SECTOR
    }

    /// The volume's UUID.
    pub fn uuid(&self) -> &str {
        text(&self.uuid)
    }

    /// For a slot: rounds of hashing (`None` when it holds no key), stripes, and the offset in
    /// bytes of its key material.
    pub fn slot(&self, index: usize) -> Option<(Option<u32>, u32, u64)> {
        let slot = self.slots.get(index)?;
        let iterations = slot.active.then_some(slot.iterations);
        Some((iterations, slot.stripes, u64::from(slot.material) * SECTOR))
    }

    /// Rounds of hashing behind the master key's digest.
    pub fn digest_iterations(&self) -> u32 {
        self.digest_iterations
    }
}

/// The offset in bytes at which data begin, of a header of which only the beginning is known yet.
pub fn payload_offset(begin: &[u8]) -> Result<u64> {
    let mut front = Front::new_zeroed();
    let len = begin.len().min(size_of::<Front>());
    front.as_mut_bytes()[..len].copy_from_slice(&begin[..len]);
    if front.magic == MAGIC && len >= offset_of!(Front, names) {
        check_version(front.version)?;
    }
    if front.magic != MAGIC || len < size_of::<Front>() {
        return Err(Error::corrupt("not a LUKS header").at_offset(0));
    }
    Ok(u64::from(front.payload_offset.get()) * SECTOR)
}

/// Whether a file that begins with `bytes` claims to be LUKS, version 1.
pub fn probe(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC) && bytes.get(MAGIC.len()..MAGIC.len() + 2) == Some(&[0, 1])
}

fn check_version(version: U16) -> Result<()> {
    match version.get() {
        VERSION => Ok(()),
        version => {
            let message = format!("LUKS version {version} is not supported");
            let offset = offset_of!(RawHeader, version) as u64;
            Err(Error::unsupported(message).at_offset(offset))
        }
    }
}

fn check_slot(slot: Slot, spec: Spec, area: usize) -> Result<Slot> {
    if slot.stripes != STRIPES {
        return Err(Error::corrupt(format!("{} stripes instead of {STRIPES}", slot.stripes)));
    }
    if slot.active && slot.iterations == 0 {
        return Err(Error::corrupt("a key slot without rounds of hashing"));
    }
    let range = slot.range(slot_bytes(spec.key_len()));
    if range.start < LEN || (slot.active && range.end > area) {
        return Err(Error::corrupt(format!(
            "the key material ({} bytes at {:#x}) lies in the header or past its area",
            range.len(),
            range.start
        )));
    }
    Ok(slot)
}

/// The text up to the first zero; empty when it is not UTF-8.
fn text(bytes: &[u8]) -> &str {
    let bytes = bytes.split(|&b| b == 0).next().unwrap_or_default();
    std::str::from_utf8(bytes).unwrap_or_default()
}

/// A name of a fixed length, which the names that are known fit into.
fn padded(name: &str) -> [u8; NAME] {
    let mut bytes = [0; NAME];
    let len = name.len().min(NAME);
    bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
    bytes
}
