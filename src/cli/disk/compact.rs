//! `vdisk compact`: a disk's unused space, given back to the host.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use serde_json::json;
use vdisk::chain::Compacted;
use vdisk::change;
use vdisk::control::Request;
use vdisk::image::Repair;
use vdisk::open::OpenOptions;
use vdisk::{Error, Result};

use crate::cli::open::options::Opening;
use crate::cli::open::{disk, held, jail};
use crate::cli::terminal::output::{self, Progress};
use crate::cli::terminal::{size, stop};

/// Give a disk's unused space back to the host: clusters that read as zeroes, free clusters, the
/// file's tail.
///
/// What the disk shows does not change, and it may be in use meanwhile. An interruption keeps what
/// was given back by then.
#[derive(ClapArgs)]
pub struct Args {
    /// The disk.
    disk: PathBuf,
    #[command(flatten)]
    opening: Opening,
    /// Only say what would be given back.
    #[arg(long)]
    dry_run: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<u8> {
    let stop = stop::on_signals()?;
    if args.dry_run {
        return plan(args, &stop).map(|()| 0);
    }
    let asked = held::ask_long(&args.disk, &Request::Compact, "compacting", &stop)?;
    let done = match asked {
        Some(answer) => Compacted {
            zeroes: held::number(&answer, "zeroes")?,
            before: held::number(&answer, "before")?,
            after: held::number(&answer, "after")?,
        },
        None => idle(args, &stop)?,
    };
    let Compacted { zeroes, before, after } = done;
    let freed = before.saturating_sub(after);
    if args.json {
        output::json(&json!({
            "allocated_before": before,
            "allocated_after": after,
            "freed": freed,
            "zeroes_unmapped": zeroes,
        }))?;
    } else {
        let text = format!(
            "{}: {} given back, {} left ({} of zeroes unmapped)\n",
            args.disk.display(),
            size::human(freed),
            size::human(after),
            size::human(zeroes)
        );
        output::text(&text)?;
    }
    Ok(0)
}

/// Says what would be done.
fn plan(args: &Args, stop: &stop::Stop) -> Result<()> {
    // Whoever has the disk may go on using it: then this is what was so a moment ago.
    let options = OpenOptions { shared: true, ..args.opening.options()? };
    let disk = change::open(&args.disk, &options)?;
    jail::close_on_open_files()?;
    let mut bar: Option<Progress> = None;
    let plan = disk.plan_compact(&mut |done, total| {
        bar.get_or_insert_with(|| Progress::new("looking", total)).at(done);
        !stop.asked()
    })?;
    drop(bar);
    if args.json {
        return output::json(&json!({
            "operation": "compact",
            "dry_run": true,
            "disk": output::path(&args.disk),
            "layers": [{ "file": output::path(&args.disk), "name": null, "fate": "compacted" }],
            "moved": 0,
            "space_needed": 0,
            "allocated_before": plan.before,
            "zeroes_unmapped": plan.zeroes,
            "unused": plan.unused,
            "freed": plan.freed(),
        }));
    }
    output::text(&format!(
        "compact: what is not needed goes back to the host\n  layer      {}: compacted\n  zeroes     \
         {}\n  unused     {}\n  moved      0 B\n  freed      {} of {}\n",
        args.disk.file_name().unwrap_or_default().to_string_lossy(),
        size::human(plan.zeroes),
        size::human(plan.unused),
        size::human(plan.freed()),
        size::human(plan.before),
    ))
}

fn idle(args: &Args, stop: &stop::Stop) -> Result<Compacted> {
    let disk = disk::open(&args.disk, &args.opening.writing())?;
    jail::close_on_changes(&disk)?;
    // What is counted as free is punched: it had better be.
    if disk.head().image.details().is_some() {
        let check = disk.head().image.check(Repair::None)?;
        if check.corruptions > 0 || check.errors > 0 {
            let text = "is corrupt: `vdisk check --repair all` comes first";
            return Err(Error::corrupt(text).at_path(&args.disk));
        }
    }
    let mut bar: Option<Progress> = None;
    disk.compact(&mut |done, total| {
        bar.get_or_insert_with(|| Progress::new("compacting", total)).at(done);
        !stop.asked()
    })
}
