//! The external data file of an image: the one that the user says, else the one that its header
//! names.

use std::sync::Arc;

use vdisk::ErrorKind;
use vdisk::open;
use vdisk::qcow2::Header;
use vdisk::storage::{FileOptions, FileStorage, MemoryStorage, Storage};

use crate::qemu_img::fail::{Fail, Outcome, os_text, reason};
use crate::qemu_img::images::bottom;
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::names::name::Source;

/// The data file of the image with `header` in `file`; `None` where it has none.
pub fn open(
    source: &Source,
    file: &FileStorage,
    header: &Header,
    using: Use,
) -> Outcome<Option<Arc<dyn Storage>>> {
    if !header.has_data_file() {
        return match &source.data_file {
            Some(_) if !using.describe => {
                Err(Fail::new("'data-file' can only be set for images with an external data file"))
            }
            _ => Ok(None),
        };
    }
    if using.describe {
        // Nobody reads a byte of it: it need not be there, nor be opened for an image that is not
        // trusted.
        return Ok(Some(Arc::new(MemoryStorage::default())));
    }
    if let Some(said) = &source.data_file {
        return Ok(Some(bottom::open(said, using)?.storage));
    }
    let name = header.data_file().map_err(|e| Fail::new(reason(&e)))?;
    let Some(name) = name else {
        return Err(Fail::new("'data-file' is required for this image"));
    };
    let access = FileOptions { access: Some(using.access()), write: using.write };
    let path = source.path().unwrap_or(file.path());
    open::open_data_file(path, file, header, access, true).map_err(|e| match e.kind() {
        ErrorKind::NotFound => {
            Fail::new(format!("Could not open '{name}': {}", os_text(nix::libc::ENOENT)))
        }
        _ => Fail::new(reason(&e)),
    })
}
