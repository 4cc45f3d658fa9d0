//! `vdisk ps` and `vdisk inspect`: which instances there are, and all that is known of one.

use clap::Args as ClapArgs;
use vdisk::Result;
use vdisk::instance::{Kind, Phase, Record, now, place};

use crate::cli::terminal::output;

/// List the containers and virtual machines that run as instances
///
/// Instances are what was started with --name, --detach, --rm or --restart, by this user.
#[derive(ClapArgs)]
pub struct PsArgs {
    /// Also those that have ended.
    #[arg(short, long)]
    all: bool,
    /// Print JSON: as `vdisk inspect`.
    #[arg(long)]
    json: bool,
    /// Print ids only.
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
}

/// Show all that is known of an instance, as JSON
#[derive(ClapArgs)]
pub struct InspectArgs {
    /// Instances: names, ids or their first digits, or disks.
    #[arg(value_name = "N", required = true)]
    instances: Vec<String>,
}

pub fn ps(args: &PsArgs) -> Result<u8> {
    let mut all = place::list()?;
    all.retain(|record| args.all || record.lives());
    if args.json {
        output::json(&all)?;
    } else if args.quiet {
        output::text(&all.iter().map(|record| format!("{}\n", record.id)).collect::<String>())?;
    } else {
        output::text(&table(&all))?;
    }
    Ok(0)
}

pub fn inspect(args: &InspectArgs) -> Result<u8> {
    let found = args.instances.iter().map(|word| place::find(word)).collect::<Result<Vec<_>>>()?;
    output::json(&found).map(|()| 0)
}

fn table(all: &[Record]) -> String {
    let head = ["ID", "NAME", "KIND", "STATE", "DISK", "COMMAND"].map(str::to_owned);
    let rows: Vec<[String; 6]> = std::iter::once(head).chain(all.iter().map(row)).collect();
    let mut widths = [0; 6];
    for row in &rows {
        for (width, field) in widths.iter_mut().zip(row) {
            *width = (*width).max(field.chars().count());
        }
    }
    let line = |row: &[String; 6]| {
        let fields = row.iter().zip(widths).map(|(field, width)| format!("{field:<width$}"));
        format!("{}\n", fields.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn row(record: &Record) -> [String; 6] {
    let kind = match record.kind {
        Kind::Container => "container",
        Kind::Machine => "machine",
    };
    let disk = record.image.clone().unwrap_or_else(|| record.disk.clone());
    let command: String = record.command.join(" ").chars().map(shown).take(40).collect();
    let words = [&record.id, &record.name, kind, &state(record), &disk, &command];
    words.map(str::to_owned)
}

/// What would change the terminal is not shown as it is.
fn shown(c: char) -> char {
    if c.is_control() { ' ' } else { c }
}

fn state(record: &Record) -> String {
    let word = record.phase.word();
    let since = |at: Option<u64>| age(now().saturating_sub(at.unwrap_or(record.created)));
    match record.phase {
        Phase::Exited => {
            let status = record.status.map_or("?".to_owned(), |status| status.to_string());
            format!("{word} ({status}) {} ago", since(record.ended))
        }
        Phase::Running | Phase::Paused => format!("{word} {}", since(record.started)),
        _ => word.to_owned(),
    }
}

/// A time for people.
fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}
