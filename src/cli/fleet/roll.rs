//! `vdisk roll`: instances put anew on another image, batch by batch, and back.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args as ClapArgs;
use vdisk::Result;

use super::health::Health;
use super::many;
use super::report::{self, Outcome, Row};
use super::target::{self, Target};
use super::work::{Goal, Work};
use crate::cli::image::Which;
use crate::cli::open::turn;
use crate::cli::snapshot::{KeepingArgs, PlanArgs};
use crate::cli::terminal::{ask, stop};

/// Put instances anew on another image, or bring them back
///
/// Each instance whose name fits a GLOB (`'web-*'`; quote it) is stopped, its clone made anew on IMAGE, and
/// it is started again as it was; one that does not run stays stopped. Its name, its options and its id stay.
/// What its program runs is what IMAGE says, unless it was started with a command of its own. What it has
/// written is not in the new clone: it is kept aside for a week (--keep-for), or until the host needs the
/// space, and --keep NAME keeps it as a snapshot for good.
///
/// They are rolled one after the other, or so many at a time as --batch says. With --health, each is asked
/// how it is once it runs. When one fails no further batch is begun: those that are done stay on IMAGE, the
/// others are what they were. The same command goes on where the last one stopped or was interrupted,
/// whenever that was, and --back undoes it.
///
/// An instance that runs on a disk of the user's is rolled if that is a clone; IMAGE may be a base disk then.
#[derive(ClapArgs)]
#[command(group = clap::ArgGroup::new("where").required(true))]
pub struct Args {
    /// The image to put them on; for clones of disks, an image or a base disk.
    #[arg(long, value_name = "IMAGE", group = "where")]
    to: Option<PathBuf>,
    /// Bring back what they were before the last roll, with all that they had written. What they have
    /// written since is dropped, or kept with --keep.
    #[arg(long, group = "where")]
    back: bool,
    /// Names of instances, with *, ? and [a-z] for what may differ.
    #[arg(value_name = "GLOB", required = true)]
    globs: Vec<String>,
    /// Keep what each has written as a snapshot of this name of its disk.
    #[arg(long, value_name = "NAME")]
    keep: Option<String>,
    #[command(flatten)]
    keeping: KeepingArgs,
    /// How many at a time.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Ask each how it is with a shell command, run on this host, once it runs: again until its exit status
    /// is 0. Its environment has VDISK_INSTANCE (the name), VDISK_ID, VDISK_PID (the process that holds the
    /// disk and runs it), VDISK_KIND (container, machine), VDISK_DISK, VDISK_IMAGE and VDISK (this program):
    /// --health '"$VDISK" exec "$VDISK_INSTANCE" test -e /run/ready'
    #[arg(long, value_name = "CMD")]
    health: Option<String>,
    /// Seconds until it must be 0.
    #[arg(long, value_name = "S", default_value = "30", value_parser = turn::seconds, requires = "health")]
    health_timeout: Duration,
    /// Seconds until an instance that does not stop is ended.
    #[arg(short, long, value_name = "S", default_value = "10", value_parser = turn::seconds)]
    time: Duration,
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    store: Which,
}

/// Rolls them.
pub fn run(args: &Args) -> Result<u8> {
    let goal = match &args.to {
        Some(image) => Goal::to(image, &args.store)?,
        None => Goal::Back,
    };
    let work = Work {
        goal,
        keep: args.keep.clone(),
        keeping: args.keeping.keeping()?,
        patience: args.time,
        health: args.health.clone().map(|command| Health { command, within: args.health_timeout }),
    };
    let targets = target::find(&args.globs, &args.store)?;
    // What cannot be done is said before anything is.
    let planned = targets.iter().map(|target| work.plan(target)).collect::<Result<Vec<_>>>()?;
    let mut rows: Vec<Row> =
        targets.iter().zip(planned).map(|(target, intent)| Row::new(target, intent)).collect();
    if args.plan.dry_run {
        report::show(&rows, args.back, &args.plan)?;
        return Ok(0);
    }
    if let Some(loss) = report::loss(&rows, args.back, args.keep.is_some()) {
        ask::confirm(&loss, args.plan.yes)?;
    }
    carry_out(&work, &targets, &mut rows, args)?;
    if args.plan.json {
        report::show(&rows, args.back, &args.plan)?;
    }
    report::failure(&rows, &args.globs, args.back).map_or(Ok(0), Err)
}

/// Batch by batch, until one fails or the user asks to stop.
fn carry_out(work: &Work, targets: &[Target], rows: &mut [Row], args: &Args) -> Result<()> {
    let asked = stop::on_signals()?;
    let batch = args.batch as usize;
    for (targets, rows) in targets.chunks(batch).zip(rows.chunks_mut(batch)) {
        if asked.asked() {
            break;
        }
        let one = |number: usize| {
            let done = targets.get(number).map_or(Ok(()), |target| work.carry_out(target));
            if let (Ok(()), Some(target), false) = (&done, targets.get(number), args.plan.json) {
                eprintln!("{}: {}", target.name, work.goal.words());
            }
            done
        };
        // Where several are asked for at a time, the user knows what his host can do.
        let at_once = batch.min(many::processors().max(64));
        let done = many::in_parallel(targets.len(), at_once, &|| asked.asked(), &one);
        let mut failed = false;
        for (row, done) in rows.iter_mut().zip(done) {
            failed |= matches!(done, Some(Err(_)));
            row.outcome = done.map_or(Outcome::NotBegun, Outcome::from);
        }
        if failed {
            break;
        }
    }
    Ok(())
}
