//! `vdisk rm`: a disk with its snapshots, or files in a disk.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;
use serde_json::json;
use vdisk::change::{Removal, plan_remove};
use vdisk::instance::{Record, parse_name, place};
use vdisk::{Error, ErrorKind, Result};

use crate::cli::files;
use crate::cli::files::remove::RemoveArgs;
use crate::cli::image::Which;
use crate::cli::instance::named::clone_named;
use crate::cli::open::rest::Rest;
use crate::cli::terminal::{ask, output, size};

/// Remove a disk with its snapshots, files in a disk (DISK:PATH), or an instance
///
/// A disk is not removed while clones stand on it. An instance goes when it has ended, with its log and with the clone
/// that was made for it from an image; the disk that it was run on stays.
#[derive(ClapArgs)]
pub struct Args {
    /// Disks, files in them as DISK:PATH, or instances by name or id
    #[arg(value_name = "DISK|DISK:PATH|N", required = true)]
    targets: Vec<OsString>,
    #[command(flatten)]
    files: RemoveArgs,
    /// Also where clones stand on it: they can be read no more then.
    #[arg(long)]
    even_if_cloned: bool,
    /// Only say what would be removed.
    #[arg(long)]
    dry_run: bool,
    /// Say what is removed as JSON.
    #[arg(long)]
    json: bool,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    store: Which,
}

/// What a word of the command line means.
enum Target<'a> {
    InDisk(&'a OsString),
    Disk(&'a Path),
    Instance(Box<Instance>),
}

/// An instance, and the clone that was made for it: of one whose record a restart of the host has taken, that.
struct Instance {
    record: Option<Record>,
    clone: Option<PathBuf>,
}

pub fn run(args: &Args) -> Result<u8> {
    let targets = args.targets.iter().map(|word| Target::of(word, args));
    let targets = targets.collect::<Result<Vec<_>>>()?;
    enclose(&targets)?;
    for target in targets {
        match target {
            Target::InDisk(word) => files::remove(word, &args.files)?,
            Target::Disk(path) => disk(path, args)?,
            Target::Instance(instance) => remove(*instance, args)?,
        }
    }
    Ok(0)
}

impl Target<'_> {
    fn of<'a>(word: &'a OsString, args: &Args) -> Result<Target<'a>> {
        if files::is_in_disk(word) {
            return Ok(Target::InDisk(word));
        }
        if Path::new(word).symlink_metadata().is_ok() {
            return Ok(Target::Disk(Path::new(word)));
        }
        let record = word.to_str().and_then(|word| place::find(word).ok());
        let clone = match (&record, word.to_str()) {
            (Some(record), _) => record.clone.then(|| PathBuf::from(&record.disk)),
            (None, Some(word)) if parse_name(word).is_ok() => {
                args.store.existing()?.map(|store| clone_named(&store, word))
            }
            _ => None,
        };
        let clone = clone.filter(|clone| clone.symlink_metadata().is_ok());
        Ok(match (&record, &clone) {
            // Whatever is wrong with it as a disk's name is said.
            (None, None) => Target::Disk(Path::new(word)),
            _ => Target::Instance(Box::new(Instance { record, clone })),
        })
    }
}

/// Closes the jail around the removal of disks, of files in disks, and of instances with what is kept of them.
fn enclose(targets: &[Target<'_>]) -> Result<()> {
    let mut rest = Rest::new();
    for target in targets {
        rest = match target {
            Target::InDisk(word) => match files::disk_of(word) {
                Some(disk) => rest.disk(&disk),
                None => rest,
            },
            Target::Disk(path) => rest.disk(path),
            Target::Instance(instance) => {
                let Instance { record, clone } = &**instance;
                let kept = record.as_ref().map(place::of).transpose()?;
                let rest = kept.iter().fold(rest, |rest, dir| rest.made(dir));
                clone.iter().fold(rest, |rest, clone| rest.disk(clone))
            }
        };
    }
    rest.close()
}

/// Removes an instance that has ended, and its clone.
fn remove(Instance { record, clone }: Instance, args: &Args) -> Result<()> {
    if let Some(record) = record.as_ref().filter(|record| record.lives()) {
        let text = format!("{} runs: `vdisk stop {}` ends it", record.name, record.name);
        return Err(Error::new(ErrorKind::InUse, text));
    }
    if let Some(clone) = clone {
        disk(&clone, args)?;
    }
    match record {
        Some(record) if !args.dry_run => place::forget(&record),
        _ => Ok(()),
    }
}

fn disk(disk: &Path, args: &Args) -> Result<()> {
    args.files.which.opening.govern(disk)?;
    let plan = plan_remove(disk, args.even_if_cloned)?;
    if args.json {
        output::json(&json!({
            "operation": "rm",
            "dry_run": args.dry_run,
            "disk": plan.disk,
            "files": plan.files,
            "snapshots": plan.snapshots,
            "dropped": plan.dropped,
        }))?;
    } else if args.dry_run {
        plan.files.iter().try_for_each(|file| output::text(&format!("{}\n", file.display())))?;
    }
    if args.dry_run {
        return Ok(());
    }
    ask::confirm(&loss(&plan), args.yes)?;
    for base in plan.execute()? {
        let base = base.display();
        eprintln!(
            "vdisk: warning: {base} could not be written, and goes on saying that {} stands on it: \
             `vdisk unseal {base}` tells it",
            plan.disk.display()
        );
    }
    Ok(())
}

fn loss(plan: &Removal) -> String {
    let with = match &plan.snapshots[..] {
        [] => String::new(),
        some => format!(" and its snapshots {}", some.join(", ")),
    };
    let (disk, bytes) = (plan.disk.display(), size::human(plan.dropped));
    format!("{disk}{with}, {bytes}, will be removed for good")
}
