//! `qemu-img check`: is an image right, and if not, mend it.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};
use vdisk::image::{Check, Repair};
use vdisk::qcow2::Image;

use crate::qemu_img::fail::{Fail, Outcome, os_text, reason};
use crate::qemu_img::foreign::check as check_foreign;
use crate::qemu_img::images::open;
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::jail::Opens;
use crate::qemu_img::json;
use crate::qemu_img::options::args::{self, Given, value};
use crate::qemu_img::options::format::{
    CACHE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, Output, QUIET, SHARED,
};

/// Exit status for an image with lost data, or data loss to come.
const CORRUPT: u8 = 2;
/// Exit status for an image that only wastes space.
const LEAKS: u8 = 3;

pub fn run(args: &[String]) -> Outcome {
    let repair = value("r").or("repair");
    let known = [FORMAT, SHARED, QUIET, OUTPUT, OBJECT, IMAGE_OPTS, CACHE, repair];
    let given = args::parse(args, &known)?;
    let output = given.output()?;
    given.check_cache("T", "source cache")?;
    let repair = match given.get("r") {
        None => Repair::None,
        Some("leaks") => Repair::Leaks,
        Some("all") => Repair::All,
        Some(other) => {
            return Err(Fail::usage(format!(
                "--repair (-r) expects 'leaks' or 'all' not '{other}'"
            )));
        }
    };
    let source = given.source(given.only_name()?)?;
    Opens::new().changed(&source).close();
    let quiet = given.has("q") || output == Output::Json;
    if let Some((format, check)) = check_foreign::check(&source, repair, given.has("U"))? {
        if check.corruptions_fixed > 0 && !quiet {
            print!("{}", repaired(&check));
        }
        return Ok(tell(&check, &given, format, output));
    }
    let using = Use {
        write: repair != Repair::None,
        shared: given.has("U"),
        check: true,
        ..Use::default()
    };
    let opened = open::on_its_chain(&source, using)?;
    let Some(image) = &opened.qcow2 else {
        return Err(check_foreign::no_check());
    };
    // What is printed follows what is said on stderr meanwhile.
    let mut said = String::new();
    let check = check(image, repair, quiet, &mut said)?;
    print!("{said}");
    Ok(tell(&check, &given, "qcow2", output))
}

/// Reports, and says the exit status.
fn tell(check: &Check, given: &Given, format: &str, output: Output) -> u8 {
    let name = given.names.first().map_or("", String::as_str);
    match output {
        Output::Json => println!("{}", json::pretty(&to_json(check, name, format))),
        Output::Human if given.has("q") => {}
        Output::Human => print!("{}", text(check)),
    }
    match check {
        Check { errors: 1.., .. } => 1,
        Check { corruptions: 1.., .. } => CORRUPT,
        Check { leaks: 1.., .. } => LEAKS,
        _ => 0,
    }
}

/// Checks, mends, and checks again what was mended.
fn check(image: &Image, repair: Repair, quiet: bool, said: &mut String) -> Outcome<Check> {
    let once = |repair: Repair| -> Outcome<Check> {
        let check = image.check(repair).map_err(|e| {
            if e.kind() == vdisk::ErrorKind::Corrupt {
                eprintln!("qemu-img: ERROR {}", e.message());
            }
            Fail::new(format!("Check failed: {}", reason(&e)))
        })?;
        check.messages.iter().for_each(|line| eprintln!("{line}"));
        if check.errors > 0 && repair == Repair::Leaks {
            // Nothing was mended.
            return Err(Fail::new(format!("Check failed: {}", os_text(nix::libc::EIO))));
        }
        Ok(check)
    };
    let first = once(repair)?;
    if repair != Repair::None && first.corruptions == 0 && first.errors == 0 {
        image.mark_right().map_err(|e| Fail::new(reason(&e)))?;
    }
    if first.leaks_fixed == 0 && first.corruptions_fixed == 0 {
        return Ok(first);
    }
    if !quiet {
        said.push_str(&repaired(&first));
    }
    let second = once(Repair::None)?;
    let Check { leaks_fixed, corruptions_fixed, .. } = first;
    Ok(Check { leaks_fixed, corruptions_fixed, ..second })
}

/// What is said after a repair.
fn repaired(check: &Check) -> String {
    format!(
        "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} \
         corruptions\n\nDouble checking the fixed image now...\n",
        check.leaks_fixed, check.corruptions_fixed
    )
}

fn text(check: &Check) -> String {
    let mut out = String::new();
    if check.is_clean() {
        out.push_str("No errors were found on the image.\n");
    }
    if check.corruptions > 0 {
        let _ = write!(
            out,
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the \
             image may corrupt it.\n",
            check.corruptions
        );
    }
    if check.leaks > 0 {
        let _ = write!(
            out,
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no \
             harm to data.\n",
            check.leaks
        );
    }
    if check.errors > 0 {
        let _ = writeln!(out, "\n{} internal errors have occurred during the check.", check.errors);
    }
    let part = |of: u64, total: u64| of as f64 * 100.0 / total.max(1) as f64;
    if check.total_clusters > 0 && check.allocated_clusters > 0 {
        let _ = writeln!(
            out,
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            check.allocated_clusters,
            check.total_clusters,
            part(check.allocated_clusters, check.total_clusters),
            part(check.fragmented_clusters, check.allocated_clusters),
            part(check.compressed_clusters, check.allocated_clusters),
        );
    }
    if check.image_end_offset > 0 {
        let _ = writeln!(out, "Image end offset: {}", check.image_end_offset);
    }
    out
}

fn to_json(check: &Check, name: &str, format: &str) -> Value {
    let mut map = Map::new();
    map.insert("filename".to_owned(), json!(name));
    map.insert("format".to_owned(), json!(format));
    map.insert("check-errors".to_owned(), json!(check.errors));
    let counts = [
        ("image-end-offset", check.image_end_offset),
        ("total-clusters", check.total_clusters),
        ("allocated-clusters", check.allocated_clusters),
        ("fragmented-clusters", check.fragmented_clusters),
        ("compressed-clusters", check.compressed_clusters),
        ("corruptions", check.corruptions),
        ("leaks", check.leaks),
        ("corruptions-fixed", check.corruptions_fixed),
        ("leaks-fixed", check.leaks_fixed),
    ];
    for (key, count) in counts.into_iter().filter(|(_, count)| *count > 0) {
        map.insert(key.to_owned(), json!(count));
    }
    Value::Object(map)
}
