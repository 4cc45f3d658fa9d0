//! The header as it stands in the file: 592 bytes, big-endian. Section 2.3 of the specification.

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
const LEN: usize = 592;
const FIRST_SLOT: usize = 208;
const SLOT: usize = 48;
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
        let mut reader = Reader { bytes, at: 0 };
        if reader.array()? != MAGIC {
            return Err(Error::corrupt("not a LUKS header").at_offset(0));
        }
        let version = u16::from_be_bytes(reader.array()?);
        if version != 1 {
            return Err(Error::unsupported(format!("LUKS version {version}")).at_offset(6));
        }
        let (cipher, mode, hash): ([u8; 32], [u8; 32], [u8; 32]) =
            (reader.array()?, reader.array()?, reader.array()?);
        let (payload, key_len) = (reader.number()?, reader.number()?);
        let spec =
            Spec::parse(text(&cipher), text(&mode), key_len).map_err(|error| error.at_offset(8))?;
        let hash = Hash::parse(text(&hash)).map_err(|error| error.at_offset(72))?;
        let mut header = Header {
            spec,
            hash,
            payload,
            digest: reader.array()?,
            digest_salt: reader.array()?,
            digest_iterations: reader.number()?,
            uuid: reader.array()?,
            slots: [Slot::default(); SLOTS],
        };
        for (index, slot) in header.slots.iter_mut().enumerate() {
            *slot = parse_slot(&mut reader)
                .and_then(|slot| check_slot(slot, spec, area.len()))
                .map_err(|error| error.at_offset((FIRST_SLOT + SLOT * index) as u64))?;
        }
        header.check_overlap()?;
        if header.digest_iterations == 0 {
            return Err(Error::corrupt("the key's digest has no rounds").at_offset(164));
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
        let mut bytes = Vec::with_capacity(LEN);
        bytes.extend(MAGIC);
        bytes.extend(1u16.to_be_bytes());
        for name in [cipher, mode, self.hash.name()] {
            let end = bytes.len() + 32;
            bytes.extend(name.bytes());
            bytes.resize(end, 0);
        }
        bytes.extend(self.payload.to_be_bytes());
        bytes.extend((self.spec.key_len() as u32).to_be_bytes());
        bytes.extend(self.digest);
        bytes.extend(self.digest_salt);
        bytes.extend(self.digest_iterations.to_be_bytes());
        bytes.extend(self.uuid);
        for slot in &self.slots {
            bytes.extend(if slot.active { ENABLED } else { DISABLED }.to_be_bytes());
            bytes.extend(slot.iterations.to_be_bytes());
            bytes.extend(slot.salt);
            bytes.extend(slot.material.to_be_bytes());
            bytes.extend(slot.stripes.to_be_bytes());
        }
        let place = area.get_mut(..bytes.len()).ok_or_else(super::too_short)?;
        place.copy_from_slice(&bytes);
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
    /// Where the header says it.
    const PAYLOAD: usize = 104;
    let bytes = begin.get(PAYLOAD..PAYLOAD + 4).filter(|_| begin.starts_with(&MAGIC));
    let bytes: [u8; 4] = bytes
        .and_then(|b| b.try_into().ok())
        .ok_or_else(|| Error::corrupt("not a LUKS header").at_offset(0))?;
    Ok(u64::from(u32::from_be_bytes(bytes)) * SECTOR)
}

/// Whether a file that begins with `bytes` claims to be LUKS, version 1.
pub fn probe(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC) && bytes.get(MAGIC.len()..MAGIC.len() + 2) == Some(&[0, 1])
}

fn parse_slot(reader: &mut Reader<'_>) -> Result<Slot> {
    let state = reader.number()?;
    let active = match state {
        ENABLED => true,
        DISABLED => false,
        _ => return Err(Error::corrupt(format!("a key slot in state {state:#x}"))),
    };
    Ok(Slot {
        active,
        iterations: reader.number()?,
        salt: reader.array()?,
        material: reader.number()?,
        stripes: reader.number()?,
    })
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

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.bytes.get(self.at..self.at + N).and_then(|b| b.try_into().ok());
        self.at += N;
        bytes.ok_or_else(|| Error::corrupt("the LUKS header ends too early"))
    }

    fn number(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }
}
