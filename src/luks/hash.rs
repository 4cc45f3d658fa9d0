//! The hashes that LUKS headers name, and the stretching of passphrases (PBKDF2, RFC 8018).

use std::time::{Duration, Instant};

use ripemd::Ripemd160;
use sha1::Sha1;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};

use crate::error::{Error, Result};

/// A hash function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    /// RIPEMD-160, the default of some distributions of old.
    Ripemd160,
    /// SHA-1, 160 bits.
    Sha1,
    /// SHA-224.
    Sha224,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl Hash {
    const ALL: [Hash; 6] =
        [Hash::Ripemd160, Hash::Sha1, Hash::Sha224, Hash::Sha256, Hash::Sha384, Hash::Sha512];

    /// The hash of this name. [`Unsupported`](crate::ErrorKind::Unsupported) for others.
    pub fn parse(name: &str) -> Result<Hash> {
        let found = Hash::ALL.into_iter().find(|hash| hash.name() == name);
        found.ok_or_else(|| Error::unsupported(format!("the hash '{name}'")))
    }

    /// Its name in a header.
    pub fn name(self) -> &'static str {
        match self {
            Hash::Ripemd160 => "ripemd160",
            Hash::Sha1 => "sha1",
            Hash::Sha224 => "sha224",
            Hash::Sha256 => "sha256",
            Hash::Sha384 => "sha384",
            Hash::Sha512 => "sha512",
        }
    }

    /// Bytes of a digest.
    pub(super) fn len(self) -> usize {
        match self {
            Hash::Ripemd160 | Hash::Sha1 => 20,
            Hash::Sha224 => 28,
            Hash::Sha256 => 32,
            Hash::Sha384 => 48,
            Hash::Sha512 => 64,
        }
    }

    /// The digest of `parts`, one after the other; `digest` takes as much of it as it has room for.
    pub(super) fn digest(self, parts: &[&[u8]], digest: &mut [u8]) {
        fn run<D: Digest>(parts: &[&[u8]], digest: &mut [u8]) {
            let mut state = D::new();
            parts.iter().for_each(|part| state.update(part));
            digest.iter_mut().zip(state.finalize().iter()).for_each(|(to, from)| *to = *from);
        }
        match self {
            Hash::Ripemd160 => run::<Ripemd160>(parts, digest),
            Hash::Sha1 => run::<Sha1>(parts, digest),
            Hash::Sha224 => run::<Sha224>(parts, digest),
            Hash::Sha256 => run::<Sha256>(parts, digest),
            Hash::Sha384 => run::<Sha384>(parts, digest),
            Hash::Sha512 => run::<Sha512>(parts, digest),
        }
    }

    /// PBKDF2 with HMAC: fills `key` after `rounds` rounds.
    pub(super) fn stretch(self, secret: &[u8], salt: &[u8], rounds: u32, key: &mut [u8]) {
        match self {
            Hash::Ripemd160 => {
                pbkdf2::pbkdf2_hmac::<Ripemd160>(secret, salt, rounds, key);
            }
            Hash::Sha1 => pbkdf2::pbkdf2_hmac::<Sha1>(secret, salt, rounds, key),
            Hash::Sha224 => pbkdf2::pbkdf2_hmac::<Sha224>(secret, salt, rounds, key),
            Hash::Sha256 => pbkdf2::pbkdf2_hmac::<Sha256>(secret, salt, rounds, key),
            Hash::Sha384 => pbkdf2::pbkdf2_hmac::<Sha384>(secret, salt, rounds, key),
            Hash::Sha512 => pbkdf2::pbkdf2_hmac::<Sha512>(secret, salt, rounds, key),
        }
    }

    /// How many rounds for a key of `len` bytes take about `time` here; at most `most`.
    pub(super) fn rounds(self, len: usize, time: Duration, most: u32) -> u32 {
        let mut key = vec![0; len];
        let mut rounds = 1u32 << 10;
        loop {
            let begin = Instant::now();
            self.stretch(b"passphrase", &[0; 32], rounds, &mut key);
            let took = begin.elapsed();
            if took >= Duration::from_millis(5) || rounds >= most / 2 {
                let scale = time.as_secs_f64() / took.as_secs_f64().max(1e-9);
                return (f64::from(rounds) * scale).min(f64::from(most)) as u32;
            }
            rounds *= 2;
        }
    }
}
