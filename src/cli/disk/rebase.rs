//! `vdisk rebase`: another base, or none.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use serde_json::{Value, json};
use vdisk::Result;
use vdisk::change::preview::{Rebase, plan_flatten, plan_rebase};
use vdisk::change::rebase::{Contents, accept_base, flatten, rebase};
use vdisk::open::Format;

use crate::cli::open::options::{self as opening, Opening};
use crate::cli::open::rest::Rest;
use crate::cli::terminal::output::{self, Progress};
use crate::cli::terminal::size;

/// Put a disk on another base, or make it stand alone.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk.
    disk: PathBuf,
    /// The new base. The disk's contents stay what they are.
    #[arg(long, value_name = "FILE", required_unless_present_any = ["flatten", "accept_base"])]
    backing: Option<PathBuf>,
    /// Only change the name of the base: what the disk shows of it changes with it.
    #[arg(long = "unsafe", requires = "backing")]
    trust: bool,
    /// Copy what the disk shows of its base into it, so that it needs none.
    #[arg(long, conflicts_with_all = ["backing", "trust"])]
    flatten: bool,
    /// Take the bases below it as they are now: record what changed, and where one has moved to.
    #[arg(long, conflicts_with_all = ["backing", "trust", "flatten"])]
    accept_base: bool,
    #[command(flatten)]
    opening: Opening,
    /// The new base's format; without it the contents tell, which a guest may have written
    #[arg(long, value_name = "F", value_parser = opening::parse, requires = "backing")]
    backing_format: Option<Format>,
    /// Only say what would be done.
    #[arg(long, conflicts_with = "accept_base")]
    dry_run: bool,
    /// Say what is done as JSON.
    #[arg(long, conflicts_with = "accept_base")]
    json: bool,
}

pub fn run(args: &Args) -> Result<u8> {
    // The new base is another disk: what the user says of this one is no word about that.
    match (&args.backing, args.backing_format) {
        (Some(_), None) if !args.opening.links.follow => args.opening.refuse_flat(&args.disk)?,
        _ => args.opening.govern(&args.disk)?,
    }
    let how = opening::options(args.backing_format, args.opening.links.follow)?;
    let rest = Rest::new().disk(&args.disk);
    match &args.backing {
        Some(base) => rest.base(base).close()?,
        None => rest.close()?,
    }
    if args.accept_base {
        let recorded = accept_base(&args.disk)?;
        if recorded.is_empty() {
            eprintln!("nothing to record: no base below it has changed or moved");
        }
        recorded.iter().for_each(|line| eprintln!("{line}"));
        return Ok(0);
    }
    let contents = if args.trust { Contents::Trust } else { Contents::Keep };
    if args.dry_run || args.json {
        let plan = match &args.backing {
            Some(base) => plan_rebase(&args.disk, base, &how, contents)?,
            None => plan_flatten(&args.disk)?,
        };
        if args.json {
            output::json(&value(&plan, args.dry_run))?;
        } else {
            output::text(&said(&plan))?;
        }
    }
    if args.dry_run {
        return Ok(0);
    }
    let stop = crate::cli::terminal::stop::on_signals()?;
    let mut bar: Option<Progress> = None;
    let mut go_on = |done, total| {
        bar.get_or_insert_with(|| Progress::new("rebasing", total)).at(done);
        !stop.asked()
    };
    match &args.backing {
        Some(base) => {
            rebase(&args.disk, base, &how, contents, &mut go_on)?;
        }
        None => flatten(&args.disk, &mut go_on)?,
    }
    Ok(0)
}

fn why(plan: &Rebase) -> String {
    match &plan.backing {
        Some(base) => format!("the disk stands on '{}' then", base.display()),
        None => "the disk stands alone then".to_owned(),
    }
}

fn said(plan: &Rebase) -> String {
    let mut text = format!("rebase: {}\n", why(plan));
    for layer in &plan.layers {
        let file = layer.path.file_name().unwrap_or_default().to_string_lossy();
        text += &format!("  layer      {file}: {}\n", layer.fate.words());
    }
    let at_most = if plan.compared > 0 { " at most" } else { "" };
    text += &format!("  compared   {}\n", size::human(plan.compared));
    text += &format!("  moved      {}{at_most}\n", size::human(plan.moved));
    text += &format!("  needed     {}{at_most}\n  freed      0 B\n", size::human(plan.moved));
    text
}

fn value(plan: &Rebase, dry_run: bool) -> Value {
    let layers = plan.layers.iter();
    let layers = layers
        .map(|l| json!({ "file": output::path(&l.path), "name": l.name, "fate": l.fate.words() }));
    json!({
        "operation": if plan.backing.is_some() { "rebase" } else { "flatten" },
        "dry_run": dry_run,
        "disk": output::path(&plan.disk),
        "backing_before": plan.before.as_ref().map(output::path),
        "backing": plan.backing.as_ref().map(output::path),
        "layers": layers.collect::<Vec<_>>(),
        "why": why(plan),
        "compared": plan.compared,
        "moved": plan.moved,
        "space_needed": plan.moved,
        "freed": 0,
    })
}
