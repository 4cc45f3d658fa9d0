//! LUKS version 1: a header that keeps a disk's master key under up to eight passphrases, and the
//! cipher that the key drives. "LUKS On-Disk Format Specification", version 1.2.3.
//!
//! It works on bytes that others read and write: it knows no file, no image format and no place
//! where a passphrase comes from. Keys and what is derived from passphrases are wiped when dropped.

mod cipher;
mod hash;
mod layout;
mod passphrase;
mod sectors;
mod split;

use std::time::Duration;

use zeroize::Zeroizing;

pub use self::cipher::{Cipher, Spec};
pub use self::hash::Hash;
use self::layout::{DIGEST, SALT, SECTOR, Slot, UUID};
pub use self::layout::{Header, SLOTS, payload_offset, probe};
pub use self::passphrase::Passphrase;
pub use self::sectors::{Place, Sectors};
use crate::error::{Error, Result};

/// Pieces that the master key is split into, so that wiping any of them loses it.
const STRIPES: u32 = 4000;
/// The key material of a slot begins at a multiple of this many sectors, the first behind the
/// header.
const SLOT_ALIGN: u32 = 8;
/// The fewest rounds that a passphrase is hashed for.
const MIN_ITERATIONS: u32 = 1000;
/// The most rounds that a slot may ask for: some seconds of work. More is not a slow machine's
/// choice but an attempt to make this one hang.
const MAX_ITERATIONS: u32 = 1 << 23;
/// The most rounds that all slots together may cost one try of a passphrase.
const MAX_WORK: u64 = 1 << 25;

/// What is said of a passphrase that opens none of a header's slots.
pub const NO_SLOT: &str = "the passphrase opens none of the image's key slots";

/// How a new header is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Cipher, mode and key length.
    pub spec: Spec,
    /// What passphrases and the key's pieces are hashed with.
    pub hash: Hash,
    /// How long a try of a passphrase is to take on this machine.
    pub iter_time: Duration,
}

impl Default for Options {
    /// AES-256 in XTS mode, SHA-256, two seconds: what QEMU chooses.
    fn default() -> Options {
        Options { spec: Spec::default(), hash: Hash::Sha256, iter_time: Duration::from_secs(2) }
    }
}

/// A header with all its key material, as it stands in a file.
pub struct Created {
    /// The bytes: header and key slots up to where data may begin.
    pub area: Vec<u8>,
    /// What they say.
    pub header: Header,
    /// The cipher of the new master key.
    pub cipher: Cipher,
}

impl Header {
    /// The length in bytes of the area that [`create`](Header::create) makes for `spec`.
    pub fn area_len(spec: Spec) -> u64 {
        u64::from(SLOT_ALIGN + SLOTS as u32 * slot_sectors(spec.key_len())) * SECTOR
    }

    /// A new master key, kept in the first slot under `passphrase`.
    pub fn create(passphrase: &[u8], options: &Options) -> Result<Created> {
        let Options { spec, hash, iter_time } = *options;
        let master = random_key(spec.key_len())?;
        let rounds = hash.rounds(spec.key_len(), iter_time, MAX_ITERATIONS);
        let digest_salt: [u8; SALT] = random()?;
        let digest_iterations = (rounds / 8).max(MIN_ITERATIONS);
        let mut digest = [0; DIGEST];
        hash.stretch(&master, &digest_salt, digest_iterations, &mut digest);
        let sectors = slot_sectors(spec.key_len());
        let slot = |n: u32| Slot {
            active: false,
            iterations: 0,
            salt: [0; SALT],
            material: SLOT_ALIGN + n * sectors,
            stripes: STRIPES,
        };
        let mut header = Header {
            spec,
            hash,
            payload: SLOT_ALIGN + SLOTS as u32 * sectors,
            digest,
            digest_salt,
            digest_iterations,
            uuid: new_uuid()?,
            slots: [0, 1, 2, 3, 4, 5, 6, 7].map(slot),
        };
        let mut area = vec![0; Header::area_len(spec) as usize];
        let cipher = Cipher::new(spec, master)?;
        header.add_key(&mut area, 0, &cipher, passphrase, iter_time)?;
        Ok(Created { area, header, cipher })
    }

    /// The cipher, when `passphrase` opens one of the slots. `area` is what the header was parsed
    /// from, with the key material.
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) when it opens none.
    pub fn unlock(&self, area: &[u8], passphrase: &[u8]) -> Result<Cipher> {
        self.find(area, passphrase)?
            .map(|(_, cipher)| cipher)
            .ok_or_else(|| Error::invalid(NO_SLOT))
    }

    /// The first slot that `passphrase` opens, and the cipher of the key in it.
    pub fn find(&self, area: &[u8], passphrase: &[u8]) -> Result<Option<(usize, Cipher)>> {
        let active = || self.slots.iter().enumerate().filter(|(_, slot)| slot.active);
        let work: u64 = active().map(|(_, slot)| u64::from(slot.iterations)).sum();
        let most = active().map(|(_, slot)| slot.iterations).max().unwrap_or(0);
        let most = most.max(self.digest_iterations);
        if most > MAX_ITERATIONS || work > MAX_WORK {
            return Err(Error::unsupported(format!(
                "the key slots ask for {most} rounds of hashing each, {work} in all; the limits \
                 are {MAX_ITERATIONS} and {MAX_WORK}"
            )));
        }
        for (index, slot) in active() {
            if let Some(master) = self.master_in(area, slot, passphrase)? {
                return Ok(Some((index, Cipher::new(self.spec, master)?)));
            }
        }
        Ok(None)
    }

    /// The slots that `passphrase` opens. They were within bounds when [`find`](Header::find) was
    /// called.
    pub fn opened_by(&self, area: &[u8], passphrase: &[u8]) -> Result<Vec<usize>> {
        let mut opened = Vec::new();
        for (index, slot) in self.slots.iter().enumerate().filter(|(_, slot)| slot.active) {
            if self.master_in(area, slot, passphrase)?.is_some() {
                opened.push(index);
            }
        }
        Ok(opened)
    }

    /// The master key, where `passphrase` opens the slot.
    fn master_in(
        &self,
        area: &[u8],
        slot: &Slot,
        passphrase: &[u8],
    ) -> Result<Option<Zeroizing<Vec<u8>>>> {
        let master = self.open_slot(area, slot, passphrase)?;
        let mut digest = [0; DIGEST];
        self.hash.stretch(&master, &self.digest_salt, self.digest_iterations, &mut digest);
        Ok((digest == self.digest).then_some(master))
    }

    /// Keeps the master key under one more passphrase, in slot `index`. Changes `area`: the header
    /// and the slot's key material.
    pub fn add_key(
        &mut self,
        area: &mut [u8],
        index: usize,
        cipher: &Cipher,
        passphrase: &[u8],
        iter_time: Duration,
    ) -> Result<()> {
        let slot = self.slots.get_mut(index).ok_or_else(|| no_slot(index))?;
        let master = cipher.master();
        let rounds = self.hash.rounds(master.len(), iter_time, MAX_ITERATIONS);
        slot.active = true;
        slot.iterations = rounds.max(MIN_ITERATIONS);
        slot.salt = random()?;
        let mut derived = Zeroizing::new(vec![0; master.len()]);
        self.hash.stretch(passphrase, &slot.salt, slot.iterations, &mut derived);
        let mut pieces = random_key(master.len() * slot.stripes as usize)?;
        split::split(self.hash, master, &mut pieces);
        let len = pieces.len().next_multiple_of(SECTOR as usize);
        pieces.resize(len, 0);
        Cipher::new(self.spec, derived)?.encrypt(0, &mut pieces)?;
        let material = area.get_mut(slot.range(len)).ok_or_else(too_short)?;
        material.copy_from_slice(&pieces);
        self.write(area)
    }

    /// Forgets the key in slot `index`: its material is overwritten. Refused for the last one, with
    /// which all data would be lost, unless `even_last`.
    pub fn erase_key(&mut self, area: &mut [u8], index: usize, even_last: bool) -> Result<()> {
        let others = self.slots.iter().enumerate().any(|(n, slot)| n != index && slot.active);
        let len = slot_bytes(self.spec.key_len());
        let slot = self.slots.get_mut(index).ok_or_else(|| no_slot(index))?;
        if slot.active && !others && !even_last {
            return Err(Error::invalid(format!(
                "slot {index} holds the only key: without it nothing on the disk can be read again"
            )));
        }
        let material = area.get_mut(slot.range(len)).ok_or_else(too_short)?;
        getrandom::fill(material).map_err(no_random)?;
        slot.active = false;
        slot.iterations = 0;
        slot.salt = [0; SALT];
        self.write(area)
    }

    /// The slots that hold a key.
    pub fn active_slots(&self) -> impl Iterator<Item = usize> + '_ {
        self.slots.iter().enumerate().filter(|(_, slot)| slot.active).map(|(index, _)| index)
    }

    fn open_slot(&self, area: &[u8], slot: &Slot, passphrase: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
        let key_len = self.spec.key_len();
        let mut derived = Zeroizing::new(vec![0; key_len]);
        self.hash.stretch(passphrase, &slot.salt, slot.iterations, &mut derived);
        let material = area.get(slot.range(slot_bytes(key_len))).ok_or_else(too_short)?;
        let mut pieces = Zeroizing::new(material.to_vec());
        Cipher::new(self.spec, derived)?.decrypt(0, &mut pieces)?;
        pieces.truncate(key_len * STRIPES as usize);
        Ok(split::merge(self.hash, &pieces, key_len))
    }
}

/// Changes key slots. `area` is a header with its key material, as it stands in a file; `store`
/// writes bytes at an offset within it, durably.
///
/// Key material is stored before the header that says it is there: stopped in between, the slots
/// that were not meant still open.
pub fn change(
    area: &[u8],
    change: impl FnOnce(&mut Header, &mut [u8]) -> Result<()>,
    store: impl Fn(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut header = Header::parse(area)?;
    let mut new = area.to_vec();
    change(&mut header, &mut new)?;
    let (begin, sector) = (SECTOR as usize * 2, SECTOR as usize);
    let mut at = begin;
    while at < new.len() {
        let differs = |at: &usize| area.get(*at..*at + sector) != new.get(*at..*at + sector);
        let run = (at..new.len()).step_by(sector).take_while(differs).count() * sector;
        let end = (at + run).min(new.len());
        if run > 0 {
            store(at as u64, &new[at..end])?;
        }
        at = end.max(at + sector);
    }
    store(0, &new[..begin.min(new.len())])
}

/// Bytes of a slot's key material, whole sectors.
fn slot_bytes(key_len: usize) -> usize {
    (key_len * STRIPES as usize).next_multiple_of(SECTOR as usize)
}

fn slot_sectors(key_len: usize) -> u32 {
    ((slot_bytes(key_len) / SECTOR as usize) as u32).next_multiple_of(SLOT_ALIGN)
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(no_random)?;
    Ok(bytes)
}

fn random_key(len: usize) -> Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(vec![0; len]);
    getrandom::fill(&mut bytes).map_err(no_random)?;
    Ok(bytes)
}

/// A random UUID, version 4, as text with a zero byte behind it.
fn new_uuid() -> Result<[u8; UUID]> {
    let mut bytes: [u8; 16] = random()?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let n = u128::from_be_bytes(bytes);
    let groups = [(96, 8), (80, 4), (64, 4), (48, 4), (0, 12)].map(|(shift, digits)| {
        let part = n >> shift & ((1 << (4 * digits)) - 1);
        format!("{part:0digits$x}")
    });
    let mut uuid = [0; UUID];
    uuid.iter_mut().zip(groups.join("-").bytes()).for_each(|(to, from)| *to = from);
    Ok(uuid)
}

fn no_random(error: getrandom::Error) -> Error {
    Error::io("no random numbers for a key", std::io::Error::other(error.to_string()))
}

fn no_slot(index: usize) -> Error {
    Error::invalid(format!("there is no key slot {index}: they are 0 to {}", SLOTS - 1))
}

fn too_short() -> Error {
    Error::corrupt("the LUKS header's key material reaches past its area")
}

#[cfg(test)]
mod tests;
