//! `vdisk check`: is a disk right, and if not, mend it.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::{Args as ClapArgs, ValueEnum};
use serde::{Deserialize, Serialize};
use vdisk::chain::Layer;
use vdisk::change;
use vdisk::control::Request;
use vdisk::image::{Check, Repair};
use vdisk::jail::{Jail, Work};
use vdisk::open;
use vdisk::open::{Format, OpenOptions};
use vdisk::{Error, ErrorKind, Result};

use crate::cli::open::options::{Moment, Opening};
use crate::cli::open::{held, jail};
use crate::cli::terminal::output;

/// Exit status for an image with lost data, or data loss to come.
const CORRUPT: u8 = 2;
/// Exit status for an image that only wastes space.
const LEAKS: u8 = 3;
/// Exit status where the check could not be done.
const UNCHECKED: u8 = 1;

/// Check a disk's metadata, and repair it.
///
/// Exits with 0 where all is right, 2 for corruption, 3 for leaks only, 1 if it cannot be checked.
/// A disk in use is checked by the process that holds it; its user waits meanwhile.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk.
    disk: PathBuf,
    #[command(flatten)]
    moment: Moment,
    #[command(flatten)]
    opening: Opening,
    /// Repair what is found; nobody may use the disk meanwhile.
    #[arg(long, value_enum, value_name = "WHAT")]
    repair: Option<RepairArg>,
    /// Check each layer below it as well.
    #[arg(long)]
    chain: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum RepairArg {
    /// Give clusters back that nothing uses.
    Leaks,
    /// All that can be mended without losing data.
    All,
}

#[derive(Serialize, Deserialize)]
struct Report {
    filename: String,
    format: String,
    corruptions: u64,
    leaks: u64,
    check_errors: u64,
    corruptions_fixed: u64,
    leaks_fixed: u64,
    total_clusters: u64,
    allocated_clusters: u64,
    fragmented_clusters: u64,
    compressed_clusters: u64,
    image_end_offset: u64,
    messages: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct ChainReport {
    layers: Vec<Report>,
}

pub fn run(args: &Args) -> Result<u8> {
    let reports = run_layers(args)?;
    let status = reports.iter().map(Report::status).max_by_key(|s| match *s {
        UNCHECKED => 3,
        CORRUPT => 2,
        LEAKS => 1,
        _ => 0,
    });
    for report in &reports {
        report.messages.iter().for_each(|message| eprintln!("{message}"));
    }
    match (args.json, args.chain) {
        (true, true) => output::json(&ChainReport { layers: reports })?,
        (true, false) => reports.iter().try_for_each(output::json)?,
        (false, chain) => {
            for report in &reports {
                output::text(&report.text(chain))?;
            }
        }
    }
    Ok(status.unwrap_or(0))
}

/// The layers to be checked. Those that are to be mended are opened one at a time, for writing.
fn run_layers(args: &Args) -> Result<Vec<Report>> {
    let repair = args.repair.is_some();
    let is_frozen = args.moment.snapshot.is_some();
    if !repair
        && !is_frozen
        && let Some(answer) = held::ask(&args.disk, &Request::Check { chain: args.chain })?
    {
        return serde_json::from_value(answer).map(|ChainReport { layers }| layers).map_err(|e| {
            let text = format!("the process that holds the disk says nothing sensible: {e}");
            Error::new(ErrorKind::Io, text).at_path(&args.disk)
        });
    }
    let (disk, options) = args.opening.file_at(&args.disk, &args.moment)?;
    // Its tables need no passphrase.
    let looking = OpenOptions { unprotected: true, passphrase: None, ..options };
    let mending = OpenOptions { read_only: false, repair, ..looking.clone() };
    if !args.chain {
        let layer = open::open_image(&disk, &looking)?;
        enclose(std::slice::from_ref(&layer), repair)?;
        if repair {
            // Closed first: it is read under a lock that keeps writers out.
            drop(layer);
            return Ok(vec![mend(args, &disk, &mending)?]);
        }
        return Ok(vec![check(args, &layer)?]);
    }
    let layers = change::open(&disk, &looking)?.all_layers();
    enclose(&layers, repair)?;
    let checked = layers.iter().filter(|l| l.image.capabilities().check.is_some());
    if !repair {
        return checked.map(|layer| check(args, layer)).collect();
    }
    let names: Vec<(PathBuf, Format)> = checked.map(|l| (l.path.clone(), l.format)).collect();
    // Closed first: they are read under a lock that keeps writers out.
    drop(layers);
    let mend = |(path, format): (PathBuf, Format)| {
        let options = OpenOptions { format: Some(format), ..mending.clone() };
        mend(args, &path, &options)
    };
    names.into_iter().map(mend).collect()
}

/// Closes the jail around a check of these layers, which are open.
fn enclose(layers: &[Layer], repair: bool) -> Result<()> {
    let mut jail = Jail::new(Work::Command);
    if repair {
        layers.iter().for_each(|layer| jail::admit(&mut jail, layer, true));
    }
    jail::close(jail)
}

/// Mends who owns which cluster. What the guest sees stays, and the clones of a base with it.
fn mend(args: &Args, disk: &Path, options: &OpenOptions) -> Result<Report> {
    let mended = open::keeping_time(disk, || {
        let layer = open::open_image(disk, options)?;
        match open::sameness::begin_rewrite(&layer) {
            // It is there to be mended, and says nothing that could be noted.
            Err(e) if e.kind() == ErrorKind::Corrupt => {}
            begun => begun?,
        }
        check(args, &layer)
    });
    open::sameness::note_stamp(disk);
    mended
}

fn check(args: &Args, layer: &Layer) -> Result<Report> {
    let repair = match args.repair {
        None => Repair::None,
        Some(RepairArg::Leaks) => Repair::Leaks,
        Some(RepairArg::All) => Repair::All,
    };
    let named = |e: Error| match e.kind() {
        ErrorKind::Unsupported => {
            let message = format!("{} files hold no metadata that could be checked", layer.format);
            Error::unsupported(message).at_path(&layer.path)
        }
        _ => e.at_path(&layer.path),
    };
    let check = layer.image.check(repair).map_err(named)?;
    Ok(Report::new(layer, check))
}

impl Report {
    fn new(layer: &Layer, check: Check) -> Report {
        Report {
            filename: output::path(&layer.path),
            format: layer.format.name().to_owned(),
            corruptions: check.corruptions,
            leaks: check.leaks,
            check_errors: check.errors,
            corruptions_fixed: check.corruptions_fixed,
            leaks_fixed: check.leaks_fixed,
            total_clusters: check.total_clusters,
            allocated_clusters: check.allocated_clusters,
            fragmented_clusters: check.fragmented_clusters,
            compressed_clusters: check.compressed_clusters,
            image_end_offset: check.image_end_offset,
            messages: check.messages,
        }
    }

    fn status(&self) -> u8 {
        match self {
            Report { check_errors: 1.., .. } => UNCHECKED,
            Report { corruptions: 1.., .. } => CORRUPT,
            Report { leaks: 1.., .. } => LEAKS,
            _ => 0,
        }
    }

    fn text(&self, named: bool) -> String {
        let mut out = String::new();
        if named {
            let _ = writeln!(out, "{}:", self.filename);
        }
        out.push_str(&self.findings());
        let part = |of: u64, total: u64| of as f64 * 100.0 / total.max(1) as f64;
        if self.total_clusters > 0 {
            let _ = writeln!(
                out,
                "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
                self.allocated_clusters,
                self.total_clusters,
                part(self.allocated_clusters, self.total_clusters),
                part(self.fragmented_clusters, self.allocated_clusters),
                part(self.compressed_clusters, self.allocated_clusters),
            );
        }
        let _ = writeln!(out, "Image end offset: {}", self.image_end_offset);
        out
    }

    fn findings(&self) -> String {
        let mut out = String::new();
        if self.leaks_fixed > 0 || self.corruptions_fixed > 0 {
            let _ = writeln!(
                out,
                "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    \
                 {} corruptions\n",
                self.leaks_fixed, self.corruptions_fixed
            );
        }
        if self.status() == 0 {
            out.push_str("No errors were found on the image.\n");
        }
        if self.corruptions > 0 {
            let _ = writeln!(
                out,
                "{} errors were found on the image.\nData may be corrupted, or further writes to the \
                 image may corrupt it.",
                self.corruptions
            );
        }
        if self.leaks > 0 {
            let _ = writeln!(
                out,
                "{} leaked clusters were found on the image.\nThis means waste of disk space, but no \
                 harm to data.",
                self.leaks
            );
        }
        if self.check_errors > 0 {
            let _ = writeln!(out, "{} errors have occurred during the check.", self.check_errors);
        }
        out
    }
}
