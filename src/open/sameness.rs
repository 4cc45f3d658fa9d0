//! Changes of a layer's files after which it shows what it showed: whoever stands on it goes on
//! taking it for what it is.
//!
//! A layer that vouches for its contents is known by its content id. One program writes into such a
//! layer and leaves the mark: QEMU's commit. So a clone also remembers what the layer's files looked
//! like (`fingerprint`), and vdisk, which moves layers into one another under their clones, says in
//! the layer's own label what they look like afterwards ([`Seen`]). Before it changes the files it
//! makes sure that they are as it left them, and notes that it changes them; when it is done, and
//! the layer is closed, what they look like. So the label tells at every moment whether only vdisk
//! has changed them:
//!
//! * the files are as the clone remembers them, or as the label says: the layer is the same;
//! * vdisk is changing them, or was stopped while it did: the content id alone speaks;
//! * neither: somebody else wrote into them, and the clone is refused.
//!
//! What somebody else wrote is never taken over into the label: where the files are not as the label
//! says, it stays as it is, and a new clone gets the layer under a new content id. A clone that was
//! made before the label said anything relies on what it remembers alone.

use std::fs::FileTimes;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chain::Layer;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{BaseStamp, Identity, Seen};
use crate::open::disk::open_file;
use crate::open::fingerprint::{self, Verdict};
use crate::open::gate::Format;
use crate::open::options::OpenOptions;
use crate::qcow2;
use crate::storage::{Access, FileOptions, FileStorage};

/// Compares `layer`, which says `identity` of itself and is vouched for or not, with what is
/// remembered of it.
pub(crate) fn compare(
    layer: &Layer,
    identity: &Identity,
    vouched: bool,
    known: &BaseStamp,
) -> Result<Verdict> {
    let verdict = fingerprint::compare(layer, vouched, known)?;
    if verdict == Verdict::Same || !vouched || !known.follows {
        return Ok(verdict);
    }
    match seen(identity) {
        Seen::Changing => Ok(Verdict::Same),
        Seen::As(stamp) if fingerprint::is_as(layer, &stamp)? => Ok(Verdict::Same),
        _ => Ok(verdict),
    }
}

fn seen(identity: &Identity) -> Seen {
    let clones = identity.label.as_ref().and_then(|label| label.clones.as_ref());
    clones.map(|clones| clones.seen).unwrap_or_default()
}

/// Whether the files of `layer` are as its label says, as far as it says anything.
pub(crate) fn is_as_left(layer: &Layer, identity: &Identity) -> Result<bool> {
    match seen(identity) {
        Seen::As(stamp) => fingerprint::is_as(layer, &stamp),
        Seen::Nothing | Seen::Changing => Ok(true),
    }
}

/// To be called before `layer`, which is open for writing, is changed so that it shows the same.
pub fn begin_rewrite(layer: &Layer) -> Result<()> {
    let mut identity = layer.image.identity()?;
    if !matches!(seen(&identity), Seen::As(_)) || !is_as_left(layer, &identity)? {
        return Ok(());
    }
    if let Some(clones) = identity.label.as_mut().and_then(|label| label.clones.as_mut()) {
        clones.seen = Seen::Changing;
    }
    layer.image.set_identity(&identity).map_err(|e| e.at_path(&layer.path))
}

/// A layer that is changed so that it shows the same: its label says what its files look like once this
/// goes. The layer must be closed before.
pub(crate) struct Rewriting(PathBuf);

impl Rewriting {
    /// As [`begin_rewrite`].
    pub fn begin(layer: &Layer) -> Result<Rewriting> {
        begin_rewrite(layer).map(|()| Rewriting(layer.path.clone()))
    }
}

impl Drop for Rewriting {
    fn drop(&mut self) {
        note_stamp(&self.0);
    }
}

/// Notes in the label of the layer at `path`, which nobody writes any more, what its files look like
/// after a change that [`begin_rewrite`] began. Where that cannot be done now, the next who heals the disk
/// does it.
pub fn note_stamp(path: &Path) {
    let options = FileOptions { access: Some(Access::Read), write: true };
    let Ok(file) = FileStorage::open(path, options) else { return };
    if file.take_turn().is_ok() {
        let _ = note_stamp_in(path, &Arc::new(file));
    }
}

/// As [`note_stamp`], for a file that is open for writing and that nobody else writes.
pub(crate) fn note_stamp_in(path: &Path, file: &Arc<FileStorage>) -> Result<()> {
    let options = OpenOptions {
        format: Some(Format::Qcow2),
        unprotected: true,
        locked: true,
        ..OpenOptions::default()
    };
    let layer = open_file(path, file.clone(), &options)?;
    let identity = layer.image.identity()?;
    if seen(&identity) != Seen::Changing {
        return Ok(());
    }
    let stamp = fingerprint::file_stamp(&layer, &fingerprint::of(&layer, identity.vouched)?)?;
    keeping_time_of(file, || {
        qcow2::change_identity(&**file, |identity| {
            if let Some(clones) = identity.label.as_mut().and_then(|l| l.clones.as_mut()) {
                clones.seen = Seen::As(stamp);
            }
            Ok(())
        })
    })
}

/// Changes what the header of the layer at `path` says of it while others may read it: nobody else
/// may be writing it. `change` is told what the layer looks like.
///
/// # Errors
/// [`ErrorKind::InUse`] names who writes it.
pub(crate) fn relabel_shared(
    path: &Path,
    change: impl FnOnce(&Layer, &mut Identity) -> Result<()>,
) -> Result<()> {
    let options = FileOptions { access: Some(Access::Read), write: true };
    let file = Arc::new(FileStorage::open(path, options)?);
    file.take_turn()?;
    let options = OpenOptions {
        format: Some(Format::Qcow2),
        unprotected: true,
        locked: true,
        ..OpenOptions::default()
    };
    let layer = open_file(path, file.clone(), &options)?;
    let work = || qcow2::change_identity(&*file, |identity| change(&layer, identity));
    keeping_time_of(&file, work).map_err(|e| e.at_path(path))
}

/// Runs what changes an open file's header, and gives the file the time of its last write back.
fn keeping_time_of<T>(file: &FileStorage, change: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = file.file().metadata().and_then(|meta| meta.modified());
    let before = before.map_err(|e| Error::io("could not be examined", e).at_path(file.path()))?;
    let done = change();
    let _ = file.file().set_times(FileTimes::new().set_modified(before));
    done
}

/// Whether that is why a layer cannot be marked: the host lets nobody write it, so that it is as good
/// as sealed.
pub(crate) fn is_out_of_reach(error: &Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS))
        || error.kind() == ErrorKind::Denied
}
