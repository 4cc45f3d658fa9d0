//! `qemu-img bitmap`: persistent dirty bitmaps, added, removed, cleared, switched and merged.

use std::sync::Arc;

use vdisk::qcow2::Image;

use super::args::{self, Given, long, value};
use super::fail::{Fail, Outcome, os_text};
use super::format::{FORMAT, IMAGE_OPTS, OBJECT};
use super::name::Source;
use super::open::{self, Use};
use super::size;

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
    // What is below need not be there.
    let image = open::owned(&source, Use::writing())?;
    let old = image.as_ref().is_none_or(|image| image.header().version < 3);
    if let Some((action, _)) = actions.first().filter(|_| old) {
        let why = no_bitmaps(action, name, file, granularity, image.is_some());
        return Err(Fail::new(format!("Operation {action} on bitmap {name} failed: {why}")));
    }
    let Some(mut image) = image else { return Ok(0) };
    let mut disabled = given.has("add") && given.has("disable");
    for (action, value) in actions {
        let failed =
            |why: String| Fail::new(format!("Operation {action} on bitmap {name} failed: {why}"));
        let done = match action {
            "add" if !granularity.is_none_or(|g| g >= 512 && g.is_power_of_two()) => {
                return Err(failed(BAD_GRANULARITY.to_owned()));
            }
            "add" => image.add_bitmap(name, granularity, !disabled),
            "remove" => image.remove_bitmap(name),
            "clear" => image.clear_bitmap(name),
            "enable" => image.enable_bitmap(name, true),
            // It was added so already.
            "disable" if std::mem::take(&mut disabled) => Ok(()),
            "disable" => image.enable_bitmap(name, false),
            _ => {
                merge_from(&mut image, &given, name, value).map_err(failed)?;
                Ok(())
            }
        };
        done.map_err(|e| failed(why(&e)))?;
    }
    vdisk::image::Image::flush(&image).map_err(|e| Fail::new(why(&e)))?;
    Ok(0)
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
fn merge_from(image: &mut Image, given: &Given, name: &str, from: &str) -> Result<(), String> {
    if !image.bitmaps().is_ok_and(|all| all.iter().any(|bitmap| bitmap.name == name)) {
        return Err(format!("Dirty bitmap '{name}' not found"));
    }
    let ranges = match given.get("b") {
        None => image.bitmap_ranges(from),
        Some(file) => {
            let source = Source::parse(file, given.get("F"), false);
            let opened = source.and_then(|s| open::layer(&s, Use::reading(false)));
            let opened = opened.map_err(|e| e.text().to_owned())?;
            let other: Arc<Image> = opened.qcow2.ok_or_else(|| os_text(nix::libc::ENOTSUP))?;
            other.bitmap_ranges(from)
        }
    };
    ranges.and_then(|r| image.merge_bitmap(name, &r)).map_err(|e| why(&e))
}

fn why(error: &vdisk::Error) -> String {
    error.message().to_owned()
}
