//! New images of other programs' formats: their options, the empty image, and filling it. An image
//! that is there already is only read.

use std::path::Path;
use std::sync::Arc;

use vdisk::Error;
use vdisk::addr::GuestOffset;
use vdisk::chain::{Chain, Descent, Format, Layer, OpenOptions};
use vdisk::formats::{raw, vdi, vhd, vmdk};
use vdisk::image::{Image, Mapping};
use vdisk::storage::{Access, FileOptions, FileStorage, Storage, draft};

use super::create::Place;
use super::create_options::{Chosen, Kind, Known, SIZE, known, with_default};
use super::fail::{Fail, Outcome, reason};
use super::name::Source;
use super::open::{self, Use, full_backing_name};
use super::window::Window;

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

/// What a VMDK image is made with.
pub const VMDK: &[Known] = &[
    SIZE,
    known(
        "adapter_type",
        Kind::Text,
        "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX",
    ),
    known("backing_file", Kind::Text, "File name of a base image"),
    known("backing_fmt", Kind::Text, "Must be 'vmdk' if present"),
    with_default("compat6", Kind::Switch, "VMDK version 6 image", "off"),
    with_default("hwversion", Kind::Text, "VMDK hardware version", NO_VERSION),
    known(
        "subformat",
        Kind::Text,
        "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | \
         twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} ",
    ),
    known("toolsversion", Kind::Text, "VMware guest tools version"),
    known(
        "zeroed_grain",
        Kind::Switch,
        "Enable efficient zero writes using the zeroed-grain GTE feature",
    ),
];

/// The hardware version that stands for the usual one.
const NO_VERSION: &str = "undefined";

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

/// What the options of a VMDK image mean; `path` is the image's.
pub fn vmdk_options(path: &Path, size: u64, chosen: &Chosen) -> Outcome<vmdk::CreateOptions> {
    let bad = |value: &str| Fail::new(format!("invalid parameter value: {value}"));
    let adapter = chosen.text("adapter_type").unwrap_or("ide");
    if !matches!(adapter, "ide" | "lsilogic" | "buslogic" | "legacyESX") {
        return Err(bad(adapter));
    }
    let subformat = match chosen.text("subformat") {
        None => vmdk::Subformat::MonolithicSparse,
        Some(name) => {
            let mut all = vmdk::Subformat::ALL.into_iter();
            all.find(|s| s.name() == name).ok_or_else(|| bad(name))?
        }
    };
    let version = chosen.text("hwversion").filter(|v| *v != NO_VERSION);
    let hardware = match (version, chosen.switch("compat6") == Some(true)) {
        (Some(_), true) => {
            return Err(Fail::new("compat6 cannot be enabled with hwversion set"));
        }
        (Some(version), false) => version,
        (None, true) => "6",
        (None, false) => "4",
    };
    let parent = chosen.text("backing_file").map(|name| parent(path, name, chosen)).transpose()?;
    Ok(vmdk::CreateOptions {
        size,
        subformat,
        zeroed_grain: chosen.switch("zeroed_grain") == Some(true),
        parent,
        adapter: adapter.to_owned(),
        hardware: hardware.to_owned(),
        tools: chosen.text("toolsversion").unwrap_or("2147483647").to_owned(),
    })
}

/// The name and content id of the image below.
fn parent(path: &Path, name: &str, chosen: &Chosen) -> Outcome<(String, u32)> {
    let full = full_backing_name(&path.display().to_string(), name);
    let source = Source::named(&full, chosen.text("backing_fmt"))?;
    let opened = open::layer(&source, Use::reading(false))?;
    if opened.layer.format != Format::Vmdk {
        return Err(Fail::new("backing_file must be a vmdk image"));
    }
    let id = opened.layer.image.fingerprint().and_then(|id| u32::from_str_radix(&id, 16).ok());
    let id = id.ok_or_else(|| Fail::new("the backing file has no content id"))?;
    Ok((name.to_owned(), id))
}

/// Makes a VMDK image in an empty file, and the files beside it.
pub fn vmdk(file: &FileStorage, path: &Path, options: &vmdk::CreateOptions) -> Outcome<()> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let mut beside = |extent: &str| -> vdisk::Result<Arc<dyn Storage>> {
        Ok(Arc::new(super::create::emptied_file(&path.with_file_name(extent))?))
    };
    vmdk::create(file, &name, options, &mut beside).map_err(failed)
}

/// Whether a new image of the format takes whole compressed blocks, and nothing else.
pub fn only_compressed(format: &str, chosen: &Chosen) -> bool {
    format == "vmdk" && chosen.text("subformat") == Some(vmdk::Subformat::StreamOptimized.name())
}

/// Refuses what can be made, but not filled.
pub fn check_fillable(format: &str, chosen: &Chosen) -> Outcome<()> {
    let refused = |what: &str| Err(Fail::new(format!("{what} are only made empty here")));
    match chosen.text("subformat") {
        Some("twoGbMaxExtentSparse" | "twoGbMaxExtentFlat") => {
            refused("VMDK images of several files")
        }
        _ if format == "vmdk" && chosen.has("backing_file") => {
            refused("VMDK images with a backing file")
        }
        _ => Ok(()),
    }
}

/// Opens the new image at `place` to be filled; `None` for formats that are written at any time.
pub fn filling(
    place: &Place,
    format: &str,
    chosen: &Chosen,
    unsynced: bool,
) -> Outcome<Option<Chain>> {
    let format = match format {
        "vdi" => Format::Vdi,
        "vpc" => Format::Vpc,
        "vmdk" => Format::Vmdk,
        _ => return Ok(None),
    };
    let Place::File(path) = place else {
        return Err(Fail::new(format!("'{format}' images are only made in files")));
    };
    let options = FileOptions { access: Some(Access::Write), write: true };
    let open = |path: &Path| FileStorage::open(path, options).map(Arc::new).map_err(failed);
    let file = open(path)?;
    let lasting = |file: Arc<FileStorage>| -> Arc<dyn Storage> {
        if unsynced { draft::unsynced(file) } else { file }
    };
    let storage = lasting(file.clone());
    let whole = chosen.switch("static") == Some(true)
        || matches!(chosen.text("subformat"), Some("fixed" | "monolithicFlat"));
    let image: Arc<dyn Image> = match format {
        _ if whole => {
            let made = open::layer(
                &Source::named(&path.display().to_string(), Some(format.name()))?,
                Use::reading(true),
            )?;
            flat(&made.layer, |beside| open(beside).map(lasting), storage)?
        }
        Format::Vdi => Arc::new(vdi::fill(storage).map_err(failed)?),
        Format::Vpc => Arc::new(vhd::fill(storage).map_err(failed)?),
        _ => Arc::new(vmdk::fill(storage).map_err(failed)?),
    };
    let layer = Layer { path: path.to_owned(), format, image, file };
    let options = OpenOptions { read_only: false, ..OpenOptions::default() };
    Ok(Some(Descent::from_head(layer, &options).map_err(failed)?.finish()))
}

/// The disk of an image whose bytes stand in one file as they are.
fn flat(
    made: &Layer,
    open: impl Fn(&Path) -> Outcome<Arc<dyn Storage>>,
    own: Arc<dyn Storage>,
) -> Outcome<Arc<dyn Image>> {
    let size = made.image.size();
    if size == 0 {
        return Ok(Arc::new(raw::Image::open(own, true).map_err(failed)?));
    }
    let first = made.image.map(GuestOffset(0), size).map_err(failed)?;
    let Mapping::Data { host, .. } = first.mapping else {
        return Err(Fail::new("the new image does not hold its disk in one piece"));
    };
    let (storage, at) = match made.image.place(host) {
        Some((name, at)) => (open(&made.path.with_file_name(name))?, at),
        None => (own, host),
    };
    let window = Window::new(storage, at.0, Some(size)).map_err(failed)?;
    Ok(Arc::new(raw::Image::open(Arc::new(window), false).map_err(failed)?))
}
