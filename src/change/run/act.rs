//! The steps that change what layers say of themselves, and their files' names.

use std::path::{Path, PathBuf};

use crate::change::run::layer::{open_frozen, refuse_cloned, reidentify, relabel, unprotected};
use crate::change::run::step::{Demote, Relabel};
use crate::change::run::{Ready, Run, head};
use crate::error::{Error, ErrorKind, Result};
use crate::family::tree::Member;
use crate::image::{Id, Identity, Label, Role};
use crate::open::disk::Peek;
use crate::open::{open_image, sameness};
use crate::storage::draft::{make_like, rename_over};
use crate::storage::name::{remove, sync_directory};
use crate::storage::{Access, FileOptions, FileStorage};

impl Run<'_> {
    pub(super) fn claim(&mut self, layer: Id, unless_cloned: bool) -> Result<()> {
        let open = self.open(layer)?;
        if unless_cloned { refuse_cloned(&open) } else { Ok(()) }
    }

    pub(super) fn refuse_left(&mut self, layers: &[Id]) -> Result<()> {
        let stayed = |m: &&Member| layers.contains(&m.label.layer);
        let stayed: Vec<&str> =
            self.family().snapshots().filter(stayed).map(|m| &*m.label.name).collect();
        if stayed.is_empty() {
            return Ok(());
        }
        let message = format!("has been cloned meanwhile, and keeps: {}", stayed.join(", "));
        Err(Error::new(ErrorKind::Sealed, message).at_path(self.disk()))
    }

    pub(super) fn hold(&mut self, layer: Id) -> Result<()> {
        self.below = Some(open_frozen(&self.path(layer)?)?);
        Ok(())
    }

    fn held_head(&self) -> Result<&crate::chain::Layer> {
        let message = "is not held by the change of its tree";
        self.head.as_ref().ok_or_else(|| Error::invalid(message).at_path(self.disk()))
    }

    pub(super) fn read_bitmaps(&mut self) -> Result<()> {
        let bitmaps = self.held_head()?.image.bitmaps();
        self.bitmaps = bitmaps.map_err(|e| e.at_path(self.disk()))?;
        Ok(())
    }

    pub(super) fn demote(&mut self, demote: &Demote) -> Result<()> {
        let head = self.held_head()?.clone();
        // A new label, where other programs made the file, is the one that the family knows.
        let own = head.image.identity()?.label.unwrap_or_else(|| self.family.head.label.clone());
        let Demote { role, name, description, kept, durably } = demote.clone();
        let identity = head::demote(&head, Label { role, name, description, kept, ..own })?;
        if durably {
            sync_directory(self.disk()).inspect_err(|_| self.take_back())?;
        }
        let path = self.disk().to_path_buf();
        self.family.relabel(&path, identity);
        self.demoted = true;
        Ok(())
    }

    /// Makes the head's file the head again after a failure. If that fails too, the next open does it.
    fn take_back(&self) {
        if let Some(head) = &self.head {
            let _ = head::promote(self.disk(), head);
        }
    }

    pub(super) fn promote(&mut self) -> Result<()> {
        let path = self.disk().to_path_buf();
        let head = self.context.open(&path)?;
        head::promote(&path, &head)?;
        let identity = head.image.identity()?;
        drop(head);
        self.family.relabel(&path, identity);
        Ok(())
    }

    pub(super) fn hold_head(&mut self) -> Result<()> {
        self.head = Some(open_image(self.disk(), &unprotected())?);
        Ok(())
    }

    pub(super) fn put_head(&mut self) -> Result<()> {
        let path = self.disk().to_path_buf();
        let missing = || Error::invalid("no head was made ready").at_path(&path);
        let Ready { draft, identity, size } = self.ready.take().ok_or_else(missing)?;
        draft.replace().inspect_err(|_| {
            if self.demoted {
                self.take_back();
            }
        })?;
        self.take_in(path, identity, size);
        Ok(())
    }

    /// Notes that another file has the head's name, and what that says of itself.
    fn take_in(&mut self, path: PathBuf, identity: Identity, size: u64) {
        self.head_replaced();
        self.head = None;
        if let Some(label) = identity.label.clone() {
            let peek = Peek { identity, size, allocated: 0 };
            self.family.put(Member { path, label, peek });
        }
    }

    pub(super) fn new_head(&mut self, on: Id, bitmaps: bool) -> Result<()> {
        let path = self.disk().to_path_buf();
        let below = match self.below.take() {
            Some(below) => below,
            // On what it is itself.
            None if on == self.family.head.label.layer => self.held_head()?.clone(),
            None => open_frozen(&self.path(on)?)?,
        };
        let bitmaps = if bitmaps { std::mem::take(&mut self.bitmaps) } else { Vec::new() };
        let made = head::put_head_on(&path, &below, &bitmaps);
        let identity = made.inspect_err(|_| {
            if self.demoted {
                self.take_back();
            }
        })?;
        self.take_in(path, identity, below.image.size());
        Ok(())
    }

    pub(super) fn label(&mut self, to: &Relabel) -> Result<()> {
        let open = self.open(to.layer)?;
        if to.unless_cloned {
            refuse_cloned(&open)?;
        }
        let identity = relabel(&open, |label| {
            (label.role, label.kept) = (to.role, to.kept.clone());
        })?;
        self.note(to.layer, identity)
    }

    pub(super) fn relabel(&mut self, layer: Id, change: impl FnOnce(&mut Label)) -> Result<()> {
        let open = self.open(layer)?;
        let identity = relabel(&open, change)?;
        self.note(layer, identity)
    }

    /// Notes what a layer says of itself by now.
    pub(super) fn note(&mut self, layer: Id, identity: Identity) -> Result<()> {
        let path = self.path(layer)?;
        self.family.relabel(&path, identity);
        Ok(())
    }

    pub(super) fn forget_clones(&mut self, layer: Id) -> Result<()> {
        // What was kept aside may have gone since this was planned.
        if !self.family().member(layer).is_some_and(|m| m.label.is_marked()) {
            return Ok(());
        }
        self.relabel(layer, |label| label.clones = None)
    }

    pub(super) fn new_id(&mut self) -> Result<()> {
        let path = self.disk().to_path_buf();
        let head = self.context.open(&path)?;
        // Nothing stands on a head, so nothing knows it by the id that it loses.
        let identity = relabel(&head, |label| label.layer = Id::new_v4())?;
        self.family.relabel(&path, identity);
        Ok(())
    }

    pub(super) fn become_head(&mut self) -> Result<()> {
        let path = self.disk().to_path_buf();
        self.let_have(&path);
        let head = self.context.open(&path)?;
        let identity = reidentify(&head, |identity| {
            let Some(label) = &mut identity.label else { return };
            (label.role, label.kept) = (Role::Head, None);
            (label.time, label.clones) = (0, None);
            identity.vouched = false;
        })?;
        self.family.relabel(&path, identity);
        Ok(())
    }

    pub(super) fn become_accessible_as(&mut self, layer: Id, like: Id) -> Result<()> {
        make_like(&self.path(layer)?, &self.path(like)?)
    }

    pub(super) fn take_name(&mut self, file: &Path, over: &Path) -> Result<()> {
        let mut folded = self.folded.take();
        if let Some(folded) = &mut folded {
            folded.close_lower();
        }
        let _guard = self.guard(over, folded.is_some())?;
        rename_over(file, over)?;
        sync_directory(over)?;
        self.context.touch();
        // Until here nobody could begin to write what has just lost its name.
        match folded {
            Some(folded) if folded.notes_sight() => drop(folded),
            folded => {
                drop(folded);
                sameness::note_stamp(over);
            }
        }
        if over == self.disk() {
            self.head_replaced();
        }
        if let Some(member) = self.family.take(file) {
            self.family.put(Member { path: over.to_path_buf(), ..member });
        }
        Ok(())
    }

    /// Keeps others from beginning to write the head, which is about to lose its name, where nobody here
    /// does so yet: what they wrote would be gone.
    fn guard(&self, over: &Path, folded: bool) -> Result<Option<FileStorage>> {
        let ours = folded || self.head.is_some() || self.context.in_use();
        if ours || over != self.disk() || over.symlink_metadata().is_err() {
            return Ok(None);
        }
        let options = FileOptions { access: Some(Access::Write), write: false };
        FileStorage::open(over, options).map(Some)
    }

    pub(super) fn move_off(&mut self, layer: Id, off: Id) -> Result<()> {
        let (backing, parent) = {
            let off = self.member(off)?;
            (off.peek.identity.backing.clone(), off.label.parent)
        };
        let open = self.open(layer)?;
        let identity = reidentify(&open, |identity| {
            identity.backing = backing;
            if let Some(label) = &mut identity.label {
                label.parent = parent;
            }
        })?;
        self.note(layer, identity)
    }

    pub(super) fn remove(&mut self, layer: Id) -> Result<()> {
        let path = self.path(layer)?;
        remove(&path)?;
        self.family.take(&path);
        Ok(())
    }

    pub(super) fn discard(&mut self, layer: Id) -> Result<()> {
        let path = self.path(layer)?;
        let open = match self.open(layer) {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                self.family.take(&path);
                return Ok(());
            }
            other => other?,
        };
        let identity = open.image.identity()?;
        let goes = match &identity.label {
            // Somebody may have made a clone of it meanwhile.
            Some(label) if label.is_marked() && refuse_cloned(&open).is_err() => false,
            Some(label) => matches!(label.role, Role::Dropped | Role::Unnamed),
            None => false,
        };
        if !goes {
            return self.note(layer, identity);
        }
        remove(&path)?;
        self.family.take(&path);
        Ok(())
    }

    pub(super) fn sync_names(&mut self) -> Result<()> {
        sync_directory(self.disk())
    }

    pub(super) fn note_stamp(&mut self, layer: Id) -> Result<()> {
        sameness::note_stamp(&self.path(layer)?);
        Ok(())
    }
}
