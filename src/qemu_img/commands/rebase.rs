//! `qemu-img rebase`: puts an image on another backing file, or on none.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::path::Path;

use vdisk::block::{BlockDevice, is_zero};
use vdisk::chain::{Chain, Layer};
use vdisk::change;
use vdisk::image::{Backing, Identity};

use crate::qemu_img::fail::{Fail, Outcome, os_text, reason};
use crate::qemu_img::images::open::{self, Opened, full_backing_name};
use crate::qemu_img::images::status;
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::jail::Opens;
use crate::qemu_img::names::name::Source;
use crate::qemu_img::options::args::{self, Given, flag, value};
use crate::qemu_img::options::format::{CACHE, FORMAT, IMAGE_OPTS, OBJECT, QUIET, SHARED};
use crate::qemu_img::progress::Progress;

/// Bytes that are compared at a time.
const PIECE: u64 = 2 << 20;
/// Bytes that are read at a time: they are still near the processor when they are compared.
const STEP: u64 = 256 << 10;
pub fn run(args: &[String]) -> Outcome {
    let known = [
        FORMAT,
        value("F"),
        value("b"),
        flag("u"),
        flag("p"),
        value("t"),
        CACHE,
        QUIET,
        SHARED,
        flag("c"),
        OBJECT,
        IMAGE_OPTS,
    ];
    let given = args::parse(args, &known)?;
    let name = given.only_name()?;
    let base = match given.get("b") {
        Some(base) => base,
        None if given.has("u") => "",
        None => {
            let message = "Must specify backing file (-b) or use unsafe mode (-u)";
            return Err(Fail::usage(message));
        }
    };
    let mut progress = Progress::begin(given.has("p") && !given.has("q"), 2.0);
    let done = rebase(&given, name, base, &mut progress);
    progress.end();
    done.map(|()| 0)
}

fn rebase(given: &Given, name: &str, base: &str, progress: &mut Progress) -> Outcome<()> {
    given.check_cache("t", "cache")?;
    given.check_cache("T", "source cache")?;
    let source = given.source(name)?;
    let opens = Opens::new().changed(&source);
    match source.path() {
        Ok(path) if !base.is_empty() => {
            opens.told(&full_backing_name(&path.display().to_string(), base))
        }
        _ => opens,
    }
    .close();
    let format = given.get("F");
    if let Some(format) = format.filter(|f| vdisk::open::Format::from_name(f).is_err()) {
        return Err(Fail::new(format!("Invalid format name: '{format}'")));
    }
    if given.has("u") {
        let opened = open::layer(&source, Use::writing())?;
        let named = set_backing(&opened, base, format);
        progress.at(100.0);
        return named;
    }
    let (opened, disk) = open::layer_and_chain(&source, Use::writing())?;
    if given.has("c") && opened.qcow2.is_none() {
        return Err(Fail::new("Compression not supported for this file format"));
    }
    let new = new_base(&opened, base, format)?;
    let job = Job {
        layers: disk.all_layers(),
        disk: &disk,
        new_layers: new.as_ref().map_or_else(Vec::new, Chain::all_layers),
        new: new.as_ref(),
        compress: given.has("c"),
    };
    job.run(progress)?;
    disk.flush().map_err(|e| Fail::new(reason(&e)))?;
    let named = set_backing(&opened, base, format);
    progress.at(100.0);
    named
}

/// Opens the new backing file; none where the name is empty.
fn new_base(opened: &Opened, base: &str, format: Option<&str>) -> Outcome<Option<Chain>> {
    if base.is_empty() {
        return Ok(None);
    }
    let full = full_backing_name(&opened.shown, base);
    let new = Source::named(&full, format)
        .and_then(|source| open::try_chain(&source, Use::reading(false)));
    let failed = |e: Fail| e.prefix(format!("Could not open new backing file '{full}': "));
    new.map(|(_, chain)| Some(chain)).map_err(failed)
}

/// Records the backing file in the image.
pub fn set_backing(opened: &Opened, base: &str, format: Option<&str>) -> Outcome<()> {
    let failed =
        |why: &str| Fail::new(format!("Could not change the backing file to '{base}': {why}"));
    if !base.is_empty() && format.is_none() {
        return Err(failed("backing format must be specified"));
    }
    let Some(image) = &opened.qcow2 else {
        return Err(failed(&os_text(nix::libc::ENOTSUP)));
    };
    if !base.is_empty() && image.header().data_file_is_raw() {
        // The data file alone is to show the whole disk.
        return Err(failed(&os_text(nix::libc::EINVAL)));
    }
    let layer: &dyn vdisk::image::Image = &**image;
    let mut identity = layer.identity().map_err(|e| failed(&reason(&e)))?;
    identity.backing = (!base.is_empty())
        .then(|| Backing { name: base.to_owned(), format: format.map(str::to_owned) });
    let path = &opened.layer.path;
    relabel(path, &mut identity);
    let before = change::Bases::of(path).map_err(|e| failed(&reason(&e)))?;
    if let Some(backing) = &identity.backing {
        change::mark_below(path, backing, before.disk());
    }
    layer.set_identity(&identity).map_err(|e| match e.kind() {
        vdisk::ErrorKind::Invalid => failed("No space left in the file header"),
        _ => failed(&reason(&e)),
    })?;
    before.leave(path);
    Ok(())
}

/// A disk with a label also records which layer it stands on, and how that is known again.
fn relabel(path: &Path, identity: &mut Identity) {
    let Some(label) = &mut identity.label else { return };
    label.parent = identity.backing.as_ref().and_then(|backing| {
        let below = vdisk::open::resolve(path, &backing.name).ok()?;
        let format =
            backing.format.as_deref().map(vdisk::open::Format::from_name).transpose().ok()?;
        // A base that is missing, or being written, is not remembered.
        change::remembered(&below, format).ok()
    });
}

/// Copies into the disk what its old backing file shows otherwise than its new one.
struct Job<'a> {
    disk: &'a Chain,
    /// The disk's layers from the head down.
    layers: Vec<Layer>,
    new: Option<&'a Chain>,
    /// The new backing file's layers.
    new_layers: Vec<Layer>,
    compress: bool,
}

/// What both sides show at a stretch of the disk.
struct Both {
    len: u64,
    old_zero: bool,
    new_zero: bool,
    /// The same bytes of the same file.
    shared: bool,
}

impl Both {
    fn alike(&self) -> bool {
        self.shared || self.old_zero && self.new_zero
    }
}

/// The bytes of a stretch, as far as they are needed.
#[derive(Default)]
struct Bytes {
    /// What the old backing file shows; zero wherever nothing was read.
    ours: Vec<u8>,
    theirs: Vec<u8>,
    /// Which units differ: see [`Job::unit`].
    differs: Vec<bool>,
}

impl Job<'_> {
    fn run(&self, progress: &mut Progress) -> Outcome<()> {
        let size = self.disk.size();
        let steps = size / size.clamp(1, PIECE);
        let mut bytes = Bytes::default();
        let mut at = 0;
        while at < size {
            let status = status::at(&self.layers[..1], at, size - at)?;
            let mut len = status.len.min(PIECE);
            if !status.allocated {
                if self.compress {
                    // Compressed clusters are written whole.
                    let unit = self.disk.head().image.cluster();
                    len = (unit.ceil(at + len.max(1)) - at).min(size - at);
                }
                len = self.shown_by_both(at, len, &mut bytes)?;
                progress.more(100.0 / steps.max(1) as f32);
            }
            at += len;
        }
        Ok(())
    }

    /// Looks at what no layer of the disk itself holds; returns how far it came.
    fn shown_by_both(&self, at: u64, len: u64, bytes: &mut Bytes) -> Outcome<u64> {
        let both = self.look(at, len)?;
        if both.alike() {
            let unit = self.unit();
            if both.len >= unit {
                return Ok(both.len - both.len % unit);
            }
        }
        bytes.prepare(len as usize, self.unit() as usize);
        self.compare(at, len, bytes)?;
        self.write_differences(at, len as usize, bytes)?;
        bytes.ours[..len as usize].fill(0);
        Ok(len)
    }

    /// What differs is told apart by this many bytes: what the head holds as a whole. A part of it
    /// that reads as zeroes already would not be written, and show the new backing file.
    fn unit(&self) -> u64 {
        let head = self.disk.head().image;
        if self.compress { head.cluster().bytes() } else { head.granularity().bytes() }
    }

    /// What both sides show at `at`, and how far; at most `len` bytes.
    fn look(&self, at: u64, len: u64) -> Outcome<Both> {
        let old = status::at(&self.layers, at, len)?;
        let new_size = self.new.map_or(0, |n| n.size());
        if at >= new_size {
            return Ok(Both { len: old.len, old_zero: old.zero, new_zero: true, shared: false });
        }
        let new = status::at(&self.new_layers, at, (new_size - at).min(len))?;
        let shared = old.host.is_some()
            && (old.host, old.zero) == (new.host, new.zero)
            && same_file(self.layers.get(old.depth), self.new_layers.get(new.depth));
        let len = old.len.min(new.len);
        Ok(Both { len, old_zero: old.zero, new_zero: new.zero, shared })
    }

    /// Notes where both sides differ within `len` bytes at `at`. Reads no more than it has to.
    fn compare(&self, at: u64, len: u64, bytes: &mut Bytes) -> Outcome<()> {
        let mut pos = at;
        while pos < at + len {
            let both = self.look(pos, (at + len - pos).min(STEP))?;
            let (from, to) = ((pos - at) as usize, (pos - at + both.len) as usize);
            pos += both.len;
            // What is written with its neighbours has to be read even if it is alike.
            let whole = (from as u64 | to as u64).is_multiple_of(self.unit());
            if both.old_zero && both.new_zero || both.shared && whole {
                continue;
            }
            if !both.old_zero {
                read(self.disk, at + from as u64, &mut bytes.ours[from..to])?;
            }
            match self.new.filter(|_| !both.new_zero) {
                Some(new) => read(new, at + from as u64, &mut bytes.theirs[from..to])?,
                None => bytes.theirs[from..to].fill(0),
            }
            bytes.note(from..to, self.unit() as usize);
        }
        Ok(())
    }

    fn write_differences(&self, at: u64, len: usize, bytes: &Bytes) -> Outcome<()> {
        let cluster = self.disk.head().image.cluster().bytes();
        let unit = self.unit() as usize;
        let mut number = 0;
        for run in bytes.differs.chunk_by(|a, b| a == b) {
            if run[0] {
                let end = ((number + run.len()) * unit).min(len);
                let bytes = &bytes.ours[number * unit..end];
                self.write(at + (number * unit) as u64, bytes, cluster)?;
            }
            number += run.len();
        }
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8], cluster: u64) -> Outcome<()> {
        let failed = |e: vdisk::Error| {
            Fail::new(format!("Error while writing to COW image: {}", reason(&e)))
        };
        if is_zero(bytes) {
            let len = bytes.len() as u64;
            let old = self.disk.head().image.details().and_then(|d| d.version) == Some(2);
            // Version 2 holds zeroes as data only, and a disk without a backing file not at all
            // unless it is made to.
            let held = if old { self.disk.copy_up(at, len) } else { Ok(()) };
            return held.and_then(|()| self.disk.write_zeroes(at, len, false)).map_err(failed);
        }
        if !self.compress {
            return self.disk.write_at(at, &[IoSlice::new(bytes)]).map_err(failed);
        }
        for (number, part) in bytes.chunks(cluster as usize).enumerate() {
            let pos = at + number as u64 * cluster;
            self.disk.write_compressed(pos, part).map_err(failed)?;
        }
        Ok(())
    }
}

impl Bytes {
    fn prepare(&mut self, len: usize, unit: usize) {
        self.ours.resize(self.ours.len().max(len), 0);
        self.theirs.resize(self.theirs.len().max(len), 0);
        self.differs.clear();
        self.differs.resize(len.div_ceil(unit), false);
    }

    /// Notes where both sides differ within `range`.
    fn note(&mut self, range: Range<usize>, unit: usize) {
        let mut from = range.start;
        while from < range.end {
            let to = ((from / unit + 1) * unit).min(range.end);
            self.differs[from / unit] |= self.ours[from..to] != self.theirs[from..to];
            from = to;
        }
    }
}

/// Whether equal host offsets in both layers are the same bytes.
fn same_file(a: Option<&Layer>, b: Option<&Layer>) -> bool {
    // A raw layer may begin anywhere in its file.
    let file = |layer: &Layer| {
        let counts_from_start = layer.format == vdisk::open::Format::Qcow2;
        counts_from_start.then(|| layer.file.identity().ok()).flatten()
    };
    let identity = a.and_then(file);
    identity.is_some() && identity == b.and_then(file)
}

/// Reads; what lies past the disk's end is zero.
fn read(disk: &Chain, at: u64, bytes: &mut [u8]) -> Outcome<()> {
    let have = disk.size().saturating_sub(at).min(bytes.len() as u64) as usize;
    if have == 0 {
        return Ok(());
    }
    disk.read_at(at, &mut [IoSliceMut::new(&mut bytes[..have])])
        .map_err(|e| Fail::new(format!("error while reading from backing file: {}", reason(&e))))
}
