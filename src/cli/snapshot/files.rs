//! `vdisk snapshot diff --files`: the files that differ between two moments of a disk.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Value, json};
use vdisk::block::BlockDevice;
use vdisk::chain::Chain;
use vdisk::copy::diff;
use vdisk::copy::diff::Change;
use vdisk::family::tree::Family;
use vdisk::filesystem::ext4::compare::{Aspect, FileChange, Kind, compare};
use vdisk::filesystem::ext4::{Ext4, Inode, Moments};
use vdisk::filesystem::{self, Found};
use vdisk::{Error, ErrorKind, Result};

use super::live::DiffArgs;
use crate::cli::open::disk::{self, Use};
use crate::cli::open::rest::Rest;
use crate::cli::terminal::{output, stop};

/// Prints which files differ.
pub fn diff(args: &DiffArgs) -> Result<()> {
    Rest::new().disk(&args.disk).close()?;
    let (from, to) = (args.name.as_str(), args.other.as_deref());
    let earlier = open(args, Some(from))?;
    let later = open(args, to).map_err(|e| match (e.kind(), to) {
        (ErrorKind::InUse, None) => {
            let text = format!(
                "{}. While it is written its files are in motion: take a snapshot, and compare \
                 with that",
                e.message()
            );
            Error::new(ErrorKind::InUse, text).at_path(&args.disk)
        }
        _ => e,
    })?;
    let written = diff::diff(&Family::of(&args.disk)?, from, to)?;
    let stop = stop::on_signals()?;
    let asked = || stop.asked();
    let before = file_system(args, &*earlier, &asked)?;
    let after = file_system(args, &*later, &asked)?;
    if before.may_be_behind() || after.may_be_behind() {
        eprintln!(
            "vdisk: warning: {}: was in use and makes fast commits: changes of the last seconds \
             before a snapshot may be missing",
            args.disk.display()
        );
    }
    let moments =
        Moments { before: &before, after: &after, written: &|at, len| overlaps(&written, at, len) };
    let found = compare(&moments).map_err(|e| e.at_path(&args.disk))?;
    if args.json {
        let rows: Vec<Value> = found.iter().map(row).collect();
        output::json(&json!({ "files": rows }))?;
    } else {
        output::text(&found.iter().map(line).collect::<String>())?;
    }
    eprintln!("{}", summary(&found));
    Ok(())
}

fn open(args: &DiffArgs, snapshot: Option<&str>) -> Result<std::sync::Arc<Chain>> {
    disk::open(&args.disk, &Use { snapshot, ..Use::reading() })
}

fn file_system<'d>(
    args: &DiffArgs,
    device: &'d dyn BlockDevice,
    stop: &'d dyn Fn() -> bool,
) -> Result<Ext4<'d>> {
    let found = filesystem::find(device, args.partition).and_then(|found| match found.fs.driver {
        "ext4" => Ok(found),
        _ => {
            let name = found.fs.name;
            Err(Error::unsupported(format!("holds {name}: --files reads ext2, ext3 and ext4")))
        }
    });
    let Found { offset, len, .. } = found.map_err(|e| e.at_path(&args.disk))?;
    let len = if len == 0 { device.size().saturating_sub(offset) } else { len };
    Ext4::open(device, offset, len, stop).map_err(|e| e.at_path(&args.disk))
}

/// Whether anything in the range was written; `changes` are in order.
fn overlaps(changes: &[Change], at: u64, len: u64) -> bool {
    let next = changes.partition_point(|change| change.start + change.len <= at);
    changes.get(next).is_some_and(|change| change.start < at.saturating_add(len))
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Added => "added",
        Kind::Removed => "removed",
        Kind::Renamed => "renamed",
        Kind::Modified => "modified",
        Kind::Attributes => "attributes",
    }
}

fn aspect(aspect: &Aspect) -> &'static str {
    match aspect {
        Aspect::Contents => "contents",
        Aspect::Mode => "mode",
        Aspect::Owner => "owner",
        Aspect::Attributes => "attributes",
        Aspect::Time => "time",
    }
}

/// A path for people: what a terminal would not show as it is, is escaped.
pub fn shown(path: &[u8]) -> String {
    let mut text = String::new();
    for chunk in path.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => text.push_str("\\\\"),
                c if c.is_control() => text.extend(c.escape_default()),
                c => text.push(c),
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

fn line(change: &FileChange) -> String {
    let slash = if is_directory(change) { "/" } else { "" };
    let mut text = format!("{:<10} ", kind(change.kind));
    if let Some(from) = &change.from {
        let _ = write!(text, "{}{slash} -> ", shown(from));
    }
    text += &shown(&change.path);
    if !change.path.ends_with(b"/") {
        text += slash;
    }
    if !change.aspects.is_empty() {
        let words: Vec<&str> = change.aspects.iter().map(aspect).collect();
        let _ = write!(text, " ({})", words.join(", "));
    }
    text + "\n"
}

fn is_directory(change: &FileChange) -> bool {
    change.new.as_ref().or(change.old.as_ref()).is_some_and(Inode::is_directory)
}

fn row(change: &FileChange) -> Value {
    let inode = |inode: &Inode| {
        json!({
            "inode": inode.number,
            "size": inode.size,
            "mode": format!("{:04o}", inode.mode & 0o7777),
            "uid": inode.uid,
            "gid": inode.gid,
            "modified": inode.modified.0,
        })
    };
    let type_name = change.new.as_ref().or(change.old.as_ref()).map(|inode| match inode.kind() {
        0x1000 => "fifo",
        0x2000 => "character_device",
        0x4000 => "directory",
        0x6000 => "block_device",
        0x8000 => "file",
        0xa000 => "symlink",
        0xc000 => "socket",
        _ => "unknown",
    });
    json!({
        "change": kind(change.kind),
        "path": String::from_utf8_lossy(&change.path),
        "from": change.from.as_ref().map(|from| String::from_utf8_lossy(from)),
        "type": type_name,
        "differs": change.aspects.iter().map(aspect).collect::<Vec<_>>(),
        "before": change.old.as_ref().map(inode),
        "after": change.new.as_ref().map(inode),
    })
}

fn summary(found: &[FileChange]) -> String {
    let mut counts: BTreeMap<Kind, usize> = BTreeMap::new();
    found.iter().for_each(|change| *counts.entry(change.kind).or_default() += 1);
    let words: Vec<String> = counts.iter().map(|(k, n)| format!("{n} {}", kind(*k))).collect();
    if words.is_empty() { "no file differs".to_owned() } else { words.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_write_to_the_terminal() {
        assert_eq!(shown(b"/a\x1b[2J\xff\\n\xc3\xa4"), "/a\\u{1b}[2J\\xff\\\\n\u{e4}");
    }

    #[test]
    fn a_range_is_looked_up_among_what_was_written() {
        let changes = [(10, 10), (40, 10)].map(|(start, len)| Change { start, len, zero: false });
        let hit = |at, len| overlaps(&changes, at, len);
        assert!(hit(0, 11) && hit(19, 1) && hit(5, 100) && hit(49, 1));
        assert!(!hit(0, 10) && !hit(20, 20) && !hit(50, 9));
    }
}
