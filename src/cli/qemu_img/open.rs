//! Opening what the user named: one layer, or a whole chain.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vdisk::chain::{self, Chain, Descent, Format, Layer, OpenOptions};
use vdisk::formats::{raw, vhd, vmdk};
use vdisk::image::Image;
use vdisk::qcow2::{self, Preallocation};
use vdisk::storage::draft::unsynced;
use vdisk::storage::{Access, FileOptions, FileStorage, Storage};
use vdisk::{Error, ErrorKind};

use super::data_file;
use super::fail::{Fail, Outcome, open_reason, os_text, reason, report};
use super::faults::Faults;
use super::faulty::{Faulty, FaultyStorage};
use super::name::{Below, Protocol, Source, has_protocol};
use super::opts::List;
use super::window::Window;

/// What a command does with an image.
#[derive(Debug, Clone, Copy, Default)]
pub struct Use {
    /// Writes to it.
    pub write: bool,
    /// Reads although others write.
    pub shared: bool,
    /// Checks it, and perhaps mends it: nothing is repaired on opening.
    pub check: bool,
    /// Only looks at what the image says of itself.
    pub describe: bool,
    /// What is written is left to the host's page cache.
    pub unsynced: bool,
}

impl Use {
    /// Only reads; `shared` although others write.
    pub fn reading(shared: bool) -> Use {
        Use { shared, ..Use::default() }
    }

    /// Reads and writes.
    pub fn writing() -> Use {
        Use { write: true, ..Use::default() }
    }

    fn options(self) -> OpenOptions {
        OpenOptions {
            read_only: !self.write,
            shared: self.shared && !self.write,
            // A reader takes a chain as it is, like any other program.
            unprotected: !self.write,
            probe_backing: true,
            ..OpenOptions::default()
        }
    }

    /// How its files are locked.
    pub fn access(self) -> Access {
        match (self.write, self.shared) {
            (true, _) => Access::Write,
            (false, true) => Access::ReadShared,
            (false, false) => Access::Read,
        }
    }
}

/// One layer that the user named.
pub struct Opened {
    /// The layer.
    pub layer: Layer,
    /// The same as a qcow2 image, where it is one.
    pub qcow2: Option<Arc<qcow2::Image>>,
    /// The same as a VMDK image, where it is one.
    pub vmdk: Option<Arc<vmdk::Vmdk>>,
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

/// The same; the error does not name the image.
pub fn try_chain(source: &Source, using: Use) -> Outcome<(Opened, Chain)> {
    let opened = try_layer(source, using)?;
    let chain = below(source, &opened, using)?;
    Ok((opened, chain))
}

fn below(source: &Source, opened: &Opened, using: Use) -> Outcome<Chain> {
    let options = OpenOptions { format: None, ..using.options() };
    let mut descent =
        Descent::from_head(opened.layer.clone(), &options).map_err(|e| Fail::new(reason(&e)))?;
    let mut below = source.below.clone();
    loop {
        let backing_failed =
            |e: Fail, depth: usize| e.prefix("Could not open backing file: ".repeat(depth));
        let depth = descent.depth();
        let more = match below {
            Below::Nothing => false,
            Below::Recorded => {
                let next = descent.step();
                next.map_err(|e| backing_failed(below_reason(&e), depth))?
            }
            Below::Given(given) => {
                let reading = Use::reading(using.shared);
                let lower = try_layer(&given, reading).map_err(|e| backing_failed(e, depth))?;
                descent.put(lower.layer).map_err(|e| Fail::new(reason(&e)))?;
                below = given.below.clone();
                continue;
            }
        };
        if !more {
            return Ok(descent.finish());
        }
    }
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
    let (mut storage, file) = storage(&source.protocol, using)?;
    if using.unsynced {
        storage = unsynced(storage);
    }
    let path = source.path().unwrap_or(file.path()).to_path_buf();
    let failed = |e: Error| Fail::new(reason(&e));
    if using.write && !using.check {
        chain::refuse_sealed(&path).map_err(failed)?;
    }
    let format = match source.format.as_deref() {
        Some(name) => Format::from_name(name).map_err(failed)?,
        None => chain::probe(&*storage).map_err(|e| match e.raw_os_error() {
            Some(_) => failed(e).prefix("Could not read image for determining its format: "),
            None => failed(e),
        })?,
    };
    let mut vmdk = None;
    let (image, qcow2): (Arc<dyn Image>, _) = match format {
        Format::Qcow2 => {
            let options = using.options();
            let header = qcow2::Header::read(&*storage).map_err(failed)?;
            let data_file = data_file::open(&path, &file, &header, using)?;
            let inner = qcow2::OpenOptions {
                read_only: !using.write,
                cache: if using.write { options.cache / 4 } else { 1 << 20 },
                repair: using.check && using.write,
                data_file,
                ..qcow2::OpenOptions::default()
            };
            let image =
                Arc::new(qcow2::Image::with_header(storage, header, inner).map_err(failed)?);
            if !using.check {
                // A table of snapshots that is over the limits keeps an image from being used.
                let over = image.snapshots().err().filter(|e| e.raw_os_error().is_some());
                if let Some(error) = over {
                    return Err(Fail::new(error.message()));
                }
            }
            image.mended_on_opening().iter().for_each(|line| eprintln!("{line}"));
            (image.clone(), Some(image))
        }
        Format::Raw => {
            let (offset, len) = source.window;
            let window = Window::new(storage, offset, len).map_err(failed)?;
            let window = window.by_sectors(source.direct);
            let image = raw::Image::open(Arc::new(window), !using.write).map_err(failed)?;
            (Arc::new(image), None)
        }
        Format::Vmdk if !using.write => {
            let image = open_vmdk(source, &path, storage, using)?;
            vmdk = Some(image.clone());
            (image, None)
        }
        Format::Vpc if !using.write => {
            (Arc::new(vhd::Vhd::open(storage, source.vhd_size).map_err(failed)?), None)
        }
        _ => {
            let options = OpenOptions { format: Some(format), ..using.options() };
            let layer = chain::open_file(&path, file.clone(), &options).map_err(failed)?;
            (layer.image, None)
        }
    };
    if using.write && format == Format::Raw && source.format.is_none() {
        warn_of_guess(source);
    }
    let image = with_faults(source, image)?;
    let layer = Layer { path, format, image, file };
    Ok(Opened { layer, qcow2, vmdk, shown: source.shown() })
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
    chain::open_vmdk(path, storage, options).map(Arc::new).map_err(failed)
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
        source.given
    );
}

/// The bytes of the image's file.
pub fn bytes(source: &Source, using: Use) -> Outcome<Arc<dyn Storage>> {
    let opened = storage(&source.protocol, using);
    let (storage, _) =
        opened.map_err(|e| e.prefix(format!("Could not open '{}': ", source.given)))?;
    Ok(storage)
}

/// The format that the image's first bytes show.
pub fn probe(source: &Source, using: Use) -> Outcome<Format> {
    let bytes = bytes(source, using)?;
    chain::probe(&*bytes)
        .map_err(|e| Fail::new(format!("Could not open '{}': {}", source.given, reason(&e))))
}

/// The bytes of a source, and the file at the bottom of it.
fn storage(protocol: &Protocol, using: Use) -> Outcome<(Arc<dyn Storage>, Arc<FileStorage>)> {
    match protocol {
        Protocol::File(path) => {
            let file = open_file(path, using)?;
            Ok((file.clone(), file))
        }
        Protocol::Faulty { config, rules, image } => {
            let (inner, file) = storage(image, using)?;
            let faults = Faults::read(config.as_deref(), rules)?;
            Ok((Arc::new(FaultyStorage::new(inner, faults)), file))
        }
        Protocol::Null(size) => {
            // A file without blocks is all that it takes: it reads as zeroes, and says so.
            let made = FileStorage::temporary(&std::env::temp_dir())
                .and_then(|file| file.set_len(*size).map(|()| file));
            let file = Arc::new(made.map_err(|e| Fail::new(reason(&e)))?);
            Ok((file.clone(), file))
        }
        Protocol::Quorum(parts) => {
            let first = parts.first().ok_or_else(|| Fail::new("No children"))?;
            storage(first, using)
        }
    }
}

fn open_file(path: &Path, using: Use) -> Outcome<Arc<FileStorage>> {
    let options = FileOptions { access: Some(using.access()), write: using.write };
    let opened = FileStorage::open(path, options).map_err(|e| match e.kind() {
        ErrorKind::Unsupported => {
            Fail::new(format!("'file' driver requires '{}' to be a regular file", path.display()))
        }
        _ => Fail::new(open_reason(&e, path)),
    });
    opened.map(Arc::new)
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
        return Err(failed(format!("Device '{name}' does not support internal snapshots")));
    }
    let (storage, file) = storage(&source.protocol, using)?;
    let image = qcow2::Image::open_snapshot(storage, 1 << 20, named).map_err(|e| {
        failed(match e.kind() {
            ErrorKind::NotFound => "Can't find snapshot".to_owned(),
            _ => e.message().to_owned(),
        })
    })?;
    let layer = Layer { image: Arc::new(image), file, ..opened.layer };
    let options = OpenOptions { format: None, ..using.options() };
    let lower = chain.all_layers().split_off(1);
    let mut descent = Descent::from_head(layer, &options).map_err(|e| Fail::new(reason(&e)))?;
    for layer in lower {
        descent.put(layer).map_err(|e| Fail::new(reason(&e)))?;
    }
    Ok(descent.finish())
}

/// Opens a qcow2 image for changes that need it as a whole; `None` for other formats.
pub fn owned(source: &Source, using: Use) -> Outcome<Option<qcow2::Image>> {
    let Opened { layer, qcow2, .. } = self::layer(source, using)?;
    let options = using.options();
    Descent::from_head(layer, &options).map(drop).map_err(|e| Fail::new(reason(&e)))?;
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
