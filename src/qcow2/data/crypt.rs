//! Encrypted data: LUKS by host offsets, and the AES that qcow2 had before it by guest offsets.
//!
//! Specification: qcow2, "Encryption" and "Full disk encryption header pointer".

use std::io::{IoSlice, IoSliceMut};

use zerocopy::byteorder::big_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::addr::{GuestOffset, HostOffset};
use crate::error::{Error, ErrorKind, Result};
use crate::luks::{self, Cipher, Passphrase, Place, Sectors};
use crate::qcow2::data::Data;
use crate::qcow2::header::Header;
use crate::qcow2::header::extension::CRYPTO_HEADER;
use crate::storage::Storage;

/// `crypt_method` of the old AES.
pub(in crate::qcow2) const AES: u32 = 1;
/// `crypt_method` of LUKS.
pub(in crate::qcow2) const LUKS: u32 = 2;
/// The longest LUKS header with its key material: several times what any cipher needs.
pub(in crate::qcow2) const MAX_AREA: u64 = 16 << 20;

/// What encrypts an image's data.
pub(in crate::qcow2) struct Crypt {
    /// `None` where no passphrase was given: the tables are readable, the data are not.
    sectors: Option<Sectors>,
    /// A sector's number is the guest's, not the host's.
    by_guest: bool,
}

impl Crypt {
    pub fn luks(cipher: Cipher) -> Crypt {
        Crypt::new(Some(cipher), false)
    }

    pub fn legacy(cipher: Cipher) -> Crypt {
        Crypt::new(Some(cipher), true)
    }

    fn new(cipher: Option<Cipher>, by_guest: bool) -> Crypt {
        Crypt { sectors: cipher.map(Sectors::new), by_guest }
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
        if !by_guest && area_place(header).is_none() {
            return Err(no_header());
        }
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

    fn sectors(&self) -> Result<&Sectors> {
        self.sectors.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::Denied, "the image is encrypted, and no passphrase was given")
        })
    }

    /// Fails where the key is not known.
    pub fn check_unlocked(&self) -> Result<()> {
        self.sectors().map(|_| ())
    }

    fn place(&self, host: HostOffset, guest: GuestOffset) -> Place {
        Place { stored: host.0, counted: if self.by_guest { guest.0 } else { host.0 } }
    }

    /// Reads and decrypts.
    pub fn read(
        &self,
        data: &Data,
        host: HostOffset,
        guest: GuestOffset,
        bufs: &mut [IoSliceMut<'_>],
    ) -> Result<()> {
        self.sectors()?.read(self.place(host, guest), bufs, &|at, bytes| {
            data.read_stored(HostOffset(at), &mut [IoSliceMut::new(bytes)])
        })
    }

    /// Encrypts and writes.
    pub fn write(
        &self,
        data: &Data,
        host: HostOffset,
        guest: GuestOffset,
        bufs: &[IoSlice<'_>],
    ) -> Result<()> {
        let fetch = |at: u64, bytes: &mut [u8]| {
            data.read_stored(HostOffset(at), &mut [IoSliceMut::new(bytes)])
        };
        let store =
            |at: u64, bytes: &[u8]| data.write_stored(HostOffset(at), &[IoSlice::new(bytes)]);
        self.sectors()?.write(self.place(host, guest), bufs, &fetch, &store)
    }
}

/// Offset and length of the LUKS header that `header` names.
pub(in crate::qcow2) fn area_place(header: &Header) -> Option<(u64, u64)> {
    let (place, _) = AreaPlace::ref_from_prefix(header.extension(CRYPTO_HEADER)?).ok()?;
    Some((place.offset.get(), place.length.get()))
}

/// The data of the header extension for a LUKS header of `len` bytes at `offset`.
pub(in crate::qcow2) fn area_extension(offset: u64, len: u64) -> Vec<u8> {
    AreaPlace { offset: offset.into(), length: len.into() }.as_bytes().to_vec()
}

/// "Full disk encryption header pointer".
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct AreaPlace {
    offset: U64,
    length: U64,
}

const _: () = assert!(size_of::<AreaPlace>() == 16);

/// The LUKS header of an image with its key material, and where it stands.
pub(super) fn read_area(storage: &dyn Storage, header: &Header) -> Result<(u64, Vec<u8>)> {
    let (at, len) = area_place(header).ok_or_else(no_header)?;
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

fn no_header() -> Error {
    Error::corrupt(format!("Missing CRYPTO header for crypt method {LUKS}"))
}

/// The error with its offset counted from the file's beginning, not the LUKS header's.
pub(super) fn shifted(error: Error, at: u64) -> Error {
    match error.offset() {
        Some(offset) => Error::new(error.kind(), error.message()).at_offset(at + offset),
        None => error,
    }
}
