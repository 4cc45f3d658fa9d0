//! New images of other programs' formats: their options, and the empty image. What stands in them is
//! written by others; here they are only read.

use vdisk::Error;
use vdisk::formats::{vdi, vhd};
use vdisk::storage::FileStorage;

use super::create_options::{Chosen, Kind, Known, SIZE, known, with_default};
use super::fail::{Fail, Outcome, reason};

/// What a VDI image is made with.
pub const VDI: &[Known] =
    &[SIZE, with_default("static", Kind::Switch, "VDI static (pre-allocated) image", "off")];

/// What a VHD image is made with.
pub const VPC: &[Known] = &[
    SIZE,
    known(
        "subformat",
        Kind::Text,
        "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
    ),
    known(
        "force_size",
        Kind::Switch,
        "Force disk size calculation to use the actual size specified, rather than using the nearest \
         CHS-based calculation",
    ),
];

/// Makes a VDI image of `size` bytes in an empty file.
pub fn vdi(file: &FileStorage, size: u64, chosen: &Chosen) -> Outcome<()> {
    let fixed = chosen.switch("static") == Some(true);
    vdi::create(file, size, fixed).map_err(failed)
}

/// Makes a VHD image of at least `size` bytes in an empty file.
pub fn vpc(file: &FileStorage, size: u64, chosen: &Chosen) -> Outcome<()> {
    let fixed = match chosen.text("subformat") {
        None | Some("dynamic") => false,
        Some("fixed") => true,
        Some(other) => {
            return Err(Fail::new(format!(
                "Parameter 'subformat' does not accept value '{other}'"
            )));
        }
    };
    let exact = chosen.switch("force_size") == Some(true);
    vhd::create(file, vhd::CreateOptions { size, fixed, exact }).map_err(failed)
}

fn failed(error: Error) -> Fail {
    Fail::new(reason(&error))
}
