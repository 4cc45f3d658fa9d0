//! Dirty bitmaps that go along when an image is copied, and the room they take.

use vdisk::addr::Unit;
use vdisk::qcow2::{BitmapChanges, BitmapInfo, Image};

use crate::qemu_img::fail::{Fail, Outcome, reason, report};
use crate::qemu_img::images::open;
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::names::name::Source;

/// A bitmap with the ranges that are marked in it.
pub struct Copied {
    info: BitmapInfo,
    ranges: Vec<std::ops::Range<u64>>,
}

/// Reads the bitmaps of an image that is to be copied.
pub fn read(image: &Image, skip_broken: bool) -> Outcome<Vec<Copied>> {
    let failed = |e: vdisk::Error| Fail::new(reason(&e));
    let mut all = Vec::new();
    let infos = image.bitmaps().map_err(failed)?;
    // One after the other would leave some copied: all are looked at first.
    if let Some(broken) = infos.iter().filter(|i| i.in_use).map(|i| &i.name).min()
        && !skip_broken
    {
        return Err(Fail::new(format!(
            "Cannot copy inconsistent bitmap '{broken}'\nTry --skip-broken-bitmaps, or use 'qemu-img \
             bitmap --remove' to delete it"
        )));
    }
    let mut broken: Vec<&str> =
        infos.iter().filter(|i| i.in_use).map(|i| i.name.as_str()).collect();
    broken.sort_unstable();
    for name in broken {
        report(format!("warning: Skipping inconsistent bitmap '{name}'"));
    }
    for info in infos.into_iter().filter(|i| !i.in_use) {
        let ranges = image.bitmap_ranges(&info.name).map_err(failed)?;
        all.push(Copied { info, ranges });
    }
    Ok(all)
}

/// Adds bitmaps to a new image.
pub fn write(target: &Source, all: &[Copied]) -> Outcome<()> {
    if all.is_empty() {
        return Ok(());
    }
    let Some(mut image) = open::owned(target, Use::writing())? else { return Ok(()) };
    let add = |bitmaps: &mut BitmapChanges<'_>, one: &Copied| {
        let BitmapInfo { name, granularity, auto, .. } = &one.info;
        let added = bitmaps.add(name, Some(*granularity), *auto);
        let done = added.and_then(|()| bitmaps.merge(name, &one.ranges));
        done.map_err(|e| Fail::new(format!("Failed to populate bitmap {name}: {}", reason(&e))))
    };
    let done = image.change_bitmaps(|bitmaps| all.iter().try_for_each(|one| add(bitmaps, one)));
    done.map_err(|e| Fail::new(format!("Failed to store the bitmaps: {}", reason(&e))))??;
    vdisk::image::Image::flush(&image).map_err(|e| Fail::new(reason(&e)))
}

/// The bytes that copies of the bitmaps of a disk of `size` bytes take at most in an image with
/// such clusters: their bits, their tables, and the directory.
pub fn room(all: &[BitmapInfo], size: u64, cluster: Unit) -> u64 {
    /// Bytes of a directory entry before the name.
    const ENTRY: u64 = 24;
    let mut directory = 0;
    let mut bytes = 0;
    for one in all.iter().filter(|b| !b.in_use) {
        let bits = size.div_ceil(one.granularity.max(1));
        let clusters = cluster.count(bits.div_ceil(8));
        bytes += (clusters << cluster.bits()) + cluster.ceil(clusters * 8);
        directory += (ENTRY + one.name.len() as u64).next_multiple_of(8);
    }
    bytes + cluster.ceil(directory)
}
