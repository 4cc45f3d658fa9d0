//! LUKS as a format of its own: a header with key slots, and behind it the disk, encrypted sector by
//! sector. "LUKS On-Disk Format Specification", version 1.2.3.

use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::addr::{GuestOffset, HostOffset, Unit};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{self, Details, Extent, Mapping};
use crate::luks::{self, Header, Options, Passphrase, Place, Sectors};
use crate::storage::Storage;

/// The longest header with its key material: several times what any cipher needs.
const MAX_AREA: u64 = 16 << 20;
/// Zeroes that are encrypted and written at a time.
const CHUNK: u64 = 1 << 20;
/// Disks consist of whole sectors.
const SECTOR: u64 = 512;

/// A LUKS image.
pub struct Luks {
    storage: Arc<dyn Storage>,
    /// Where the disk begins in the file.
    payload: u64,
    header: RwLock<Header>,
    /// `None` where no passphrase was given: the header is readable, the disk is not.
    sectors: Option<Sectors>,
    size: AtomicU64,
    read_only: bool,
}

/// Makes an image of a disk of `size` bytes in `storage`, whatever that holds. What the disk
/// holds is noise.
pub fn create(
    storage: &dyn Storage,
    size: u64,
    passphrase: &Passphrase,
    options: &Options,
) -> Result<()> {
    let made = Header::create(passphrase.bytes(), options)?;
    let len = (made.area.len() as u64).checked_add(size);
    let len = len.ok_or_else(|| Error::invalid("Image size is too large"))?;
    if storage.len()? != len {
        storage.set_len(len)?;
    }
    if storage.is_fixed() {
        storage.write_zeroes(0, made.area.len() as u64)?;
    }
    // Slots without a key, and what lies between, stay holes.
    for (number, piece) in made.area.chunks(CHUNK as usize / 256).enumerate() {
        if piece.iter().any(|b| *b != 0) {
            storage.write_all_at(number as u64 * (CHUNK / 256), piece)?;
        }
    }
    storage.sync()
}

impl Luks {
    /// Opens the image in `storage`. Without a passphrase, all that needs none works.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where the passphrase opens no key slot; [`ErrorKind::Corrupt`] and
    /// [`ErrorKind::Unsupported`] as [`Header::parse`].
    pub fn open(
        storage: Arc<dyn Storage>,
        read_only: bool,
        passphrase: Option<&Passphrase>,
    ) -> Result<Luks> {
        let area = read_area(&*storage)?;
        let header = Header::parse(&area)?;
        let payload = header.payload_offset();
        let len = storage.len()?;
        if payload > len {
            let message = format!("the disk begins at {payload}, past the end of the file");
            return Err(Error::corrupt(message).at_offset(104));
        }
        let sectors = match passphrase {
            None => None,
            Some(words) => Some(Sectors::new(header.unlock(&area, words.bytes())?)),
        };
        let size = AtomicU64::new((len - payload) / SECTOR * SECTOR);
        Ok(Luks { storage, payload, header: RwLock::new(header), sectors, size, read_only })
    }

    /// What the header says.
    pub fn header(&self) -> Header {
        self.header.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the key slots, durably; see [`luks::change`].
    pub fn change_keys(
        &self,
        change: impl FnOnce(&mut Header, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        self.check_writable()?;
        let area = read_area(&*self.storage)?;
        luks::change(&area, change, |offset, bytes| {
            self.storage.write_all_at(offset, bytes).and_then(|()| self.storage.sync())
        })?;
        let header = Header::parse(&read_area(&*self.storage)?)?;
        *self.header.write().unwrap_or_else(PoisonError::into_inner) = header;
        Ok(())
    }

    fn sectors(&self) -> Result<&Sectors> {
        self.sectors.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::Denied, "the image is encrypted, and no passphrase was given")
        })
    }

    fn check_writable(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the image is open for reading only"));
        }
        Ok(())
    }

    fn place(&self, at: u64) -> Place {
        Place { stored: self.payload + at, counted: at }
    }

    fn write(&self, at: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.check_writable()?;
        let fetch = |at: u64, bytes: &mut [u8]| self.storage.read_exact_at(at, bytes);
        let store = |at: u64, bytes: &[u8]| self.storage.write_all_at(at, bytes);
        self.sectors()?.write(self.place(at), bufs, &fetch, &store)
    }
}

/// The header with its key material: what stands before the disk.
fn read_area(storage: &dyn Storage) -> Result<Vec<u8>> {
    /// The header, and some more.
    const FIRST: u64 = 4096;
    let len = storage.len()?;
    let mut area = vec![0; FIRST.min(len) as usize];
    storage.read_exact_at(0, &mut area)?;
    let payload = match luks::payload_offset(&area)? {
        // The disk stands in another file.
        0 => len.min(MAX_AREA),
        payload => payload.min(len),
    };
    if payload > MAX_AREA {
        let message = format!("a LUKS header with its keys of {payload} bytes");
        return Err(Error::unsupported(message).at_offset(104));
    }
    area.resize(payload.max(FIRST.min(len)) as usize, 0);
    storage.read_exact_at(0, &mut area)?;
    Ok(area)
}

impl image::Image for Luks {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// There are no clusters; this is the unit in which others account for them.
    fn cluster(&self) -> Unit {
        Unit::from_bits(16)
    }

    fn block_size(&self) -> Option<u64> {
        None
    }

    fn granularity(&self) -> Unit {
        Unit::from_bits(0)
    }

    fn encrypted(&self) -> bool {
        true
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        let host = HostOffset(self.payload + at.0);
        let mapping = Mapping::Data { host, exclusive: !self.read_only };
        Ok(Extent { start: at, len: len.min(self.size().saturating_sub(at.0)), mapping })
    }

    fn read(&self, extent: &Extent, at: GuestOffset, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let _ = extent;
        let fetch = |at: u64, bytes: &mut [u8]| self.storage.read_exact_at(at, bytes);
        self.sectors()?.read(self.place(at.0), bufs, &fetch)
    }

    fn overwrite(&self, extent: &Extent, at: GuestOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        let _ = extent;
        self.write(at.0, bufs)
    }

    /// Holes would read as noise: zeroes are written.
    fn zero(&self, at: GuestOffset, len: u64, _unmap: bool) -> Result<()> {
        let zeroes = vec![0; len.min(CHUNK) as usize];
        let mut done = 0;
        while done < len {
            let part = &zeroes[..(len - done).min(CHUNK) as usize];
            self.write(at.0 + done, &[IoSlice::new(part)])?;
            done += part.len() as u64;
        }
        Ok(())
    }

    fn discard(&self, _at: GuestOffset, _len: u64, expose: bool) -> Result<()> {
        self.check_writable()?;
        if expose {
            return Err(Error::unsupported("a LUKS image has nothing that could show through"));
        }
        Ok(())
    }

    fn details(&self) -> Option<Details> {
        Some(Details { encryption: Some("luks"), ..Details::default() })
    }

    fn flush(&self) -> Result<()> {
        if self.read_only { Ok(()) } else { self.storage.sync() }
    }

    fn resize_over(&self, size: u64, _clear: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.check_writable()?;
        let len = self.payload.checked_add(size);
        self.storage.resize(len.ok_or_else(|| Error::invalid("Image size is too large"))?)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::image::Image as _;
    use crate::storage::MemoryStorage;

    fn words(text: &str) -> Passphrase {
        Passphrase::new(text.as_bytes().to_vec().into())
    }

    fn made() -> Arc<dyn Storage> {
        let storage = Arc::new(MemoryStorage::default());
        let options = Options { iter_time: Duration::from_millis(1), ..Options::default() };
        create(&*storage, 1 << 20, &words("first"), &options).unwrap();
        storage
    }

    #[test]
    fn what_is_written_comes_back_under_any_passphrase_of_its_slots() {
        let storage = made();
        let image = Luks::open(storage.clone(), false, Some(&words("first"))).unwrap();
        assert_eq!(image.size(), 1 << 20);
        let extent = image.map(GuestOffset(0), 1 << 20).unwrap();
        image.overwrite(&extent, GuestOffset(700), &[IoSlice::new(&[5; 900])]).unwrap();
        image
            .change_keys(|header, area| {
                let cipher = header.unlock(area, b"first")?;
                header.add_key(area, 3, &cipher, b"second", Duration::from_millis(1))?;
                header.erase_key(area, 0, false)
            })
            .unwrap();
        assert!(Luks::open(storage.clone(), true, Some(&words("first"))).is_err());
        let image = Luks::open(storage, true, Some(&words("second"))).unwrap();
        let mut got = [0; 900];
        image.read(&extent, GuestOffset(700), &mut [IoSliceMut::new(&mut got)]).unwrap();
        assert_eq!(got, [5; 900]);
    }

    #[test]
    fn a_file_that_ends_before_the_disk_or_inside_the_keys_is_refused() {
        for len in [0, 7, 592, 4096, 100_000] {
            let storage = made();
            storage.set_len(len).unwrap();
            assert!(Luks::open(storage, true, Some(&words("first"))).is_err(), "{len}");
        }
    }

    #[test]
    fn without_passphrase_the_header_is_all_there_is() {
        let image = Luks::open(made(), true, None).unwrap();
        assert_eq!(image.header().active_slots().collect::<Vec<_>>(), [0]);
        let extent = image.map(GuestOffset(0), 512).unwrap();
        let failed = image.read(&extent, GuestOffset(0), &mut [IoSliceMut::new(&mut [0; 512])]);
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::Denied);
    }
}
