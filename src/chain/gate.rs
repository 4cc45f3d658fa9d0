//! The gate: every file that is named inside an image passes here before it is opened.
//!
//! An image comes from anywhere and may be hostile. The gate refuses names that are not plain
//! paths, formats that are not declared, chains without end and chains too long.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::image::Backing;

/// The most layers of one chain.
pub const MAX_DEPTH: usize = 4096;

/// An image format, by the name that qemu-img gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// The guest's bytes as they are.
    Raw,
    /// A disk behind a LUKS header, encrypted.
    Luks,
    /// VirtualBox's format; only read.
    Vdi,
    /// Hyper-V's format; only read.
    Vhdx,
    /// VMware's formats; only read.
    Vmdk,
    /// Virtual PC's format, VHD; only read.
    Vpc,
}

impl Format {
    /// The format that `name` means.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] names the format that is not known.
    pub fn from_name(name: &str) -> Result<Format> {
        match name {
            "qcow2" => Ok(Format::Qcow2),
            // A device or file is raw whatever protocol driver reads it.
            "raw" | "file" | "host_device" => Ok(Format::Raw),
            "luks" => Ok(Format::Luks),
            "vdi" => Ok(Format::Vdi),
            "vhdx" => Ok(Format::Vhdx),
            "vmdk" => Ok(Format::Vmdk),
            "vpc" => Ok(Format::Vpc),
            other => Err(Error::unsupported(format!("unknown image format '{other}'"))),
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
            Format::Luks => "luks",
            Format::Vdi => "vdi",
            Format::Vhdx => "vhdx",
            Format::Vmdk => "vmdk",
            Format::Vpc => "vpc",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the gate has let through on the way down one chain.
pub(super) struct Gate {
    /// Device and inode number of each layer's file.
    passed: Vec<(u64, u64)>,
}

impl Gate {
    pub fn new() -> Gate {
        Gate { passed: Vec::new() }
    }

    /// Notes the layer at `path`, before it is opened.
    pub fn pass(&mut self, path: &Path) -> Result<()> {
        let meta =
            fs::metadata(path).map_err(|e| Error::io("could not be found", e).at_path(path))?;
        let identity = (meta.dev(), meta.ino());
        if self.passed.contains(&identity) {
            let message = "stands below itself: its backing files form a loop";
            return Err(Error::corrupt(message).at_path(path));
        }
        if self.passed.len() >= MAX_DEPTH {
            let message = format!("the chain has more than {MAX_DEPTH} layers");
            return Err(Error::new(ErrorKind::Denied, message).at_path(path));
        }
        self.passed.push(identity);
        Ok(())
    }

    /// Forgets the layer that passed last: another is opened in its place.
    pub fn turn_back(&mut self) {
        self.passed.pop();
    }
}

/// The path and format of the layer that `child` names as its backing file; no format where the
/// child does not say it and it may be guessed.
pub(super) fn admit(
    child: &Path,
    backing: &Backing,
    may_guess: bool,
) -> Result<(PathBuf, Option<Format>)> {
    let path = resolve(child, &backing.name)?;
    let Some(format) = &backing.format else {
        if may_guess {
            return Ok((path, None));
        }
        let message = format!(
            "names '{}' as its backing file without saying its format, and guessing from contents \
             that a guest may have written is not safe: record the format with `vdisk rebase \
             --unsafe --backing` or `qemu-img rebase -u -b '{}' -F FORMAT`",
            backing.name, backing.name
        );
        return Err(Error::new(ErrorKind::Denied, message).at_path(child));
    };
    let format = Format::from_name(format).map_err(|e| {
        let message = format!("declares its backing file's format: {}", e.message());
        Error::unsupported(message).at_path(child)
    })?;
    Ok((path, Some(format)))
}

/// The path that a backing file's name means: relative to the directory of the image that names it.
pub fn resolve(child: &Path, name: &str) -> Result<PathBuf> {
    resolve_as(child, name, "backing file")
}

/// The path of the file that `child` names as its `what`.
pub(super) fn resolve_as(child: &Path, name: &str, what: &str) -> Result<PathBuf> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    let scheme = name.split('/').next().unwrap_or_default();
    if scheme.contains(':') {
        let message = format!(
            "names '{name}' as its {what}: only paths of files are opened for an image \
             (write './{name}' if it is one)"
        );
        return Err(Error::new(ErrorKind::Denied, message).at_path(child));
    }
    Ok(child.parent().unwrap_or(Path::new("")).join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_relative_to_the_image_and_protocols_are_refused() {
        let child = Path::new("/disks/web.qcow2");
        assert_eq!(resolve(child, "base.qcow2").unwrap(), Path::new("/disks/base.qcow2"));
        assert_eq!(resolve(child, "file:/b").unwrap(), Path::new("/b"));
        assert_eq!(resolve(child, "./a:b").unwrap(), Path::new("/disks/./a:b"));
        for name in ["json:{}", "nbd://host/x", "ssh:/x", "a:b"] {
            assert_eq!(resolve(child, name).unwrap_err().kind(), ErrorKind::Denied, "{name}");
        }
    }
}
