//! Encrypted data: LUKS by host offsets, and the AES that qcow2 had before it by guest offsets.
//!
//! Sectors are the unit: a write of a part of one reads the rest of it first. Guests' memory is
//! never encrypted or decrypted in place. Specification: qcow2, "Encryption" and "Full disk
//! encryption header pointer".

use std::io::{IoSlice, IoSliceMut};
use std::sync::{PoisonError, RwLock};

use byteorder::{BigEndian, ByteOrder};

use super::data::Data;
use super::extension::CRYPTO_HEADER;
use super::header::Header;
use crate::addr::{GuestOffset, HostOffset, Unit};
use crate::block::{total, total_mut, window, window_mut};
use crate::error::{Error, ErrorKind, Result};
use crate::luks::{self, Cipher, Passphrase};
use crate::storage::Storage;

/// `crypt_method` of the old AES.
pub(super) const AES: u32 = 1;
/// `crypt_method` of LUKS.
pub(super) const LUKS: u32 = 2;
/// The unit of encryption.
const SECTOR: Unit = Unit::from_bits(9);
/// Bytes that are encrypted or decrypted at a time.
const CHUNK: u64 = 1 << 20;
/// The longest LUKS header with its key material: several times what any cipher needs.
pub(super) const MAX_AREA: u64 = 16 << 20;

/// What encrypts an image's data.
pub(super) struct Crypt {
    /// `None` where no passphrase was given: the tables are readable, the data are not.
    cipher: Option<Cipher>,
    /// A sector's number is the guest's, not the host's.
    by_guest: bool,
    /// Held exclusively by writes of parts of sectors, shared by all others: what such a write
    /// has read around its bytes must not go stale.
    whole: RwLock<()>,
}

impl Crypt {
    pub fn luks(cipher: Cipher) -> Crypt {
        Crypt::new(Some(cipher), false)
    }

    pub fn legacy(cipher: Cipher) -> Crypt {
        Crypt::new(Some(cipher), true)
    }

    /// Encryption whose key is not known.
    pub fn locked() -> Crypt {
        Crypt::new(None, false)
    }

    fn new(cipher: Option<Cipher>, by_guest: bool) -> Crypt {
        Crypt { cipher, by_guest, whole: RwLock::new(()) }
    }

    /// What encrypts the image with `header`; `None` for a plain one.
    pub fn open(
        storage: &dyn Storage,
        header: &Header,
        passphrase: Option<&Passphrase>,
    ) -> Result<Option<Crypt>> {
        let by_guest = match header.crypt_method {
            0 => return Ok(None),
            method => method == AES,
        };
        let cipher = match passphrase {
            None => None,
            Some(passphrase) if by_guest => Some(Cipher::legacy(passphrase.bytes())?),
            Some(passphrase) => {
                let (at, area) = read_area(storage, header)?;
                let parsed = luks::Header::parse(&area)
                    .and_then(|header| header.unlock(&area, passphrase.bytes()));
                Some(parsed.map_err(|e| shifted(e, at))?)
            }
        };
        Ok(Some(Crypt::new(cipher, by_guest)))
    }

    fn cipher(&self) -> Result<&Cipher> {
        self.cipher.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::Denied, "the image is encrypted, and no passphrase was given")
        })
    }

    /// Fails where the key is not known.
    pub fn check_unlocked(&self) -> Result<()> {
        self.cipher().map(|_| ())
    }

    fn number(&self, host: u64, guest: u64) -> u64 {
        if self.by_guest { guest } else { host }
    }

    /// Reads and decrypts.
    pub fn read(
        &self,
        data: &Data,
        host: HostOffset,
        guest: GuestOffset,
        bufs: &mut [IoSliceMut<'_>],
    ) -> Result<()> {
        let cipher = self.cipher()?;
        let mut done = 0;
        let len = total_mut(bufs);
        while done < len {
            let piece = Piece::cut(host.0 + done, guest.0 + done, len - done)?;
            let mut bounce = vec![0; piece.padded as usize];
            data.read_stored(HostOffset(piece.host), &mut [IoSliceMut::new(&mut bounce)])?;
            cipher.decrypt(self.number(piece.host, piece.guest), &mut bounce)?;
            let mut from = &bounce[piece.skip as usize..];
            for buf in &mut window_mut(bufs, done, piece.len) {
                let (now, rest) = from.split_at(buf.len().min(from.len()));
                buf.copy_from_slice(now);
                from = rest;
            }
            done += piece.len;
        }
        Ok(())
    }

    /// Encrypts and writes.
    pub fn write(
        &self,
        data: &Data,
        host: HostOffset,
        guest: GuestOffset,
        bufs: &[IoSlice<'_>],
    ) -> Result<()> {
        let cipher = self.cipher()?;
        let len = total(bufs);
        let whole = SECTOR.aligned(host.0) && SECTOR.aligned(len);
        let _shared = whole.then(|| self.whole.read().unwrap_or_else(PoisonError::into_inner));
        let _alone = (!whole).then(|| self.whole.write().unwrap_or_else(PoisonError::into_inner));
        let mut done = 0;
        while done < len {
            let piece = Piece::cut(host.0 + done, guest.0 + done, len - done)?;
            let mut bounce = vec![0; piece.padded as usize];
            for sector in piece.partial() {
                let part = &mut bounce[sector as usize..(sector + SECTOR.bytes()) as usize];
                let bufs = &mut [IoSliceMut::new(&mut *part)];
                data.read_stored(HostOffset(piece.host + sector), bufs)?;
                cipher.decrypt(self.number(piece.host + sector, piece.guest + sector), part)?;
            }
            let mut at = piece.skip as usize;
            for buf in &window(bufs, done, piece.len) {
                bounce[at..at + buf.len()].copy_from_slice(buf);
                at += buf.len();
            }
            cipher.encrypt(self.number(piece.host, piece.guest), &mut bounce)?;
            data.write_stored(HostOffset(piece.host), &[IoSlice::new(&bounce)])?;
            done += piece.len;
        }
        Ok(())
    }
}

/// A part of a request that is encrypted at once, and the whole sectors around it.
struct Piece {
    /// The first sector, on the host and for the guest.
    host: u64,
    guest: u64,
    /// Bytes before the request's in the first sector.
    skip: u64,
    /// Bytes of the request.
    len: u64,
    /// Bytes of the sectors.
    padded: u64,
}

impl Piece {
    fn cut(host: u64, guest: u64, len: u64) -> Result<Piece> {
        let skip = SECTOR.within(host);
        if SECTOR.within(guest) != skip {
            return Err(Error::corrupt("a sector's guest and host offset differ").at_offset(host));
        }
        let len = len.min(CHUNK - skip);
        let padded = SECTOR.ceil(skip + len);
        Ok(Piece { host: host - skip, guest: guest - skip, skip, len, padded })
    }

    /// The sectors, as offsets within the piece, of which the request has a part only.
    fn partial(&self) -> impl Iterator<Item = u64> {
        let end = self.skip + self.len;
        let first = (self.skip != 0).then_some(0);
        let last = (!SECTOR.aligned(end)).then(|| SECTOR.floor(end));
        first.into_iter().chain(last.filter(|at| first != Some(*at)))
    }
}

/// Offset and length of the LUKS header that `header` names.
pub(super) fn area_place(header: &Header) -> Option<(u64, u64)> {
    let data = header.extension(CRYPTO_HEADER).filter(|data| data.len() >= 16)?;
    Some((BigEndian::read_u64(data), BigEndian::read_u64(&data[8..])))
}

/// The LUKS header of an image with its key material, and where it stands.
fn read_area(storage: &dyn Storage, header: &Header) -> Result<(u64, Vec<u8>)> {
    let (at, len) = area_place(header).ok_or_else(|| {
        Error::corrupt("the image is encrypted (LUKS) but says not where its key is")
    })?;
    if !header.cluster.aligned(at) || at == 0 {
        let message = format!(
            "Encryption header offset '{at}' is not a multiple of cluster size '{}'",
            header.cluster.bytes()
        );
        return Err(Error::corrupt(message));
    }
    let inside = at.checked_add(len).is_some_and(|end| end <= storage.len().unwrap_or(0));
    if len > MAX_AREA || !inside {
        let message = format!("the encryption header of {len} bytes does not fit into the file");
        return Err(Error::corrupt(message).at_offset(at));
    }
    let mut area = vec![0; len as usize];
    storage.read_exact_at(at, &mut area).map_err(|e| e.at_offset(at))?;
    Ok((at, area))
}

/// The error with its offset counted from the file's beginning, not the LUKS header's.
fn shifted(error: Error, at: u64) -> Error {
    match error.offset() {
        Some(offset) => Error::new(error.kind(), error.message()).at_offset(at + offset),
        None => error,
    }
}
