//! `qemu-img rebase`: puts an image on another backing file, or on none.

use std::io::{IoSlice, IoSliceMut};
use std::path::Path;

use vdisk::block::BlockDevice;
use vdisk::chain::{self, Chain, Layer};
use vdisk::image::{Backing, Identity, Parent};

use super::args::{self, Given, flag, value};
use super::copy::is_zero;
use super::fail::{Fail, Outcome, os_text, reason};
use super::format::{CACHE, FORMAT, IMAGE_OPTS, OBJECT, QUIET, SHARED};
use super::name::Source;
use super::open::{self, Opened, Use, full_backing_name};
use super::progress::Progress;
use super::status;

/// Bytes that are compared at a time.
const PIECE: u64 = 2 << 20;
/// What differs is told apart by this many bytes.
const SECTOR: u64 = 512;

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
    let format = given.get("F");
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
    let job =
        Job { layers: disk.all_layers(), disk: &disk, new: new.as_ref(), compress: given.has("c") };
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
    let Some(image) = &opened.qcow2 else {
        return Err(failed(&os_text(nix::libc::ENOTSUP)));
    };
    if !base.is_empty() && format.is_none() {
        return Err(failed("backing format must be specified"));
    }
    let layer: &dyn vdisk::image::Image = &**image;
    let mut identity = layer.identity().map_err(|e| failed(&reason(&e)))?;
    identity.backing = (!base.is_empty())
        .then(|| Backing { name: base.to_owned(), format: format.map(str::to_owned) });
    relabel(&opened.layer.path, &mut identity);
    layer.set_identity(&identity).map_err(|e| match e.kind() {
        vdisk::ErrorKind::Invalid => failed("No space left in the file header"),
        _ => failed(&reason(&e)),
    })
}

/// A disk with a label also records which layer it stands on.
fn relabel(path: &Path, identity: &mut Identity) {
    let Some(label) = &mut identity.label else { return };
    label.parent = identity.backing.as_ref().and_then(|backing| {
        let below = chain::peek(&chain::resolve(path, &backing.name).ok()?).ok()??;
        let vouched = below.identity.vouched;
        let parent = below.identity.label?;
        let content = if vouched { parent.content } else { vdisk::image::Id::nil() };
        Some(Parent { layer: parent.layer, content, witness: None })
    });
}

/// Copies into the disk what its old backing file shows otherwise than its new one.
struct Job<'a> {
    disk: &'a Chain,
    /// The disk's layers from the head down.
    layers: Vec<Layer>,
    new: Option<&'a Chain>,
    compress: bool,
}

impl Job<'_> {
    fn run(&self, progress: &mut Progress) -> Outcome<()> {
        let size = self.disk.size();
        let steps = size / size.clamp(1, PIECE);
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
                len = self.shown_by_both(at, len)?;
                progress.more(100.0 / steps.max(1) as f32);
            }
            at += len;
        }
        Ok(())
    }

    /// Looks at what no layer of the disk itself holds; returns how far it came.
    fn shown_by_both(&self, at: u64, len: u64) -> Outcome<u64> {
        let old = status::at(&self.layers, at, len)?;
        let new_size = self.new.map_or(0, |n| n.size());
        let mut new_zero = at >= new_size;
        let mut both = old.len;
        if let Some(new) = self.new.filter(|_| !new_zero) {
            let status = status::at(&new.all_layers(), at, (new_size - at).min(len))?;
            new_zero = status.zero;
            both = both.min(status.len);
        }
        if old.zero && new_zero {
            let unit = if self.compress { self.disk.head().image.cluster().bytes() } else { 1 };
            if both >= unit {
                return Ok(both - both % unit);
            }
        }
        let (mut ours, mut theirs) = (vec![0; len as usize], vec![0; len as usize]);
        read(self.disk, at, &mut ours)?;
        if let Some(new) = self.new {
            read(new, at, &mut theirs)?;
        }
        self.write_differences(at, &ours, &theirs)?;
        Ok(len)
    }

    fn write_differences(&self, at: u64, ours: &[u8], theirs: &[u8]) -> Outcome<()> {
        let cluster = self.disk.head().image.cluster().bytes();
        let unit = if self.compress { cluster } else { SECTOR } as usize;
        let differs: Vec<bool> =
            ours.chunks(unit).zip(theirs.chunks(unit)).map(|(a, b)| a != b).collect();
        let mut number = 0;
        while number < differs.len() {
            let run = differs[number..].iter().take_while(|d| **d == differs[number]).count();
            if differs[number] {
                let end = ((number + run) * unit).min(ours.len());
                let bytes = &ours[number * unit..end];
                self.write(at + (number * unit) as u64, bytes, cluster)?;
            }
            number += run;
        }
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8], cluster: u64) -> Outcome<()> {
        let failed = |e: vdisk::Error| {
            Fail::new(format!("Error while writing to COW image: {}", reason(&e)))
        };
        if is_zero(bytes) {
            return self.disk.write_zeroes(at, bytes.len() as u64, false).map_err(failed);
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

/// Reads; what lies past the disk's end is zero.
fn read(disk: &Chain, at: u64, bytes: &mut [u8]) -> Outcome<()> {
    let have = disk.size().saturating_sub(at).min(bytes.len() as u64) as usize;
    if have == 0 {
        return Ok(());
    }
    disk.read_at(at, &mut [IoSliceMut::new(&mut bytes[..have])])
        .map_err(|e| Fail::new(format!("error while reading from backing file: {}", reason(&e))))
}
