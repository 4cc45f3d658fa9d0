//! How a command opens the disk that it names: what the user says of it, which its contents are not
//! asked then. One set of options for all verbs.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;
use vdisk::change::snapshot;
use vdisk::open;
use vdisk::open::{Format, OpenOptions};
use vdisk::{Error, Result};

use crate::cli::open::disk::Use;
use crate::cli::open::{memory, passphrase};

/// What the user says of a disk.
#[derive(ClapArgs, Debug, Clone, Default, PartialEq, Eq)]
pub struct Opening {
    /// The disk's format: raw, qcow2, ... Without it the contents tell, which a guest may have written
    #[arg(long, value_name = "F", value_parser = parse)]
    pub format: Option<Format>,
    #[command(flatten)]
    pub links: Links,
}

/// What the user says of the files that a disk names.
#[derive(ClapArgs, Debug, Clone, Default, PartialEq, Eq)]
pub struct Links {
    /// Open what the disk names as its base or its data also outside its directory
    #[arg(long)]
    pub follow: bool,
}

/// Which moment of a disk is looked at.
#[derive(ClapArgs, Debug, Clone, Default)]
pub struct Moment {
    /// Look at the disk as it was at snapshot NAME
    #[arg(long, value_name = "NAME")]
    pub snapshot: Option<String>,
}

/// Parses the name of a format.
pub fn parse(name: &str) -> std::result::Result<Format, String> {
    Format::from_name(name).map_err(|e| e.message().to_owned())
}

impl Moment {
    /// The snapshot's name.
    pub fn name(&self) -> Option<&str> {
        self.snapshot.as_deref()
    }

    /// The words that say the same to another process of this program.
    pub fn words(&self) -> Vec<OsString> {
        self.snapshot.iter().map(|name| format!("--snapshot={name}").into()).collect()
    }
}

impl Opening {
    /// `using`, with what the user says.
    pub fn with<'a>(&self, using: Use<'a>) -> Use<'a> {
        Use { format: self.format, follow: self.links.follow, ..using }
    }

    /// For reading, at a moment.
    pub fn reading<'a>(&self, moment: &'a Moment) -> Use<'a> {
        self.with(Use { snapshot: moment.name(), ..Use::reading() })
    }

    /// For reading and writing.
    pub fn writing(&self) -> Use<'static> {
        self.with(Use::writing())
    }

    /// The file to look at: the disk's, or that of its snapshot at `moment`; and the options for it.
    pub fn file_at(&self, disk: &Path, moment: &Moment) -> Result<(PathBuf, OpenOptions)> {
        let options = self.options()?;
        let Some(name) = moment.name() else { return Ok((disk.to_path_buf(), options)) };
        let layer = snapshot::layer_of(disk, name, options.format)?;
        Ok((layer, OpenOptions { format: Some(Format::Qcow2), ..options }))
    }

    /// The library's options, as far as the user says them.
    pub fn options(&self) -> Result<OpenOptions> {
        options(self.format, self.links.follow)
    }

    /// Lets all that this command does with `disk`, whose layers are qcow2, go by what the user says.
    /// Only for commands that open no other disk.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](vdisk::ErrorKind::Invalid) for a disk of another format, which has no
    /// layers.
    pub fn govern(&self, disk: &Path) -> Result<()> {
        self.refuse_flat(disk)?;
        if self.links.follow || self.format.is_some() {
            open::follow_links();
        }
        Ok(())
    }

    /// `using`, with what the user says, for a process that holds the disk and no other: what is done
    /// to the disk meanwhile goes by it, too.
    pub fn holding<'a>(&self, using: Use<'a>) -> Use<'a> {
        if self.links.follow || self.format.is_some() {
            open::follow_links();
        }
        self.with(using)
    }

    /// Refuses what the user says to be no qcow2 image.
    pub fn refuse_flat(&self, disk: &Path) -> Result<()> {
        let Some(format) = self.format else { return Ok(()) };
        if format != Format::Qcow2 {
            let message = format!("a {format} disk has no layers: no base, and no snapshots");
            return Err(Error::invalid(message).at_path(disk));
        }
        match open::peek(disk)? {
            Some(_) => Ok(()),
            None => Err(Error::corrupt("is no qcow2 image").at_path(disk)),
        }
    }

    /// The words that say the same to another process of this program.
    pub fn words(&self) -> Vec<OsString> {
        let format = self.format.map(|format| format!("--format={format}").into());
        let follow = self.links.follow.then(|| "--follow".into());
        format.into_iter().chain(follow).collect()
    }
}

/// The library's options for a disk of which the user says this. Whoever says its format knows it,
/// and what it names.
pub fn options(format: Option<Format>, follow: bool) -> Result<OpenOptions> {
    let defaults = OpenOptions::default();
    Ok(OpenOptions {
        format,
        follow: defaults.follow || follow || format.is_some(),
        passphrase: passphrase::given()?,
        cache: memory::given()?,
        ..defaults
    })
}
