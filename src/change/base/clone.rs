//! Linked clones: an empty delta on a base, which is sealed from then on.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::chain::{Chain, Layer};
use crate::change::base::marks::{self, Clone};
use crate::change::heal;
use crate::change::run::layer::{delta_options, refuse_encrypted, unprotected};
use crate::error::{Error, ErrorKind, Result};
use crate::family::clones_of;
use crate::family::standing::{Standing, list};
use crate::image::{Backing, Id, Identity, Image as _, Label, Parent, Role, Seen};
use crate::open::gate::same_file;
use crate::open::{
    Format, OpenOptions, create, fingerprint, gate, open_image, open_layers, peek, sameness,
};
use crate::qcow2;
use crate::storage::draft::publish_all;
use crate::storage::name::directory;
use crate::storage::{Draft, FileOptions, FileStorage, follow};

/// How many clones are made at once: each is an open file.
const BATCH: usize = 256;

/// A base that clones can be made of. Where nothing was put on it, it is what it was when this goes.
pub struct Base {
    layer: Layer,
    /// The base's file, without symbolic links.
    path: PathBuf,
    parent: Parent,
    /// What it said of itself before it was sealed, where it was not.
    before: Option<Identity>,
    /// Whether something stands on it now.
    used: AtomicBool,
    /// Whether the user vouches for what it names.
    follow: bool,
    /// What is run in its clones, where they are told.
    config: Option<Vec<u8>>,
}

impl Base {
    /// Opens and seals the layer at `path`: it is not written any more while it is a base. A file
    /// that cannot be written, and one that has no header, stay as they are.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where somebody writes to it.
    pub fn seal(path: &Path) -> Result<Base> {
        Base::seal_with(path, &OpenOptions::default(), &[])
    }

    /// The same for a layer whose format is known: nothing is guessed from what a guest wrote.
    pub(crate) fn seal_as(
        path: &Path,
        format: Option<Format>,
        children: &[PathBuf],
    ) -> Result<Base> {
        Base::seal_with(path, &OpenOptions { format, ..OpenOptions::default() }, children)
    }

    /// The same for a layer that `how` opens, of the format that the user says, if he says one: clones
    /// record it, so that nobody guesses it again. Images at `children` are to stand on it; what none of
    /// them could name as its base is left as it is.
    ///
    /// # Errors
    /// As [`seal`](Base::seal); [`ErrorKind::Unsupported`] for a name that no image can record.
    pub fn seal_with(path: &Path, how: &OpenOptions, children: &[PathBuf]) -> Result<Base> {
        let path =
            fs::canonicalize(path).map_err(|e| Error::io("could not be found", e).at_path(path))?;
        let mut directories: Vec<&Path> = children.iter().map(|child| directory(child)).collect();
        directories.sort_unstable();
        directories.dedup();
        directories.into_iter().try_for_each(|dir| name_in(dir, &path).map(drop))?;
        let options = OpenOptions { unprotected: true, ..how.clone() };
        let read = || open_image(&path, &options);
        let mut layer = read()?;
        refuse_encrypted(&*layer.image).map_err(|e| e.at_path(&path))?;
        let mut identity = layer.image.identity()?;
        if let Some(label) = &identity.label {
            marks::refuse_passing(&path, label)?;
        }
        refuse_strangers(&path, &identity, &options)?;
        let mut before = None;
        if !is_sealed(&layer, &identity) {
            let format = layer.format;
            drop(layer);
            let seal = || seal(&path, how.follow);
            if format == Format::Qcow2 && fingerprint::keeping_time(&path, seal)? {
                before = Some(identity);
            }
            layer = read()?;
            identity = layer.image.identity()?;
        } else if !sameness::is_as_left(&layer, &identity)? {
            // Those that stand on it take it for what it was; the new ones for what it is.
            renew(&path)?;
            layer = read()?;
            identity = layer.image.identity()?;
        }
        if layer.format == Format::Qcow2 {
            // Who says that no clone is left means those that are there, not those to come.
            layer.file.begin_clones()?;
        }
        let parent = as_parent(&layer, &identity)?;
        let (follow, used) = (how.follow, AtomicBool::new(false));
        let config = identity.label.and_then(|label| label.config);
        Ok(Base { layer, path, parent, follow, before, used, config })
    }

    /// Clones are told what is run in them; without, as much as the base itself was.
    #[must_use]
    pub fn with_config(mut self, config: Option<Vec<u8>>) -> Base {
        self.config = config.or(self.config.take());
        self
    }

    /// Marks the base: the disk of that id at `path` is about to stand on it. Returns what that is to
    /// remember of it.
    pub(crate) fn mark(&self, disk: Id, path: &Path) -> Result<Parent> {
        self.mark_all(&[Clone { disk, path }])
    }

    /// As [`mark`](Base::mark), for a layer of the disk `disk`: not where the base is that disk's own.
    pub(crate) fn mark_for(&self, disk: Id, path: &Path) -> Result<Parent> {
        let own = self.layer.image.identity()?.label.is_some_and(|label| label.disk == disk);
        if own { Ok(self.parent) } else { self.mark(disk, path) }
    }

    /// Takes the mark back of a disk that does not stand on the base after all.
    pub(crate) fn unmark(&self, disk: Id, path: &Path) {
        if self.layer.format == Format::Qcow2 {
            // Where that fails, the mark stays too long: `vdisk unseal` takes it away.
            let _ = marks::unmark(&self.path, &Clone { disk, path });
        }
    }

    /// Notes that something stands on the base now.
    pub(crate) fn used(&self) {
        self.used.store(true, Ordering::Relaxed);
    }

    /// Makes a clone at each of `paths`, none of which must exist. The work does not depend on the
    /// base's size. Thousands of clones are made durable a few hundred at a time; what is made when
    /// it fails or is interrupted stays, and is whole.
    ///
    /// # Errors
    /// [`ErrorKind::Interrupted`] where `progress`, told how many are made, asks to stop.
    pub fn clone_all(
        &self,
        paths: &[PathBuf],
        progress: &mut dyn FnMut(usize) -> bool,
    ) -> Result<()> {
        for (number, batch) in paths.chunks(BATCH).enumerate() {
            if !progress(number * BATCH) {
                let message = format!("interrupted; {} clones were made", number * BATCH);
                return Err(Error::new(ErrorKind::Interrupted, message));
            }
            let new: Vec<(Id, &Path)> = batch.iter().map(|p| (Id::new_v4(), p.as_path())).collect();
            self.clone_batch(&new).inspect_err(|_| self.take_back(&new))?;
            self.used();
        }
        Ok(())
    }

    fn clone_batch(&self, new: &[(Id, &Path)]) -> Result<()> {
        new.iter().try_for_each(|(_, path)| create::refuse_existing(path))?;
        let clones: Vec<Clone<'_>> =
            new.iter().map(|(disk, path)| Clone { disk: *disk, path }).collect();
        let parent = self.mark_all(&clones)?;
        let drafts = new.iter().map(|(disk, path)| self.draft(*disk, path, parent));
        publish_all(drafts.collect::<Result<Vec<_>>>()?)
    }

    /// Only a qcow2 layer can say who stands on it.
    fn mark_all(&self, clones: &[Clone<'_>]) -> Result<Parent> {
        match self.layer.format {
            Format::Qcow2 => marks::mark(&self.path, self.parent, clones),
            _ => Ok(self.parent),
        }
    }

    /// Takes back the marks of those clones that were not made.
    fn take_back(&self, new: &[(Id, &Path)]) {
        for (disk, path) in new {
            let made = peek(path).ok().flatten().and_then(|p| p.identity.label);
            match made.is_some_and(|label| label.disk == *disk) {
                true => self.used(),
                false => self.unmark(*disk, path),
            }
        }
    }

    /// Makes a clone at `path`, which must not exist.
    pub fn clone_to(&self, path: &Path) -> Result<()> {
        self.clone_all(&[path.to_path_buf()], &mut |_| true)
    }

    fn draft(&self, disk: Id, path: &Path, parent: Parent) -> Result<Draft> {
        let draft = Draft::new(path)?;
        self.fill(&draft, disk, path, parent)?;
        Ok(draft)
    }

    /// Makes of `draft` the head, to be named `path`, of a disk that stands on the base, which is marked;
    /// returns what it says of itself.
    pub(crate) fn fill(
        &self,
        draft: &Draft,
        disk: Id,
        path: &Path,
        parent: Parent,
    ) -> Result<Identity> {
        let config = self.config.clone();
        let label = Label { disk, parent: Some(parent), config, ..Label::new() };
        let backing = self.backing_for(path)?;
        let options = delta_options(&*self.layer.image, backing.clone(), &label)?;
        let made = qcow2::create(draft.storage(), &options).and_then(|image| image.flush());
        made.map_err(|e| e.at_path(path))?;
        Ok(Identity { label: Some(label), backing: Some(backing), vouched: false })
    }

    /// How large what it shows is, in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.layer.image.size()
    }

    /// The base's file, without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Refuses a base that stands on `disk` itself.
    pub(crate) fn refuse_below(&self, disk: &Path) -> Result<()> {
        let stands_on = self.open()?.all_layers();
        if stands_on.iter().any(|layer| same_file(&layer.path, disk)) {
            let message = format!("cannot stand on '{}', which stands on it", self.path.display());
            return Err(Error::invalid(message).at_path(disk));
        }
        Ok(())
    }

    /// The base with all below it, for reading.
    pub(crate) fn open(&self) -> Result<Chain> {
        let (format, follow) = (Some(self.layer.format), self.follow);
        let options = OpenOptions { unprotected: true, format, follow, ..OpenOptions::default() };
        open_layers(&self.path, &options)
    }

    /// The base as an image at `path` names it: relative to the image's directory.
    pub(crate) fn backing_for(&self, path: &Path) -> Result<Backing> {
        let name = name_in(directory(path), &self.path)?;
        Ok(Backing { name, format: Some(self.layer.format.name().to_owned()) })
    }
}

/// How an image in `dir` names `base`, a path without symbolic links.
fn name_in(dir: &Path, base: &Path) -> Result<String> {
    let dir = fs::canonicalize(dir).map_err(|e| Error::io("could not be found", e).at_path(dir))?;
    gate::record(&marks::relative(&dir, base)).map_err(|e| e.at_path(base))
}

impl Drop for Base {
    fn drop(&mut self) {
        let Some(before) = self.before.take().filter(|_| !*self.used.get_mut()) else { return };
        let content = self.parent.content;
        // What fails here is a seal that lasts too long: `vdisk unseal` takes it away.
        let _ = sameness::relabel_shared(&self.path, |_, identity| {
            let Some(label) = &identity.label else { return Ok(()) };
            // Another command may have made clones of it meanwhile.
            if !label.is_marked() && (content.is_nil() || label.content == content) {
                *identity = before;
            }
            Ok(())
        });
    }
}

/// Gives the sealed layer at `path` a new content id: somebody wrote into it and left the old one.
fn renew(path: &Path) -> Result<()> {
    let renewed = sameness::relabel_shared(path, |layer, identity| {
        // Alone now: what looked like a write may have been another command that was marking it.
        if sameness::is_as_left(layer, &identity.clone())? {
            return Ok(());
        }
        if let Some(label) = &mut identity.label {
            label.content = Id::new_v4();
            if let Some(clones) = &mut label.clones {
                clones.seen = Seen::Nothing;
            }
        }
        Ok(())
    });
    match renewed {
        Err(e) if sameness::is_out_of_reach(&e) => Ok(()),
        renewed => renewed,
    }
}

/// Sealed, and vouched for where its format can say so.
fn is_sealed(layer: &Layer, identity: &Identity) -> bool {
    let can_vouch = layer.image.details().is_some_and(|d| d.version != Some(2));
    let frozen = identity.label.as_ref().is_some_and(|l| l.role != Role::Head);
    frozen && (identity.vouched || !can_vouch)
}

/// The layer at `path` as one that is put on it should remember it. It is not sealed.
pub fn remembered(path: &Path, format: Option<Format>) -> Result<Parent> {
    let options = OpenOptions { unprotected: true, format, ..OpenOptions::default() };
    let layer = open_image(path, &options)?;
    as_parent(&layer, &layer.image.identity()?)
}

/// A layer as those on it remember it.
fn as_parent(layer: &Layer, identity: &Identity) -> Result<Parent> {
    let label = identity.label.as_ref();
    let content = label.filter(|_| identity.vouched).map_or(Id::nil(), |l| l.content);
    let stamp = Some(fingerprint::of(layer, !content.is_nil())?);
    Ok(Parent { layer: label.map_or(Id::nil(), |l| l.layer), content, stamp })
}

/// Refuses a base that names what it may not reach, before anything is made on it or written to it.
fn refuse_strangers(path: &Path, identity: &Identity, options: &OpenOptions) -> Result<()> {
    let reached = |b: &Backing| {
        let below = gate::resolve(path, &b.name);
        below.is_ok_and(|below| gate::reaches(path, &b.name, &below))
    };
    if options.follow || identity.backing.as_ref().is_none_or(reached) {
        return Ok(());
    }
    open_layers(path, options).map(drop)
}

/// Seals the layer at `path`; `false` where nobody may write it, or it is sealed by now.
fn seal(path: &Path, follow: bool) -> Result<bool> {
    heal::heal(path)?;
    let options = OpenOptions { format: Some(Format::Qcow2), follow, ..unprotected() };
    let layer = match open_image(path, &options) {
        // A golden image that only root may write is as good as sealed.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS)) => {
            return Ok(false);
        }
        other => other?,
    };
    let mut identity = layer.image.identity()?;
    if is_sealed(&layer, &identity) {
        // Another command was first, and its clones know the contents by the id that it gave them.
        return Ok(false);
    }
    let label = identity.label.get_or_insert_default();
    if label.role == Role::Head {
        label.role = Role::Base;
    }
    label.content = Id::new_v4();
    // What was seen of it was seen of other contents.
    label.clones.get_or_insert_default().seen = Seen::Nothing;
    identity.vouched = true;
    layer.image.set_identity(&identity).map_err(|e| e.at_path(path))?;
    Ok(true)
}

/// Makes a base an ordinary disk again; of a snapshot's layer, says that no clone stands on it any more.
/// With `even_if_cloned`, also where clones do: they are returned, and a base's are refused from now on.
///
/// # Errors
/// [`ErrorKind::Sealed`] lists the clones that stand on it: those in its directory, and those elsewhere
/// that are found where its label says.
pub fn unseal(path: &Path, even_if_cloned: bool) -> Result<Vec<PathBuf>> {
    let path = &follow(path)?;
    let label = peek(path)?.and_then(|peek| peek.identity.label);
    let frozen = label.as_ref().is_some_and(|l| !matches!(l.role, Role::Head | Role::Base));
    if frozen && label.is_some_and(|l| l.is_marked()) {
        return unmark_all(path, even_if_cloned);
    }
    // Before they are found to hold it.
    refuse_unsealing(path, &clones_of(path)?, even_if_cloned)?;
    // Whoever makes a clone has the base open: from here on there are no new ones.
    let layer = open_image(path, &unprotected())?;
    let mut identity = layer.image.identity()?;
    let Some(label) = identity.label.as_mut().filter(|label| label.role == Role::Base) else {
        return Err(Error::invalid("is not sealed").at_path(path));
    };
    let clones = Standing::by_label(path, label, None).with(clones_of(path)?).found;
    refuse_unsealing(path, &clones, even_if_cloned)?;
    (label.role, label.clones) = (Role::Head, None);
    identity.vouched = false;
    layer.image.set_identity(&identity).map_err(|e| e.at_path(path))?;
    Ok(clones)
}

fn refuse_unsealing(path: &Path, clones: &[PathBuf], even_if_cloned: bool) -> Result<()> {
    if clones.is_empty() || even_if_cloned {
        return Ok(());
    }
    let message = format!(
        "clones stand on it: {}. --even-if-cloned goes on all the same: as soon as it changes, they can \
         be read no more",
        list(clones)
    );
    Err(Error::new(ErrorKind::Sealed, message).at_path(path))
}

/// Takes the marks off a snapshot's layer, which its own disk may be using.
fn unmark_all(path: &Path, even_if_cloned: bool) -> Result<Vec<PathBuf>> {
    let options = FileOptions { access: None, write: false };
    FileStorage::open(path, options)?.await_clones()?;
    let mut standing = Vec::new();
    sameness::relabel_shared(path, |layer, identity| {
        layer.file.refuse_cloning()?;
        let Some(label) = &mut identity.label else { return Ok(()) };
        // The disk's own layers may stand on it.
        let mut clones = clones_of(path)?;
        clones.retain(|child| disk_of(child) != Some(label.disk));
        let all = Standing { found: clones, ..Standing::default() };
        standing = all.with(Standing::by_label(path, label, None).found).found;
        refuse_unsealing(path, &standing, even_if_cloned)?;
        label.clones = None;
        Ok(())
    })?;
    Ok(standing)
}

fn disk_of(path: &Path) -> Option<Id> {
    Some(peek(path).ok()??.identity.label?.disk)
}
