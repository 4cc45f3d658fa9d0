//! `DISK:PATH`: which part of a word is the disk.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use vdisk::{Error, Result};

/// What a word names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A file of the host.
    Host(PathBuf),
    /// A file in a disk.
    Disk {
        /// The disk.
        disk: PathBuf,
        /// The path in it.
        path: Vec<u8>,
    },
}

/// Reads a word: a disk is what stands before a colon and is there.
pub fn parse(word: &OsStr) -> Target {
    let bytes = word.as_bytes();
    let colons = bytes.iter().enumerate().filter(|(_, byte)| **byte == b':').map(|(at, _)| at);
    for at in colons {
        let (disk, path) = bytes.split_at(at);
        let disk = Path::new(OsStr::from_bytes(disk));
        // A socket or a directory is no disk; a block device is one.
        if disk.metadata().is_ok_and(|meta| !meta.is_dir()) {
            return Target::Disk { disk: disk.into(), path: path.get(1..).unwrap_or(b"").to_vec() };
        }
    }
    Target::Host(word.into())
}

/// Whether a word names a file in a disk, and not a file of the host.
pub fn is_in_disk(word: &OsStr) -> bool {
    disk_of(word).is_some()
}

/// The disk in which a word names a file.
pub fn disk_of(word: &OsStr) -> Option<PathBuf> {
    match parse(word) {
        Target::Disk { disk, .. } if !Path::new(word).exists() => Some(disk),
        _ => None,
    }
}

/// The disk and the path of a word that has to name a file in a disk.
pub fn in_disk(word: &OsString) -> Result<(PathBuf, Vec<u8>)> {
    match parse(word) {
        Target::Disk { disk, path } => Ok((disk, path)),
        Target::Host(path) => {
            let shown = path.display();
            let text = format!("{shown} does not name a file in a disk that is there: DISK:PATH");
            Err(Error::invalid(text))
        }
    }
}

/// The last name of a path; empty where it ends in a directory without one.
pub fn last_name(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |at| at + 1);
    let path = path.get(..end).unwrap_or_default();
    let start = path.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
    match path.get(start..).unwrap_or_default() {
        b"." | b".." => b"",
        name => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_what_is_there_before_a_colon() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("a:b.q");
        std::fs::write(&disk, "").unwrap();
        let word = OsString::from(format!("{}:/etc/x:y", disk.display()));
        assert_eq!(in_disk(&word).unwrap(), (disk, b"/etc/x:y".to_vec()));
        assert_eq!(parse(OsStr::new("/no/such:x")), Target::Host("/no/such:x".into()));
    }

    #[test]
    fn the_last_name_is_what_a_copy_is_called() {
        for (path, name) in [("/etc/x", "x"), ("x/", "x"), ("/", ""), ("a/.", ""), ("..", "")] {
            assert_eq!(last_name(path.as_bytes()), name.as_bytes());
        }
    }
}
