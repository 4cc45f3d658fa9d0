//! Content digests (OCI image specification, descriptor.md): told apart from what lies.

use std::fmt;
use std::io::{self, Read};

use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// A sha256 of some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Of `bytes`.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(Sha256::digest(bytes).into())
    }

    /// Reads `sha256:…`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) names another algorithm.
    pub fn parse(text: &str) -> Result<Digest> {
        let Some(hex) = text.strip_prefix("sha256:") else {
            return Err(Error::unsupported(format!("the digest '{text}' is no sha256")));
        };
        let mut bytes = [0; 32];
        let damaged = || Error::corrupt(format!("'{text}' is no digest"));
        if hex.len() != 64 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(damaged());
        }
        for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
            let pair = hex.get(at..at + 2).ok_or_else(damaged)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| damaged())?;
        }
        Ok(Digest(bytes))
    }

    /// The 64 digits.
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The id of a chain of layers: of those below, and the next one's digest (OCI image specification, config.md,
    /// ChainID).
    pub fn chain(below: Option<Digest>, layer: Digest) -> Digest {
        match below {
            None => layer,
            Some(below) => Digest::of(format!("{below} {layer}").as_bytes()),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

/// A reader that knows in the end whether it was what it was said to be.
pub struct Verified<R> {
    input: R,
    what: String,
    hash: Sha256,
    expected: Digest,
    /// Bytes that may still come.
    left: u64,
}

impl<R: Read> Verified<R> {
    /// `input`, which is `what` for messages, and said to have that digest and at most `most` bytes.
    pub fn new(input: R, what: impl Into<String>, expected: Digest, most: u64) -> Verified<R> {
        Verified { input, what: what.into(), hash: Sha256::new(), expected, left: most }
    }
}

impl<R: Read> Read for Verified<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let read = self.input.read(buffer)?;
        let lie = |how: &str| {
            let text = format!("{} {how} than its digest says ({})", self.what, self.expected);
            io::Error::new(io::ErrorKind::InvalidData, text)
        };
        if read == 0 {
            let found = Digest(self.hash.clone().finalize().into());
            return if found == self.expected { Ok(0) } else { Err(lie("holds something else")) };
        }
        self.left = self.left.checked_sub(read as u64).ok_or_else(|| lie("is longer"))?;
        self.hash.update(buffer.get(..read).unwrap_or_default());
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_read_and_written() {
        let digest = Digest::of(b"");
        let text = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(digest.to_string(), text);
        assert_eq!(Digest::parse(text).unwrap(), digest);
        for bad in ["sha512:00", "sha256:00", &text.to_uppercase(), &text.replace("e3", "g3")] {
            assert!(Digest::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_lie_is_found_at_the_end_and_a_flood_before_it() {
        let read = |bytes: &[u8], most| {
            let mut all = Vec::new();
            let digest = Digest::of(b"right");
            Verified::new(bytes, "a layer", digest, most).read_to_end(&mut all)
        };
        assert_eq!(read(b"right", 5).unwrap(), 5);
        assert!(read(b"wrong", 5).unwrap_err().to_string().contains("holds something else"));
        assert!(read(b"right", 4).unwrap_err().to_string().contains("is longer"));
    }
}
