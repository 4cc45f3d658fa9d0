//! Snapshots of a disk that another process holds: it is asked to do what the command says.

use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;
use serde_json::{Value, json};
use vdisk::change::snapshot;
use vdisk::control::Request;
use vdisk::copy::diff;
use vdisk::copy::diff::Change;
use vdisk::family::tree::Family;
use vdisk::{Error, ErrorKind, Result};

use super::{CreateArgs, files};
use crate::cli::open::held;
use crate::cli::open::options::Opening;
use crate::cli::open::rest::Rest;
use crate::cli::terminal::{output, size};

/// What changed between two moments.
#[derive(ClapArgs)]
pub struct DiffArgs {
    /// The disk.
    pub(super) disk: PathBuf,
    #[command(flatten)]
    pub(super) opening: Opening,
    /// The earlier snapshot.
    pub(super) name: String,
    /// The later one, instead of the disk as it is now.
    pub(super) other: Option<String>,
    /// As JSON.
    #[arg(long)]
    pub(super) json: bool,
    /// Name the files that differ in its ext2, ext3 or ext4 file system.
    #[arg(long)]
    pub(super) files: bool,
    /// The partition that holds the file system.
    #[arg(long, value_name = "N", requires = "files")]
    pub(super) partition: Option<u32>,
}

/// Takes a snapshot.
pub fn create(args: &CreateArgs) -> Result<()> {
    let (name, description) = (args.name.clone(), args.description.clone());
    let request = Request::Snapshot { name, description, freeze: args.freeze };
    let Some(answer) = held::ask(&args.disk, &request)? else {
        if args.freeze {
            let text = "is not mounted by vdisk: there is nothing to freeze";
            return Err(Error::invalid(text).at_path(&args.disk));
        }
        Rest::new().disk(&args.disk).close()?;
        return snapshot::create(&args.disk, &args.name, &args.description);
    };
    if let Some(pause) = answer.get("pause_us").and_then(Value::as_u64) {
        eprintln!("the disk's user waited for {:.1} ms", pause as f64 / 1000.0);
    }
    Ok(())
}

/// Whether another process holds the disk, and can be asked to change it.
pub fn is_held(disk: &Path) -> Result<bool> {
    Ok(held::ask(disk, &Request::Info)?.is_some())
}

/// Fails as the process that holds the disk does when it is asked what it has to refuse, before
/// anything is shown or asked. Does nothing where none holds it.
pub fn refuse(disk: &Path, request: &Request) -> Result<()> {
    held::ask(disk, request).map(drop)
}

/// Prints what changed.
pub fn diff(args: &DiffArgs) -> Result<()> {
    if args.files {
        return files::diff(args);
    }
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
    Rest::new().looked_at(disk).close()?;
    // Without a lock, what is read could change meanwhile.
    let options = vdisk::open::OpenOptions { unprotected: true, ..Default::default() };
    let _held = vdisk::open::open_image(disk, &options)?;
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
