//! `qemu-img convert`: copies one or more images into another one.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Mutex;

use vdisk::block::BlockDevice;
use vdisk::chain::Chain;
use vdisk::open::Format;

use crate::qemu_img::commands::create::{self, Place};
use crate::qemu_img::fail::{Fail, Outcome};
use crate::qemu_img::foreign::create as create_foreign;
use crate::qemu_img::images::bitmaps;
use crate::qemu_img::images::copy::{Copying, Part, copy};
use crate::qemu_img::images::open;
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::jail::Opens;
use crate::qemu_img::names::name::{Key, Source};
use crate::qemu_img::options::args::{self, Given, Opt, flag, long, value};
use crate::qemu_img::options::chosen::Chosen;
use crate::qemu_img::options::create as options;
use crate::qemu_img::options::format::{CACHE, FORMAT, IMAGE_OPTS, OBJECT, QUIET, SHARED};
use crate::qemu_img::options::opts;
use crate::qemu_img::progress::Progress;
use crate::qemu_img::size;

/// The smallest run of zeroes that is looked for, in bytes, unless the user says otherwise.
const SPARSE: u64 = 4096;
/// Runs of zeroes of another length are not looked for.
const MAX_SPARSE: u64 = 16 << 20;

const NO_COMPRESSION: &str = "Compression not supported for this file format";

const KNOWN: &[Opt] = &[
    FORMAT,
    value("O"),
    value("B"),
    flag("C"),
    flag("c"),
    value("F"),
    value("o"),
    value("l"),
    value("S"),
    flag("p"),
    value("t"),
    CACHE,
    QUIET,
    flag("n"),
    value("m"),
    flag("W"),
    SHARED,
    value("r"),
    OBJECT,
    IMAGE_OPTS,
    long("target-image-opts"),
    long("salvage"),
    long("target-is-zero"),
    long("bitmaps"),
    long("skip-broken-bitmaps"),
];

pub fn run(args: &[String]) -> Outcome {
    let given = args::parse(args, KNOWN)?;
    let list = opts::joined(given.all("o"))?;
    let sparse = given.get("S").map(sparse).transpose()?;
    if let Some(text) = given.get("m") {
        let count = text.parse::<u64>().ok().filter(|n| (1..=16).contains(n));
        count.ok_or_else(|| {
            Fail::new(
                "Invalid number of coroutines. Allowed number of coroutines is between 1 and 16",
            )
        })?;
    }
    given.check_rate()?;
    check_combination(&given)?;
    let mut names = VecDeque::from(given.names.clone());
    let target = names.pop_back();
    let format = given.get("O").unwrap_or("raw");
    if list.as_deref().is_some_and(opts::asks_for_help) {
        return options::print_help(format, target.is_some());
    }
    let Some(target) = target.filter(|_| !names.is_empty()) else {
        return Err(Fail::new("Must specify image file name"));
    };
    if names.len() > 1 && given.has("B") {
        return Err(Fail::new(
            "Having a backing file for the target makes no sense when concatenating multiple input images",
        ));
    }
    given.check_cache("T", "source cache")?;
    given.check_cache("t", "cache")?;
    let list = list.as_deref().unwrap_or("");
    let request = Request { given: &given, target: &target, format, list };
    let progress = Mutex::new(Progress::begin(given.has("p") && !given.has("q"), 1.0));
    let done = convert(&request, names, sparse.unwrap_or(SPARSE), &progress);
    let mut progress = progress.into_inner().unwrap_or_else(|e| e.into_inner());
    if done.is_ok() {
        progress.at(100.0);
    }
    progress.end();
    done.map(|()| 0)
}

fn convert(
    request: &Request<'_>,
    names: VecDeque<String>,
    sparse: u64,
    progress: &Mutex<Progress>,
) -> Outcome<()> {
    let given = request.given;
    request.opens(&names).close();
    let first = names.front().cloned().filter(|_| given.has("bitmaps"));
    let copied = match first {
        Some(name) => copied_bitmaps(given, &name, request.format)?,
        None => Vec::new(),
    };
    if !given.has("n") {
        // What cannot be made needs no source.
        options::of_format(request.format)?;
    }
    let sources = sources(given, names)?;
    let Target { chain, has_backing, zeroed, compress } = request.target(&sources)?;
    let copying = Copying {
        target: &chain,
        sparse,
        compress,
        has_backing,
        salvage: given.has("salvage"),
        quiet: given.has("q"),
        progress,
        reads_zero: zeroed && !has_backing || given.has("target-is-zero"),
    };
    copy(&sources, &copying)?;
    drop(chain);
    if !copied.is_empty() {
        bitmaps::write(&request.target_source()?, &copied)?;
    }
    Ok(())
}

fn sparse(text: &str) -> Outcome<u64> {
    let size = size::operand("buffer size for sparse output", text)?;
    if size > MAX_SPARSE || !size.is_multiple_of(512) {
        return Err(Fail::new(format!(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to \
             {MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
        )));
    }
    Ok(size)
}

fn check_combination(given: &Given) -> Outcome<()> {
    let fail = |text: &str| Err(Fail::new(text));
    if given.has("skip-broken-bitmaps") && !given.has("bitmaps") {
        return fail("Use of --skip-broken-bitmaps requires --bitmaps");
    }
    if given.has("target-image-opts") && !given.has("n") {
        return fail("--target-image-opts requires use of -n flag");
    }
    if given.has("target-is-zero") && !given.has("n") {
        return fail("--target-is-zero requires use of -n flag");
    }
    if given.has("target-is-zero") && given.has("B") {
        return fail("Cannot use --target-is-zero when the destination image has a backing file");
    }
    if given.has("n") && given.has("o") {
        return fail("-o has no effect when skipping image creation");
    }
    if given.has("C") {
        if given.has("S") {
            return fail("Cannot enable copy offloading when -S is used");
        }
        if given.has("c") {
            return fail("Cannot enable copy offloading when -c is used");
        }
        if given.has("salvage") {
            return fail("Cannot use copy offloading in salvaging mode");
        }
    }
    Ok(())
}

/// The bitmaps of the one source.
fn copied_bitmaps(given: &Given, name: &str, format: &str) -> Outcome<Vec<bitmaps::Copied>> {
    if given.names.len() > 2 {
        return Err(Fail::new("Copying bitmaps only possible with single source"));
    }
    let opened = open::layer(&given.source(name)?, given.reading())?;
    let Some(image) = opened.qcow2.as_ref().filter(|image| image.header().version > 2) else {
        return Err(Fail::new("Source lacks bitmap support"));
    };
    if format != "qcow2" {
        return Err(Fail::new(format!("Format driver '{format}' does not support bitmaps")));
    }
    bitmaps::read(image, given.has("skip-broken-bitmaps"))
}

/// Opens the sources, one behind the other.
fn sources(given: &Given, names: VecDeque<String>) -> Outcome<Vec<Part>> {
    let mut parts = Vec::new();
    let mut start = 0;
    for name in names {
        let source = given.source(&name)?;
        let chain = match given.get("l") {
            Some(snapshot) => open::at_snapshot(&source, snapshot, given.reading())?,
            None => open::chain(&source, given.reading())?,
        };
        let part = Part::new(chain, start);
        start += part.size;
        parts.push(part);
    }
    Ok(parts)
}

/// Where to.
struct Target {
    chain: Chain,
    /// It stands on a backing file of its own.
    has_backing: bool,
    /// It was made here, and reads as zeroes where nothing is written.
    zeroed: bool,
    /// Every cluster is written compressed.
    compress: bool,
}

struct Request<'a> {
    given: &'a Given,
    target: &'a str,
    format: &'a str,
    list: &'a str,
}

impl Request<'_> {
    fn target_source(&self) -> Outcome<Source> {
        let options = self.given.has("target-image-opts");
        Source::parse(self.target, (!options).then_some(self.format), options)
    }

    /// What is opened. What cannot be read is said by who opens it.
    fn opens(&self, names: &VecDeque<String>) -> Opens {
        let sources = names.iter().filter_map(|name| self.given.source(name).ok());
        let opens = sources.fold(Opens::new(), |opens, source| opens.read(&source));
        if self.given.has("n") {
            return self.target_source().iter().fold(opens, Opens::changed);
        }
        let known = options::with_file(self.format);
        let chosen = known.and_then(|known| Chosen::parse(known, self.list));
        match (create::place(self.target), chosen) {
            (Ok(place), Ok(mut chosen)) => {
                let backing = self.given.get("B").filter(|_| chosen.knows("backing_file"));
                let _ = backing.map(|backing| chosen.set("backing_file", backing));
                create::opens(opens, (self.target, &place), &chosen)
            }
            _ => opens,
        }
    }

    /// Opens the target, or makes it.
    fn target(&self, sources: &[Part]) -> Outcome<Target> {
        let compress = self.given.has("c");
        let total: u64 = sources.iter().map(|p| p.size).sum();
        let backing = self.given.get("B");
        if self.given.has("n") {
            let chain = open::chain(&self.target_source()?, Use::writing())?;
            if compress && chain.head().format != Format::Qcow2 {
                return Err(Fail::new(NO_COMPRESSION));
            }
            if chain.size() < total {
                return Err(Fail::new("output file is smaller than input file"));
            }
            let has_backing = backing.is_some();
            return Ok(Target { chain, has_backing, zeroed: false, compress });
        }
        let known = options::with_file(self.format)?;
        let place = create::place(self.target)?;
        let mut chosen = Chosen::parse(known, self.list)?;
        chosen.add_defaults()?;
        chosen.set("size", &total.to_string())?;
        for (key, value) in [("backing_file", backing), ("backing_fmt", self.given.get("F"))] {
            let Some(value) = value else { continue };
            if !chosen.knows(key) {
                let what = key.trim_start_matches("backing_").replace("fmt", "format");
                return Err(Fail::new(format!(
                    "Backing {what} not supported for file format '{}'",
                    self.format
                )));
            }
            chosen.set(key, value)?;
        }
        if chosen.has("backing_file") && !chosen.has("backing_fmt") {
            return Err(Fail::new("Use of backing file requires explicit backing format"));
        }
        self.check_compression(&chosen)?;
        let compress = compress || create_foreign::only_compressed(self.format, &chosen);
        if let Place::File(path) = &place {
            refuse_same_file(sources, path, self.format)?;
        }
        create::make(&place, self.format, &chosen).map_err(|e| {
            e.prefix(format!("{}: error while converting {}: ", self.target, self.format))
        })?;
        // As QEMU does unless told otherwise; an image that was there before is not risked for speed.
        let unsynced = self.given.get("t").is_none_or(|mode| mode == "unsafe");
        let secret = chosen.text("key-secret").or(chosen.text("encrypt.key-secret"));
        let source = Source {
            protocol: place.protocol(),
            key: Key { secret: secret.map(str::to_owned), format: None },
            ..Source::named(self.target, Some(self.format))?
        };
        let chain = open::chain(&source, Use { unsynced, ..Use::writing() })?;
        let zeroed = chain.head().image.starts_zeroed();
        Ok(Target { chain, has_backing: chosen.has("backing_file"), zeroed, compress })
    }

    fn check_compression(&self, chosen: &Chosen) -> Outcome<()> {
        if !self.given.has("c") {
            return Ok(());
        }
        if self.format != "qcow2" && !create_foreign::only_compressed(self.format, chosen) {
            return Err(Fail::new(NO_COMPRESSION));
        }
        if chosen.text("preallocation").is_some_and(|p| p != "off") {
            return Err(Fail::new("Compression and preallocation not supported at the same time"));
        }
        if chosen.switch("encryption") == Some(true) || chosen.has("encrypt.format") {
            return Err(Fail::new("Compression and encryption not supported at the same time"));
        }
        Ok(())
    }
}

/// A source that is also the target is locked: say so before it is emptied.
fn refuse_same_file(sources: &[Part], path: &Path, format: &str) -> Outcome<()> {
    use std::os::unix::fs::MetadataExt;
    let identity = |p: &Path| std::fs::metadata(p).ok().map(|m| (m.dev(), m.ino()));
    let Some(own) = identity(path) else { return Ok(()) };
    let layers = sources.iter().flat_map(|s| s.layers.iter());
    if layers.into_iter().any(|l| identity(&l.path) == Some(own)) {
        let name = path.display();
        return Err(Fail::new(format!(
            "{name}: error while converting {format}: Failed to get \"write\" lock\nIs another process using the \
             image [{name}]?"
        )));
    }
    Ok(())
}
