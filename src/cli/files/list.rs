//! `vdisk ls` and `vdisk cat`.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Write as _;

use serde_json::{Value, json};
use vdisk::filesystem::ext4::mounted::{Attributes, Mounted};
use vdisk::filesystem::{path, tree};
use vdisk::{Error, Result};

use super::target::in_disk;
use super::{BLOCK, CHARACTER, DIRECTORY, FIFO, LINK, PIECE, REGULAR, SOCKET, TYPE, Which};
use crate::cli::open::jail;
use crate::cli::terminal::output;

/// List the files in a directory of a disk
#[derive(clap::Args)]
pub struct ListArgs {
    /// The disk and the path in it: DISK:PATH
    #[arg(value_name = "DISK:PATH")]
    target: OsString,
    /// Say type, permissions, owner, size and time too
    #[arg(long, short)]
    long: bool,
    /// List what is below directories too
    #[arg(long, short = 'R')]
    recursive: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    which: Which,
}

/// Print files in a disk
#[derive(clap::Args)]
pub struct CatArgs {
    /// The disk and the path in it: DISK:PATH
    #[arg(value_name = "DISK:PATH", required = true)]
    targets: Vec<OsString>,
    #[command(flatten)]
    which: Which,
}

struct Row {
    path: Vec<u8>,
    known: Attributes,
    target: Option<Vec<u8>>,
}

/// Runs `vdisk ls`.
pub fn run(args: &ListArgs) -> Result<u8> {
    let (disk, at) = in_disk(&args.target)?;
    let chain = args.which.disk(&disk, false)?;
    jail::close_on_open_files()?;
    let fs = args.which.files(chain, &disk, false)?;
    let rows = rows(&fs, &at, args.recursive).map_err(|e| e.at_path(&disk))?;
    if args.json {
        let rows: Vec<Value> = rows.iter().map(row).collect();
        output::json(&json!({ "files": rows }))?;
    } else {
        let line = |row: &Row| if args.long { long(row) } else { short(row) };
        output::text(&rows.iter().map(line).collect::<String>())?;
    }
    Ok(0)
}

fn rows(fs: &Mounted, at: &[u8], recursive: bool) -> Result<Vec<Row>> {
    let start = path::file(fs, at, true)?;
    let mut rows = Vec::new();
    if start.mode & TYPE != DIRECTORY {
        let known = path::file(fs, at, false)?;
        rows.push(describe(fs, at.to_vec(), known)?);
        return Ok(rows);
    }
    let mut left = vec![(Vec::new(), start.inode)];
    // A damaged file system may have circles.
    let mut seen = std::collections::HashSet::from([start.inode]);
    while let Some((prefix, directory)) = left.pop() {
        let mut below = Vec::new();
        let mut found = Vec::new();
        for name in tree::names(fs, directory)? {
            let known = fs.attributes(name.1)?;
            let path = [prefix.as_slice(), &name.0].concat();
            let is_directory = known.mode & TYPE == DIRECTORY;
            if recursive && is_directory && seen.insert(name.1) {
                below.push(([path.as_slice(), b"/"].concat(), name.1));
            }
            found.push(describe(fs, path, known)?);
        }
        found.sort_by(|one, other| one.path.cmp(&other.path));
        rows.append(&mut found);
        below.sort_by(|one, other| other.0.cmp(&one.0));
        left.append(&mut below);
    }
    Ok(rows)
}

fn describe(fs: &Mounted, path: Vec<u8>, known: Attributes) -> Result<Row> {
    let link = known.mode & TYPE == LINK;
    let target = if link { Some(fs.read_link(known.inode)?) } else { None };
    Ok(Row { path, known, target })
}

fn letter(mode: u16) -> char {
    match mode & TYPE {
        FIFO => 'p',
        CHARACTER => 'c',
        DIRECTORY => 'd',
        BLOCK => 'b',
        REGULAR => '-',
        LINK => 'l',
        SOCKET => 's',
        _ => '?',
    }
}

fn type_name(mode: u16) -> &'static str {
    match mode & TYPE {
        FIFO => "fifo",
        CHARACTER => "character_device",
        DIRECTORY => "directory",
        BLOCK => "block_device",
        REGULAR => "file",
        LINK => "symlink",
        SOCKET => "socket",
        _ => "unknown",
    }
}

/// `rwxr-xr-x`, with the marks of set-user-id, set-group-id and sticky.
fn permissions(mode: u16) -> String {
    let mut text = String::new();
    for (shift, special, mark) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift & 7;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (false, true) => 'x',
            (false, false) => '-',
            (true, true) => mark,
            (true, false) => mark.to_ascii_uppercase(),
        });
    }
    text
}

fn shown(bytes: &[u8]) -> String {
    crate::cli::snapshot::shown(bytes)
}

fn short(row: &Row) -> String {
    shown(&row.path) + "\n"
}

fn long(row: &Row) -> String {
    let known = &row.known;
    let size = match known.mode & TYPE {
        BLOCK | CHARACTER => format!("{}, {}", known.device.0, known.device.1),
        _ => known.size.to_string(),
    };
    let time = jiff::Timestamp::from_second(known.modified.0).map_or_else(
        |_| known.modified.0.to_string(),
        |time| time.strftime("%Y-%m-%d %H:%M:%S").to_string(),
    );
    let mut text = format!(
        "{}{} {:>3} {:>5} {:>5} {size:>12} {time} {}",
        letter(known.mode),
        permissions(known.mode),
        known.links,
        known.uid,
        known.gid,
        shown(&row.path)
    );
    if let Some(target) = &row.target {
        let _ = write!(text, " -> {}", shown(target));
    }
    text + "\n"
}

fn row(row: &Row) -> Value {
    let known = &row.known;
    json!({
        "path": String::from_utf8_lossy(&row.path),
        "type": type_name(known.mode),
        "mode": format!("{:04o}", known.mode & 0o7777),
        "uid": known.uid,
        "gid": known.gid,
        "size": known.size,
        "links": known.links,
        "inode": known.inode,
        "modified": known.modified.0,
        "target": row.target.as_ref().map(|target| String::from_utf8_lossy(target)),
    })
}

/// Runs `vdisk cat`.
pub fn cat(args: &CatArgs) -> Result<u8> {
    let mut out = std::io::stdout().lock();
    let open = |word| {
        let (disk, at) = in_disk(word)?;
        Ok((args.which.disk(&disk, false)?, disk, at))
    };
    let targets = args.targets.iter().map(open).collect::<Result<Vec<_>>>()?;
    jail::close_on_open_files()?;
    for (chain, disk, at) in targets {
        let fs = args.which.files(chain, &disk, false)?;
        let known = path::file(&fs, &at, true).map_err(|e| e.at_path(&disk))?;
        let mut buf = vec![0; PIECE];
        let mut offset = 0;
        loop {
            let len = fs.read(known.inode, offset, &mut buf).map_err(|e| e.at_path(&disk))?;
            if len == 0 {
                break;
            }
            let piece = buf.get(..len).unwrap_or_default();
            out.write_all(piece).map_err(|e| Error::io("cannot write to standard output", e))?;
            offset += len as u64;
        }
    }
    out.flush().map_err(|e| Error::io("cannot write to standard output", e))?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::permissions;

    #[test]
    fn permissions_are_written_as_ls_writes_them() {
        assert_eq!(permissions(0o4755), "rwsr-xr-x");
        assert_eq!(permissions(0o2644), "rw-r-Sr--");
        assert_eq!(permissions(0o1777), "rwxrwxrwt");
    }
}
