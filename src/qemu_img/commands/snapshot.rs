//! `qemu-img snapshot`: internal snapshots, listed, taken, applied and deleted.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use vdisk::qcow2::{Image, NewSnapshot, OLD_TABLE_LEAKED, SNAPSHOT_LEAKED, Snapshot};

use crate::qemu_img::fail::{Fail, Outcome, os_text, reason, report};
use crate::qemu_img::images::open;
use crate::qemu_img::images::usage::Use;
use crate::qemu_img::jail::Opens;
use crate::qemu_img::options::args::{self, flag, value};
use crate::qemu_img::options::format::{FORMAT, IMAGE_OPTS, OBJECT, QUIET, SHARED};
use crate::qemu_img::size::human;

pub fn run(args: &[String]) -> Outcome {
    let known =
        [FORMAT, flag("l"), value("a"), value("c"), value("d"), QUIET, SHARED, OBJECT, IMAGE_OPTS];
    let given = args::parse(args, &known)?;
    let actions: Vec<&str> = ["l", "a", "c", "d"].into_iter().filter(|k| given.has(k)).collect();
    let twice = |key: &str| given.all(key).count() > 1;
    if actions.len() > 1 || actions.iter().any(|k| twice(k)) {
        return Err(Fail::usage("Cannot mix '-l', '-a', '-c', '-d'"));
    }
    let source = given.source(given.only_name()?)?;
    Opens::new().changed(&source).close();
    let action = actions.first().copied().unwrap_or("l");
    if action == "l" {
        let opened = open::on_its_chain(&source, given.reading())?;
        if let Some(image) = &opened.qcow2 {
            let all = image.snapshots().map_err(|e| Fail::new(reason(&e)))?;
            print!("{}", list(&all));
        }
        return Ok(0);
    }
    let name = given.get(action).unwrap_or_default();
    let verb = match action {
        "c" => "create",
        "a" => "apply",
        _ => "delete",
    };
    let failed = |why: String| Fail::new(format!("Could not {verb} snapshot '{name}': {why}"));
    drop(open::on_its_chain(&source, Use::writing())?);
    let Some(mut image) = open::owned(&source, Use::writing())? else {
        return Err(failed(match action {
            "c" => os_text(nix::libc::ENOTSUP),
            "a" => "Block driver does not support snapshots".to_owned(),
            _ => "snapshot not found".to_owned(),
        }));
    };
    match action {
        "c" => create(&mut image, name).map_err(failed)?,
        "a" => apply(&mut image, name).map_err(failed)?,
        _ => delete(&mut image, name).map_err(failed)?,
    }
    vdisk::image::Image::flush(&image).map_err(|e| failed(reason(&e)))?;
    Ok(0)
}

fn create(image: &mut Image, name: &str) -> Result<(), String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let new = NewSnapshot {
        name: name.to_owned(),
        seconds: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
        nanoseconds: now.subsec_nanos(),
        vm_clock: 0,
        icount: Some(0),
    };
    image.create_snapshot(&new).map(drop).map_err(|e| create_reason(&e))
}

fn create_reason(error: &vdisk::Error) -> String {
    match error.kind() {
        // What does not fit into a refcount is an argument out of range to QEMU.
        vdisk::ErrorKind::Invalid if error.raw_os_error().is_none() => os_text(nix::libc::EINVAL),
        _ => reason(error),
    }
}

fn apply(image: &mut Image, name: &str) -> Result<(), String> {
    if image.bitmaps().is_ok_and(|all| !all.is_empty()) {
        return Err("Device has active dirty bitmaps".to_owned());
    }
    if image.header().has_data_file() {
        return Err(format!("Failed to load snapshot: {}", os_text(nix::libc::ENOTSUP)));
    }
    let id = find(image, name)?
        .ok_or_else(|| format!("Failed to load snapshot: {}", os_text(nix::libc::ENOENT)))?;
    image.apply_snapshot(&id).map_err(|e| match e.raw_os_error() {
        Some(errno) => {
            report(e.message());
            format!("Failed to load snapshot: {}", os_text(errno))
        }
        None => e.message().to_owned(),
    })
}

fn delete(image: &mut Image, name: &str) -> Result<(), String> {
    let id = find(image, name)?.ok_or_else(|| "snapshot not found".to_owned())?;
    image.delete_snapshot(&id).map_err(|e| match e.raw_os_error() {
        Some(errno) if e.message() == OLD_TABLE_LEAKED => {
            eprintln!("qcow2_free_clusters failed: {}", os_text(errno));
            format!("{SNAPSHOT_LEAKED}: {}", os_text(errno))
        }
        Some(errno) if e.message() == SNAPSHOT_LEAKED => {
            format!("{SNAPSHOT_LEAKED}: {}", os_text(errno))
        }
        _ => e.message().to_owned(),
    })
}

/// The id of the snapshot with that id or name.
fn find(image: &Image, name: &str) -> Result<Option<String>, String> {
    let all = image.snapshots().map_err(|e| reason(&e))?;
    let found =
        all.iter().find(|s| s.id() == name).or_else(|| all.iter().find(|s| s.name() == name));
    Ok(found.map(|s| s.id().into_owned()))
}

/// The snapshots as a table.
pub fn list(all: &[Snapshot]) -> String {
    if all.is_empty() {
        return String::new();
    }
    let mut out = String::from("Snapshot list:\n");
    let _ = writeln!(
        out,
        "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}",
        "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
    );
    for one in all {
        let icount = one.icount.map_or("--".to_owned(), |n| n.to_string());
        let _ = writeln!(
            out,
            "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}",
            one.id(),
            one.name(),
            human(one.vm_state_size),
            date(one.seconds),
            clock(one.vm_clock),
            icount
        );
    }
    out
}

fn date(seconds: u32) -> String {
    let time = jiff::Timestamp::from_second(i64::from(seconds)).unwrap_or_default();
    time.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

fn clock(nanoseconds: u64) -> String {
    let (seconds, rest) = (nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000);
    format!(
        "{:04}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        rest / 1_000_000
    )
}
