//! The names of the formats, as QEMU and the images themselves say them.
//!
//! What an image of a format is made of, the format's own file knows.

use std::fmt;

use crate::error::{Error, Result};

/// An image format, by the name that qemu-img gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// The guest's bytes as they are.
    Raw,
    /// A disk behind a LUKS header, encrypted.
    Luks,
    /// Parallels' format; only read.
    Parallels,
    /// qcow2's predecessor; only read.
    Qcow,
    /// QEMU's format between qcow2's versions; only read.
    Qed,
    /// VirtualBox's format; a chain only reads it.
    Vdi,
    /// Hyper-V's format; a chain only reads it.
    Vhdx,
    /// VMware's formats; a chain only reads it.
    Vmdk,
    /// Virtual PC's format, VHD; a chain only reads it.
    Vpc,
}

/// Formats that QEMU reads and this engine does not.
const NOT_READ: [&str; 4] = ["bochs", "cloop", "dmg", "vvfat"];

impl Format {
    /// The format that `name` means.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) names the format that is not known.
    pub fn from_name(name: &str) -> Result<Format> {
        match name {
            "qcow2" => Ok(Format::Qcow2),
            // A device or file is raw whatever protocol driver reads it.
            "raw" | "file" | "host_device" => Ok(Format::Raw),
            "luks" => Ok(Format::Luks),
            "parallels" => Ok(Format::Parallels),
            "qcow" => Ok(Format::Qcow),
            "qed" => Ok(Format::Qed),
            "vdi" => Ok(Format::Vdi),
            "vhdx" => Ok(Format::Vhdx),
            "vmdk" => Ok(Format::Vmdk),
            "vpc" => Ok(Format::Vpc),
            other if NOT_READ.contains(&other) => Err(Error::unsupported(format!(
                "images of format '{other}' are not read: convert it with `qemu-img convert -f {other} \
                 -O qcow2`"
            ))),
            other => Err(Error::unsupported(format!("unknown image format '{other}'"))),
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
            Format::Luks => "luks",
            Format::Parallels => "parallels",
            Format::Qcow => "qcow",
            Format::Qed => "qed",
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
