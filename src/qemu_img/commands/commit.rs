//! `qemu-img commit`: writes what an image holds into an image below it.

use std::io::IoSliceMut;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vdisk::block::BlockDevice;
use vdisk::chain::Chain;
use vdisk::copy::queue;
use vdisk::copy::transfer::{Part, transfer};
use vdisk::family::sealed::refuse;
use vdisk::open::{OpenOptions, Walk};

use crate::qemu_img::fail::{Fail, Outcome, reason};
use crate::qemu_img::images::open::{self, Opened, full_backing_name};
use crate::qemu_img::images::status;
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::jail::Opens;
use crate::qemu_img::names::name::{Below, Source};
use crate::qemu_img::options::args::{self, Given, flag, value};
use crate::qemu_img::options::format::{FORMAT, IMAGE_OPTS, OBJECT, QUIET};
use crate::qemu_img::progress::Progress;

/// How far a copy is, is told after so many bytes.
const SHOWN: u64 = 2 << 20;
/// A smaller disk is copied by one thread.
const ALONE: u64 = 16 << 20;

pub fn run(args: &[String]) -> Outcome {
    let known = [
        FORMAT,
        value("t"),
        value("b"),
        flag("d"),
        flag("p"),
        QUIET,
        value("r"),
        OBJECT,
        IMAGE_OPTS,
    ];
    let given = args::parse(args, &known)?;
    let name = given.only_name()?;
    given.check_cache("t", "cache")?;
    given.check_rate()?;
    let source = given.source(name)?;
    Opens::new().changed_with_bases(&source).close();
    let opened = open::layer(&source, Use::writing())?;
    let mut progress = Progress::begin(given.has("p") && !given.has("q"), 1.0);
    let done = commit(&given, &source, opened, &mut progress);
    progress.end();
    done?;
    if !given.has("q") {
        println!("Image committed.");
    }
    Ok(0)
}

fn commit(given: &Given, source: &Source, opened: Opened, progress: &mut Progress) -> Outcome<()> {
    let (upper, lower) = split(source, &opened, given.get("b"))?;
    copy(&upper, &lower, progress)?;
    progress.at(100.0);
    // What stays between the image and the base keeps its meaning only while the image does.
    if given.has("d") || given.has("b") {
        return Ok(());
    }
    let Opened { layer, qcow2, shown, .. } = opened;
    // Nobody else uses it from here on.
    drop((upper, layer));
    let Some(mut image) = qcow2.and_then(Arc::into_inner) else { return Ok(()) };
    image.make_empty().map_err(|e| Fail::new(format!("Failed to empty {shown}: {}", reason(&e))))
}

/// The layers above the base as one disk, and the base with what is below it, for writing.
fn split(source: &Source, opened: &Opened, base: Option<&str>) -> Outcome<(Chain, Chain)> {
    let failed = |e: vdisk::Error| Fail::new(reason(&e));
    let options = OpenOptions { read_only: false, probe_backing: true, ..OpenOptions::default() };
    let mut upper = Walk::from_head(opened.layer.clone(), &options, &refuse).map_err(failed)?;
    let not_found = || {
        Fail::new(match base {
            Some(base) => {
                format!("Did not find '{base}' in the backing chain of '{}'", source.given)
            }
            None => "Image does not have a backing file".to_owned(),
        })
    };
    let mut shown = opened.shown.clone();
    let mut below = source.below.clone();
    loop {
        let recorded = upper.recorded().cloned().ok_or_else(not_found)?;
        // What an image names passes the library's gate: a path, and nothing else.
        let child = upper.lowest().path.clone();
        let (path, full) = match open::is_trusted_json(&recorded.name) {
            true => (PathBuf::new(), recorded.name.clone()),
            false => (
                vdisk::open::resolve(&child, &recorded.name).map_err(failed)?,
                full_backing_name(&shown, &recorded.name),
            ),
        };
        let is_base = match base {
            None => true,
            Some(base) => names(base, &shown, &recorded.name, &path),
        };
        if is_base {
            let below = match &below {
                Below::Recorded => Source::named(&full, recorded.format.as_deref())?,
                said => open::named_below(&upper, said)?.ok_or_else(not_found)?,
            };
            let lower = open::chain(&below, Use::writing())?;
            return Ok((vdisk::change::with_space(upper.finish()), lower));
        }
        open::step(&mut upper, &mut below, Use::reading(false))?;
        shown = full;
    }
}

/// Whether `base` is a name of the backing file: as it is recorded, or of the same file.
fn names(base: &str, child: &str, recorded: &str, path: &Path) -> bool {
    if base == recorded {
        return true;
    }
    let real = |p: PathBuf| std::fs::canonicalize(p).ok();
    let Some(wanted) = real(path.to_path_buf()) else { return false };
    real(open::backing_path(&full_backing_name(child, base))) == Some(wanted)
}

/// Names what `upper` holds, in order, up to `piece` bytes of data at a time.
fn held(
    upper: &Chain,
    piece: u64,
    progress: &mut Progress,
) -> impl FnMut() -> Outcome<Option<Part>> {
    let (layers, size) = (upper.all_layers(), upper.size());
    // What an image leaves open past the end of one that stands between it and the base is zero.
    let short = layers.iter().skip(1).map(|layer| layer.image.size()).min().unwrap_or(size);
    let mut at = 0;
    move || {
        let mut part = Part::new(piece);
        while at < size && !part.is_full() {
            let mut status = status::at(&layers, at, size - at)?;
            status.allocated |= at >= short;
            // Told in QEMU's steps.
            let (before, end) = (at, at + status.len);
            at += match (status.allocated, status.zero) {
                (false, _) => status.len,
                (true, true) => part.add_zeroes(at, status.len),
                (true, false) => part.add_data(at, status.len),
            };
            let told = if at == end { at } else { at - at % SHOWN };
            if told > before {
                progress.at(told as f32 / size as f32 * 100.0);
            }
        }
        Ok(part.filled())
    }
}

/// Writes what `upper` holds into `lower`.
fn copy(upper: &Chain, lower: &Chain, progress: &mut Progress) -> Outcome<()> {
    let failed = |e: vdisk::Error| Fail::new(format!("Block job failed: {}", reason(&e)));
    let size = upper.size();
    if lower.size() < size {
        lower.resize(size).map_err(failed)?;
    }
    let piece = queue::PIECE.max(lower.head().image.cluster().bytes());
    let threads = if size <= ALONE { 1 } else { queue::threads() };
    let read =
        |at, bytes: &mut [u8]| upper.read_at(at, &mut [IoSliceMut::new(bytes)]).map_err(failed);
    transfer(lower, threads, held(upper, piece, progress), read, failed)?;
    lower.flush().map_err(failed)
}
