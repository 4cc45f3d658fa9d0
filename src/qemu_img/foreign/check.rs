//! Checking images of other programs' formats: whether every block that their tables name is there.
//! The one thing that is mended is a VHDX whose log was left to be replayed.

use vdisk::addr::GuestOffset;
use vdisk::formats::vhdx;
use vdisk::image::{Check, Image, Repair};
use vdisk::open::Format;

use crate::qemu_img::fail::{Fail, Outcome, reason};
use crate::qemu_img::images::open;
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::names::name::Source;

/// How many damaged places are told; the others are counted.
const TOLD: u64 = 100;
/// The step over a place that cannot be read.
const SECTOR: u64 = 512;

/// Checks the image, and says its format; `None` where its format is another room's, or has nothing to check.
pub fn check(
    source: &Source,
    repair: Repair,
    shared: bool,
) -> Outcome<Option<(&'static str, Check)>> {
    let format = match source.format.as_deref() {
        Some(name) => Format::from_name(name).map_err(|e| Fail::new(reason(&e)))?,
        None => open::probe(source, Use::reading(shared))?,
    };
    if format == Format::Vpc {
        // What cannot be opened is wrong, and that is what its user asked.
        open::layer(source, Use { check: true, ..Use::reading(shared) })?;
        return Err(no_check());
    }
    let checked = [Format::Vhdx, Format::Vdi, Format::Vmdk, Format::Qed, Format::Parallels];
    if !checked.contains(&format) {
        return Ok(None);
    }
    if repair != Repair::None && matches!(format, Format::Qed | Format::Parallels) {
        let text = format!("{format} images are only read here: convert the image to qcow2");
        return Err(Fail::new(text));
    }
    if repair != Repair::None && format != Format::Vhdx {
        return Err(no_check());
    }
    let mut fixed = 0;
    if format == Format::Vhdx && repair != Repair::None {
        let storage = open::bytes(source, Use::writing())?;
        let replayed = vhdx::replay_log(storage)
            .map_err(|e| Fail::new(format!("Could not open '{}': {}", source.given, reason(&e))))?;
        fixed += u64::from(replayed);
    }
    let opened = open::layer(source, Use { check: true, ..Use::reading(shared) })?;
    let found = Check { corruptions_fixed: fixed, ..walk(&*opened.layer.image) };
    Ok(Some((format.name(), found)))
}

/// The format has nothing to check, or not in this way.
pub fn no_check() -> Fail {
    /// Exit status for it.
    const NO_CHECK: u8 = 63;
    Fail::new("This image format does not support checks").with_code(NO_CHECK)
}

/// Looks at every part of the disk.
fn walk(image: &dyn Image) -> Check {
    let mut check = Check::default();
    let step = image.block_size().unwrap_or(SECTOR).max(SECTOR);
    let (mut at, size) = (0, image.size());
    while at < size {
        match image.map(GuestOffset(at), size - at) {
            Ok(extent) => at += extent.len,
            Err(e) => {
                check.corruptions += 1;
                if check.corruptions <= TOLD {
                    eprintln!("ERROR: {} (guest offset {at})", e.message());
                }
                at = (at / step + 1) * step;
            }
        }
    }
    check
}
