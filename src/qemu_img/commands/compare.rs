//! `qemu-img compare`: do two images show the same disk?

use std::io::IoSliceMut;

use vdisk::block::BlockDevice;
use vdisk::chain::{Chain, Layer};

use crate::qemu_img::fail::{Fail, Outcome, reason};
use crate::qemu_img::images::open;
use crate::qemu_img::images::status::{self, Status};
use crate::qemu_img::jail::Opens;
use crate::qemu_img::names::name::Source;
use crate::qemu_img::options::args::{self, flag, value};
use crate::qemu_img::options::format::{CACHE, FORMAT, IMAGE_OPTS, OBJECT, QUIET, SHARED};
use crate::qemu_img::progress::Progress;

/// Exit status for images that differ.
const DIFFERENT: u8 = 1;
/// Exit status for images that could not be opened or looked at.
const FAILED: u8 = 2;
/// Exit status where the map of an image could not be read.
const NO_STATUS: u8 = 3;
/// Exit status where an image could not be read.
const NO_READ: u8 = 4;
/// Bytes that are compared at a time.
const PIECE: u64 = 2 << 20;
/// Differences are told to the sector.
const SECTOR: u64 = 512;

struct Side {
    name: String,
    chain: Chain,
    layers: Vec<Layer>,
}

pub fn run(args: &[String]) -> Outcome {
    let mut said = Vec::new();
    let mut progress = None;
    // What is said about the contents follows an error, if there is one.
    let ended = compare(args, &mut said, &mut progress).unwrap_or_else(|fail| fail.report());
    said.iter().for_each(|line| println!("{line}"));
    progress.iter_mut().for_each(Progress::end);
    Ok(ended)
}

fn compare(args: &[String], said: &mut Vec<String>, progress: &mut Option<Progress>) -> Outcome {
    let strict = flag("s");
    let known = [FORMAT, value("F"), CACHE, flag("p"), QUIET, strict, SHARED, OBJECT, IMAGE_OPTS];
    let given = args::parse(args, &known)?;
    let [first, second] = &given.names[..] else {
        return Err(Fail::usage("Expecting two image file names"));
    };
    let progress = progress.insert(Progress::new(given.has("p") && !given.has("q"), 2.0));
    given.check_cache("T", "source cache").map_err(|e| e.with_code(FAILED))?;
    let options = given.has("image-opts");
    let both = [(first, given.get("f")), (second, given.get("F"))];
    let both =
        both.into_iter().filter_map(|(name, format)| Source::parse(name, format, options).ok());
    both.fold(Opens::new(), |opens, source| opens.read(&source)).close();
    let side = |name: &String, format: Option<&str>| -> Outcome<Side> {
        let source = Source::parse(name, format, options)?;
        let chain = open::chain(&source, given.reading())?;
        Ok(Side { name: name.clone(), layers: chain.all_layers(), chain })
    };
    let a = side(first, given.get("f")).map_err(|e| e.with_code(FAILED))?;
    let b = side(second, given.get("F")).map_err(|e| e.with_code(FAILED))?;
    progress.at(0.0);
    let mut say = |text: String| {
        if !given.has("q") {
            said.push(text);
        }
    };
    let (long, short) = if a.chain.size() >= b.chain.size() { (&a, &b) } else { (&b, &a) };
    let (common, total) = (short.chain.size(), long.chain.size());
    if given.has("s") && common != total {
        say("Strict mode: Image size mismatch!".to_owned());
        return Ok(DIFFERENT);
    }
    let mut compared = |len: u64| progress.more(len as f32 / total.max(1) as f32 * 100.0);
    match same(&a, &b, common, given.has("s"), &mut compared)? {
        Some(Difference::Content(at)) => {
            say(format!("Content mismatch at offset {at}!"));
            return Ok(DIFFERENT);
        }
        Some(Difference::Status(at)) => {
            say(format!("Strict mode: Offset {at} block status mismatch!"));
            return Ok(DIFFERENT);
        }
        None => {}
    }
    if common != total {
        say("Warning: Image size mismatch!".to_owned());
        if let Some(at) = not_empty(long, common, total, &mut compared)? {
            say(format!("Content mismatch at offset {at}!"));
            return Ok(DIFFERENT);
        }
    }
    say("Images are identical.".to_owned());
    Ok(0)
}

enum Difference {
    Content(u64),
    Status(u64),
}

impl Side {
    fn status(&self, at: u64, len: u64) -> Outcome<Status> {
        status::at(&self.layers, at, len).map_err(|e| {
            e.prefix(format!("Error while checking status of '{}': ", self.name))
                .with_code(NO_STATUS)
        })
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> Outcome<()> {
        self.chain.read_at(at, &mut [IoSliceMut::new(bytes)]).map_err(|e| {
            Fail::new(format!("Error while reading offset {at} of {}: {}", self.name, reason(&e)))
                .with_code(NO_READ)
        })
    }
}

/// The first difference below `end`; `compared` is told the length of what is alike.
fn same(
    a: &Side,
    b: &Side,
    end: u64,
    strict: bool,
    compared: &mut dyn FnMut(u64),
) -> Outcome<Option<Difference>> {
    let mut bytes = [vec![0; PIECE as usize], vec![0; PIECE as usize]];
    let mut at = 0;
    while at < end {
        let (one, two) = (a.status(at, end - at)?, b.status(at, end - at)?);
        let mut len = one.len.min(two.len);
        if strict && (one.data, one.zero) != (two.data, two.zero) {
            return Ok(Some(Difference::Status(at)));
        }
        if one.zero && two.zero {
            at += len;
            compared(len);
            continue;
        }
        len = len.min(PIECE);
        let [left, right] = bytes.each_mut().map(|b| &mut b[..len as usize]);
        for (side, status, bytes) in [(a, one, &mut *left), (b, two, &mut *right)] {
            if status.zero {
                bytes.fill(0);
            } else {
                side.read(at, bytes)?;
            }
        }
        if let Some(n) = left.iter().zip(&*right).position(|(x, y)| x != y) {
            let n = n as u64;
            return Ok(Some(Difference::Content(at + n - n % SECTOR)));
        }
        at += len;
        compared(len);
    }
    Ok(None)
}

/// The first sector from `at` on that is not zero.
fn not_empty(
    side: &Side,
    mut at: u64,
    end: u64,
    compared: &mut dyn FnMut(u64),
) -> Outcome<Option<u64>> {
    let mut bytes = vec![0; PIECE as usize];
    while at < end {
        let status = side.status(at, end - at)?;
        if status.zero {
            at += status.len;
            compared(status.len);
            continue;
        }
        let part = &mut bytes[..status.len.min(PIECE) as usize];
        side.read(at, part)?;
        if let Some(n) = part.iter().position(|b| *b != 0) {
            let n = n as u64;
            return Ok(Some(at + n - n % SECTOR));
        }
        at += part.len() as u64;
        compared(part.len() as u64);
    }
    Ok(None)
}
