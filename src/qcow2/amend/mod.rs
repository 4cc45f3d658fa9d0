//! Changing what an image is: version, refcount width, lazy refcounts, backing name.
//!
//! Each part is complete in the file before the next begins, and what is new is built beside what is
//! old: a crash leaves an image that is right, with leaks at most. What version 3 alone can say is
//! taken out before version 2 is claimed. All of this needs the image for itself, hence `&mut`.

mod expand;
mod width;

use nix::libc::ENOTSUP;

use super::extension::{self, feature_names};
use super::header::{LAZY_REFCOUNTS, autoclear, incompatible};
use super::image::Image;
use super::snapshot::Table;
use crate::error::{Error, Result};
use crate::image::Backing;

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
}

impl Image {
    /// Changes the image as `want` says, durably.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) where parts contradict each other, or a
    /// refcount does not fit its new width (at the cluster's offset);
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) where the image needs version 3.
    pub fn amend(&mut self, want: &Amend) -> Result<()> {
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
        self.settle_changes()?;
        if version > header.version {
            self.upgrade()?;
        }
        if bits != 1 << header.refcount_order {
            self.change_refcount_width(bits)?;
        }
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
            self.downgrade()?;
        }
        Ok(())
    }

    /// Version 2 becomes version 3, whose snapshots must say their disk's size.
    fn upgrade(&mut self) -> Result<()> {
        let table = Table::read(&*self.storage, &self.header())?;
        if table.snapshots.iter().any(|s| s.is_incomplete()) {
            let old = (self.header().snapshots_offset, table.len);
            self.replace_snapshots(&table.snapshots, old)?;
        }
        self.update_header(|h| {
            let names = feature_names();
            h.version = 3;
            h.set_extension(names.magic, Some(names.data));
        })?;
        self.shape.version = 3;
        self.reload_tables()
    }

    /// Version 3 becomes version 2, which has no zero clusters.
    fn downgrade(&mut self) -> Result<()> {
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
        if header.incompatible != 0 {
            let bits = header.incompatible;
            return refuse(&format!(
                "Cannot downgrade an image with incompatible features {bits:#x} set"
            ));
        }
        if header.extension(extension::BITMAPS).is_some() {
            return refuse("Cannot downgrade an image with bitmaps; remove them first");
        }
        self.expand_zero_clusters(&snapshots)?;
        self.update_header(|h| {
            h.version = 2;
            (h.compatible, h.autoclear) = (0, 0);
            h.tail.clear();
            h.set_extension(extension::FEATURE_NAMES, None);
        })?;
        self.shape.version = 2;
        self.reload_tables()
    }
}
