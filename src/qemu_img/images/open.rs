//! Opening what the user named: one layer, or a whole chain.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vdisk::chain::{Chain, Layer};
use vdisk::family;
use vdisk::family::sealed::refuse;
use vdisk::formats::luks::Luks;
use vdisk::formats::{raw, vdi, vhd, vhdx, vmdk};
use vdisk::image::Image;
use vdisk::nbd;
use vdisk::open;
use vdisk::open::{Format, OpenOptions, Walk};
use vdisk::qcow2::{self, Preallocation};
use vdisk::storage::unsynced;
use vdisk::storage::{FileOptions, Storage};
use vdisk::{Error, ErrorKind};

use crate::qemu_img::blkdebug::faults::Faults;
use crate::qemu_img::blkdebug::faulty::Faulty;
use crate::qemu_img::encryption::crypt;
use crate::qemu_img::fail::{Fail, Outcome, open_reason, os_text, reason, report};
use crate::qemu_img::foreign::write::written;
use crate::qemu_img::images::bottom::{self, Bytes};
use crate::qemu_img::images::data_file;
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::images::window::Window;
use crate::qemu_img::names::name::{Below, Protocol, Source, has_protocol};
use crate::qemu_img::options::leftover;
use crate::qemu_img::options::opts::List;

/// The variable of the environment with which the user vouches for the `json:` names in images.
const TRUST: &str = "VDISK_TRUST_JSON_NAMES";

/// One layer that the user named.
pub struct Opened {
    /// The layer.
    pub layer: Layer,
    /// The same as a qcow2 image, where it is one.
    pub qcow2: Option<Arc<qcow2::Image>>,
    /// The same as a VMDK image, where it is one.
    pub vmdk: Option<Arc<vmdk::Vmdk>>,
    /// The same as a LUKS image, where it is one.
    pub luks: Option<Arc<Luks>>,
    /// Bytes of what holds it.
    pub length: u64,
    /// The name of what holds it, where that is no file.
    pub uri: Option<String>,
    /// The name by which it is shown.
    pub shown: String,
}

/// Opens the image alone.
pub fn layer(source: &Source, using: Use) -> Outcome<Opened> {
    let opened = try_layer(source, using);
    opened.map_err(|e| e.prefix(format!("Could not open '{}': ", source.given)))
}

/// Opens the image with all that is below it.
pub fn chain(source: &Source, using: Use) -> Outcome<Chain> {
    let (_, chain) = layer_and_chain(source, using)?;
    Ok(chain)
}

/// Opens the image with all that is below it, and hands out the head as well.
pub fn layer_and_chain(source: &Source, using: Use) -> Outcome<(Opened, Chain)> {
    let opened = try_chain(source, using);
    opened.map_err(|e| e.prefix(format!("Could not open '{}': ", source.given)))
}

/// Opens the image alone, once all that is below it has been opened as well.
pub fn on_its_chain(source: &Source, using: Use) -> Outcome<Opened> {
    layer_and_chain(source, using).map(|(opened, _)| opened)
}

/// The same; the error does not name the image.
pub fn try_chain(source: &Source, using: Use) -> Outcome<(Opened, Chain)> {
    let opened = try_layer(source, using)?;
    let chain = below(source, &opened, using)?;
    Ok((opened, chain))
}

fn below(source: &Source, opened: &Opened, using: Use) -> Outcome<Chain> {
    let options = OpenOptions { format: None, ..using.options() };
    let mut walk = Walk::from_head(opened.layer.clone(), &options, &refuse)
        .map_err(|e| Fail::new(reason(&e)))?;
    let mut below = source.below.clone();
    while step(&mut walk, &mut below, using)? {}
    Ok(vdisk::change::with_space(walk.finish()))
}

/// Opens the layer below the lowest one, `below` says which; `false` where there is none.
pub fn step(walk: &mut Walk, below: &mut Below, using: Use) -> Outcome<bool> {
    let depth = walk.depth();
    let failed = |e: Fail| e.prefix("Could not open backing file: ".repeat(depth));
    if matches!(below, Below::Recorded) && !names_json(walk) {
        let more = walk.step().map_err(|e| failed(below_reason(&e)))?;
        let lowest = walk.lowest();
        if more && !using.looks && lowest.image.encrypted() {
            return Err(failed(crypt::locked(lowest.format.name())));
        }
        return Ok(more);
    }
    let Some(source) = named_below(walk, below)? else { return Ok(false) };
    let using = Use { looks: using.looks, ..Use::reading(using.shared) };
    let lower = try_layer(&source, using).map_err(failed)?;
    walk.put(lower.layer).map_err(|e| Fail::new(reason(&e)))?;
    *below = source.below;
    Ok(true)
}

/// What stands below the lowest layer, where the user said anything about it. What an image names
/// passes the library's gate: a path, and nothing else.
pub fn named_below(walk: &Walk, below: &Below) -> Outcome<Option<Source>> {
    match below {
        Below::Nothing => Ok(None),
        Below::Given(given) => Ok(Some((**given).clone())),
        Below::Recorded | Below::Adjusted(_) => {
            let Some(recorded) = walk.recorded() else { return Ok(None) };
            if names_json(walk) {
                return Source::named(&recorded.name, recorded.format.as_deref()).map(Some);
            }
            let path = open::resolve(&walk.lowest().path, &recorded.name);
            let path = path.map_err(|e| Fail::new(reason(&e)))?;
            let none = List::default();
            let options = if let Below::Adjusted(options) = below { options } else { &none };
            Source::adjusted(&path, recorded.format.as_deref(), options).map(Some)
        }
    }
}

/// Whether the lowest layer names what is below it by `json:`, and the user vouches for such names.
fn names_json(walk: &Walk) -> bool {
    walk.recorded().is_some_and(|recorded| is_trusted_json(&recorded.name))
}

/// Whether a name that stands in an image is a `json:` one, and the user vouches for such names. They
/// come from whoever wrote the image, and may name any file and any server: nobody but who trusts all
/// of the images can want them followed.
pub fn is_trusted_json(name: &str) -> bool {
    name.starts_with("json:") && trusts_names()
}

/// Whether the user vouches for what stands in all of the images.
pub fn trusts_names() -> bool {
    std::env::var_os(TRUST).is_some_and(|value| value == "1")
}

fn below_reason(error: &Error) -> Fail {
    let path = error.path().unwrap_or(Path::new(""));
    let message = error.message();
    if error.kind() == ErrorKind::NotFound {
        let text = os_text(nix::libc::ENOENT);
        return Fail::new(format!("Could not open '{}': {text}", path.display()));
    }
    match message.rsplit_once("unknown image format ") {
        Some((_, name)) => Fail::new(format!("Unknown driver {name}")),
        None => Fail::new(open_reason(error, path)),
    }
}

/// Opens the layer; the error does not name it.
fn try_layer(source: &Source, using: Use) -> Outcome<Opened> {
    let Bytes { mut storage, file, export } = bottom::open(&source.protocol, using)?;
    let length = storage.len().map_err(|e| Fail::new(reason(&e)))?;
    if using.unsynced {
        storage = unsynced(storage);
    }
    let path = source.path().unwrap_or(file.path()).to_path_buf();
    let failed = |e: Error| Fail::new(reason(&e));
    if using.write && !using.check {
        family::refuse_sealed(&path).map_err(failed)?;
    }
    let format = match source.format.as_deref() {
        Some(name) => Format::from_name(name).map_err(failed)?,
        None => open::probe_named(&path, &*storage).map_err(|e| match e.raw_os_error() {
            Some(_) => failed(e).prefix("Could not read image for determining its format: "),
            None => failed(e),
        })?,
    };
    leftover::of_format(format.name(), &source.left)?;
    let mut vmdk = None;
    let mut luks = None;
    let (image, qcow2): (Arc<dyn Image>, _) = match format {
        Format::Qcow2 => {
            let options = using.options();
            let header = qcow2::Header::read(&*storage).map_err(failed)?;
            let data_file = data_file::open(source, &file, &header, using)?;
            let inner = qcow2::OpenOptions {
                read_only: !using.write,
                cache: if using.write { options.cache / 4 } else { 1 << 20 },
                repair: using.check,
                data_file,
                passphrase: crypt::of_qcow2(source, &header, using.looks)?,
                ..qcow2::OpenOptions::default()
            };
            let image = qcow2::Image::with_header(storage, header, inner);
            let image = Arc::new(image.map_err(|e| crypt::open_failed(&e))?);
            if !using.check {
                // A table of snapshots that is over the limits keeps an image from being used.
                let over = image.snapshots().err().filter(|e| e.raw_os_error().is_some());
                if let Some(error) = over {
                    return Err(Fail::new(error.message()));
                }
                // So does a bitmap of a kind that nobody could keep right.
                image.bitmaps().map_err(|e| Fail::new(e.message()))?;
            }
            image.mended_on_opening().iter().for_each(|line| eprintln!("{line}"));
            (image.clone(), Some(image))
        }
        Format::Raw if export.is_some() && source.window == (0, None) => match export {
            Some(client) => (Arc::new(nbd::Disk::new(client, !using.write)), None),
            None => return Err(Fail::new("No export")),
        },
        Format::Raw => {
            let (offset, len) = source.window;
            let window = Window::new(storage, offset, len)?;
            let window = window.by_sectors(source.direct);
            let bytes = Arc::new(window);
            let image = match source.format {
                None => open::open_guessed(bytes, !using.write),
                Some(_) => raw::Image::open(bytes, !using.write),
            };
            (Arc::new(image.map_err(failed)?), None)
        }
        Format::Vmdk if !using.write => {
            let image = open_vmdk(source, &path, storage, using)?;
            vmdk = Some(image.clone());
            (image, None)
        }
        Format::Vpc if !using.write => {
            (Arc::new(vhd::Vhd::open(storage, source.vhd_size).map_err(failed)?), None)
        }
        Format::Vdi if !using.write => (Arc::new(vdi::Vdi::open(storage).map_err(failed)?), None),
        Format::Vhdx if !using.write => {
            (Arc::new(vhdx::Vhdx::open(storage).map_err(failed)?), None)
        }
        Format::Luks => {
            let passphrase = crypt::of_luks(source, using.looks)?;
            let image = Luks::open(storage, !using.write, passphrase.as_ref());
            let image = Arc::new(image.map_err(|e| crypt::open_failed(&e))?);
            luks = Some(image.clone());
            (image, None)
        }
        _ if using.write => (written(format, &path, storage, source.vhd_size)?, None),
        _ => {
            let options = OpenOptions { format: Some(format), ..using.options() };
            let layer = open::open_file(&path, file.clone(), &options).map_err(failed)?;
            (layer.image, None)
        }
    };
    if using.write && format == Format::Raw && source.format.is_none() {
        warn_of_guess(source);
    }
    let image = with_faults(source, image)?;
    let layer = Layer { path, format, image, file };
    let uri = match &source.protocol {
        Protocol::Nbd(target) => Some(target.uri()),
        _ => None,
    };
    Ok(Opened { layer, qcow2, vmdk, luks, length, uri, shown: source.shown() })
}

/// Opens a VMDK image, in as many files as it consists of.
fn open_vmdk(
    source: &Source,
    path: &Path,
    storage: Arc<dyn Storage>,
    using: Use,
) -> Outcome<Arc<vmdk::Vmdk>> {
    let failed = |e: Error| Fail::new(open_reason(&e, e.path().unwrap_or(path)));
    let plan = vmdk::Plan::read(storage.clone()).map_err(failed)?;
    if matches!(source.protocol, Protocol::Quorum(_)) && !plan.files().is_empty() {
        let shown = source.shown();
        return Err(Fail::new(format!(
            "Cannot use relative paths with VMDK descriptor file '{shown}': Cannot generate a base \
             directory for quorum nodes"
        )));
    }
    let options = FileOptions { access: Some(using.access()), write: false };
    open::open_vmdk(path, storage, options, true).map(Arc::new).map_err(failed)
}

/// The image, failing as the user wants it to.
fn with_faults(source: &Source, image: Arc<dyn Image>) -> Outcome<Arc<dyn Image>> {
    let Some(rules) = &source.above else { return Ok(image) };
    let faults = Faults::read(rules.config.as_deref(), &rules.given)?;
    Ok(Arc::new(Faulty::new(image, faults)))
}

fn warn_of_guess(source: &Source) {
    eprintln!(
        "WARNING: Image format was not specified for '{}' and probing guessed raw.\n         \
         Automatically detecting the format is dangerous for raw images, write operations on block 0 will \
         be restricted.\n         Specify the 'raw' format explicitly to remove the restrictions.",
        source.shown()
    );
}

/// The bytes of the image's file.
pub fn bytes(source: &Source, using: Use) -> Outcome<Arc<dyn Storage>> {
    let opened = bottom::open(&source.protocol, using);
    let opened = opened.map_err(|e| e.prefix(format!("Could not open '{}': ", source.given)))?;
    Ok(opened.storage)
}

/// The format that the image's first bytes show.
pub fn probe(source: &Source, using: Use) -> Outcome<Format> {
    let bytes = bytes(source, using)?;
    open::probe(&*bytes)
        .map_err(|e| Fail::new(format!("Could not open '{}': {}", source.given, reason(&e))))
}

/// Opens the disk as it was at an internal snapshot.
pub fn at_snapshot(source: &Source, which: &str, using: Use) -> Outcome<Chain> {
    check_snapshot_list(which)?;
    let list = List::parse(which, None);
    let named = list.get("snapshot.id").or_else(|| list.get("snapshot.name")).unwrap_or(which);
    let failed = |why: String| Fail::new(format!("Failed to load snapshot: {why}"));
    let (opened, chain) = layer_and_chain(source, using)?;
    if opened.qcow2.is_none() {
        let name = opened.layer.format;
        return Err(failed(format!(
            "Block format '{name}' used by device '' does not support temporarily loading internal \
             snapshots"
        )));
    }
    let Bytes { storage, file, .. } = bottom::open(&source.protocol, using)?;
    let header = opened.qcow2.as_ref().map(|q| q.header());
    let passphrase = match &header {
        Some(header) => crypt::of_qcow2(source, header, using.looks)?,
        None => None,
    };
    let inner = qcow2::OpenOptions { cache: 1 << 20, passphrase, ..qcow2::OpenOptions::default() };
    let image = qcow2::Image::open_snapshot(storage, inner, named).map_err(|e| {
        failed(match e.kind() {
            ErrorKind::NotFound => "Can't find snapshot".to_owned(),
            _ => e.message().to_owned(),
        })
    })?;
    let layer = Layer { image: Arc::new(image), file, ..opened.layer };
    let options = OpenOptions { format: None, ..using.options() };
    let lower = chain.all_layers().split_off(1);
    let mut walk = Walk::from_head(layer, &options, &refuse).map_err(|e| Fail::new(reason(&e)))?;
    for layer in lower {
        walk.put(layer).map_err(|e| Fail::new(reason(&e)))?;
    }
    Ok(vdisk::change::with_space(walk.finish()))
}

/// Opens a qcow2 image for changes that need it as a whole; `None` for other formats.
pub fn owned(source: &Source, using: Use) -> Outcome<Option<qcow2::Image>> {
    let Opened { layer, qcow2, .. } = self::layer(source, using)?;
    let options = using.options();
    Walk::from_head(layer, &options, &refuse).map(drop).map_err(|e| Fail::new(reason(&e)))?;
    Ok(qcow2.and_then(Arc::into_inner))
}

/// Refuses a list of snapshot options with others than those that there are.
pub fn check_snapshot_list(text: &str) -> Outcome<()> {
    if !text.starts_with("snapshot.") {
        return Ok(());
    }
    for (key, _) in List::parse(text, None).0 {
        if !matches!(key.as_str(), "snapshot.id" | "snapshot.name") {
            report(format!("Invalid parameter '{key}'"));
            return Err(Fail::new(format!("Failed in parsing snapshot param '{text}'")));
        }
    }
    Ok(())
}

/// Refuses to change the size of an image whose snapshots could not say theirs.
pub fn refuse_resize(opened: &Opened) -> Outcome<()> {
    let header = opened.qcow2.as_ref().map(|q| q.header());
    match header {
        Some(h) if h.snapshots > 0 && h.version < 3 => {
            Err(Fail::new("Can't resize a v2 image which has snapshots"))
        }
        _ => Ok(()),
    }
}

/// Allocates the bytes by which a disk grew.
pub fn preallocate(opened: &Opened, from: u64, to: u64, how: Preallocation) -> Outcome<()> {
    let file = &opened.layer.file;
    let done = match (opened.layer.format, how) {
        (_, Preallocation::Off) => Ok(()),
        (Format::Raw, Preallocation::Falloc) => file.write_zeroes(from, to - from),
        (Format::Raw, Preallocation::Full) => file.write_zero_bytes(from, to - from),
        (Format::Qcow2, _) if opened.qcow2.is_some() => {
            let image = opened.qcow2.as_ref();
            image.map_or(Ok(()), |i| i.preallocate(from, how).and_then(|()| i.flush()))
        }
        _ => {
            let message = "Unsupported preallocation mode";
            Err(Error::unsupported(message))
        }
    };
    done.map_err(|e| Fail::new(reason(&e)))
}

/// The name of a backing file as it is found: relative to the image that names it.
pub fn full_backing_name(shown: &str, backing: &str) -> String {
    if backing.is_empty() || backing.starts_with('/') || has_protocol(backing) {
        return backing.to_owned();
    }
    match shown.rfind('/') {
        Some(slash) => format!("{}{backing}", &shown[..=slash]),
        None => backing.to_owned(),
    }
}

/// The path that a backing file's full name means.
pub fn backing_path(full: &str) -> PathBuf {
    PathBuf::from(full.strip_prefix("file:").unwrap_or(full))
}
