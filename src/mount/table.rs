//! The kernel's table of mounts: one namespace's /proc/PID/mountinfo, read without touching
//! any of the mounts.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

use crate::storage::loopdev;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `major:minor` of the file system's device.
    pub device: String,
    /// Where it stands.
    pub point: PathBuf,
    /// The file system's type, with a subtype after a dot.
    pub kind: String,
    /// What was mounted.
    pub source: OsString,
}

/// A mount of vdisk's, with the device number (`major:minor`) that tells it from all others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A disk as a file, on a FUSE connection.
    Raw(String),
    /// The file system in a disk, on a loop device. The file system's own number may be an
    /// anonymous one (btrfs).
    Files(String),
}

impl Kind {
    /// The device number.
    pub fn device(&self) -> &str {
        match self {
            Kind::Raw(device) | Kind::Files(device) => device,
        }
    }
}

impl Mount {
    /// What the mount is to vdisk; `None` where somebody else made it.
    pub fn ours(&self) -> Option<Kind> {
        if self.kind == format!("fuse.{}", vdisk_fuse::server::SUBTYPE) {
            return Some(Kind::Raw(self.device.clone()));
        }
        let number: u32 = self.source.to_str()?.strip_prefix("/dev/loop")?.parse().ok()?;
        let name = loopdev::name_of(Path::new(&self.source)).ok()??;
        (name == super::LOOP_NAME).then(|| Kind::Files(format!("7:{number}")))
    }
}

/// Lets go of the copies of vdisk's mounts that this thread's mount namespace was given when it
/// was made, all but what stands at `keep`. Elsewhere they stay; but as long as any namespace
/// holds a mount, its disk is not free.
///
/// To be called only in a namespace of the caller's own.
pub fn drop_copies(keep: &Path) {
    for mount in read(Path::new("/proc/thread-self/mountinfo")).iter().rev() {
        if mount.point != keep && mount.ours().is_some() {
            // What cannot be let go of only makes somebody's umount wait.
            let _ = umount2(&mount.point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
    }
}

/// The mounts of a mountinfo file in their order, a later one on top of an earlier one at the
/// same place; empty where the file cannot be read.
pub fn read(file: &Path) -> Vec<Mount> {
    let text = fs::read(file).unwrap_or_default();
    text.split(|b| *b == b'\n').filter_map(parse).collect()
}

/// The topmost mount that stands exactly at `point`, in this process's namespace.
pub fn at(point: &Path) -> Option<Mount> {
    read(Path::new("/proc/thread-self/mountinfo")).into_iter().rfind(|mount| mount.point == point)
}

/// `ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAG...] - TYPE SOURCE SUPER`, proc(5).
fn parse(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|b| *b == b' ');
    let device = String::from_utf8(words.nth(2)?.to_vec()).ok()?;
    let point = unescape(words.nth(1)?);
    words.by_ref().find(|word| *word == b"-")?;
    let kind = String::from_utf8(words.next()?.to_vec()).ok()?;
    let source = unescape(words.next()?);
    Some(Mount { device, point: point.into(), kind, source })
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
        let line = br"36 35 98:0 /mnt1 /mnt\040two rw,noatime master:1 - fuse.vdisk /a\134b rw";
        let mount = parse(line).unwrap();
        assert_eq!(mount.device, "98:0");
        assert_eq!(mount.point, Path::new("/mnt two"));
        assert_eq!(mount.kind, "fuse.vdisk");
        assert_eq!(mount.source.as_bytes(), br"/a\b");
        assert_eq!(parse(b"36 35 98:0 / /x rw"), None);
    }
}
