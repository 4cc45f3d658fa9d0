//! `qemu-img resize`: makes a disk bigger or smaller.

use vdisk::block::BlockDevice;
use vdisk::open::Format;
use vdisk::qcow2::Preallocation;
use vdisk::storage::Storage;

use crate::qemu_img::commands::create::unfit;
use crate::qemu_img::fail::{Fail, Outcome, reason, report};
use crate::qemu_img::images::open;
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::jail::Opens;
use crate::qemu_img::options::args::{self, long, long_value};
use crate::qemu_img::options::create::preallocation;
use crate::qemu_img::options::format::{FORMAT, IMAGE_OPTS, OBJECT, QUIET};
use crate::qemu_img::size;

/// Disks consist of whole sectors.
const SECTOR: u64 = 512;

pub fn run(args: &[String]) -> Outcome {
    let usage = || Fail::usage("Expecting image file name and size");
    // The size may begin with a minus, and is no option then.
    let (size, rest) = args.split_last().ok_or_else(usage)?;
    let known = [FORMAT, QUIET, OBJECT, IMAGE_OPTS, long_value("preallocation"), long("shrink")];
    let given = args::parse(rest, &known)?;
    let [name] = &given.names[..] else { return Err(usage()) };
    let how = given.get("preallocation");
    let how = preallocation(how).map_err(|_| {
        Fail::new(format!("Invalid preallocation mode '{}'", how.unwrap_or_default()))
    })?;
    let (relative, digits) = match size.as_bytes().first() {
        Some(b'+') => (Some(true), &size[1..]),
        Some(b'-') => (Some(false), &size[1..]),
        _ => (None, size.as_str()),
    };
    let bytes = size::operand("image size", digits)?;
    let source = given.source(name)?;
    Opens::new().changed(&source).close();
    let (opened, chain) = open::layer_and_chain(&source, Use::writing())?;
    let old = chain.size();
    let new = match relative {
        None => Some(bytes),
        Some(true) => old.checked_add(bytes),
        Some(false) => old.checked_sub(bytes),
    };
    let raw = opened.layer.format == Format::Raw;
    if raw && how == Preallocation::Metadata {
        return Err(Fail::new("Unsupported preallocation mode: metadata"));
    }
    // A raw file ends anywhere.
    let unit = if raw { 1 } else { SECTOR };
    let new = new
        .and_then(|n| n.checked_next_multiple_of(unit))
        .filter(|n| *n > 0 && i64::try_from(*n).is_ok())
        .ok_or_else(|| Fail::new("New image size must be positive"))?;
    if new <= old && how != Preallocation::Off {
        return Err(Fail::new("Preallocation can only be used for growing images"));
    }
    if new < old && !given.has("shrink") {
        report("Use the --shrink option to perform a shrink operation.");
        report(
            "warning: Shrinking an image will delete all data beyond the shrunken image's end. Before \
             performing such an operation, make sure there is no important data there.",
        );
        return Err(Fail::silent(1));
    }
    let mode = given.get("preallocation").unwrap_or("off");
    if matches!(mode, "falloc" | "full") && !raw && opened.layer.file.is_fixed() {
        return Err(Fail::new(format!("Failed to resize underlying file: {}", unfit(mode))));
    }
    open::refuse_resize(&opened)?;
    chain.resize(new).map_err(|e| Fail::new(reason(&e)))?;
    open::preallocate(&opened, old, new, how)?;
    let below = chain.all_layers().get(1).map_or(0, |layer| layer.image.size());
    if new > old && below > old {
        // What the backing file holds there stays hidden, and all of the new part says so.
        chain.write_zeroes(old, new - old, false).map_err(|e| Fail::new(reason(&e)))?;
    }
    chain.flush().map_err(|e| Fail::new(reason(&e)))?;
    if !given.has("q") {
        println!("Image resized.");
    }
    Ok(0)
}
