//! Images of other programs' formats that are there already, to be filled.

use std::path::Path;
use std::sync::Arc;

use vdisk::Error;
use vdisk::formats::vhd::SizeBy;
use vdisk::formats::{vdi, vhd, vhdx};
use vdisk::image::Image;
use vdisk::open::Format;
use vdisk::storage::{Access, FileOptions, Storage};

use crate::qemu_img::fail::{Fail, Outcome, open_reason};

/// The image in `storage`, whose name is `path`, to be written.
///
/// # Errors
/// Says what to do instead with one that is only read.
pub fn written(
    format: Format,
    path: &Path,
    storage: Arc<dyn Storage>,
    size: SizeBy,
) -> Outcome<Arc<dyn Image>> {
    let options = FileOptions { access: Some(Access::Write), write: true };
    let image: vdisk::Result<Arc<dyn Image>> = match format {
        Format::Vmdk => vdisk::open::open_vmdk_to_write(path, storage, options)
            .map(|image| Arc::new(image) as _),
        Format::Vdi => vdi::fill(storage).map(|image| Arc::new(image) as _),
        Format::Vhdx => vhdx::fill(storage).map(|image| Arc::new(image) as _),
        Format::Vpc => vhd::fill(storage, size).map(|image| Arc::new(image) as _),
        other => Err(Error::unsupported(format!(
            "images of format {other} are only read: convert it to qcow2, or make an overlay on it \
             with `create -f qcow2 -b`"
        ))),
    };
    image.map_err(|e| Fail::new(open_reason(&e, e.path().unwrap_or(path))))
}
