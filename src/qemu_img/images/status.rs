//! Which layer of a chain holds a stretch of the disk, and how: block status in QEMU's terms.

use vdisk::addr::GuestOffset;
use vdisk::chain::Layer;
use vdisk::image::Mapping;
use vdisk::open::Format;

use crate::qemu_img::fail::{Fail, Outcome, reason};

/// How a stretch of a disk is held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Status {
    /// Bytes that are alike.
    pub len: u64,
    /// Bytes are stored for it.
    pub data: bool,
    /// It reads as zeroes.
    pub zero: bool,
    /// The stored bytes are compressed.
    pub compressed: bool,
    /// Some layer says something about it; else nothing does.
    pub allocated: bool,
    /// Where the bytes stand in that layer's file.
    pub host: Option<u64>,
    /// The layer's depth; the lowest one's where nothing is allocated.
    pub depth: usize,
}

/// The status of at most `len` bytes at `at`, seen through `layers` from the first on. `at` is
/// below the first one's size.
pub fn at(layers: &[Layer], at: u64, len: u64) -> Outcome<Status> {
    let mut len = len;
    for (depth, layer) in layers.iter().enumerate() {
        let size = layer.image.size();
        if at >= size {
            // What the layer above leaves open past this one's end is zero.
            return Ok(nothing(len, depth.saturating_sub(1)));
        }
        let failed = |e: vdisk::Error| Fail::new(reason(&e));
        let extent = layer.image.map(GuestOffset(at), len.min(size - at)).map_err(failed)?;
        let stored = matches!(extent.mapping, Mapping::Data { .. });
        let extent = if stored { layer.image.narrow(extent).map_err(failed)? } else { extent };
        len = extent.len;
        let mut status = Status { allocated: true, ..nothing(len, depth) };
        match extent.mapping {
            // Formats that know no backing file say of everything what it is.
            Mapping::Unallocated if alone(layer) => {}
            Mapping::Unallocated => continue,
            Mapping::Data { host, .. } => {
                (status.data, status.zero, status.host) = (true, false, Some(host.0));
            }
            Mapping::Compressed { .. } => {
                (status.data, status.zero, status.compressed) = (true, false, true);
            }
            Mapping::Zero { host } => {
                status.host = host.map(|h| h.0);
                // A hole in what such formats hold is their data all the same.
                status.data = stored
                    && matches!(
                        layer.format,
                        Format::Vpc | Format::Vdi | Format::Vmdk | Format::Qcow2
                    );
            }
        }
        if let Some(stored) = layer.image.is_stored(&extent).map_err(failed)? {
            status.data = stored;
            if !stored && !status.zero {
                (status.allocated, status.host) = (false, None);
            }
        }
        if layer.image.encrypted() {
            // What stands there is not what the disk shows.
            status.host = None;
        }
        return Ok(status);
    }
    Ok(nothing(len, layers.len().saturating_sub(1)))
}

fn nothing(len: u64, depth: usize) -> Status {
    Status { len, data: false, zero: true, compressed: false, allocated: false, host: None, depth }
}

fn alone(layer: &Layer) -> bool {
    matches!(layer.format, Format::Vpc | Format::Vdi) && layer.image.backing().is_none()
}
