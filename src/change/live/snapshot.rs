//! Taking a snapshot of a disk in use.
//!
//! The new head is made before, empty and without a name. Then, for a moment, no request is served:
//! the new head is put on the old one in memory. All that lasts comes after: the old head is flushed
//! and marked, it gets its second name, and the new head takes the disk's name. Until that is durable
//! flushes wait, so after a crash the disk is what it was when it was last flushed: the old head with
//! its name, or the new one. Where a step fails, what was written to the new head goes into the old
//! one, which is the head again.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::block::BlockDevice;
use crate::chain::Layer;
use crate::change::live::Live;
use crate::change::live::handle::reopen;
use crate::change::names;
use crate::change::run::head::promote;
use crate::change::run::layer::delta_options;
use crate::error::{Error, ErrorKind, Result};
use crate::family::dropped::now;
use crate::family::frozen_path;
use crate::family::tree::Family;
use crate::image::{Backing, Bitmap, Bitmaps as _, Id, Identity, Label, Parent, Role};
use crate::open::{Format, OpenOptions, gate, open_file};
use crate::qcow2;
use crate::storage::name::{link, sync_directory};
use crate::storage::{Access, Draft, refuse_fixed};

/// How long others may still be flushing the old head before it is no longer open for writing.
const PATIENCE: Duration = Duration::from_secs(2);

/// Brings what uses the disk to rest for the moment of a snapshot.
pub trait Quiesce {
    /// Everything that was written is on the disk when it returns, and nothing is written until
    /// [`thaw`](Quiesce::thaw). Returns since when its user has waited.
    fn freeze(&self) -> Result<Instant>;

    /// Lets it go on already, where it need not flush for that: flushes wait until [`thaw`](Quiesce::thaw).
    /// Whether it did.
    fn go_on(&self) -> bool {
        false
    }

    /// Lets it go on. Called once after each [`freeze`](Quiesce::freeze) that succeeded, however the
    /// snapshot ended.
    fn thaw(&self);
}

/// Thaws when dropped.
struct Frozen<'a> {
    user: &'a dyn Quiesce,
    since: Instant,
    /// How long it has waited, where it goes on already.
    waited: Option<Duration>,
}

impl<'a> Frozen<'a> {
    fn new(user: &'a dyn Quiesce) -> Result<Frozen<'a>> {
        Ok(Frozen { since: user.freeze()?, waited: None, user })
    }

    fn go_on(&mut self) {
        if self.user.go_on() {
            self.waited = Some(self.since.elapsed());
        }
    }

    /// Thaws it; how long it has waited.
    fn end(self) -> Duration {
        let (since, waited) = (self.since, self.waited);
        drop(self);
        waited.unwrap_or_else(|| since.elapsed())
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.user.thaw();
    }
}

/// The head to be, and how the old one is to be called.
struct Next {
    draft: Draft,
    layer: Layer,
    /// The old head, as it is to be found below.
    below: Layer,
    /// What the old head is to say of itself.
    identity: Identity,
}

impl Live {
    /// Freezes the disk as it is under `name`; its user goes on in a new, empty delta. Returns how
    /// long no request was served. With `user`, the disk's user is at rest at that moment, and for how long
    /// is returned.
    ///
    /// # Errors
    /// As for an idle disk. After any error the disk and its snapshots are as they were; where not
    /// even that can be had, it refuses every further change.
    pub fn snapshot(
        &self,
        name: &str,
        description: &str,
        user: Option<&dyn Quiesce>,
    ) -> Result<Duration> {
        let _turn = self.begin(format!("snapshot '{name}'"))?;
        let next = self.prepare(name, description)?;
        // What is written now is not written while flushes wait.
        self.chain().flush()?;
        let mut frozen = user.map(Frozen::new).transpose()?;
        let publishing = self.chain().begin_publishing();
        let before = self.chain().put_on(next.layer.clone(), next.below.clone());
        if let Some(frozen) = &mut frozen {
            frozen.go_on();
        }
        let pause = before.pause;
        let old = next.below.clone();
        if let Err(error) = self.mark_old(&next).and_then(|()| self.keep_bitmaps(&next)) {
            let back = self.chain().take_off(before);
            let _ = promote(self.path(), &old);
            return Err(back.err().unwrap_or(error));
        }
        if let Err(error) = next.draft.take_name() {
            let back = self.chain().take_off(before);
            let _ = promote(self.path(), &old);
            return Err(back.err().unwrap_or(error));
        }
        // From here on the new head has the disk's name. Whether a crash would show that is in
        // doubt if this fails: nothing more may be called durable.
        sync_directory(self.path()).inspect_err(|_| self.chain().lose())?;
        drop(publishing);
        // Only now: to go on, the kernel's file systems flush, and flushes wait until the new head is found.
        let pause = frozen.map_or(pause, Frozen::end);
        drop((before, next.below));
        self.let_others_read(old);
        Ok(pause)
    }

    fn prepare(&self, name: &str, description: &str) -> Result<Next> {
        let path = self.path();
        match Family::read(path)? {
            Some(family) => names::check_new(&family, name)?,
            None => names::check(name)?,
        }
        let head = self.chain().head();
        if head.format != Format::Qcow2 {
            let message = format!("is {}: only a qcow2 disk has snapshots", head.format);
            return Err(Error::unsupported(message).at_path(path));
        }
        let mut label = head.image.identity()?.label.unwrap_or_default();
        (label.name, label.description) = (name.to_owned(), description.to_owned());
        (label.role, label.time, label.content) = (Role::Snapshot, now(), Id::new_v4());
        label.encode()?;
        let frozen = frozen_path(path, label.layer);
        refuse_fixed(path, &frozen)?;
        if frozen.symlink_metadata().is_ok() {
            let message = "is in the way: it has the name that the frozen layer is to have";
            return Err(Error::new(ErrorKind::Exists, message).at_path(&frozen));
        }
        // Version 2 images have no bit that vouches for their contents.
        let vouches = head.image.details().and_then(|d| d.version).is_some_and(|v| v >= 3);
        let content = if vouches { label.content } else { Id::nil() };
        let delta = Label {
            disk: label.disk,
            parent: Some(Parent { layer: label.layer, content, stamp: None }),
            config: label.config.clone(),
            ..Label::new()
        };
        let file_name = gate::record(Path::new(frozen.file_name().unwrap_or_default()))?;
        let backing = Backing { name: file_name, format: Some(head.format.name().to_owned()) };
        let options = delta_options(&*head.image, backing, &delta).map_err(|e| e.at_path(path))?;
        // They record from the moment on at which the new head takes over.
        let bitmaps = head.image.bitmaps().map_err(|e| e.at_path(path))?;
        let bitmaps: Vec<Bitmap> = bitmaps.iter().map(Bitmap::cleared).collect();
        let draft = Draft::replacing(path)?;
        let made = qcow2::create(draft.storage(), &options);
        made.and_then(|image| image.add_to_bitmaps(&bitmaps)).map_err(|e| e.at_path(path))?;
        // What is in the file now is durable before it has a name; what is written to it from now
        // on is written in the order that survives a crash.
        draft.file().file().sync_data().map_err(|e| Error::io("could not be synced", e))?;
        let layer = open_file(path, draft.file().clone(), &new_head())?;
        let backing = head.image.backing();
        let identity = Identity { label: Some(label), backing, vouched: true };
        Ok(Next { draft, layer, below: Layer { path: frozen, ..head }, identity })
    }

    /// Makes the old head durable, a snapshot, and to be found under its own name.
    fn mark_old(&self, next: &Next) -> Result<()> {
        let old = &next.below;
        let mark = || {
            // The second pass writes down which clusters the first one made free.
            old.image.flush()?;
            old.image.flush()?;
            old.image.set_identity(&next.identity)
        };
        mark().map_err(|e| e.at_path(self.path()))?;
        link(self.path(), &old.path)
    }

    /// Lets the new head's bitmaps say what the old head's say: the disk's name is not its own before.
    fn keep_bitmaps(&self, next: &Next) -> Result<()> {
        let bitmaps = next.below.image.bitmaps()?;
        if bitmaps.is_empty() {
            return Ok(());
        }
        let _alone = self.chain().layers_alone();
        next.layer.image.add_to_bitmaps(&bitmaps).map_err(|e| e.at_path(self.path()))
    }

    /// Opens the old head anew, for reading, and lets others read it. Where that cannot be done they
    /// are kept out, and nothing else is wrong.
    fn let_others_read(&self, old: Layer) {
        let options = OpenOptions {
            format: Some(old.format),
            follow: true,
            unprotected: true,
            locked: true,
            ..OpenOptions::default()
        };
        let Ok(read) = open_file(&old.path, old.file.clone(), &options) else { return };
        drop(self.chain().replace_layer(0, read.clone()));
        let Layer { image, file, .. } = old;
        let until = Instant::now() + PATIENCE;
        while Arc::strong_count(&image) > 1 {
            if Instant::now() > until {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // It writes what is left to be written.
        drop(image);
        let _ = file.relock(Access::Read);
        // An external data file had its own lock, which went with the old head.
        if read.image.details().is_some_and(|d| d.data_file.is_some())
            && let Ok(read) = reopen(&read)
        {
            drop(self.chain().replace_layer(0, read));
        }
    }
}

fn new_head() -> OpenOptions {
    OpenOptions { format: Some(Format::Qcow2), unprotected: true, ..OpenOptions::writable() }
}
