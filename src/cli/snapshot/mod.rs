//! `vdisk snapshot`: restore points of a disk, which is named by its head.

mod files;
mod live;
pub mod show;

pub use files::shown;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args as ClapArgs, Subcommand};
use serde_json::json;
use vdisk::change::merge::Wishes;
use vdisk::change::plan::{self, Keeping, Operation, Plan};
use vdisk::change::{DeleteWishes, merge, snapshot};
use vdisk::control::Request;
use vdisk::family::tree::{Family, Member};
use vdisk::{Error, ErrorKind, Result};

use crate::cli::open::held;
use crate::cli::open::options::Opening;
use crate::cli::open::rest::Rest;
use crate::cli::terminal::output::{self, Progress};
use crate::cli::terminal::{ask, size};

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
    Merge(MergeArgs),
    /// Give a snapshot another name.
    Rename(RenameArgs),
    /// List what was written since NAME, or between NAME and NAME2.
    Diff(live::DiffArgs),
    /// Take back the last delete, merge or revert, while what it dropped is kept aside.
    Undo(UndoArgs),
    /// Let go of what is kept aside for undo, and give its space back.
    Forget(ForgetArgs),
}

#[derive(ClapArgs)]
struct CreateArgs {
    /// The disk.
    disk: PathBuf,
    #[command(flatten)]
    opening: Opening,
    /// The snapshot's name.
    name: String,
    /// What to remember about it.
    #[arg(long, default_value = "")]
    description: String,
    /// Bring the mounted file system to rest for the moment of the snapshot.
    #[arg(long)]
    freeze: bool,
}

#[derive(ClapArgs)]
struct ListArgs {
    /// The disk.
    disk: PathBuf,
    #[command(flatten)]
    opening: Opening,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// Whether and how a plan is shown, and executed.
#[derive(ClapArgs)]
pub struct PlanArgs {
    /// Show what would be done, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Show what is done as JSON.
    #[arg(long)]
    pub json: bool,
    /// Do not ask before changes are dropped.
    #[arg(long)]
    pub yes: bool,
}

/// How long what is dropped can be brought back.
#[derive(ClapArgs)]
pub struct KeepingArgs {
    /// Keep what is dropped for undo so long: 90s, 15m, 12h, 7d. The variable VDISK_KEEP_FOR says it
    /// for all commands.
    #[arg(long, value_name = "TIME", value_parser = age, conflicts_with = "forget")]
    keep_for: Option<Duration>,
    /// Keep nothing for undo: what is dropped is gone, and its space free.
    #[arg(long)]
    forget: bool,
}

#[derive(ClapArgs)]
struct RevertArgs {
    /// The disk.
    disk: PathBuf,
    #[command(flatten)]
    opening: Opening,
    /// The snapshot to go back to.
    name: String,
    /// Keep today's state as a snapshot of this name.
    #[arg(long, value_name = "NAME2")]
    keep: Option<String>,
    #[command(flatten)]
    keeping: KeepingArgs,
    #[command(flatten)]
    plan: PlanArgs,
}

#[derive(ClapArgs)]
struct DeleteArgs {
    /// The disk.
    disk: PathBuf,
    #[command(flatten)]
    opening: Opening,
    /// The snapshot.
    name: String,
    /// Delete the snapshots that stand on it too.
    #[arg(long)]
    tree: bool,
    /// Also where clones stand on what goes: they can be read no more then.
    #[arg(long)]
    even_if_cloned: bool,
    #[command(flatten)]
    keeping: KeepingArgs,
    #[command(flatten)]
    plan: PlanArgs,
}

#[derive(ClapArgs)]
struct MergeArgs {
    /// The disk.
    disk: PathBuf,
    #[command(flatten)]
    opening: Opening,
    /// The snapshot.
    name: String,
    /// Copy at most so much in a second while the disk is in use, such as 50M.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    rate: Option<u64>,
    /// Give back what was copied as soon as it is durable, though there is space for all of it.
    #[arg(long)]
    in_batches: bool,
    /// Also where clones stand on the snapshot: they can be read no more then.
    #[arg(long)]
    even_if_cloned: bool,
    #[command(flatten)]
    keeping: KeepingArgs,
    #[command(flatten)]
    plan: PlanArgs,
}

#[derive(ClapArgs)]
struct UndoArgs {
    /// The disk.
    disk: PathBuf,
    #[command(flatten)]
    opening: Opening,
    /// Keep today's state as a snapshot of this name.
    #[arg(long, value_name = "NAME")]
    keep: Option<String>,
    #[command(flatten)]
    plan: PlanArgs,
}

#[derive(ClapArgs)]
struct ForgetArgs {
    /// The disk.
    disk: PathBuf,
    /// Also what clones elsewhere stand on: they can be read no more then.
    #[arg(long)]
    even_if_cloned: bool,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    plan: PlanArgs,
}

#[derive(ClapArgs)]
struct RenameArgs {
    /// The disk.
    disk: PathBuf,
    #[command(flatten)]
    opening: Opening,
    /// The snapshot.
    old: String,
    /// Its new name.
    new: String,
}

impl Verb {
    /// The disk, and what the user says of it.
    fn disk(&self) -> (&Path, &Opening) {
        match self {
            Verb::Create(a) => (&a.disk, &a.opening),
            Verb::List(a) => (&a.disk, &a.opening),
            Verb::Revert(a) => (&a.disk, &a.opening),
            Verb::Delete(a) => (&a.disk, &a.opening),
            Verb::Merge(a) => (&a.disk, &a.opening),
            Verb::Rename(a) => (&a.disk, &a.opening),
            Verb::Diff(a) => (&a.disk, &a.opening),
            Verb::Undo(a) => (&a.disk, &a.opening),
            Verb::Forget(a) => (&a.disk, &a.opening),
        }
    }
}

pub fn run(args: &Args) -> Result<u8> {
    let (disk, opening) = args.verb.disk();
    opening.govern(disk)?;
    match &args.verb {
        Verb::Create(a) => live::create(a)?,
        Verb::List(a) => list(a)?,
        Verb::Revert(a) => {
            live::refuse(&a.disk, &Request::Revert { name: a.name.clone() })?;
            let keeping = a.keeping.keeping()?;
            let plan = || snapshot::plan_revert(&a.disk, &a.name, a.keep.as_deref(), keeping);
            let plan = planned(&a.disk, plan)?;
            carry_out(&plan, &a.plan, None)?;
        }
        Verb::Delete(a) => {
            let keeping = a.keeping.keeping()?;
            let (tree, even_if_cloned) = (a.tree, a.even_if_cloned);
            let wishes = DeleteWishes { tree, keeping, even_if_cloned };
            let plan = planned(&a.disk, || snapshot::plan_delete_as(&a.disk, &a.name, wishes))?;
            let (name, keep) = (a.name.clone(), Some(milliseconds(keeping)));
            let seen = Some(plan.tree());
            let request = Request::Delete { name, tree, even_if_cloned, keep, seen };
            carry_out(&plan, &a.plan, Some(request))?;
        }
        Verb::Merge(a) => {
            let (keeping, in_batches) = (a.keeping.keeping()?, a.in_batches);
            let (in_use, even_if_cloned) = (live::is_held(&a.disk)?, a.even_if_cloned);
            let wishes = Wishes { keeping, in_batches, in_use, even_if_cloned };
            let plan = planned(&a.disk, || merge::plan_merge(&a.disk, &a.name, wishes))?;
            let (name, rate, keep) = (a.name.clone(), a.rate, Some(milliseconds(keeping)));
            let seen = Some(plan.tree());
            let request = Request::Merge { name, rate, keep, in_batches, even_if_cloned, seen };
            carry_out(&plan, &a.plan, Some(request))?;
        }
        Verb::Rename(a) => {
            let request = Request::Rename { old: a.old.clone(), new: a.new.clone() };
            if held::ask(&a.disk, &request)?.is_none() {
                Rest::new().disk(&a.disk).close()?;
                snapshot::rename_snapshot(&a.disk, &a.old, &a.new)?;
            }
        }
        Verb::Undo(a) => {
            let plan = planned(&a.disk, || snapshot::plan_undo(&a.disk, a.keep.as_deref()))?;
            let request = Request::Undo { keep_as: a.keep.clone(), seen: Some(plan.tree()) };
            carry_out(&plan, &a.plan, Some(request))?;
        }
        Verb::Forget(a) => {
            let even_if_cloned = a.even_if_cloned;
            let plan = || snapshot::plan_forget_as(&a.disk, even_if_cloned);
            let plan = planned(&a.disk, plan)?;
            let request = Request::Forget { even_if_cloned, seen: Some(plan.tree()) };
            carry_out(&plan, &a.plan, Some(request))?;
        }
        Verb::Diff(a) => live::diff(a)?,
    }
    Ok(0)
}

/// Makes a plan. Layers are looked at without a lock, and another command may take one away meanwhile:
/// then there is no plan yet.
fn planned(disk: &Path, make: impl FnOnce() -> Result<Plan>) -> Result<Plan> {
    let before = plan::tree(disk);
    make().map_err(|error| {
        if plan::tree(disk) == before {
            return error;
        }
        Error::new(ErrorKind::Busy, error.message()).at_path(disk)
    })
}

/// Shows a plan, asks where something would be lost, and does it, or has it done by the process that
/// holds the disk, which is asked so.
fn carry_out(plan: &Plan, args: &PlanArgs, request: Option<Request>) -> Result<()> {
    if let Some(request) = request.as_ref().filter(|_| plan.moves_head()) {
        live::refuse(&plan.disk, request)?;
    }
    if args.dry_run {
        return match args.json {
            true => output::json(&show::value(plan, true)),
            false => output::text(&show::text(plan)),
        };
    }
    if let Some(loss) = show::loss(plan) {
        if !args.yes && !args.json && std::io::stderr().is_terminal() {
            eprint!("{}", show::text(plan));
        }
        ask::confirm(&loss, args.yes)?;
    }
    if let Some(kept) = plan.forgets.as_ref().filter(|_| plan.operation == Operation::Merge) {
        eprintln!("vdisk: what the {} had kept aside for undo goes", kept.what);
    }
    if plan.operation == Operation::Merge && !plan.bitmaps.is_empty() {
        eprintln!("vdisk: warning: {}", show::lost_bitmaps(plan));
    }
    execute(plan, request)?;
    if args.json { output::json(&show::value(plan, false)) } else { Ok(()) }
}

fn execute(plan: &Plan, request: Option<Request>) -> Result<()> {
    let stop = crate::cli::terminal::stop::on_signals()?;
    if let Some(request) = request
        && held::ask_long(&plan.disk, &request, "moving", &stop)?.is_some()
    {
        return Ok(());
    }
    Rest::new().disk(&plan.disk).close()?;
    let bar = Progress::new("moving", plan.moved.saturating_add(plan.linked));
    plan.execute(&mut |done, total| {
        bar.of(total);
        bar.at(done);
        !stop.asked()
    })
}

fn milliseconds(keeping: Keeping) -> u64 {
    u64::try_from(keeping.0.as_millis()).unwrap_or(u64::MAX)
}

impl KeepingArgs {
    /// What is said, or the variable, or a week.
    pub fn keeping(&self) -> Result<Keeping> {
        if self.forget {
            return Ok(Keeping::NOTHING);
        }
        if let Some(age) = self.keep_for {
            return Ok(Keeping(age));
        }
        match std::env::var("VDISK_KEEP_FOR") {
            Ok(text) => age(&text)
                .map(Keeping)
                .map_err(|e| Error::invalid(format!("VDISK_KEEP_FOR is '{text}': {e}"))),
            Err(_) => Ok(Keeping::default()),
        }
    }
}

/// Parses a length of time.
fn age(text: &str) -> std::result::Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let seconds = match &text[digits.len()..] {
        "" if digits == "0" => 1,
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err("say a number and s, m, h or d, as in 7d".to_owned()),
    };
    let number: u64 = digits.parse().map_err(|_| format!("'{digits}' is no number"))?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(|| "is too long".to_owned())
}

fn list(args: &ListArgs) -> Result<()> {
    Rest::new().looked_at(&args.disk).close()?;
    let family = Family::read(&args.disk)?;
    if family.is_none() && !args.disk.exists() {
        let missing = std::io::ErrorKind::NotFound.into();
        return Err(Error::io("could not be opened", missing).at_path(&args.disk));
    }
    let current = family.as_ref().and_then(Family::current).map(|m| m.label.layer);
    let kept = family.as_ref().map_or(Ok(None), snapshot::kept_aside)?;
    let snapshots: Vec<&Member> = family.iter().flat_map(Family::snapshots).collect();
    if args.json {
        let rows: Vec<_> = snapshots.iter().map(|m| row(family.as_ref(), m, current)).collect();
        let kept = kept.as_ref().map(show::kept_value);
        println!(
            "{}",
            json!({ "disk": output::path(&args.disk), "snapshots": rows, "kept_aside": kept })
        );
        return Ok(());
    }
    if let Some(kept) = &kept {
        eprintln!("{}", show::kept_text(kept));
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
        "file": output::path(&member.path),
    })
}

/// The snapshot that a snapshot stands on.
fn parent(family: Option<&Family>, member: &Member) -> String {
    let below = family.and_then(|f| f.snapshot_below(member));
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
