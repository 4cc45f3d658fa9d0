//! `qemu-img bitmap`: persistent dirty bitmaps, added, removed, cleared, switched and merged.

use std::sync::Arc;

use vdisk::ErrorKind;
use vdisk::qcow2::{BitmapChanges, Image};

use crate::qemu_img::fail::{Fail, Outcome, os_text};
use crate::qemu_img::images::open;
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::jail::Opens;
use crate::qemu_img::names::name::Source;
use crate::qemu_img::options::args::{self, Given, long, value};
use crate::qemu_img::options::format::{FORMAT, IMAGE_OPTS, OBJECT};
use crate::qemu_img::size;

/// What can be done, by the option that asks for it.
const ACTIONS: [&str; 6] = ["add", "remove", "clear", "enable", "disable", "merge"];

pub fn run(args: &[String]) -> Outcome {
    let merge = args::long_value("merge");
    let known = [
        FORMAT,
        value("b").or("source-file"),
        value("F").or("source-format"),
        value("g").or("granularity"),
        OBJECT,
        IMAGE_OPTS,
        long("add"),
        long("remove"),
        long("clear"),
        long("enable"),
        long("disable"),
        merge,
    ];
    let given = args::parse(args, &known)?;
    let [file, name] = &given.names[..] else {
        return Err(Fail::usage("Expecting filename and bitmap name"));
    };
    let actions: Vec<(&str, &str)> =
        given.in_order().filter(|(k, _)| ACTIONS.contains(k)).collect();
    check(&given, &actions)?;
    let granularity = given.get("g").map(|g| size::bounded("granularity", g, 1, u64::MAX));
    let granularity = granularity.transpose()?;
    let source = given.source(file)?;
    let from = given.get("b").and_then(|file| Source::parse(file, given.get("F"), false).ok());
    from.iter().fold(Opens::new().changed(&source), Opens::read).close();
    // What is below need not be there.
    let image = open::owned(&source, Use::writing())?;
    let old = image.as_ref().is_none_or(|image| image.header().version < 3);
    if let Some((action, _)) = actions.first().filter(|_| old) {
        let why = no_bitmaps(action, name, file, granularity, image.is_some());
        return Err(Fail::new(format!("Operation {action} on bitmap {name} failed: {why}")));
    }
    let Some(mut image) = image else { return Ok(0) };
    let all = Actions { given: &given, name, granularity, actions: &actions };
    // Stored at once: others see all of it or nothing, and what went before a failure stays.
    let stored = image.change_bitmaps(|bitmaps| all.run(bitmaps));
    stored.map_err(|e| all.failed(all.last(), &why(&e)))??;
    vdisk::image::Image::flush(&image).map_err(|e| Fail::new(why(&e)))?;
    Ok(0)
}

/// What is to be done with one bitmap, in order.
struct Actions<'a> {
    given: &'a Given,
    name: &'a str,
    granularity: Option<u64>,
    actions: &'a [(&'a str, &'a str)],
}

impl Actions<'_> {
    fn run(&self, bitmaps: &mut BitmapChanges<'_>) -> Outcome<()> {
        let mut disabled = self.given.has("add") && self.given.has("disable");
        let (name, granularity) = (self.name, self.granularity);
        for (action, value) in self.actions {
            let done = match *action {
                "add" if !granularity.is_none_or(|g| g >= 512 && g.is_power_of_two()) => {
                    return Err(self.failed(action, BAD_GRANULARITY));
                }
                "add" => bitmaps.add(name, granularity, !disabled),
                "remove" => bitmaps.remove(name),
                "clear" => bitmaps.clear(name),
                "enable" => bitmaps.enable(name, true),
                // It was added so already.
                "disable" if std::mem::take(&mut disabled) => Ok(()),
                "disable" => bitmaps.enable(name, false),
                _ => {
                    let merged = merge_from(bitmaps, self.given, name, value);
                    merged.map_err(|why| self.failed(action, &why))?;
                    Ok(())
                }
            };
            done.map_err(|e| self.failed(action, &why(&e)))?;
        }
        Ok(())
    }

    fn last(&self) -> &str {
        self.actions.last().map_or("", |(action, _)| action)
    }

    fn failed(&self, action: &str, why: &str) -> Fail {
        Fail::new(format!("Operation {action} on bitmap {} failed: {why}", self.name))
    }
}

const BAD_GRANULARITY: &str = "Granularity must be power of 2 and at least 512";

/// Why nothing can be done with bitmaps of an image that can have none.
fn no_bitmaps(
    action: &str,
    name: &str,
    file: &str,
    granularity: Option<u64>,
    qcow2: bool,
) -> String {
    if action != "add" {
        return format!("Dirty bitmap '{name}' not found");
    }
    if !granularity.is_none_or(|g| g >= 512 && g.is_power_of_two()) {
        return BAD_GRANULARITY.to_owned();
    }
    if qcow2 {
        return format!(
            "Can't make bitmap '{name}' persistent in '{file}': Cannot store dirty bitmaps in qcow2 \
             v2 files"
        );
    }
    let why = os_text(nix::libc::ENOTSUP);
    format!("Can't store persistent bitmaps to {file}: {why}")
}

fn check(given: &Given, actions: &[(&str, &str)]) -> Outcome<()> {
    let fail = |text: &str| Err(Fail::new(text));
    if actions.is_empty() {
        return fail(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        );
    }
    if given.has("g") && !given.has("add") {
        return fail("granularity only supported with --add");
    }
    if given.has("F") && !given.has("b") {
        return fail("-F only supported with -b");
    }
    if given.has("b") && !given.has("merge") {
        return fail("Merge bitmap source file only supported with --merge");
    }
    Ok(())
}

/// Takes the bits of the bitmap `from` over, which is in the same image or in the one that `-b` names.
fn merge_from(
    bitmaps: &mut BitmapChanges<'_>,
    given: &Given,
    name: &str,
    from: &str,
) -> Result<(), String> {
    if !bitmaps.has(name) {
        return Err(format!("Dirty bitmap '{name}' not found"));
    }
    let ranges = match given.get("b") {
        None => bitmaps.ranges(from),
        Some(file) => {
            let source = Source::parse(file, given.get("F"), false);
            let opened = source.and_then(|s| open::layer(&s, Use::reading(false)));
            let opened = opened.map_err(|e| e.text().to_owned())?;
            let other: Arc<Image> = opened.qcow2.ok_or_else(|| os_text(nix::libc::ENOTSUP))?;
            other.bitmap_ranges(from)
        }
    };
    ranges.and_then(|r| bitmaps.merge(name, &r)).map_err(|e| why(&e))
}

fn why(error: &vdisk::Error) -> String {
    match error.kind() {
        ErrorKind::NoSpace => os_text(nix::libc::ENOSPC),
        _ => error.message().to_owned(),
    }
}
