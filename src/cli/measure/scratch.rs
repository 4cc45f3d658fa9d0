//! A directory for what is measured, and clones in it: they go with it, and leave no word in their base.

use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use vdisk::{Error, Result};

use super::Args;
use super::disk::{Question, Used, VERB};
use crate::cli::inside::Inside;

/// The directory, and the process in a jail that makes and reads the clones in it.
pub struct Scratch {
    inside: Inside,
    dir: Dir,
}

/// A directory that goes when this is dropped.
struct Dir(PathBuf);

impl Scratch {
    /// A directory for clones of the disk that is to be measured.
    ///
    /// # Errors
    /// Where that cannot be read, or somebody writes to it.
    pub fn new(args: &Args) -> Result<Scratch> {
        let dir = std::env::temp_dir().join(format!("vdisk-measure-{}", uuid::Uuid::new_v4()));
        let made = DirBuilder::new().mode(0o700).create(&dir);
        made.map_err(|e| Error::io("cannot be made", e).at_path(&dir))?;
        let dir = Dir(dir);
        let mut words: Vec<OsString> = vec!["--scratch".into(), dir.0.clone().into()];
        words.extend(args.opening.words());
        words.extend(args.moment.words());
        words.extend(args.store.words());
        words.extend(["--".into(), args.disk.clone().into()]);
        Ok(Scratch { inside: Inside::start(VERB, words)?, dir })
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.0.join(name)
    }

    /// What is run in the disk: its configuration's words.
    pub fn command(&self) -> Result<Vec<String>> {
        self.inside.ask(&Question::Command)
    }

    /// A new clone in it.
    pub fn clone(&self, name: &str) -> Result<PathBuf> {
        let () = self.inside.ask(&Question::Clone(name.to_owned()))?;
        Ok(self.path(name))
    }

    /// What a clone in it holds and shows.
    pub fn used(&self, name: &str) -> Result<Used> {
        self.inside.ask(&Question::Used(name.to_owned()))
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // Best effort: it holds nothing that anybody wants.
        let _ = fs::remove_dir_all(&self.0);
    }
}
