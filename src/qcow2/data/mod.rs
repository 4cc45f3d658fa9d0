//! Where the guest's bytes stand: in the image's own file or in an external data file, plain or
//! encrypted.
//!
//! It knows host offsets and no mapping. Specification: qcow2, "External data file" (incompatible
//! bit 2, autoclear bit 1) and "Encryption".

pub(in crate::qcow2) mod crypt;
pub(in crate::qcow2) mod inflated;
mod keys;
mod read;

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::addr::{GuestOffset, HostOffset};
use crate::block::{fill_zero, total, total_mut, window_mut};
use crate::error::{Error, Result};
use crate::qcow2::data::crypt::Crypt;
use crate::qcow2::header::Header;
use crate::qcow2::step;
use crate::storage::Storage;

/// The file that holds the guest's bytes, and how they are written there.
pub(in crate::qcow2) struct Data {
    storage: Arc<dyn Storage>,
    placing: Placing,
    crypt: Option<Crypt>,
    /// Bytes that the file is known to have.
    len: AtomicU64,
}

/// Who decides where a guest cluster stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Placing {
    /// The refcounts: the image's own file.
    Own,
    /// Nobody: every cluster of the data file stands at its guest offset, and none is counted.
    External {
        /// The data file is a raw image that shows the disk without the tables.
        raw: bool,
    },
}

impl Data {
    /// The data of the image with `header` in `own`; `external` is the data file, if it was opened.
    pub fn open(
        own: &Arc<dyn Storage>,
        external: Option<Arc<dyn Storage>>,
        header: &Header,
        crypt: Option<Crypt>,
    ) -> Result<Data> {
        let (storage, placing) = match (header.has_data_file(), external) {
            (false, _) => (own.clone(), Placing::Own),
            (true, Some(file)) => (file, Placing::External { raw: header.data_file_is_raw() }),
            (true, None) => {
                return Err(Error::invalid(
                    "the image keeps its data in an external data file, which is not open",
                ));
            }
        };
        let len = AtomicU64::new(storage.len()?);
        Ok(Data { storage, placing, crypt, len })
    }

    /// Whether the data stand in a file of their own: at their guest offsets, and not counted.
    pub fn is_external(&self) -> bool {
        self.placing != Placing::Own
    }

    /// Whether the data file shows the disk without the tables.
    pub fn is_raw(&self) -> bool {
        self.placing == Placing::External { raw: true }
    }

    /// Whether an external data file goes on showing the disk without the tables.
    pub fn set_raw(&mut self, raw: bool) {
        if self.is_external() {
            self.placing = Placing::External { raw };
        }
    }

    pub fn is_encrypted(&self) -> bool {
        self.crypt.is_some()
    }

    /// Fails where the data are encrypted by a key that is not known.
    pub fn check_unlocked(&self) -> Result<()> {
        self.crypt.as_ref().map_or(Ok(()), Crypt::check_unlocked)
    }

    /// How the data are encrypted from now on; nothing has been written yet.
    pub fn set_crypt(&mut self, crypt: Crypt) {
        self.crypt = Some(crypt);
    }

    /// The file that the data stand in.
    pub fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    /// Notes that the file has at least `len` bytes.
    pub fn grown_to(&self, len: u64) {
        // Most writes grow nothing: they only read what all threads share.
        if self.len.load(Ordering::Acquire) < len {
            self.len.fetch_max(len, Ordering::AcqRel);
        }
    }

    /// Cuts an external data file where it is longer than `size`.
    pub fn shrink(&self, size: u64) -> Result<()> {
        if self.storage.len()? > size {
            self.shortened();
            self.storage.set_len(size)?;
        }
        Ok(())
    }

    /// The image's own file may be shorter than it was.
    pub fn shortened(&self) {
        self.len.store(0, Ordering::Release);
    }

    /// Makes what was written durable, where the image's own file is another.
    pub fn sync_external(&self) -> Result<()> {
        if self.is_external() { self.storage.sync() } else { Ok(()) }
    }

    /// Reads the guest's bytes at `guest`, which stand at `host`.
    pub fn read(
        &self,
        host: HostOffset,
        guest: GuestOffset,
        bufs: &mut [IoSliceMut<'_>],
    ) -> Result<()> {
        match &self.crypt {
            None => self.read_stored(host, bufs),
            Some(crypt) => crypt.read(self, host, guest, bufs),
        }
    }

    /// Writes the guest's bytes at `guest`, which are to stand at `host`.
    pub fn write(&self, host: HostOffset, guest: GuestOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        match &self.crypt {
            None => self.write_stored(host, bufs),
            Some(crypt) => crypt.write(self, host, guest, bufs),
        }
    }

    /// Makes bytes that are to stand at `host` share the space of others; see [`share`](crate::storage::FileStorage::share).
    pub fn share(
        &self,
        host: HostOffset,
        from: &dyn Storage,
        from_offset: u64,
        len: u64,
    ) -> Result<bool> {
        let files = self.storage.as_file().zip(from.as_file());
        let Some((to, from)) = files.filter(|_| !self.is_encrypted()) else { return Ok(false) };
        let shared = to.share(host.0, from, from_offset, len)?;
        if shared {
            self.grown_to(host.0 + len);
        }
        Ok(shared)
    }

    /// Reads bytes as they are stored. The file may end inside the last cluster: what is missing is
    /// zero.
    pub(in crate::qcow2) fn read_stored(
        &self,
        host: HostOffset,
        bufs: &mut [IoSliceMut<'_>],
    ) -> Result<()> {
        self.storage.about_to(step::READ);
        let end = host.checked_add(total_mut(bufs));
        let end =
            end.ok_or_else(|| Error::corrupt("a cluster past 2^64 bytes").at_offset(host.0))?;
        if end.0 <= self.len.load(Ordering::Acquire) {
            return self.storage.read_at(host.0, bufs);
        }
        let len = self.storage.len()?;
        self.grown_to(len);
        if end.0 <= len {
            return self.storage.read_at(host.0, bufs);
        }
        fill_zero(bufs);
        let have = len.saturating_sub(host.0);
        if have == 0 {
            return Ok(());
        }
        self.storage.read_at(host.0, &mut window_mut(bufs, 0, have))
    }

    /// Writes compressed bytes.
    pub fn write_compressed(&self, host: HostOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.storage.about_to(step::WRITE_COMPRESSED);
        self.storage.write_at(host.0, bufs)?;
        self.grown_to(host.0 + total(bufs));
        Ok(())
    }

    /// Writes bytes as they are to be stored.
    pub(in crate::qcow2) fn write_stored(
        &self,
        host: HostOffset,
        bufs: &[IoSlice<'_>],
    ) -> Result<()> {
        self.storage.about_to(step::WRITE);
        self.storage.write_at(host.0, bufs)?;
        self.grown_to(host.0 + total(bufs));
        Ok(())
    }
}
