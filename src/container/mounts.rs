//! The mount table of this process: proc_pid_mountinfo(5), read.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One mount.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// What part of the file system is mounted: the path in it.
    pub(super) root: PathBuf,
    /// Where.
    pub(super) point: PathBuf,
    /// The file system's kind.
    pub(super) kind: String,
    /// The options of the file system, joined by commas.
    pub(super) options: String,
}

/// All mounts that this process can see, in the order in which they were made.
pub(super) fn table() -> io::Result<Vec<Entry>> {
    Ok(fs::read_to_string("/proc/self/mountinfo")?.lines().filter_map(parse).collect())
}

/// `36 35 98:0 /root /point rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn parse(line: &str) -> Option<Entry> {
    let (mount, system) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(3);
    let mut system = system.split(' ');
    Some(Entry {
        root: unescape(mount.next()?),
        point: unescape(mount.next()?),
        kind: system.next()?.to_owned(),
        options: system.nth(1)?.to_owned(),
    })
}

/// The kernel writes a blank, a tab, a newline and a backslash as `\` and three octal digits.
fn unescape(field: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let escaped = after.get(..3).and_then(|d| std::str::from_utf8(d).ok());
        match escaped.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_with_its_escapes() {
        let line =
            r"29 23 0:26 /a\134b /mnt/a\040b rw,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate";
        let entry = parse(line).unwrap();
        assert_eq!(entry.root, PathBuf::from(r"/a\b"));
        assert_eq!(entry.point, PathBuf::from("/mnt/a b"));
        assert_eq!((entry.kind.as_str(), entry.options.as_str()), ("cgroup2", "rw,nsdelegate"));
        assert!(parse("29 23 0:26 /").is_none());
    }
}
