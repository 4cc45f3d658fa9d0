//! New images of other programs' formats: their options, the empty image, and filling it. An image
//! that is there already is only read.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vdisk::Error;
use vdisk::formats::{vdi, vhd, vhdx, vmdk};
use vdisk::open::Format;
use vdisk::storage::Storage;

use crate::qemu_img::fail::{Fail, Outcome, reason};
use crate::qemu_img::images::open::{self, full_backing_name};
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::names::name::Source;
use crate::qemu_img::options::chosen::Chosen;
use crate::qemu_img::options::known::{Kind, Known, SIZE, known, with_default};

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

/// What a VHDX image is made with.
pub const VHDX: &[Known] = &[
    SIZE,
    with_default("log_size", Kind::Size, "Log size; min 1MB.", "1M"),
    with_default(
        "block_size",
        Kind::Size,
        "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.",
        "0",
    ),
    known(
        "subformat",
        Kind::Text,
        "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'.",
    ),
    known(
        "block_state_zero",
        Kind::Switch,
        "Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to 'off' \
         when using 'qemu-img convert' with subformat=dynamic.",
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

/// Makes a VDI image of `size` bytes in `file`.
pub fn vdi(file: &dyn Storage, size: u64, chosen: &Chosen) -> Outcome<()> {
    let fixed = chosen.switch("static") == Some(true);
    vdi::create(file, size, fixed).map_err(failed)
}

/// Makes a VHD image of at least `size` bytes in `file`.
pub fn vpc(file: &dyn Storage, size: u64, chosen: &Chosen) -> Outcome<()> {
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

/// Makes a VHDX image of `size` bytes in `file`.
pub fn vhdx(file: &dyn Storage, size: u64, chosen: &Chosen) -> Outcome<()> {
    let fixed = match chosen.text("subformat") {
        None | Some("dynamic") => false,
        Some("fixed") => true,
        Some(other) => {
            return Err(Fail::new(format!(
                "Parameter 'subformat' does not accept value '{other}'"
            )));
        }
    };
    let options = vhdx::CreateOptions {
        size,
        fixed,
        block: chosen.number("block_size").filter(|bytes| *bytes != 0),
        log: chosen.number("log_size").unwrap_or(1 << 20),
        zero_blocks: chosen.switch("block_state_zero") != Some(false),
    };
    vhdx::create(file, &options).map_err(failed)
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
    vmdk::check_name(&file_name(path)).map_err(failed)?;
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
    vmdk::check_name(name).map_err(failed)?;
    Ok((name.to_owned(), id))
}

/// Makes a VMDK image in `file`, and the files beside it.
pub fn vmdk(file: &dyn Storage, path: &Path, options: &vmdk::CreateOptions) -> Outcome<()> {
    let name = file_name(path);
    let mut open = |extent: &str| -> vdisk::Result<Arc<dyn Storage>> {
        Ok(Arc::new(crate::qemu_img::commands::create::emptied_file(&beside(path, extent))?))
    };
    vmdk::create(file, &name, options, &mut open).map_err(failed)
}

/// The file that the image at `path` calls `name`, which stands beside it.
fn beside(path: &Path, name: &str) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).join(name)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Whether a new image of the format takes whole compressed blocks, and nothing else.
pub fn only_compressed(format: &str, chosen: &Chosen) -> bool {
    format == "vmdk" && chosen.text("subformat") == Some(vmdk::Subformat::StreamOptimized.name())
}
