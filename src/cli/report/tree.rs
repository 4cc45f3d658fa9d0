//! `vdisk tree`: bases, clones and snapshots with their sizes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;
use serde_json::{Value, json};
use vdisk::Result;
use vdisk::family::forest::{Node, forest, measure, trees_of};
use vdisk::image::Role;
use vdisk::open::Format;

use crate::cli::open::rest::Rest;
use crate::cli::report::picture::rows::{self, Row};
use crate::cli::report::picture::tree::{Facts, svg};
use crate::cli::report::picture::{dot, plain};
use crate::cli::terminal::{output, size};

/// Show what stands on what.
///
/// ON HOST is what a file takes; EXCLUSIVE the data in it that nothing on it shows, and that would be
/// gone with it. A disk that can be written has a full dot.
#[derive(ClapArgs)]
pub struct Args {
    /// A disk, or a directory of disks.
    disk: PathBuf,
    /// As JSON.
    #[arg(long)]
    json: bool,
    /// As a graph for graphviz.
    #[arg(long, conflicts_with = "json")]
    dot: bool,
    /// As an SVG picture.
    #[arg(long, conflicts_with_all = ["json", "dot"])]
    svg: bool,
}

/// The colours of the pictures, with what they mean.
const LEGEND: [(&str, &str); 4] = [
    ("#3b7dd8", "base, frozen"),
    ("#3f9c5a", "snapshot, frozen"),
    ("#e8743b", "disk"),
    ("#a7b0ba", "dropped or missing"),
];

pub fn run(args: &Args) -> Result<u8> {
    // Which files stand on which is what is looked for: any is read, and none written.
    Rest::new().read(Path::new("/")).close()?;
    let mut trees = if args.disk.is_dir() {
        forest(std::slice::from_ref(&args.disk))?
    } else {
        trees_of(&args.disk)?
    };
    measure(&mut trees);
    let here = Here::of(&args.disk);
    if args.json {
        let trees = trees.iter().map(|node| value(node, &here)).collect();
        output::text(&format!("{}\n", Value::Array(trees)))?;
        return Ok(0);
    }
    let rows = rows::of(&trees);
    let facts: Vec<Facts> = rows.iter().map(|row| facts(row.node, &here)).collect();
    output::text(&match (args.svg, args.dot) {
        (true, _) => svg(&rows, &facts, &LEGEND),
        (_, true) => graph(&rows, &facts),
        _ => text(&rows, &facts),
    })?;
    Ok(0)
}

/// The file that the user named.
struct Here(Option<(u64, u64)>);

impl Here {
    fn of(path: &Path) -> Here {
        Here(fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino())))
    }

    fn is(&self, node: &Node) -> bool {
        self.0.is_some() && Here::of(&node.path).0 == self.0
    }
}

/// Names longer than this do not move the columns of all others.
const NAME: usize = 48;

fn text(rows: &[Row<'_>], facts: &[Facts]) -> String {
    let names: Vec<String> = rows.iter().zip(facts).map(|(row, fact)| named(row, fact)).collect();
    let width = |text: &String| text.chars().count();
    let wide = names.iter().map(width).filter(|w| *w <= NAME).max().unwrap_or(0).max(12);
    let kinds = facts.iter().map(|f| f.kind.len()).max().unwrap_or(0);
    let known = |bytes: Option<u64>| bytes.map_or("-".to_owned(), size::human);
    let mut out = format!(
        "{:wide$}  {:kinds$}  {:>9}  {:>9}  {:>9}\n",
        "NAME", "KIND", "SIZE", "ON HOST", "EXCLUSIVE"
    );
    for (name, fact) in names.iter().zip(facts) {
        let host = fact.allocated.map_or("missing".to_owned(), size::human);
        let (size, exclusive) = (known(fact.size), known(fact.exclusive));
        let here = if fact.here { "  <- here" } else { "" };
        let pad = " ".repeat(wide.saturating_sub(width(name)));
        let kind = fact.kind;
        out += &format!("{name}{pad}  {kind:kinds$}  {size:>9}  {host:>9}  {exclusive:>9}{here}\n");
    }
    out
}

fn named(row: &Row<'_>, fact: &Facts) -> String {
    let frozen = row.node.label().is_some_and(|l| l.role != Role::Head);
    format!("{}{} {}", row.lead, if frozen { '○' } else { '●' }, plain(&fact.name))
}

fn graph(rows: &[Row<'_>], facts: &[Facts]) -> String {
    let mut graph = dot::Graph::new("vdisk");
    for (number, fact) in facts.iter().enumerate() {
        let host = fact.allocated.map_or("missing".to_owned(), |b| size::human(b) + " on host");
        let exclusive = fact.exclusive.map(|b| format!("{} exclusive", size::human(b)));
        let sizes = [fact.size.map(size::human), Some(host), exclusive];
        let sizes: Vec<String> = sizes.into_iter().flatten().collect();
        let lines = [fact.name.clone(), fact.kind.to_owned(), sizes.join(", ")];
        // Paler than a dot: a text stands on it.
        let fill = format!("{}40", fact.colour);
        graph.node(number, &dot::Box { lines: &lines, fill: &fill, strong: fact.here });
    }
    for (number, row) in rows.iter().enumerate() {
        if let Some(parent) = row.parent {
            graph.edge(parent, number);
        }
    }
    graph.finish()
}

fn facts(node: &Node, here: &Here) -> Facts {
    let file = node.path.file_name().unwrap_or_default().to_string_lossy();
    let name = match node.snapshot() {
        Some(name) => {
            let disk = file.rsplit_once('@').map_or(&*file, |(disk, _)| disk);
            format!("{name} ({disk})")
        }
        None => file.into_owned(),
    };
    let [base, snapshot, disk, gone] = LEGEND.map(|(colour, _)| colour);
    let colour = match node.label().map(|l| l.role) {
        _ if node.allocated.is_none() => gone,
        Some(Role::Dropped | Role::Dropping | Role::Returning) => gone,
        Some(Role::Head) => disk,
        Some(Role::Base) => base,
        Some(_) => snapshot,
        None if node.children.is_empty() => disk,
        None => base,
    };
    Facts {
        name,
        kind: kind(node),
        colour,
        size: node.peek.as_ref().map(|peek| peek.size),
        allocated: node.allocated,
        exclusive: node.exclusive,
        here: here.is(node),
    }
}

fn kind(node: &Node) -> &'static str {
    match node.label().map(|l| l.role) {
        Some(Role::Base) => "base",
        Some(Role::Snapshot) => "snapshot",
        Some(Role::Merging | Role::Leaving | Role::Rising) => "being merged",
        Some(Role::Dropped | Role::Dropping | Role::Returning) => "dropped, kept for undo",
        Some(Role::Unnamed) => "shared layer",
        Some(Role::Head) => match node.peek.as_ref().and_then(|p| p.identity.backing.as_ref()) {
            Some(_) => "delta",
            None => "disk",
        },
        None if node.peek.is_some() => "qcow2",
        None => node.declared().map_or("raw", Format::name),
    }
}

fn value(node: &Node, here: &Here) -> Value {
    json!({
        "file": output::path(&node.path),
        "kind": kind(node),
        "snapshot": node.snapshot(),
        "virtual_size": node.peek.as_ref().map(|p| p.size),
        "allocated_size": node.allocated,
        "exclusive": node.exclusive,
        "here": here.is(node),
        "children": node.children.iter().map(|n| value(n, here)).collect::<Vec<_>>(),
    })
}
