//! AES over whole sectors: the mode, and how a sector's number becomes its initialisation vector.
//!
//! XTS is IEEE 1619's tweak chain around [`aes`], a sector's 32 blocks at a time: that keeps the
//! processor's AES units busy, which a chain of single blocks does not.

use aes::cipher::common::BlockSizeUser;
use aes::cipher::consts::U16;
use aes::cipher::{
    Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockModeDecrypt, BlockModeEncrypt, InnerIvInit,
    KeyInit,
};
use aes::{Aes128, Aes192, Aes256};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::error::{Error, Result};

const SECTOR: usize = 512;
type Block = Array<u8, U16>;

/// How a sector is chained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Xts,
    Cbc,
}

/// What a sector's number becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vector {
    /// Its low 32 bits.
    Plain,
    /// All 64.
    Plain64,
    /// All 64, under a key that is the SHA-256 of the master key.
    EssivSha256,
}

/// Modes by their names in a header.
const MODES: [(&str, Mode, Vector); 5] = [
    ("xts-plain64", Mode::Xts, Vector::Plain64),
    ("xts-plain", Mode::Xts, Vector::Plain),
    ("cbc-essiv:sha256", Mode::Cbc, Vector::EssivSha256),
    ("cbc-plain64", Mode::Cbc, Vector::Plain64),
    ("cbc-plain", Mode::Cbc, Vector::Plain),
];

/// A cipher with its mode and key length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spec {
    name: &'static str,
    mode: Mode,
    vector: Vector,
    key_len: usize,
}

impl Default for Spec {
    /// AES-256 in XTS mode, two keys of 32 bytes.
    fn default() -> Spec {
        Spec { name: "xts-plain64", mode: Mode::Xts, vector: Vector::Plain64, key_len: 64 }
    }
}

impl Spec {
    /// The cipher of a header's two names, with keys of `key_len` bytes.
    /// [`Unsupported`](crate::ErrorKind::Unsupported), by name, for all but AES in the modes that
    /// QEMU makes.
    pub fn parse(cipher: &str, mode: &str, key_len: u32) -> Result<Spec> {
        let unsupported = || {
            Error::unsupported(format!(
                "the cipher {cipher}-{mode} with {key_len} bytes of key is not supported: AES is"
            ))
        };
        // Some name a hash that their vectors do without.
        let plain = mode.split_once(':').map_or(mode, |(plain, _)| plain);
        let known = MODES.iter().find(|(name, ..)| *name == mode || *name == plain);
        let &(name, mode, vector) = known.ok_or_else(unsupported)?;
        let fits = match mode {
            Mode::Xts => matches!(key_len, 32 | 48 | 64),
            Mode::Cbc => matches!(key_len, 16 | 24 | 32),
        };
        if cipher != "aes" || !fits {
            return Err(unsupported());
        }
        Ok(Spec { name, mode, vector, key_len: key_len as usize })
    }

    /// The two names in a header: cipher and mode.
    pub fn names(&self) -> (&'static str, &'static str) {
        ("aes", self.name)
    }

    /// Bytes of the master key.
    pub fn key_len(&self) -> usize {
        self.key_len
    }
}

/// Encrypts and decrypts sectors with one key, from many threads at once.
pub struct Cipher {
    sectors: Box<dyn Sectors>,
    vector: Vector,
    essiv: Option<Aes256>,
    key: Zeroizing<Vec<u8>>,
}

impl Cipher {
    /// The cipher of `spec` under `key`.
    pub fn new(spec: Spec, key: Zeroizing<Vec<u8>>) -> Result<Cipher> {
        let bad = || Error::invalid(format!("a key of {} bytes does not fit", key.len()));
        let essiv = match spec.vector {
            Vector::EssivSha256 => Some(Aes256::new(&Sha256::digest(&key[..]))),
            Vector::Plain | Vector::Plain64 => None,
        };
        let (first, second) = key.split_at(key.len() / 2);
        let sectors: Option<Box<dyn Sectors>> = match (spec.mode, key.len()) {
            (Mode::Xts, 32) => xts::<Aes128>(first, second),
            (Mode::Xts, 48) => xts::<Aes192>(first, second),
            (Mode::Xts, 64) => xts::<Aes256>(first, second),
            (Mode::Cbc, 16) => cbc::<Aes128>(&key),
            (Mode::Cbc, 24) => cbc::<Aes192>(&key),
            (Mode::Cbc, 32) => cbc::<Aes256>(&key),
            _ => None,
        };
        Ok(Cipher { sectors: sectors.ok_or_else(bad)?, vector: spec.vector, essiv, key })
    }

    /// What qcow2 had before LUKS: AES-128 in CBC mode under the passphrase itself, cut or filled
    /// with zeroes. Offsets are the guest's there.
    pub fn legacy(passphrase: &[u8]) -> Result<Cipher> {
        let mut key = Zeroizing::new(vec![0; 16]);
        key.iter_mut().zip(passphrase).for_each(|(to, from)| *to = *from);
        Cipher::new(Spec::parse("aes", "cbc-plain64", 16)?, key)
    }

    /// Encrypts whole sectors that are to stand at `offset` bytes.
    pub fn encrypt(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.each(offset, data, |vector, sector| self.sectors.encrypt(vector, sector))
    }

    /// Decrypts whole sectors that stood at `offset` bytes.
    pub fn decrypt(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.each(offset, data, |vector, sector| self.sectors.decrypt(vector, sector))
    }

    pub(super) fn master(&self) -> &[u8] {
        &self.key
    }

    fn each(&self, offset: u64, data: &mut [u8], run: impl Fn(Block, &mut [Block])) -> Result<()> {
        if !offset.is_multiple_of(SECTOR as u64) || !data.len().is_multiple_of(SECTOR) {
            return Err(Error::invalid(format!(
                "{} bytes at {offset:#x} are not whole sectors",
                data.len()
            )));
        }
        let first = offset / SECTOR as u64;
        for (number, sector) in (first..).zip(data.chunks_exact_mut(SECTOR)) {
            let mut vector = Block::default();
            let number = match self.vector {
                Vector::Plain => number & u64::from(u32::MAX),
                Vector::Plain64 | Vector::EssivSha256 => number,
            };
            vector.iter_mut().zip(number.to_le_bytes()).for_each(|(to, from)| *to = from);
            if let Some(essiv) = &self.essiv {
                essiv.encrypt_block(&mut vector);
            }
            run(vector, Block::slice_as_chunks_mut(sector).0);
        }
        Ok(())
    }
}

/// One sector at a time.
trait Sectors: Send + Sync {
    fn encrypt(&self, vector: Block, sector: &mut [Block]);
    fn decrypt(&self, vector: Block, sector: &mut [Block]);
}

/// A block cipher of 16 bytes.
trait Aes:
    KeyInit + BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync
{
}

impl<C> Aes for C where
    C: KeyInit
        + BlockSizeUser<BlockSize = U16>
        + BlockCipherEncrypt
        + BlockCipherDecrypt
        + Send
        + Sync
{
}

struct Xts<C> {
    data: C,
    tweak: C,
}

fn xts<C: Aes + 'static>(data: &[u8], tweak: &[u8]) -> Option<Box<dyn Sectors>> {
    let (data, tweak) = (C::new_from_slice(data).ok()?, C::new_from_slice(tweak).ok()?);
    Some(Box::new(Xts { data, tweak }))
}

impl<C: Aes> Xts<C> {
    /// The tweak of every block: the first encrypted, each next one the one before times x.
    fn tweaks(&self, mut vector: Block) -> [u128; SECTOR / 16] {
        self.tweak.encrypt_block(&mut vector);
        let mut tweak = u128::from_le_bytes(vector.into());
        [(); SECTOR / 16].map(|()| {
            let this = tweak;
            tweak = (this << 1) ^ if this >> 127 == 1 { 0x87 } else { 0 };
            this
        })
    }
}

fn xor_all(sector: &mut [Block], tweaks: &[u128]) {
    for (block, tweak) in sector.iter_mut().zip(tweaks) {
        let mixed = u128::from_le_bytes((*block).into()) ^ tweak;
        *block = mixed.to_le_bytes().into();
    }
}

impl<C: Aes> Sectors for Xts<C> {
    fn encrypt(&self, vector: Block, sector: &mut [Block]) {
        let tweaks = self.tweaks(vector);
        xor_all(sector, &tweaks);
        self.data.encrypt_blocks(sector);
        xor_all(sector, &tweaks);
    }

    fn decrypt(&self, vector: Block, sector: &mut [Block]) {
        let tweaks = self.tweaks(vector);
        xor_all(sector, &tweaks);
        self.data.decrypt_blocks(sector);
        xor_all(sector, &tweaks);
    }
}

struct Cbc<C>(C);

fn cbc<C: Aes + 'static>(key: &[u8]) -> Option<Box<dyn Sectors>> {
    Some(Box::new(Cbc(C::new_from_slice(key).ok()?)))
}

impl<C: Aes> Sectors for Cbc<C> {
    fn encrypt(&self, vector: Block, sector: &mut [Block]) {
        cbc::Encryptor::inner_iv_init(&self.0, &vector).encrypt_blocks(sector);
    }

    fn decrypt(&self, vector: Block, sector: &mut [Block]) {
        cbc::Decryptor::inner_iv_init(&self.0, &vector).decrypt_blocks(sector);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xts_agrees_with_the_standards_vector() {
        // IEEE 1619-2007, annex B, vector 4: 512 bytes counting up, sector 0.
        let hex = |s: &str| -> Vec<u8> {
            (0..s.len()).step_by(2).map(|i| u8::from_str_radix(&s[i..i + 2], 16).unwrap()).collect()
        };
        let key = hex("2718281828459045235360287471352631415926535897932384626433832795");
        let cipher =
            Cipher::new(Spec::parse("aes", "xts-plain64", 32).unwrap(), key.into()).unwrap();
        let mut data: Vec<u8> = (0..512).map(|i| i as u8).collect();
        cipher.encrypt(0, &mut data).unwrap();
        assert_eq!(data[..16], hex("27a7479befa1d476489f308cd4cfa6e2"));
        cipher.decrypt(0, &mut data).unwrap();
        assert!(data.iter().enumerate().all(|(i, &b)| b == i as u8));
    }

    #[test]
    fn a_hash_that_vectors_do_without_is_passed_over() {
        let spec = Spec::parse("aes", "cbc-plain64:md5", 16).unwrap();
        assert_eq!(spec.names(), ("aes", "cbc-plain64"));
    }

    #[test]
    fn every_sector_is_encrypted_by_its_own_number() {
        for (name, _, vector) in MODES {
            let spec = Spec::parse("aes", name, 32).unwrap();
            let cipher = Cipher::new(spec, vec![5; 32].into()).unwrap();
            let at = (1u64 << 32) * 512;
            let mut data = vec![9; 1024];
            cipher.encrypt(at, &mut data).unwrap();
            assert_ne!(data[..512], data[512..], "{name}");
            let mut low = vec![9; 512];
            cipher.encrypt(0, &mut low).unwrap();
            assert_eq!(low == data[..512], vector == Vector::Plain, "{name}");
            cipher.decrypt(at + 512, &mut data[512..]).unwrap();
            cipher.decrypt(at, &mut data[..512]).unwrap();
            assert_eq!(data, [9; 1024], "{name}");
        }
    }

    #[test]
    fn what_is_not_whole_sectors_or_not_aes_is_refused() {
        let cipher = Cipher::legacy(b"secret").unwrap();
        assert!(cipher.encrypt(256, &mut [0; 512]).is_err());
        assert!(cipher.decrypt(512, &mut [0; 500]).is_err());
        for (cipher, mode, len) in [
            ("serpent", "xts-plain64", 64),
            ("aes", "xts-plain64", 40),
            ("aes", "cbc-essiv:sha1", 32),
        ] {
            let error = Spec::parse(cipher, mode, len).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::Unsupported);
        }
    }
}
