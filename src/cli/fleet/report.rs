//! What a roll does to each instance, for people and for programs.

use serde_json::{Value, json};
use vdisk::{Error, ErrorKind, Result};

use super::disk::Planned;
use super::target::Target;
use super::work::Intent;
use crate::cli::snapshot::{PlanArgs, time};
use crate::cli::terminal::{output, size};

/// One instance.
pub struct Row {
    name: String,
    id: Option<String>,
    disk: String,
    state: &'static str,
    lives: bool,
    intent: Intent,
    /// What became of it.
    pub outcome: Outcome,
}

/// What became of an instance.
pub enum Outcome {
    NotBegun,
    Done,
    Failed(Error),
}

impl From<Result<()>> for Outcome {
    fn from(done: Result<()>) -> Outcome {
        done.map_or_else(Outcome::Failed, |()| Outcome::Done)
    }
}

impl Outcome {
    fn word(&self) -> &'static str {
        match self {
            Outcome::NotBegun => "not begun",
            Outcome::Done => "done",
            Outcome::Failed(_) => "failed",
        }
    }
}

impl Row {
    /// What is about to be done to an instance.
    pub fn new(target: &Target, intent: Intent) -> Row {
        let record = target.record.as_ref();
        Row {
            name: target.name.clone(),
            id: record.map(|record| record.id.clone()),
            disk: output::path(&target.disk),
            state: record.map_or("no record", |record| record.phase.word()),
            lives: record.is_some_and(|record| record.lives()),
            intent,
            outcome: Outcome::NotBegun,
        }
    }

    /// What is done to it, in a few words.
    fn words(&self, back: bool) -> String {
        let plan = match &self.intent.plan {
            None if self.intent.starts => return "started again".to_owned(),
            None if back => return "nothing to bring back".to_owned(),
            None => return "there already".to_owned(),
            Some(plan) => plan,
        };
        let what = if back { "brought back" } else { "made anew" };
        let then = if self.intent.starts { "started again" } else { "stays stopped" };
        format!("{what}, {then}; {}", fate(plan))
    }

    fn value(&self, dry_run: bool) -> Value {
        let plan = self.intent.plan.as_ref();
        let until = plan.and_then(|plan| plan.until);
        let error = match &self.outcome {
            Outcome::Failed(error) => Some(error.to_string()),
            _ => None,
        };
        json!({
            "name": self.name,
            "id": self.id,
            "disk": self.disk,
            "state": self.state,
            "changes": plan.is_some(),
            "starts": self.intent.starts,
            "dropped": plan.map_or(0, |plan| plan.dropped),
            "kept": plan.map_or(0, |plan| plan.kept),
            "until_ms": until,
            "result": if dry_run { "planned" } else { self.outcome.word() },
            "error": error,
        })
    }
}

/// What becomes of what it has written.
fn fate(plan: &Planned) -> String {
    let bytes = size::human(plan.dropped);
    match plan.until {
        _ if plan.dropped == 0 => "nothing is dropped".to_owned(),
        Some(end) => format!("{bytes} are kept aside until {}", time(end)),
        None => format!("{bytes} are dropped"),
    }
}

/// Shows what is or would be done.
pub fn show(rows: &[Row], back: bool, how: &PlanArgs) -> Result<()> {
    if how.json {
        let all: Vec<Value> = rows.iter().map(|row| row.value(how.dry_run)).collect();
        let operation = if back { "roll back" } else { "roll" };
        return output::json(
            &json!({ "operation": operation, "dry_run": how.dry_run, "instances": all }),
        );
    }
    let line = |row: &Row| format!("{} ({}): {}\n", row.name, row.state, row.words(back));
    output::text(&rows.iter().map(line).collect::<String>())
}

/// What the user loses, or would have to bring back; nothing where it is all kept as snapshots.
pub fn loss(rows: &[Row], back: bool, kept: bool) -> Option<String> {
    if kept {
        return None;
    }
    // What runs writes meanwhile.
    let loses =
        |row: &&Row| row.intent.plan.as_ref().is_some_and(|plan| plan.dropped > 0 || row.lives);
    let losing: Vec<&Row> = rows.iter().filter(loses).collect();
    let first = losing.first()?;
    let plans = || losing.iter().filter_map(|row| row.intent.plan.as_ref());
    let bytes = plans().fold(0, |sum: u64, plan| sum.saturating_add(plan.dropped));
    let bytes = size::human(bytes);
    let whom = match losing.len() {
        1 => first.name.clone(),
        count => format!("{count} instances"),
    };
    let since = if back { "since the roll" } else { "in its clone" };
    let since = if losing.len() > 1 && !back { "in their clones" } else { since };
    let until = plans().find_map(|plan| plan.until);
    let aside = match until {
        Some(end) => {
            format!(" (kept aside until {}: `vdisk roll --back` brings it back)", time(end))
        }
        None => String::new(),
    };
    Some(format!("what {whom} wrote {since}, {bytes} so far, will be dropped{aside}"))
}

/// What has failed, and how the others are.
pub fn failure(rows: &[Row], globs: &[String], back: bool) -> Option<Error> {
    let count = |word: &str| rows.iter().filter(|row| row.outcome.word() == word).count();
    if count("done") == rows.len() {
        return None;
    }
    let mut failed = rows.iter().filter_map(|row| match &row.outcome {
        Outcome::Failed(error) => Some((&row.name, error)),
        _ => None,
    });
    let first = failed.next();
    for (name, error) in failed {
        eprintln!("vdisk: {name}: {error}");
    }
    let what = match first {
        Some((name, error)) => format!("{name}: {error}"),
        None => "interrupted".to_owned(),
    };
    let globs: Vec<String> = globs.iter().map(|glob| format!("'{glob}'")).collect();
    let next = match back {
        true => "the same command goes on".to_owned(),
        false => {
            let globs = globs.join(" ");
            format!(
                "the same command goes on, and `vdisk roll --back {globs}` brings back what was"
            )
        }
    };
    let (done, rest) = (count("done"), count("not begun"));
    let text = format!("{what}. {done} are done, {rest} were not begun: {next}");
    // One that is busy is not the whole command, which would be said again.
    let kind = first.map_or(ErrorKind::Interrupted, |(_, error)| error.kind());
    let kind = if kind == ErrorKind::Busy { ErrorKind::InUse } else { kind };
    Some(Error::new(kind, text))
}
