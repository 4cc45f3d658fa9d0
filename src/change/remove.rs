//! Removing a disk with its snapshots.
//!
//! A disk of one file goes in one step. Of another the head goes first, by one rename to a hidden name:
//! from then on the disk is gone. Its layers follow, and the hidden head last, so that a removal that was
//! interrupted is finished by the same command. Then what the disk stood on is told that it does no more.

use std::path::{Path, PathBuf};

use crate::chain::Layer;
use crate::change::base::marks::{self, Clone};
use crate::change::heal;
use crate::change::run::layer::unprotected;
use crate::error::{Error, ErrorKind, Result};
use crate::family::beside::Beside;
use crate::family::clones_of;
use crate::family::cost::{data_bytes, look};
use crate::family::names::names_beside;
use crate::family::standing::Standing;
use crate::family::tree::Family;
use crate::image::{Id, Role};
use crate::open::{open_image, peek};
use crate::storage::draft::{draft_form, hidden_name};
use crate::storage::name::{remove, rename, sync_directory};
use crate::storage::{Turn, follow};

/// What removing a disk will do.
#[derive(Debug, Clone)]
pub struct Removal {
    /// The disk.
    pub disk: PathBuf,
    /// Its files: the layers, those that stand on others before those, then the head.
    pub files: Vec<PathBuf>,
    /// Its snapshots.
    pub snapshots: Vec<String>,
    /// Bytes of data that go.
    pub dropped: u64,
    /// The head's file, where an interrupted removal has hidden it.
    head: PathBuf,
    /// The layers of other disks that it stands on.
    bases: Vec<PathBuf>,
    id: Id,
    /// Whether the clones that stand on it count.
    even_if_cloned: bool,
}

/// What removing the disk at `path` will do. With `even_if_cloned`, also where clones stand on it: they
/// can be read no more then.
///
/// # Errors
/// [`ErrorKind::Sealed`] names the clones that stand on it, or on one of its snapshots.
pub fn plan_remove(path: &Path, even_if_cloned: bool) -> Result<Removal> {
    let path = &follow(path)?;
    let head = match path.symlink_metadata() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            hidden(path)?.ok_or_else(|| Error::io("could not be found", e).at_path(path))?
        }
        _ => path.clone(),
    };
    if head == *path {
        heal::heal(path)?;
    }
    let Some(family) = Family::read(&head)? else { return plan_alone(path, even_if_cloned) };
    refuse_frozen(&family)?;
    let layers = family.children_first();
    if !even_if_cloned {
        refuse_cloned(&family)?;
    }
    let mut plan = Removal {
        disk: path.to_path_buf(),
        files: Vec::new(),
        snapshots: layers
            .iter()
            .filter(|m| m.is_snapshot())
            .map(|m| m.label.name.clone())
            .collect(),
        dropped: 0,
        bases: marks::bases_of(&family),
        id: family.head.label.disk,
        even_if_cloned,
        head,
    };
    for layer in &layers {
        plan.dropped += data_bytes(&*look(layer)?.image)?;
    }
    plan.files = files_of(&family, path);
    Ok(plan)
}

/// The files of a disk whose name is `disk`, in the order in which they go.
fn files_of(family: &Family, disk: &Path) -> Vec<PathBuf> {
    let all = family.children_first().into_iter().map(|m| &m.path);
    let mut files: Vec<PathBuf> = all.filter(|p| **p != family.head.path).cloned().collect();
    files.push(disk.to_path_buf());
    files
}

/// A file without a label: it has no snapshots.
fn plan_alone(path: &Path, even_if_cloned: bool) -> Result<Removal> {
    if !even_if_cloned {
        refuse_named(path)?;
    }
    let dropped = data_bytes(&*open_image(path, &Default::default())?.image)?;
    let (disk, head, files) = (path.to_path_buf(), path.to_path_buf(), vec![path.to_path_buf()]);
    let (snapshots, bases, id) = (Vec::new(), Vec::new(), Id::nil());
    Ok(Removal { disk, files, snapshots, dropped, head, bases, id, even_if_cloned })
}

/// Refuses a file without a label that others beside it name as theirs.
fn refuse_named(path: &Path) -> Result<()> {
    Standing::default().with(clones_of(path)?).refuse(path, "a disk")
}

fn refuse_frozen(family: &Family) -> Result<()> {
    if matches!(family.head.label.role, Role::Head | Role::Base) {
        return Ok(());
    }
    let message = "is a frozen layer of a disk: name the disk, or remove the snapshot with `vdisk \
                   snapshot delete`";
    Err(Error::new(ErrorKind::Sealed, message).at_path(&family.head.path))
}

fn refuse_cloned(family: &Family) -> Result<()> {
    let beside = Beside::read(family)?;
    family.layers.iter().try_for_each(|member| beside.refuse_clones(member, family))?;
    let head = &family.head;
    let standing = beside.standing_on(head);
    standing.refuse(&head.path, "the disk")?;
    // A base that was sealed before its clones were counted may have some anywhere.
    if head.label.role == Role::Base && head.label.clones.is_none() {
        let more = Standing { more: true, ..Standing::default() };
        more.refuse(&head.path, "a base")?;
    }
    Ok(())
}

/// The head of a disk of which an interrupted removal has left the rest.
fn hidden(path: &Path) -> Result<Option<PathBuf>> {
    let form = draft_form(path);
    let drafts = names_beside(path, |name| form.middle(name).is_some())?;
    let is_head = |path: &PathBuf| {
        let label = peek(path).ok().flatten().and_then(|peek| peek.identity.label);
        label.is_some_and(|label| matches!(label.role, Role::Head | Role::Base))
    };
    Ok(drafts.into_iter().find(is_head))
}

impl Removal {
    /// Whether the disk is what it was when this was planned. Nobody else can change its files now, and
    /// whoever makes a clone of one marks it.
    fn check(&self) -> Result<()> {
        let family = match Family::read(&self.head)? {
            None if self.id.is_nil() && self.even_if_cloned => return Ok(()),
            None if self.id.is_nil() => return refuse_named(&self.disk),
            family => family,
        };
        if let Some(family) = family.filter(|f| files_of(f, &self.disk) == self.files) {
            return if self.even_if_cloned { Ok(()) } else { refuse_cloned(&family) };
        }
        let message = "the disk or its snapshots have changed since this was planned: look again";
        Err(Error::new(ErrorKind::Busy, message).at_path(&self.disk))
    }

    /// Does it. Returns the layers that it stood on and that could not be told so: they go on saying that
    /// a clone stands on them.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] names who holds one of the files: nothing was removed. [`ErrorKind::Sealed`]
    /// names clones that were made meanwhile, [`ErrorKind::Busy`] says that it is another disk by now.
    pub fn execute(&self) -> Result<Vec<PathBuf>> {
        let _turn = Turn::take(&self.disk)?;
        let mut held: Vec<Layer> = Vec::new();
        for file in self.files.iter().filter(|f| **f != self.disk).chain([&self.head]) {
            match open_image(file, &unprotected()) {
                Ok(layer) => held.push(layer),
                // Damaged, or not writable: its name can go all the same, but nobody may be using it.
                Err(e) if matches!(e.kind(), ErrorKind::InUse | ErrorKind::Busy) => return Err(e),
                Err(_) => {}
            }
        }
        self.check()?;
        let mut hidden = self.head.clone();
        // Of several files all are gone with the first step; one goes in one.
        if self.head == self.disk && self.files.len() > 1 {
            hidden = hidden_name(&self.disk);
            rename(&self.disk, &hidden)?;
            sync_directory(&self.disk)?;
        }
        for file in self.files.iter().filter(|f| **f != self.disk) {
            remove(file)?;
        }
        remove(&hidden)?;
        sync_directory(&self.disk)?;
        drop(held);
        let clone = Clone { disk: self.id, path: &self.disk };
        let untold = self.bases.iter().filter(|base| marks::unmark(base, &clone).is_err());
        Ok(untold.cloned().collect())
    }
}
