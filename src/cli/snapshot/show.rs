//! What a change of the tree will do, for people and for programs.

use std::fmt::Write;

use serde_json::{Value, json};
use vdisk::change::plan::{Direction, Method, Plan, Undoable};
use vdisk::change::snapshot::KeptAside;

use super::time;
use crate::cli::terminal::output;
use crate::cli::terminal::size::human;

/// What it means that the head has no bitmaps any more.
const LOST_BITMAPS: &str = "the next backup is a full one";

/// The plan in some lines.
pub fn text(plan: &Plan) -> String {
    let mut out = String::new();
    let what = plan.snapshot.as_ref().map(|name| format!(" '{name}'")).unwrap_or_default();
    let _ = writeln!(out, "{}{what}: {}", plan.operation.name(), plan.why);
    if let (Some(direction), Some(method)) = (plan.direction, plan.method) {
        let _ = writeln!(out, "  direction  {}, {}", direction_name(direction), how(method));
    }
    for layer in &plan.layers {
        let file = layer.path.file_name().unwrap_or_default().to_string_lossy();
        let name = layer.name.as_ref().map(|n| format!(" ({n})")).unwrap_or_default();
        let _ = writeln!(out, "  layer      {file}{name}: {}", layer.fate.words());
    }
    let sizes = [
        ("dropped", plan.dropped),
        ("moved", plan.moved),
        ("linked", plan.linked),
        ("needed", plan.space),
        ("kept", plan.kept),
        ("freed", plan.freed),
        ("exclusive", plan.share.exclusive),
        ("shared", plan.share.shared),
    ];
    for (word, bytes) in sizes {
        let _ = writeln!(out, "  {word:<10} {}", human(bytes));
    }
    if let Some(kept) = &plan.forgets {
        let _ = writeln!(
            out,
            "  forgets    what the {} had kept aside, {}",
            kept.what,
            human(kept.bytes)
        );
    }
    if !plan.bitmaps.is_empty() {
        let _ = writeln!(out, "  bitmaps    {}: {LOST_BITMAPS}", plan.bitmaps.join(", "));
    }
    let _ = match &plan.undo {
        Undoable::Until(end) => writeln!(out, "  undo       until {}", time(*end)),
        Undoable::NotNeeded => writeln!(out, "  undo       nothing is lost"),
        Undoable::No(why) => writeln!(out, "  undo       no: {why}"),
    };
    out
}

/// The plan as JSON; sizes are in bytes.
pub fn value(plan: &Plan, dry_run: bool) -> Value {
    let layers: Vec<Value> = plan
        .layers
        .iter()
        .map(|l| json!({ "file": output::path(&l.path), "name": l.name, "fate": l.fate.words() }))
        .collect();
    let undo = match &plan.undo {
        Undoable::Until(end) => json!({ "possible": true, "until_ms": end }),
        Undoable::NotNeeded => json!({ "possible": false, "reason": "nothing is lost" }),
        Undoable::No(why) => json!({ "possible": false, "reason": why }),
    };
    json!({
        "operation": plan.operation.name(),
        "dry_run": dry_run,
        "disk": output::path(&plan.disk),
        "snapshot": plan.snapshot,
        "snapshots": plan.snapshots,
        "layers": layers,
        "direction": plan.direction.map(direction_name),
        "method": plan.method.map(method_name),
        "why": plan.why,
        "dropped": plan.dropped,
        "moved": plan.moved,
        "linked": plan.linked,
        "space_needed": plan.space,
        "kept": plan.kept,
        "freed": plan.freed,
        "exclusive": plan.share.exclusive,
        "shared": plan.share.shared,
        "undo": undo,
        "bitmaps_lost": plan.bitmaps,
        "forgets": plan.forgets.as_ref().map(|k| json!({ "what": k.what, "bytes": k.bytes })),
    })
}

fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Up => "up",
        Direction::Down => "down",
    }
}

fn method_name(method: Method) -> &'static str {
    match method {
        Method::Copy => "copy",
        Method::Share => "share",
        Method::Batches => "batches",
    }
}

fn how(method: Method) -> &'static str {
    match method {
        Method::Copy => "copying",
        Method::Share => "sharing the host's space",
        Method::Batches => "copying in batches that are given back at once",
    }
}

/// What the user would lose; `None` where that is nothing.
pub fn loss(plan: &Plan) -> Option<String> {
    use vdisk::change::plan::Operation;
    if !matches!(plan.operation, Operation::Delete | Operation::Revert | Operation::Undo) {
        return None;
    }
    let with = (plan.operation == Operation::Delete && !plan.snapshots.is_empty())
        .then(|| format!(", and with them the snapshots {}", plan.snapshots.join(", ")));
    let bitmaps = (!plan.bitmaps.is_empty()).then(|| format!("; {}", lost_bitmaps(plan)));
    if plan.dropped == 0 && with.is_none() && bitmaps.is_none() {
        return None;
    }
    let mut loss = format!("{} of changes will be dropped", human(plan.dropped));
    loss += &with.unwrap_or_default();
    loss += &bitmaps.unwrap_or_default();
    if let Undoable::Until(end) = plan.undo {
        let _ = write!(loss, " (`vdisk snapshot undo` brings them back until {})", time(end));
    }
    Some(loss)
}

/// What becomes of bitmaps that the head does not have afterwards.
pub fn lost_bitmaps(plan: &Plan) -> String {
    format!("the disk has no bitmaps any more ({}), {LOST_BITMAPS}", plan.bitmaps.join(", "))
}

/// What is kept aside, in one line.
pub fn kept_text(kept: &KeptAside) -> String {
    format!(
        "kept aside for undo: the {}, {}, until {}",
        kept.what,
        human(kept.bytes),
        time(kept.until)
    )
}

/// What is kept aside, as JSON.
pub fn kept_value(kept: &KeptAside) -> Value {
    json!({
        "what": kept.what,
        "since_ms": kept.since,
        "until_ms": kept.until,
        "size": kept.bytes,
        "snapshots": kept.snapshots,
        "files": kept.files.iter().map(output::path).collect::<Vec<_>>(),
    })
}
