//! Names of files and directories: giving them, taking them away, and making that durable.
//!
//! Nothing here knows what a file holds. That a name is durable is said of each; where it is not,
//! [`sync_directory`] makes it so.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::device::is_device;
use super::maker::maker;
use crate::error::{Error, Result};

/// The most links that are followed for one name, as the kernel has it.
const MAX_LINKS: usize = 40;
/// The most bytes of a file's name.
const NAME_MAX: usize = 255;

/// As much of the beginning of a name as leaves `room` bytes of a file's name for more.
pub fn fitting(name: &str, room: usize) -> &str {
    name.get(..name.floor_char_boundary(NAME_MAX.saturating_sub(room))).unwrap_or_default()
}

/// Names that one rule makes of a file's name: what stands before and behind what differs. Who makes such
/// names and who is to know them again go by the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Form {
    /// What they all begin with.
    pub before: String,
    /// What differs.
    pub differs: Differs,
    /// What they all end with.
    pub behind: String,
}

/// What tells names of one form apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Differs {
    /// That many lower-case hexadecimal digits.
    Digits(usize),
    /// A process and a number, with a hyphen between.
    Numbers,
}

impl Form {
    /// The name with this in the middle.
    pub fn name(&self, middle: &str) -> String {
        format!("{}{middle}{}", self.before, self.behind)
    }

    /// What stands in the middle of a name of this form.
    pub fn middle<'a>(&self, name: &'a [u8]) -> Option<&'a str> {
        let name = std::str::from_utf8(name).ok()?;
        let middle = name.strip_prefix(&self.before)?.strip_suffix(&self.behind)?;
        let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        let fits = match self.differs {
            Differs::Digits(count) => {
                let is_digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
                middle.len() == count && middle.bytes().all(is_digit)
            }
            Differs::Numbers => {
                middle.split_once('-').is_some_and(|(a, b)| is_number(a) && is_number(b))
            }
        };
        fits.then_some(middle)
    }
}

/// The directory that holds `path`.
pub fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Makes the names in the directory of `path` durable.
pub fn sync_directory(path: &Path) -> Result<()> {
    let dir = directory(path);
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(|e| Error::io("could not be synced", e).at_path(dir))
}

/// Renames a file to a name that nobody has; not yet durably.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    refuse_device(to)?;
    maker().rename(from, to).map_err(|e| Error::io("could not be renamed", e).at_path(from))
}

/// The file that a name means: where it is a symbolic link, what that leads to. The directory is
/// left as it is named.
///
/// # Errors
/// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) says where a link leads that leads nowhere.
pub fn follow(path: &Path) -> Result<PathBuf> {
    let mut at = path.to_path_buf();
    let mut left = MAX_LINKS;
    while let Ok(target) = fs::read_link(&at) {
        if left == 0 {
            return Err(Error::io("could not be followed", Errno::ELOOP.into()).at_path(path));
        }
        left -= 1;
        at = at.parent().unwrap_or(Path::new("")).join(target);
    }
    if left == MAX_LINKS {
        return Ok(at);
    }
    let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    match (identity(path), identity(&at)) {
        (Ok(named), Ok(found)) if named == found => Ok(at),
        // What stands in /proc for an open file only looks like a link.
        (Ok(_), _) => Ok(path.to_path_buf()),
        (Err(e), _) => {
            let text = format!("is a link to '{}', which could not be found", at.display());
            Err(Error::io(text, e).at_path(path))
        }
    }
}

/// Gives a file a second name, not yet durably.
pub fn link(from: &Path, to: &Path) -> Result<()> {
    refuse_device(from)?;
    maker().link(from, to).map_err(|e| Error::io("could not be linked", e).at_path(to))
}

/// A device's name is the host's, often in memory only: no file is put there, and none is made of it.
pub(super) fn refuse_device(path: &Path) -> Result<()> {
    if !is_device(path) {
        return Ok(());
    }
    let message = "is a device, and no file takes its place: make a clone of it in a directory, and \
                   do that with the clone";
    Err(Error::unsupported(message).at_path(path))
}

/// Takes a name away from a file, not yet durably.
pub fn remove(path: &Path) -> Result<()> {
    maker().remove(path).map_err(|e| Error::io("could not be removed", e).at_path(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_knows_its_own_names_and_no_others() {
        let of = |differs| Form { before: "web@".into(), differs, behind: ".q".into() };
        let digits = of(Differs::Digits(4));
        assert_eq!(digits.middle(digits.name("09af").as_bytes()), Some("09af"));
        for other in ["web@09ag.q", "web@09a.q", "web@09aff.q", "web@09AF.q", "web@.q", "web@09af"]
        {
            assert_eq!(digits.middle(other.as_bytes()), None, "{other}");
        }
        let numbers = of(Differs::Numbers);
        assert_eq!(numbers.middle(numbers.name("12-3").as_bytes()), Some("12-3"));
        for other in ["web@12.q", "web@-3.q", "web@12-.q", "web@1-2-3.q", "web@1/2-3.q", "web@.q"] {
            assert_eq!(numbers.middle(other.as_bytes()), None, "{other}");
        }
        // What stands before and behind may be all there is, and share nothing.
        let short = Form { before: "aa".into(), differs: Differs::Digits(0), behind: "aa".into() };
        assert_eq!((short.middle(b"aaa"), short.middle(b"aaaa")), (None, Some("")));
    }
}
