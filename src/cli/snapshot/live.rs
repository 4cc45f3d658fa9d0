//! Snapshots of a disk that another process holds: it is asked to do what the command says.

use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;
use serde_json::{Value, json};
use vdisk::chain::diff::{self, Change};
use vdisk::chain::tree::Family;
use vdisk::control::Request;
use vdisk::{Error, ErrorKind, Result};

use super::super::{held, output, size, stop};
use super::{Args, Verb};

/// What changed between two moments.
#[derive(ClapArgs)]
pub struct DiffArgs {
    /// The disk.
    disk: PathBuf,
    /// The earlier snapshot.
    name: String,
    /// The later one, instead of the disk as it is now.
    other: Option<String>,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// Hands the command over to the process that holds the disk; `false` where none does.
pub fn run(args: &Args) -> Result<bool> {
    let (disk, request) = match &args.verb {
        Verb::Create(a) => {
            let (name, description) = (a.name.clone(), a.description.clone());
            (&a.disk, Request::Snapshot { name, description, freeze: a.freeze })
        }
        // What would be done is told by the files.
        Verb::Revert(a) if a.plan.dry_run => return Ok(false),
        Verb::Delete(a) if a.plan.dry_run => return Ok(false),
        Verb::Merge(a) if a.plan.dry_run => return Ok(false),
        Verb::Revert(a) => (&a.disk, Request::Revert { name: a.name.clone() }),
        Verb::Delete(a) => (&a.disk, Request::Delete { name: a.name.clone(), tree: a.tree }),
        Verb::Merge(a) => {
            let request = Request::Merge { name: a.name.clone(), rate: a.rate };
            let stop = stop::on_signals()?;
            return Ok(held::ask_long(&a.disk, &request, "merging", &stop)?.is_some());
        }
        _ => return Ok(false),
    };
    let Some(answer) = held::ask(disk, &request)? else {
        if let Verb::Create(a) = &args.verb
            && a.freeze
        {
            let text = "is not mounted by vdisk: there is nothing to freeze";
            return Err(Error::invalid(text).at_path(&a.disk));
        }
        return Ok(false);
    };
    if let Some(pause) = answer.get("pause_us").and_then(Value::as_u64) {
        eprintln!("the disk's user waited for {:.1} ms", pause as f64 / 1000.0);
    }
    Ok(true)
}

/// Prints what changed.
pub fn diff(args: &DiffArgs) -> Result<()> {
    let (from, to) = (args.name.clone(), args.other.clone());
    let changes = match held::ask(&args.disk, &Request::Diff { from, to })? {
        Some(answer) => parse(&answer)?,
        None => idle(&args.disk, &args.name, args.other.as_deref())?,
    };
    let total: u64 = changes.iter().map(|c| c.len).sum();
    if args.json {
        let rows: Vec<Value> = changes
            .iter()
            .map(|c| json!({ "start": c.start, "length": c.len, "zero": c.zero }))
            .collect();
        return output::json(&json!({ "changed": total, "extents": rows }));
    }
    let mut text = String::new();
    for Change { start, len, zero } in &changes {
        let what = if *zero { "zero" } else { "data" };
        text += &format!("{start:#014x} {len:>14} {what}\n");
    }
    output::text(&text)?;
    eprintln!("{} changed in {} extents", size::human(total), changes.len());
    Ok(())
}

fn idle(disk: &Path, from: &str, to: Option<&str>) -> Result<Vec<Change>> {
    // Without a lock, what is read could change meanwhile.
    let options = vdisk::chain::OpenOptions { unprotected: true, ..Default::default() };
    let _held = vdisk::chain::open_image(disk, &options)?;
    diff::diff(&Family::of(disk)?, from, to)
}

fn parse(answer: &Value) -> Result<Vec<Change>> {
    let row = |row: &Value| {
        let (start, len) = (row.get(0)?.as_u64()?, row.get(1)?.as_u64()?);
        Some(Change { start, len, zero: row.get(2)?.as_bool()? })
    };
    let rows = answer.get("changes").and_then(Value::as_array);
    let changes = rows.and_then(|rows| rows.iter().map(row).collect());
    changes.ok_or_else(|| {
        Error::new(ErrorKind::Io, "the process that holds the disk lists no changes")
    })
}
