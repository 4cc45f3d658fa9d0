//! The jail that a command works in: how much of one its user wants, and what of a disk is let through.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use clap::ValueEnum;
use vdisk::chain::{Chain, Layer};
use vdisk::control::place;
use vdisk::family::own;
use vdisk::image::{Id, Label};
use vdisk::jail::broker::{Broker, Grants, May, Told};
use vdisk::jail::{self, Jail, Reach, Work};
use vdisk::open::resolve;
use vdisk::storage::follow;
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

impl Mode {
    fn of_jail(self) -> jail::Mode {
        match self {
            Mode::Require => jail::Mode::Require,
            Mode::Best => jail::Mode::Best,
            Mode::Off => jail::Mode::Off,
        }
    }
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
    close_untold(jail)?.iter().for_each(|missing| tell(missing));
    Ok(())
}

/// The same for a process that works for another, which says what of the jail is missing.
pub fn close_untold(jail: Jail) -> Result<Option<String>> {
    if CLOSED.set(()).is_err() {
        return Ok(None);
    }
    Ok(jail.close(wanted().of_jail())?.missing)
}

/// Says once what of a jail is missing.
pub fn tell(missing: &str) {
    static TOLD: OnceLock<()> = OnceLock::new();
    if TOLD.set(()).is_ok() {
        eprintln!("vdisk: warning: the jail around this command is not whole: {missing}");
    }
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
    let reach = if write { Reach::Change } else { Reach::Read };
    for path in files_of(layer) {
        admit_file(jail, &path, reach, write);
    }
}

/// The file of a layer, and that of its data where that is another.
fn files_of(layer: &Layer) -> Vec<PathBuf> {
    let data = layer.image.details().and_then(|details| details.data_file);
    let data = data.and_then(|name| resolve(&layer.path, &name).ok());
    std::iter::once(layer.path.clone()).chain(data).collect()
}

/// Lets through the directory of a file, or a device itself; whether it is a file.
fn admit_file(jail: &mut Jail, path: &Path, beside: Reach, write: bool) -> bool {
    let full = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let is_file = full.is_file();
    if is_file {
        jail.reach(directory(&full), beside);
        jail.reach(directory(path), beside);
    } else {
        // A device: what stands beside it are the host's other devices. Who looks for files of the
        // disk's there finds none.
        jail.reach(directory(&full), Reach::List);
        jail.reach(&full, if write { Reach::Write } else { Reach::Read });
    }
    is_file
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

/// Starts the broker of a server that is to be jailed, where it may have to change its disk's files by name:
/// first of all, before a disk is opened. It is given to [`Around::new`].
pub fn broker(changes: bool) -> Result<Option<Broker>> {
    if !changes || wanted() == Mode::Off {
        return Ok(None);
    }
    Broker::start().map(Some)
}

/// A jail around a server of disks that is not closed yet, and the broker beside it.
pub struct Around {
    jail: Jail,
    broker: Option<Broker>,
    grants: Grants,
}

impl Around {
    /// Nothing is let through yet.
    pub fn new(work: Work, broker: Option<Broker>) -> Around {
        Around { jail: Jail::new(work), broker, grants: Grants::default() }
    }

    /// As [`Jail::reach`].
    pub fn reach(&mut self, path: &Path, reach: Reach) {
        self.jail.reach(path, reach);
    }

    /// As [`disk`], but what a change of a held disk opens for writing, makes and removes is the broker's.
    pub fn disk(&mut self, chain: &Chain, held: bool) -> Result<()> {
        if !held || self.broker.is_none() {
            return disk(&mut self.jail, chain, held);
        }
        let layers = chain.all_layers();
        let disk = layers.first().and_then(disk_of);
        let mut files: Vec<Vec<PathBuf>> = Vec::new();
        for (depth, layer) in layers.iter().enumerate() {
            let is_own = depth == 0 || disk.is_some() && disk_of(layer) == disk;
            let mut of_layer = files_of(layer);
            of_layer.retain(|path| admit_file(&mut self.jail, path, Reach::Read, is_own));
            let is_file = of_layer.first() == Some(&layer.path);
            // The tree of a disk on a device does not change: nothing takes a device's place.
            let has_tree = depth == 0 || !files.is_empty();
            files.extend((is_own && is_file && has_tree).then_some(of_layer));
            clones_of(layer).iter().for_each(|dir| self.jail.reach(dir, Reach::Read));
        }
        self.grant(&files)?;
        self.jail.reach(&place::directory()?, Reach::Sockets);
        Ok(())
    }

    /// Makes what is a disk's the broker's: of `files`, those of each layer that says it is the disk's, the
    /// head first, what has its name from the disk.
    fn grant(&mut self, files: &[Vec<PathBuf>]) -> Result<()> {
        let layers = files.iter().map(|files| files.first().map(|path| follow(path)).transpose());
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let Some(Some(head)) = layers.first() else { return Ok(()) };
        let below: Vec<PathBuf> = layers.iter().skip(1).flatten().cloned().collect();
        let own = own(head, &below)?;
        for (layer, files) in layers.iter().zip(files) {
            let is_own = layer.as_ref().is_some_and(|layer| own.has(layer));
            // What holds a layer's data is only ever written.
            for data in files.iter().skip(1).filter(|_| is_own) {
                self.grants.file(&follow(data)?, May::Write)?;
            }
        }
        let dir = directory(&own.head);
        own.names.iter().try_for_each(|name| self.grants.file(&dir.join(name), May::All))?;
        self.grants.forms(dir, own.forms, own.others)
    }

    /// Lets a socket's file be removed where it is.
    pub fn socket(&mut self, path: &Path) -> Result<()> {
        if self.broker.is_none() {
            self.jail.reach(directory(path), Reach::Remove);
            return Ok(());
        }
        self.jail.reach(directory(path), Reach::List);
        self.grants.file(path, May::Remove)
    }

    /// Closes it, and the broker its own. What the storage does to files by name is the broker's from then on.
    pub fn close(self) -> Result<()> {
        let Around { jail, broker, grants } = self;
        let broker = broker.filter(|_| !grants.is_empty());
        let told = broker.map(|broker| broker.tell(grants, wanted().of_jail())).transpose()?;
        close(jail)?;
        told.map_or(Ok(()), Told::take_over)
    }
}
