//! Changing what an image is: version, refcount width, lazy refcounts, backing name.
//!
//! Each part is complete in the file before the next begins, and what is new is built beside what is
//! old: a crash leaves an image that is right, with leaks at most. What version 3 alone can say is
//! taken out before version 2 is claimed. All of this needs the image for itself, hence `&mut`.

mod expand;
mod width;

use nix::libc::ENOTSUP;

use crate::error::{Error, Result};
use crate::image::Backing;
use crate::qcow2::data::inflated::Inflated;
use crate::qcow2::guard::lock;
use crate::qcow2::header::extension::{self, feature_names};
use crate::qcow2::header::{Compression, LAZY_REFCOUNTS, autoclear, incompatible};
use crate::qcow2::image::Image;
use crate::qcow2::snapshot::{OldTable, Table};

/// What is to be changed; `None` leaves it as it is.
#[derive(Debug, Clone, Default)]
pub struct Amend {
    /// 2 or 3.
    pub version: Option<u32>,
    /// A power of two up to 64; 16 in version 2.
    pub refcount_bits: Option<u32>,
    /// Version 3 only.
    pub lazy_refcounts: Option<bool>,
    /// The layer below, or `Some(None)` for none. The guest's bytes are the caller's business.
    pub backing: Option<Option<Backing>>,
    /// The recorded name of the external data file, or `Some(None)` for none, of an image that has
    /// one. The file itself stays the one that is open.
    pub data_file: Option<Option<String>>,
    /// Whether the data file goes on showing the disk without the tables; it cannot begin to.
    pub data_file_raw: Option<bool>,
}

/// A part of a change that can take long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AmendPart {
    /// To version 3.
    Upgrade,
    /// New refcounts.
    RefcountWidth,
    /// To version 2.
    Downgrade,
}

/// How far a change of an image is.
#[derive(Debug, Clone, Copy)]
pub struct AmendProgress {
    /// What is being done.
    pub part: AmendPart,
    /// How much of this part is done.
    pub done: u64,
    /// How much this part is; an estimate that may grow.
    pub total: u64,
}

/// Who wants to know how far a change is.
pub(super) type Watch<'a> = &'a mut dyn FnMut(AmendProgress);

impl Image {
    /// Changes the image as `want` says, durably.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) where parts contradict each other, or a
    /// refcount does not fit its new width (at the cluster's offset);
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) where the image needs version 3.
    pub fn amend(&mut self, want: &Amend) -> Result<()> {
        self.amend_watched(want, &mut |_| ())
    }

    /// The same; `watch` is told how far it is.
    ///
    /// # Errors
    /// As [`amend`](Image::amend).
    pub fn amend_watched(
        &mut self,
        want: &Amend,
        watch: &mut dyn FnMut(AmendProgress),
    ) -> Result<()> {
        self.check_writable()?;
        let header = self.header();
        let version = want.version.unwrap_or(header.version);
        let bits = want.refcount_bits.unwrap_or(1 << header.refcount_order);
        let lazy = want.lazy_refcounts;
        if !(2..=3).contains(&version) {
            return Err(Error::invalid(format!("qcow2 has no version {version}")));
        }
        if !bits.is_power_of_two() || bits > 64 {
            let message = "Refcount width must be a power of two and may not exceed 64 bits";
            return Err(Error::invalid(message));
        }
        if version < 3 && bits != 16 {
            return Err(Error::invalid(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above (use \
                 compat=1.1 or greater)",
            ));
        }
        if version < 3 && lazy == Some(true) {
            return Err(Error::invalid(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use \
                 compat=1.1 or greater)",
            ));
        }
        self.write_back_all()?;
        if version > header.version {
            self.upgrade(watch)?;
        }
        if bits != 1 << header.refcount_order {
            self.change_refcount_width(bits, watch)?;
        }
        self.amend_data_file(want)?;
        if let Some(lazy) = lazy.filter(|_| version >= 3) {
            self.update_header(|h| {
                h.compatible =
                    h.compatible & !LAZY_REFCOUNTS | if lazy { LAZY_REFCOUNTS } else { 0 };
            })?;
        }
        if let Some(backing) = &want.backing {
            self.update_header(|h| {
                h.backing = backing.clone();
                h.autoclear &= !autoclear::CONTENT_ID;
            })?;
        }
        if version < header.version {
            self.downgrade(watch)?;
        }
        Ok(())
    }

    /// What is recorded of the external data file.
    fn amend_data_file(&mut self, want: &Amend) -> Result<()> {
        if want.data_file.is_none() && want.data_file_raw.is_none() {
            return Ok(());
        }
        let raw = want.data_file_raw.unwrap_or(self.data.is_raw());
        if want.data_file.is_some() && !self.data.is_external() {
            let message = "data-file can only be set for images that use an external data file";
            return Err(Error::invalid(message));
        }
        if raw && !self.data.is_raw() {
            return Err(Error::invalid("data-file-raw cannot be set on existing images"));
        }
        self.update_header(|h| {
            if let Some(name) = &want.data_file {
                let name = name.as_ref().map(|name| name.clone().into_bytes());
                h.set_extension(extension::DATA_FILE, name);
            }
            if !raw {
                h.autoclear &= !autoclear::RAW_DATA;
            }
        })?;
        self.data.set_raw(raw);
        Ok(())
    }

    /// Version 2 becomes version 3, whose snapshots must say their disk's size.
    fn upgrade(&mut self, watch: Watch<'_>) -> Result<()> {
        let mut done = |done| watch(AmendProgress { part: AmendPart::Upgrade, done, total: 2 });
        done(0);
        let table = Table::read(&*self.storage, &self.header())?;
        if table.snapshots.iter().any(|s| s.is_incomplete()) {
            let old = OldTable { offset: self.header().snapshots_offset, len: table.len };
            self.replace_snapshots(&table.snapshots, old)?;
        }
        done(1);
        self.update_header(|h| {
            let names = feature_names();
            h.version = 3;
            h.set_extension(names.magic, Some(names.data));
        })?;
        self.shape.version = 3;
        self.reload_tables()?;
        done(2);
        Ok(())
    }

    /// Version 3 becomes version 2, which has no zero clusters.
    fn downgrade(&mut self, watch: Watch<'_>) -> Result<()> {
        let header = self.header();
        let refuse = |message: &str| Err(Error::unsupported(message).with_os_error(ENOTSUP));
        let snapshots = Table::read(&*self.storage, &header)?.snapshots;
        let needs_v3 = |s: &super::Snapshot| {
            s.vm_state_size > u64::from(u32::MAX) || s.disk_size != Some(header.size)
        };
        if header.incompatible & incompatible::DATA_FILE != 0 {
            return refuse("Cannot downgrade an image with a data file");
        }
        if self.data.is_encrypted() {
            return refuse("Cannot downgrade an encrypted image: it may hold zero clusters");
        }
        if snapshots.iter().any(needs_v3) {
            return refuse("Internal snapshots prevent downgrade of image");
        }
        let bits = header.incompatible & !incompatible::COMPRESSION;
        if bits != 0 {
            return refuse(&format!(
                "Cannot downgrade an image with incompatible features {bits:#x} set"
            ));
        }
        if header.extension(extension::BITMAPS).is_some() {
            return refuse("Cannot downgrade an image with bitmaps; remove them first");
        }
        if header.compression != Compression::Zlib && self.has_compressed(&snapshots)? {
            return refuse(
                "Cannot downgrade an image with zstd compression type and existing compressed clusters",
            );
        }
        self.expand_zero_clusters(&snapshots, watch)?;
        self.update_header(|h| {
            (h.version, h.incompatible, h.compression) = (2, 0, Compression::Zlib);
            (h.compatible, h.autoclear) = (0, 0);
            h.tail.clear();
            h.set_extension(extension::FEATURE_NAMES, None);
        })?;
        self.shape.version = 2;
        *lock(&self.inflated) = Inflated::new(Compression::Zlib);
        self.reload_tables()
    }

    /// Whether the disk or a snapshot has a compressed cluster.
    fn has_compressed(&self, snapshots: &[super::Snapshot]) -> Result<bool> {
        let mut l1 = self.active_l1(&self.header())?;
        for one in snapshots {
            l1.extend(self.read_l1("Snapshot", one.l1_offset, one.l1_size)?);
        }
        let mut found = false;
        self.each_l2(&l1, |l2| {
            found |= (0..self.l2_entries()).any(|i| self.shape.get(&l2.bytes, i).is_compressed());
            Ok(())
        })?;
        Ok(found)
    }
}
