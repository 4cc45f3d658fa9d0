//! `vdisk commit`: a delta goes into its base.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use serde_json::json;
use vdisk::Result;
use vdisk::change::commit::{Commit, commit, plan_commit};

use crate::cli::open::options::Opening;
use crate::cli::open::rest::Rest;
use crate::cli::terminal::output::{self, Progress};
use crate::cli::terminal::size;

/// Write what a disk holds into its backing file; the disk is empty on it then.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk.
    disk: PathBuf,
    #[command(flatten)]
    opening: Opening,
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
    /// Say what is done as JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<u8> {
    args.opening.govern(&args.disk)?;
    Rest::new().disk_and_base(&args.disk).close()?;
    let plan = plan_commit(&args.disk)?;
    if args.json {
        output::json(&json!({
            "operation": "commit",
            "dry_run": args.dry_run,
            "disk": output::path(&args.disk),
            "base": output::path(&plan.base),
            "moved": plan.moved,
            "space": plan.space,
            "in_batches": plan.in_batches,
        }))?;
    } else if args.dry_run {
        output::text(&said(&plan))?;
    }
    if args.dry_run {
        return Ok(0);
    }
    let stop = crate::cli::terminal::stop::on_signals()?;
    let bar = Progress::new("committing", plan.moved);
    commit(&args.disk, &mut |done, total| {
        bar.of(total);
        bar.at(done);
        !stop.asked()
    })?;
    Ok(0)
}

fn said(plan: &Commit) -> String {
    format!(
        "base   {}\nmoved  {}\nspace  {}{}\nundo   no: the base is written\n",
        plan.base.display(),
        size::human(plan.moved),
        size::human(plan.space),
        if plan.in_batches { ", in batches that are given back at once" } else { "" },
    )
}
