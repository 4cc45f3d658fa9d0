//! The key slots of an encrypted image.

use super::crypt::{LUKS, read_area, shifted};
use crate::error::{Error, Result};
use crate::luks;
use crate::qcow2::image::Image;

impl Image {
    /// The LUKS header of an image that has one.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where it is none, or lies past the end of the file.
    pub fn luks_header(&self) -> Result<Option<luks::Header>> {
        let header = self.header();
        if header.crypt_method != LUKS {
            return Ok(None);
        }
        let (at, area) = read_area(&*self.storage, &header)?;
        luks::Header::parse(&area).map(Some).map_err(|e| shifted(e, at))
    }

    /// Changes the key slots of an image with a LUKS header, durably. `change` gets the header and
    /// the area that it stands in, with the key material.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for an image without LUKS header; what `change` returns, and nothing
    /// has changed then.
    pub fn change_keys(
        &self,
        change: impl FnOnce(&mut luks::Header, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        self.check_writable()?;
        let header = self.header();
        if header.crypt_method != LUKS {
            return Err(Error::invalid("the image has no LUKS header"));
        }
        let (at, area) = read_area(&*self.storage, &header)?;
        luks::change(&area, change, |offset, bytes| {
            self.metadata(|| {
                self.storage.write_all_at(at + offset, bytes).and_then(|()| self.storage.sync())
            })
        })
        .map_err(|e| shifted(e, at))
    }
}
