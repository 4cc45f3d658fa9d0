//! `vdisk compare`: do two disks hold the same?

use std::path::PathBuf;

use clap::Args as ClapArgs;
use serde::Serialize;
use vdisk::Result;
use vdisk::block::BlockDevice;
use vdisk::copy;
use vdisk::open::Format;

use crate::cli::open::disk::{self, Use};
use crate::cli::open::jail;
use crate::cli::open::options::{self as opening, Moment, Opening};
use crate::cli::terminal::output::{self, Progress};

/// Exit status of disks that differ.
const DIFFER: u8 = 1;
/// Exit status where the comparison failed.
const FAILED: u8 = 2;

/// Compare the contents of two disks; print the first difference.
///
/// Exits with 0 where they are the same, 1 where they differ, 2 where that cannot be told.
#[derive(ClapArgs)]
pub struct Args {
    /// One disk.
    a: PathBuf,
    /// The other disk.
    b: PathBuf,
    /// Disks of different sizes differ, even if the longer one ends in zeroes.
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    opening: Opening,
    /// Format of the first disk, if not --format.
    #[arg(long, value_name = "F", value_parser = opening::parse)]
    format_a: Option<Format>,
    /// Format of the second disk, if not --format.
    #[arg(long, value_name = "F", value_parser = opening::parse)]
    format_b: Option<Format>,
    #[command(flatten)]
    moment: Moment,
    /// Snapshot of the first disk, if not --snapshot.
    #[arg(long, value_name = "NAME")]
    snapshot_a: Option<String>,
    /// Snapshot of the second disk, if not --snapshot.
    #[arg(long, value_name = "NAME")]
    snapshot_b: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Compare them although a base has changed under one of them.
    #[arg(long)]
    accept_base: bool,
}

#[derive(Serialize)]
struct Report {
    identical: bool,
    /// The first byte that differs.
    offset: Option<u64>,
    size_a: u64,
    size_b: u64,
}

pub fn run(args: &Args) -> Result<u8> {
    // Status 1 says that the disks differ: a failure must not look like it.
    Ok(compare(args).unwrap_or_else(|error| {
        eprintln!("vdisk: {error}");
        FAILED
    }))
}

fn compare(args: &Args) -> Result<u8> {
    let open = |path, format: Option<Format>, snapshot: &Option<String>| {
        let common = args.opening.reading(&args.moment);
        let using = Use {
            format: format.or(common.format),
            snapshot: snapshot.as_deref().or(common.snapshot),
            accept_base: args.accept_base,
            ..common
        };
        disk::open(path, &using)
    };
    let a = open(&args.a, args.format_a, &args.snapshot_a)?;
    let b = open(&args.b, args.format_b, &args.snapshot_b)?;
    jail::close_on_open_files()?;
    let (size_a, size_b) = (a.size(), b.size());
    let found = if args.strict && size_a != size_b {
        copy::Difference { offset: None, sizes_differ: true }
    } else {
        let progress = Progress::new("comparing", size_a.max(size_b));
        copy::compare(&*a, &*b, &|done| progress.at(done))?
    };
    let identical = found.offset.is_none() && !(args.strict && found.sizes_differ);
    if args.json {
        output::json(&Report { identical, offset: found.offset, size_a, size_b })?;
        return Ok(if identical { 0 } else { DIFFER });
    }
    if found.sizes_differ && !args.strict {
        eprintln!("Warning: Image size mismatch!");
    }
    output::text(&match found.offset {
        Some(offset) => format!("Content mismatch at offset {offset}!\n"),
        None if identical => "Images are identical.\n".to_owned(),
        None => format!("Strict mode: Image size mismatch! ({size_a} and {size_b} bytes)\n"),
    })?;
    Ok(if identical { 0 } else { DIFFER })
}
