//! `vdisk snapshot`: restore points of a disk, which is named by its head.

use std::path::{Path, PathBuf};

use clap::{Args as ClapArgs, Subcommand};
use serde_json::json;
use vdisk::chain::merge;
use vdisk::chain::snapshot;
use vdisk::chain::tree::{Family, Member};
use vdisk::{Error, Result};

use super::{ask, size};

/// Take, list, go back to, delete and merge snapshots.
#[derive(ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Keep the disk as it is now under NAME.
    Create(CreateArgs),
    /// Show the snapshots: name, time, size of its changes, parent, current position.
    List(ListArgs),
    /// Go back to NAME. Today's changes are dropped, or kept with --keep.
    Revert(RevertArgs),
    /// Remove NAME and the changes made since it: the disk returns to the moment it was taken.
    Delete(DeleteArgs),
    /// Remove the name NAME; no change is lost.
    Merge(NameArgs),
    /// Give a snapshot another name.
    Rename(RenameArgs),
}

#[derive(ClapArgs)]
struct CreateArgs {
    /// The disk.
    disk: PathBuf,
    /// The snapshot's name.
    name: String,
    /// What to remember about it.
    #[arg(long, default_value = "")]
    description: String,
}

#[derive(ClapArgs)]
struct ListArgs {
    /// The disk.
    disk: PathBuf,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

#[derive(ClapArgs)]
struct RevertArgs {
    /// The disk.
    disk: PathBuf,
    /// The snapshot to go back to.
    name: String,
    /// Keep today's state as a snapshot of this name.
    #[arg(long, value_name = "NAME2")]
    keep: Option<String>,
    /// Do not ask before changes are dropped.
    #[arg(long)]
    yes: bool,
}

#[derive(ClapArgs)]
struct DeleteArgs {
    /// The disk.
    disk: PathBuf,
    /// The snapshot.
    name: String,
    /// Delete the snapshots that stand on it too.
    #[arg(long)]
    tree: bool,
    /// Do not ask before changes are dropped.
    #[arg(long)]
    yes: bool,
}

#[derive(ClapArgs)]
struct NameArgs {
    /// The disk.
    disk: PathBuf,
    /// The snapshot.
    name: String,
}

#[derive(ClapArgs)]
struct RenameArgs {
    /// The disk.
    disk: PathBuf,
    /// The snapshot.
    old: String,
    /// Its new name.
    new: String,
}

pub fn run(args: &Args) -> Result<u8> {
    match &args.verb {
        Verb::Create(a) => snapshot::create(&a.disk, &a.name, &a.description)?,
        Verb::List(a) => list(a)?,
        Verb::Revert(a) => revert(a)?,
        Verb::Delete(a) => delete(a)?,
        Verb::Merge(a) => merge(a)?,
        Verb::Rename(a) => snapshot::rename_snapshot(&a.disk, &a.old, &a.new)?,
    }
    Ok(0)
}

fn revert(args: &RevertArgs) -> Result<()> {
    if args.keep.is_none() {
        let dropped = snapshot::head_bytes(&args.disk, &args.name)?;
        if dropped > 0 {
            let loss = format!("{} of changes will be dropped", size::human(dropped));
            ask::confirm(&loss, args.yes)?;
        }
    }
    snapshot::revert(&args.disk, &args.name, args.keep.as_deref())
}

fn delete(args: &DeleteArgs) -> Result<()> {
    let plan = snapshot::plan_delete(&args.disk, &args.name, args.tree)?;
    if plan.dropped > 0 || !plan.snapshots.is_empty() {
        let mut loss = format!("{} of changes will be dropped", size::human(plan.dropped));
        if !plan.snapshots.is_empty() {
            loss += &format!(", and with them the snapshots {}", plan.snapshots.join(", "));
        }
        ask::confirm(&loss, args.yes)?;
    }
    snapshot::delete(&args.disk, &args.name, args.tree)
}

fn merge(args: &NameArgs) -> Result<()> {
    let stop = super::stop::on_signals()?;
    merge::merge(&args.disk, &args.name, &mut |_, _| !stop.asked())
}

fn list(args: &ListArgs) -> Result<()> {
    let family = Family::read(&args.disk)?;
    if family.is_none() && !args.disk.exists() {
        let missing = std::io::ErrorKind::NotFound.into();
        return Err(Error::io("could not be opened", missing).at_path(&args.disk));
    }
    let current = family.as_ref().and_then(Family::current).map(|m| m.label.layer);
    let snapshots: Vec<&Member> = family.iter().flat_map(Family::snapshots).collect();
    if args.json {
        let rows: Vec<_> =
            snapshots.iter().map(|m| row(&args.disk, family.as_ref(), m, current)).collect();
        println!("{}", json!({ "disk": args.disk, "snapshots": rows }));
        return Ok(());
    }
    if snapshots.is_empty() {
        eprintln!("{} has no snapshots", args.disk.display());
        return Ok(());
    }
    println!("  {:<20} {:<19} {:>9}  {:<20} DESCRIPTION", "NAME", "TIME", "SIZE", "PARENT");
    for member in snapshots {
        let here = if Some(member.label.layer) == current { '*' } else { ' ' };
        println!(
            "{here} {:<20} {:<19} {:>9}  {:<20} {}",
            member.label.name,
            time(member.label.time),
            size::human(member.peek.allocated),
            parent(family.as_ref(), member),
            member.label.description
        );
    }
    Ok(())
}

fn row(
    disk: &Path,
    family: Option<&Family>,
    member: &Member,
    current: Option<vdisk::image::Id>,
) -> serde_json::Value {
    let parent = parent(family, member);
    json!({
        "name": member.label.name,
        "description": member.label.description,
        "time": time(member.label.time),
        "time_ms": member.label.time,
        "size": member.peek.allocated,
        "virtual_size": member.peek.size,
        "parent": (parent != "-").then_some(parent),
        "current": Some(member.label.layer) == current,
        "layer": member.label.layer.to_string(),
        "file": disk.with_file_name(member.path.file_name().unwrap_or_default()),
    })
}

/// The snapshot that a snapshot stands on.
fn parent(family: Option<&Family>, member: &Member) -> String {
    let below = member.parent().zip(family).and_then(|(id, f)| f.member(id));
    below.map_or("-".to_owned(), |m| m.label.name.clone())
}

/// A time in the user's time zone.
pub fn time(milliseconds: u64) -> String {
    let stamp =
        i64::try_from(milliseconds).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    stamp.map_or("-".to_owned(), |t| {
        t.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string()
    })
}
