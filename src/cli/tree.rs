//! `vdisk tree`: bases, clones and snapshots with their sizes.

use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;
use serde_json::{Value, json};
use vdisk::Result;
use vdisk::chain::forest::{Node, forest, trees_of};
use vdisk::image::Role;

use super::size;

/// Show what stands on what.
#[derive(ClapArgs)]
pub struct Args {
    /// A disk, or a directory of disks.
    disk: PathBuf,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<u8> {
    let trees = if args.disk.is_dir() {
        forest(std::slice::from_ref(&args.disk))?
    } else {
        trees_of(&args.disk)?
    };
    if args.json {
        println!("{}", Value::Array(trees.iter().map(|n| value(n, &args.disk)).collect()));
        return Ok(0);
    }
    for tree in &trees {
        print(tree, &args.disk, "", "", "");
    }
    Ok(0)
}

/// Prints a node, its own line behind `lead` and `branch`, its children's behind `lead` and `below`.
fn print(node: &Node, here: &Path, lead: &str, branch: &str, below: &str) {
    println!("{lead}{branch}{}", line(node, here));
    let lead = format!("{lead}{below}");
    for (number, child) in node.children.iter().enumerate() {
        let last = number + 1 == node.children.len();
        let (branch, below) = if last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        print(child, here, &lead, branch, below);
    }
}

fn line(node: &Node, here: &Path) -> String {
    let file = node.path.file_name().unwrap_or_default().to_string_lossy();
    let mut text = match node.snapshot() {
        Some(name) => {
            let disk = file.rsplit_once('@').map_or(&*file, |(disk, _)| disk);
            format!("{name} (snapshot of {disk}")
        }
        None => format!("{file} ({}", kind(node)),
    };
    if let Some(peek) = &node.peek {
        text += &format!(", {}", size::human(peek.size));
    }
    match node.allocated {
        Some(bytes) => text += &format!(", {} on the host)", size::human(bytes)),
        None => text += ", missing)",
    }
    if is_here(node, here) {
        text += "  <- here";
    }
    text
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
        None => "raw",
    }
}

fn is_here(node: &Node, here: &Path) -> bool {
    match (node.path.canonicalize(), here.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

fn value(node: &Node, here: &Path) -> Value {
    json!({
        "file": node.path,
        "kind": kind(node),
        "snapshot": node.snapshot(),
        "virtual_size": node.peek.as_ref().map(|p| p.size),
        "allocated_size": node.allocated,
        "here": is_here(node, here),
        "children": node.children.iter().map(|n| value(n, here)).collect::<Vec<_>>(),
    })
}
