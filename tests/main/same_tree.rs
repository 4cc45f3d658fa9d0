//! Everything that a tree of files shows, as lines that can be compared.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;

use crate::same_calls::{Side, digest, told};

/// The names of a file's extended attributes, in order.
pub fn xattr_names(path: &Path) -> rustix::io::Result<Vec<String>> {
    let mut list = [0u8; 65536];
    let len = rustix::fs::llistxattr(path, &mut list[..])?;
    let names = list[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut names: Vec<_> = names.map(|name| String::from_utf8_lossy(name).into_owned()).collect();
    names.sort();
    Ok(names)
}

/// Everything that a tree shows, one line for each name.
pub fn tree(root: &Path, started: i64) -> Vec<String> {
    let mut lines = Vec::new();
    let mut links = HashMap::new();
    walk(root, Path::new(""), started, &mut lines, &mut links);
    lines
}

fn walk(
    root: &Path,
    at: &Path,
    started: i64,
    lines: &mut Vec<String>,
    links: &mut HashMap<u64, PathBuf>,
) {
    let full = root.join(at);
    let side = Side::new(root, started);
    let meta = match fs::symlink_metadata(&full) {
        Ok(meta) => meta,
        Err(error) => return lines.push(format!("{}: {error}", at.display())),
    };
    let mut line = format!("{}: {}", at.display(), side.stat(&meta));
    if !meta.is_dir() {
        let first = links.entry(meta.ino()).or_insert_with(|| at.to_owned());
        line += &format!(" ={}", first.display());
    }
    for name in xattr_names(&full).unwrap_or_default() {
        let mut value = [0u8; 4096];
        let value = rustix::fs::lgetxattr(&full, name.as_str(), &mut value[..])
            .map(|len| value[..len].to_vec());
        line += &format!(" {name}={}", told(value.map(|value| digest(&value))));
    }
    if meta.is_symlink() {
        line += &format!(" -> {:?}", fs::read_link(&full));
    } else if meta.is_file() {
        line += &contents(&full);
    }
    lines.push(line);
    if meta.is_dir() {
        let mut names: Vec<_> = match fs::read_dir(&full) {
            Ok(entries) => entries.flatten().map(|entry| entry.file_name()).collect(),
            Err(error) => return lines.push(format!("{}: {error}", at.display())),
        };
        names.sort();
        for name in names {
            walk(root, &at.join(name), started, lines, links);
        }
    }
}

/// A file's bytes and where its holes are.
fn contents(path: &Path) -> String {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) => return format!(" {error}"),
    };
    let (mut at, mut holes) = (0, String::new());
    while let Ok(data) = rustix::fs::seek(&file, SeekFrom::Data(at)) {
        let Ok(hole) = rustix::fs::seek(&file, SeekFrom::Hole(data)) else { break };
        holes += &format!(" {data}-{hole}");
        at = hole;
    }
    let _ = rustix::fs::seek(&file, SeekFrom::Start(0));
    let mut bytes = Vec::new();
    match io::Read::read_to_end(&mut &file, &mut bytes) {
        Ok(_) => format!(" {}{holes}", digest(&bytes)),
        Err(error) => format!(" {error}"),
    }
}
