//! `qemu-img create`: a new image, over whatever stood there.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vdisk::formats::luks;
use vdisk::image::Backing;
use vdisk::image::Image as _;
use vdisk::luks::Header;
use vdisk::nbd::{self, Target};
use vdisk::qcow2::{self, CreateOptions, DataFile, Preallocation};
use vdisk::storage::{FileOptions, FileStorage, Storage};
use vdisk::{Error, ErrorKind};

use crate::qemu_img::encryption::crypt;
use crate::qemu_img::fail::{Fail, Outcome, os_text, reason};
use crate::qemu_img::foreign::create as create_foreign;
use crate::qemu_img::images::open::{self, full_backing_name};
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::jail::Opens;
use crate::qemu_img::names::name::{Protocol, Source, protocol};
use crate::qemu_img::options::args::{self, flag, value};
use crate::qemu_img::options::chosen::Chosen;
use crate::qemu_img::options::create as options;
use crate::qemu_img::options::format::{FORMAT, OBJECT, QUIET};
use crate::qemu_img::options::opts;
use crate::qemu_img::size;

/// What a guest reads and writes at least: sizes are rounded up to it.
const SECTOR: u64 = 512;

pub fn run(args: &[String]) -> Outcome {
    let known = [FORMAT, value("F"), value("b"), value("o"), flag("u"), QUIET, OBJECT];
    let given = args::parse(args, &known)?;
    let format = given.get("f").unwrap_or("raw").to_owned();
    let list = opts::joined(given.all("o"))?;
    let name = given.names.first();
    if list.as_deref().is_some_and(opts::asks_for_help) {
        return options::print_help(&format, name.is_some());
    }
    let Some(name) = name else { return Err(Fail::usage("Expecting image file name")) };
    let size = match given.names.get(1) {
        Some(text) => Some(size::operand("image size", text)?),
        None => None,
    };
    if let Some(more) = given.names.get(2) {
        return Err(Fail::usage(format!("Unexpected argument: {more}")));
    }
    let request = Request {
        name,
        format: &format,
        list: list.as_deref().unwrap_or(""),
        size,
        backing: given.get("b"),
        backing_format: given.get("F"),
        unsafe_backing: given.has("u"),
        quiet: given.has("q"),
    };
    create(&request).map_err(|e| e.prefix(format!("{name}: ")))?;
    Ok(0)
}

/// What to create.
struct Request<'a> {
    name: &'a str,
    format: &'a str,
    list: &'a str,
    size: Option<u64>,
    backing: Option<&'a str>,
    backing_format: Option<&'a str>,
    unsafe_backing: bool,
    quiet: bool,
}

fn create(request: &Request<'_>) -> Outcome<()> {
    let known = options::with_file(request.format)?;
    let place = place(request.name)?;
    let mut chosen = Chosen::parse(known, request.list)?;
    chosen.add_defaults()?;
    if let Some(size) = request.size {
        if chosen.has("size") {
            return Err(Fail::new("The image size must be specified only once"));
        }
        chosen.set("size", &size.to_string())?;
    }
    let named = [("backing_file", request.backing), ("backing_fmt", request.backing_format)];
    for ((key, value), what) in named.into_iter().zip(["file", "format"]) {
        let Some(value) = value else { continue };
        if !chosen.knows(key) {
            return Err(Fail::new(format!(
                "Backing {what} not supported for file format '{}'",
                request.format
            )));
        }
        chosen.set(key, value)?;
    }
    opens(Opens::new(), (request.name, &place), &chosen).close();
    check_backing(request, &mut chosen)?;
    if !chosen.has("size") {
        return Err(Fail::new("Image creation needs a size parameter"));
    }
    if !request.quiet {
        println!("Formatting '{}', fmt={}{}", request.name, request.format, chosen.listed());
    }
    if let (Place::File(path), Some(name)) = (&place, chosen.text("backing_file")) {
        let format = chosen.text("backing_fmt").map(str::to_owned);
        let backing = Backing { name: name.to_owned(), format };
        vdisk::change::mark_below(path, &backing, Default::default());
    }
    make(&place, request.format, &chosen)
}

/// With what is opened besides where an image is made at a place that is called so, as the user has chosen.
pub fn opens(opens: Opens, (name, place): (&str, &Place), chosen: &Chosen) -> Opens {
    let opens = opens.made(&place.protocol());
    let opens = match chosen.text("backing_file").filter(|backing| !backing.is_empty()) {
        Some(backing) => opens.told(&full_backing_name(name, backing)),
        None => opens,
    };
    match chosen.text("data_file").map(protocol) {
        Some(Ok(data)) => opens.made(&data),
        _ => opens,
    }
}

/// Where an image can be made.
pub enum Place {
    /// A file, new or not.
    File(PathBuf),
    /// A server's export, which is there.
    Export(Target),
}

impl Place {
    /// What names it to those who open it.
    pub fn protocol(&self) -> Protocol {
        match self {
            Place::File(path) => Protocol::File(path.clone()),
            Place::Export(target) => Protocol::Nbd(target.clone()),
        }
    }

    /// The name of the file that a description of the image would tell.
    fn file_name(&self) -> String {
        match self {
            Place::File(path) => {
                path.file_name().unwrap_or_default().to_string_lossy().into_owned()
            }
            Place::Export(_) => "export".to_owned(),
        }
    }

    /// Opens it, a file emptied; a device or an export keeps what it holds.
    fn open(&self) -> Outcome<Arc<dyn Storage>> {
        match self {
            Place::File(path) => Ok(Arc::new(emptied(path)?)),
            Place::Export(target) => {
                let client = nbd::Client::connect(target, true).map_err(|e| {
                    let why = reason(&e);
                    Fail::new(format!(
                        "Protocol driver 'nbd' does not support creating new images, so an existing \
                         image must be selected as the target; however, opening the given target as \
                         an existing image failed: {why}"
                    ))
                })?;
                Ok(Arc::new(client))
            }
        }
    }
}

/// The place that a name means.
pub fn place(name: &str) -> Outcome<Place> {
    match protocol(name)? {
        Protocol::Nbd(target) => Ok(Place::Export(target)),
        _ => file_path(name).map(Place::File),
    }
}

/// The file that a name means.
fn file_path(name: &str) -> Outcome<PathBuf> {
    match protocol(name)? {
        Protocol::File(path) => Ok(path),
        _ => Err(Fail::new(format!("'{name}' is not the name of a file that could be made"))),
    }
}

/// Looks at the backing file, and takes its size where the user said none.
fn check_backing(request: &Request<'_>, chosen: &mut Chosen) -> Outcome<()> {
    let Some(backing) = chosen.text("backing_file").map(str::to_owned) else { return Ok(()) };
    if backing.is_empty() {
        return Err(Fail::new("Expected backing file name, got empty string"));
    }
    if backing == request.name {
        return Err(Fail::new(
            "Error: Trying to create an image with the same filename as the backing file",
        ));
    }
    let format = chosen.text("backing_fmt").map(str::to_owned);
    if let Some(format) = &format
        && vdisk::open::Format::from_name(format).is_err()
    {
        return Err(Fail::new(format!("Unknown backing file format '{format}'")));
    }
    if request.unsafe_backing {
        return match format {
            Some(_) => Ok(()),
            None => Err(Fail::new("Backing file specified without backing format")),
        };
    }
    let full = full_backing_name(request.name, &backing);
    let opened = Source::named(&full, format.as_deref())
        .and_then(|source| open::try_chain(&source, Use::looking(false)));
    let (opened, chain) =
        opened.map_err(|e| Fail::new(format!("{}\nCould not open backing image.", e.text())))?;
    if format.is_none() {
        return Err(Fail::new(format!(
            "Backing file specified without backing format\nDetected format of {}.",
            opened.layer.format
        )));
    }
    if !chosen.has("size") {
        use vdisk::block::BlockDevice;
        chosen.set("size", &chain.size().to_string())?;
    }
    Ok(())
}

/// Makes the image; a file that was to become one and did not is taken away.
pub fn make(place: &Place, format: &str, chosen: &Chosen) -> Outcome<()> {
    let size = chosen.number("size").unwrap_or(0);
    let size = size
        .checked_next_multiple_of(SECTOR)
        .filter(|s| *s <= i64::MAX as u64)
        .ok_or_else(|| Fail::new("Image size is too large"))?;
    let of_file = if format == "qcow2" { Preallocation::Off } else { file_preallocation(chosen)? };
    if matches!(format, "vmdk" | "vdi" | "vhdx" | "vpc") {
        return make_foreign(place, format, size, chosen, of_file);
    }
    let file = place.open()?;
    check_preallocation(&*file, format, chosen)?;
    let made = match format {
        "qcow2" => options::qcow2(chosen, size)
            .and_then(|o| with_data_file(o, chosen))
            .and_then(|o| make_qcow2(file.clone(), &o)),
        "luks" => make_luks(&*file, size, chosen, of_file),
        _ => make_raw(&*file, size, of_file),
    };
    made.inspect_err(|_| {
        if let Place::File(path) = place
            && format != "raw"
            && path.is_file()
        {
            // What stands there is no image; the failure that is reported is the first one.
            let _ = std::fs::remove_file(path);
        }
    })
}

/// The same with its data file, new or emptied, where one is asked for.
fn with_data_file(options: CreateOptions, chosen: &Chosen) -> Outcome<CreateOptions> {
    let Some(name) = chosen.text("data_file") else { return Ok(options) };
    let storage = Arc::new(emptied(&file_path(name)?)?);
    let raw = chosen.switch("data_file_raw") == Some(true);
    let data_file = Some(DataFile { name: name.to_owned(), raw, storage });
    Ok(CreateOptions { data_file, ..options })
}

/// The file at `path`, new or emptied, locked for writing.
fn emptied(path: &Path) -> Outcome<FileStorage> {
    let failed = |e: Error| match e.raw_os_error() {
        Some(errno) => {
            Fail::new(format!("Could not create '{}': {}", path.display(), os_text(errno)))
        }
        None => Fail::new(reason(&e)),
    };
    // QEMU would overwrite it under its clones.
    vdisk::family::refuse_sealed(path).map_err(|e| Fail::new(e.to_string()))?;
    emptied_file(path).map_err(failed)
}

/// The same, for whoever has words of their own.
pub fn emptied_file(path: &Path) -> vdisk::Result<FileStorage> {
    let exclusive = vdisk::storage::Access::Write;
    let options = FileOptions { access: Some(exclusive), write: true };
    match FileStorage::open(path, options) {
        Ok(file) => file.set_len(0).map(|()| file),
        Err(e) if e.kind() == ErrorKind::NotFound => FileStorage::create(path),
        Err(e) => Err(e),
    }
}

fn make_qcow2(file: Arc<dyn Storage>, options: &CreateOptions) -> Outcome<()> {
    let made = qcow2::create(file, options).and_then(|image| image.flush());
    made.map_err(|e| Fail::new(reason(&e)))
}

/// Refuses what cannot be reserved where the image is to stand.
fn check_preallocation(file: &dyn Storage, format: &str, chosen: &Chosen) -> Outcome<()> {
    let mode = match chosen.text("preallocation") {
        None | Some("off") => return Ok(()),
        Some(mode) => mode,
    };
    Err(Fail::new(match (format, mode, file.is_fixed()) {
        ("raw", _, true) => format!("Unsupported preallocation mode '{mode}'"),
        ("raw", "metadata", false) => format!("Unsupported preallocation mode: {mode}"),
        ("qcow2", "falloc" | "full", true) => {
            format!("Could not resize image: Failed to resize underlying file: {}", unfit(mode))
        }
        ("luks", "falloc" | "full", true) => unfit(mode),
        _ => return Ok(()),
    }))
}

/// What keeps a device from being preallocated.
pub fn unfit(mode: &str) -> String {
    format!("Preallocation mode '{mode}' unsupported for this non-regular file")
}

/// An image of another program's format.
fn make_foreign(
    place: &Place,
    format: &str,
    size: u64,
    chosen: &Chosen,
    of_file: Preallocation,
) -> Outcome<()> {
    let name = place.file_name();
    let path = match place {
        Place::File(path) => path.clone(),
        Place::Export(_) => PathBuf::from(&name),
    };
    let vmdk = match format {
        "vmdk" => Some(create_foreign::vmdk_options(&path, size, chosen)?),
        _ => None,
    };
    let file = place.open()?;
    if of_file == Preallocation::Metadata {
        return Err(Fail::new("Unsupported preallocation mode: metadata"));
    }
    match (vmdk, format) {
        (Some(options), _) => create_foreign::vmdk(&*file, &path, &options),
        (None, "vdi") => create_foreign::vdi(&*file, size, chosen),
        (None, "vhdx") => create_foreign::vhdx(&*file, size, chosen),
        (None, _) => create_foreign::vpc(&*file, size, chosen),
    }
}

/// The mode in which the file below a format is made.
fn file_preallocation(chosen: &Chosen) -> Outcome<Preallocation> {
    let text = chosen.text("preallocation");
    options::preallocation(text)
        .map_err(|_| Fail::new(format!("invalid parameter value: {}", text.unwrap_or_default())))
}

fn make_luks(file: &dyn Storage, size: u64, chosen: &Chosen, how: Preallocation) -> Outcome<()> {
    let (passphrase, options) = crypt::for_luks(chosen)?;
    if chosen.switch("detached-header") == Some(true) {
        return Err(Fail::new("Parameter 'detached-header' is unexpected"));
    }
    let end = Header::area_len(options.spec).saturating_add(size);
    // The header goes over what is reserved for it.
    let made = match how {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => file.write_zeroes(0, end),
        Preallocation::Full => write_zero_bytes(file, 0, end),
    };
    made.and_then(|()| luks::create(file, size, &passphrase, &options))
        .map_err(|e| Fail::new(reason(&e)))
}

fn make_raw(file: &dyn Storage, size: u64, how: Preallocation) -> Outcome<()> {
    if file.is_fixed() && file.as_file().is_some() && file.len().is_ok_and(|len| len < size) {
        return Err(Fail::new("Cannot grow device files"));
    }
    let made = file.set_len(size).and_then(|()| match how {
        Preallocation::Off | Preallocation::Metadata => raw_beginning(file, size),
        Preallocation::Falloc => file.write_zeroes(0, size),
        Preallocation::Full => write_zero_bytes(file, 0, size).and_then(|()| file.sync()),
    });
    made.map_err(|e| Fail::new(reason(&e)))
}

/// Writes the first block of a new raw file of `size` bytes: what asks a file for the alignment that
/// its host wants cannot tell it from a hole. Of a device only so much is written that it is not
/// taken for what it held before.
pub fn raw_beginning(file: &dyn Storage, size: u64) -> vdisk::Result<()> {
    const BLOCK: u64 = 4096;
    let len = if size < BLOCK || file.is_fixed() { SECTOR } else { BLOCK };
    if size == 0 { Ok(()) } else { write_zero_bytes(file, 0, len) }
}

/// Writes zeroes, whatever the host could do instead.
fn write_zero_bytes(file: &dyn Storage, at: u64, len: u64) -> vdisk::Result<()> {
    const PIECE: u64 = 1 << 20;
    let zeroes = vec![0; len.min(PIECE) as usize];
    let mut done = 0;
    while done < len {
        let part = &zeroes[..(len - done).min(PIECE) as usize];
        file.write_all_at(at + done, part)?;
        done += part.len() as u64;
    }
    Ok(())
}
