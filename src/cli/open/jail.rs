//! The jail that a command works in: how much of one its user wants, and what of a disk is let through.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use clap::ValueEnum;
use vdisk::chain::{Chain, Layer};
use vdisk::control::place;
use vdisk::image::{Id, Label};
use vdisk::jail::{self, Jail, Reach, Work};
use vdisk::open::resolve;
use vdisk::storage::name::directory;
use vdisk::{Error, Result};

static WANTED: OnceLock<Mode> = OnceLock::new();

/// How much of a jail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// All of it, or nothing is done.
    Require,
    /// As much as this host's kernel has.
    Best,
    /// None.
    Off,
}

/// Notes what the command line says.
pub fn keep(mode: Mode) {
    // The command line is parsed once.
    let _ = WANTED.set(mode);
}

fn wanted() -> Mode {
    WANTED.get().copied().unwrap_or(Mode::Best)
}

/// The words that say the same to another process of this program.
pub fn words() -> Vec<OsString> {
    let word = wanted().to_possible_value().map(|value| value.get_name().to_owned());
    word.map(|word| format!("--jail={word}").into()).into_iter().collect()
}

/// Set where this command's jail was closed.
static CLOSED: OnceLock<()> = OnceLock::new();

/// Whether this command is in its jail.
pub fn is_closed() -> bool {
    CLOSED.get().is_some() && wanted() != Mode::Off
}

/// Closes a jail for this command, and says once where it is not whole. A command that is said again, since
/// another was at work on its disk, is in it already.
pub fn close(jail: Jail) -> Result<()> {
    if CLOSED.set(()).is_err() {
        return Ok(());
    }
    let mode = match wanted() {
        Mode::Require => jail::Mode::Require,
        Mode::Best => jail::Mode::Best,
        Mode::Off => jail::Mode::Off,
    };
    if let Some(missing) = jail.close(mode)?.missing {
        eprintln!("vdisk: warning: the jail around this command is not whole: {missing}");
    }
    Ok(())
}

/// Refuses to work without a jail where the user wants one, and says why there is none.
pub fn refuse(why: &str) -> Result<()> {
    if wanted() != Mode::Require {
        return Ok(());
    }
    let text = format!("the jail that was asked for cannot be had: {why}");
    Err(Error::unsupported(text))
}

/// Closes a jail for a command that needs no file from now on but those that are open.
pub fn close_on_open_files() -> Result<()> {
    close(Jail::new(Work::Command))
}

/// Closes a jail for a command that needs no file from now on but those of an open disk, which it changes.
pub fn close_on_changes(chain: &Chain) -> Result<()> {
    let mut jail = Jail::new(Work::Command);
    change(&mut jail, chain);
    close(jail)
}

/// Lets through what may be opened of a disk: read only or, where `held` says that its tree may change
/// meanwhile, for that, and with the sockets at which commands ask for it.
pub fn disk(jail: &mut Jail, chain: &Chain, held: bool) -> Result<()> {
    if !held {
        chain.all_layers().iter().for_each(|layer| admit(jail, layer, false));
        return Ok(());
    }
    change(jail, chain);
    jail.reach(&place::directory()?, Reach::Sockets);
    Ok(())
}

/// Lets through what a change of the disk's own files may open, and reads of its bases.
pub fn change(jail: &mut Jail, chain: &Chain) {
    let layers = chain.all_layers();
    let own = layers.first().and_then(disk_of);
    for (depth, layer) in layers.iter().enumerate() {
        // Bases are other disks', and are not written.
        let is_own = depth == 0 || own.is_some() && disk_of(layer) == own;
        admit(jail, layer, is_own);
        clones_of(layer).iter().for_each(|dir| jail.reach(dir, Reach::Read));
    }
}

fn disk_of(layer: &Layer) -> Option<Id> {
    layer.image.identity().ok()?.label.map(|label| label.disk)
}

/// Lets a layer be opened by its name, or changed there.
pub fn admit(jail: &mut Jail, layer: &Layer, write: bool) {
    let data = layer.image.details().and_then(|details| details.data_file);
    let data = data.and_then(|name| resolve(&layer.path, &name).ok());
    for path in [Some(layer.path.clone()), data].into_iter().flatten() {
        let full = fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
        if full.is_file() {
            let reach = if write { Reach::Change } else { Reach::Read };
            jail.reach(directory(&full), reach);
            jail.reach(directory(&path), reach);
        } else {
            // A device: what stands beside it are the host's other devices. Who looks for files of the
            // disk's there finds none.
            jail.reach(directory(&full), Reach::List);
            jail.reach(&full, if write { Reach::Write } else { Reach::Read });
        }
    }
}

fn clones_of(layer: &Layer) -> Vec<PathBuf> {
    let label = layer.image.identity().ok().and_then(|identity| identity.label);
    clones_in(label.as_ref(), &layer.path)
}

/// The directories in which clones were made on the layer at `path`: who merges it looks whether they are
/// there still.
pub fn clones_in(label: Option<&Label>, path: &Path) -> Vec<PathBuf> {
    let clones = label.and_then(|label| label.clones.as_ref());
    let places = clones.map(|clones| clones.places.clone());
    let dir = directory(path);
    let named = places.unwrap_or_default().into_iter().filter(|place| !place.path.is_empty());
    let mut dirs: Vec<PathBuf> =
        named.map(|place| directory(&dir.join(place.path)).to_path_buf()).collect();
    dirs.sort();
    dirs.dedup();
    dirs
}

/// Lets a socket's file be removed where it is.
pub fn socket(jail: &mut Jail, path: &Path) {
    jail.reach(directory(path), Reach::Remove);
}
