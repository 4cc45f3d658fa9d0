//! What a user names to be run: a disk, or an image, of which a clone is run.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use vdisk::change::{Base, roll};
use vdisk::instance::Record;
use vdisk::oci::config::{RunConfig, of_disk};
use vdisk::oci::store::Store;
use vdisk::open::Format;
use vdisk::{Error, ErrorKind, Result};

use crate::cli::image::Which;
use crate::cli::open::options::Opening;

/// A disk, or an image and what is run of it.
pub struct Named {
    /// What is opened: the disk; of an image the clone that is kept, or its topmost layer, which is run
    /// with a throw-away delta.
    pub disk: PathBuf,
    /// The image.
    pub image: Option<Image>,
    store: Option<Store>,
}

/// An image that is run.
pub struct Image {
    /// What the user calls it.
    pub name: PathBuf,
    top: PathBuf,
    kept: bool,
}

impl Named {
    /// What `word` means. Of an image a clone is kept where the instance has a `name`.
    pub fn find(word: &Path, which: &Which, name: Option<&str>) -> Result<Named> {
        let store = which.existing()?;
        let top = which.base(word)?;
        let (Some(of), true) = (&store, top != word) else {
            return Ok(Named { disk: word.to_owned(), image: None, store });
        };
        let disk = name.map_or_else(|| top.clone(), |name| clone_named(of, name));
        let image = Image { name: word.to_owned(), top, kept: name.is_some() };
        Ok(Named { disk, image: Some(image), store })
    }

    /// What the instance of that record runs, whatever `word` means by now.
    pub fn again(word: &Path, which: &Which, record: &Record) -> Result<Named> {
        let store = which.existing()?;
        let disk = PathBuf::from(&record.disk);
        let Some(name) = record.image.as_ref().map(PathBuf::from) else {
            return Ok(Named { disk: word.to_owned(), image: None, store });
        };
        let top = match record.clone {
            true => roll::stands_on(&disk)?.unwrap_or_else(|| disk.clone()),
            false => disk.clone(),
        };
        Ok(Named { disk, image: Some(Image { name, top, kept: record.clone }), store })
    }

    /// Whether all that is written goes when it ends.
    pub fn is_ephemeral(&self) -> bool {
        self.image.as_ref().is_some_and(|image| !image.kept)
    }

    /// The disk, or the image's layer where the clone is not made yet.
    pub fn there(&self) -> &Path {
        match &self.image {
            Some(image) if self.disk.symlink_metadata().is_err() => &image.top,
            _ => &self.disk,
        }
    }

    /// What is run in it, and as whom.
    pub fn config(&self, opening: &Opening) -> Result<RunConfig> {
        if opening.format.is_some_and(|format| format != Format::Qcow2) {
            // What a guest wrote into its disk must not pass for what the disk says of itself.
            return Ok(RunConfig::default());
        }
        of_disk(self.there(), self.store.as_ref())
    }

    /// Makes the clone that is kept, where it is not there; whether it was made.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] where one of that name stands on another image.
    pub fn make(&self, which: &Which) -> Result<bool> {
        let Some(image) = self.image.as_ref().filter(|image| image.kept) else { return Ok(false) };
        let real = |path: &Path| path.canonicalize().ok();
        if self.disk.symlink_metadata().is_ok() {
            let below = roll::stands_on(&self.disk)?;
            let same = below.and_then(|below| real(&below)) == real(&image.top);
            return if same { Ok(false) } else { Err(self.other()) };
        }
        if let Some(dir) = self.disk.parent() {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.map_err(|e| Error::io("cannot be made", e).at_path(dir))?;
        }
        let clones = [self.disk.clone()];
        let base = Base::seal_with(&image.top, &Opening::default().options()?, &clones)?;
        base.with_config(which.config(&image.name)?).clone_all(&clones, &mut |_| true)?;
        Ok(true)
    }

    fn other(&self) -> Error {
        let text = "an instance of that name was made from another image: `vdisk roll --to IMAGE NAME` puts \
                    it on this one, `vdisk start NAME` runs it as it is, and `vdisk rm NAME` removes it";
        Error::new(ErrorKind::Exists, text).at_path(&self.disk)
    }
}

/// The clone that is kept for the instance `name`.
pub fn clone_named(store: &Store, name: &str) -> PathBuf {
    store.dir().join("instances").join(format!("{name}.qcow2"))
}
