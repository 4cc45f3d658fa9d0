//! The kernel's table of mounts: a mount namespace's mountinfo (proc_pid_mountinfo(5)), read
//! without touching any of the mounts. It knows no disk and no container.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `major:minor` of the file system's device.
    pub device: String,
    /// What part of the file system is mounted: the path in it.
    pub root: PathBuf,
    /// Where it stands.
    pub point: PathBuf,
    /// The file system's type, with a subtype after a dot.
    pub kind: String,
    /// What was mounted.
    pub source: OsString,
    /// The options of the file system, joined by commas.
    pub options: String,
}

/// The mounts of a mountinfo file in the order in which they were made: of two at the same place,
/// the later one is on top.
///
/// # Errors
/// What reading the file returned.
pub fn read(file: &Path) -> io::Result<Vec<Mount>> {
    Ok(fs::read(file)?.split(|b| *b == b'\n').filter_map(parse).collect())
}

/// The mounts that the calling thread sees.
///
/// # Errors
/// As [`read`].
pub fn here() -> io::Result<Vec<Mount>> {
    read(Path::new("/proc/thread-self/mountinfo"))
}

/// `ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAG...] - TYPE SOURCE SUPER`
fn parse(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|b| *b == b' ');
    let device = String::from_utf8(words.nth(2)?.to_vec()).ok()?;
    let root = unescape(words.next()?).into();
    let point = unescape(words.next()?).into();
    words.by_ref().find(|word| *word == b"-")?;
    let kind = String::from_utf8(words.next()?.to_vec()).ok()?;
    let source = unescape(words.next()?);
    let options = String::from_utf8(words.next()?.to_vec()).ok()?;
    Some(Mount { device, root, point, kind, source, options })
}

/// The kernel writes blanks and backslashes as three octal digits.
fn unescape(word: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| *first == b'\\');
        let code = octal.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn a_line_with_tags_and_escaped_blanks_is_read() {
        let line =
            br"36 35 98:0 /r\040t /mnt\040two rw,noatime master:1 - fuse.vdisk /a\134b rw,nodev";
        let mount = parse(line).unwrap();
        assert_eq!(mount.device, "98:0");
        assert_eq!(mount.root, Path::new("/r t"));
        assert_eq!(mount.point, Path::new("/mnt two"));
        assert_eq!(mount.kind, "fuse.vdisk");
        assert_eq!(mount.source.as_bytes(), br"/a\b");
        assert_eq!(mount.options, "rw,nodev");
        assert_eq!(parse(b"36 35 98:0 / /x rw"), None);
    }
}
