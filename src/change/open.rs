//! Opening a disk for its user: what an interrupted change of its tree left is put right first, a layer
//! that others stand on is not written, and where the host has no space for what is written, what is kept
//! aside is let go of.

use std::path::Path;

use crate::chain::{Chain, Layer};
use crate::change::heal;
use crate::change::release;
use crate::change::run::Run;
use crate::change::run::context::Context;
use crate::change::run::layer::{same_contents, same_open_file, unprotected};
use crate::change::run::step::Step;
use crate::error::Result;
use crate::family::sealed;
use crate::family::tree::Family;
use crate::image::Identity;
use crate::open::{Format, OpenOptions, Walk, open_image};
use crate::storage::follow;
use crate::storage::name::sync_directory;

/// Opens the disk at `path` with all layers below it.
///
/// # Errors
/// [`ErrorKind::Sealed`](crate::ErrorKind::Sealed) for writing to a layer that others stand on;
/// [`ErrorKind::BaseChanged`](crate::ErrorKind::BaseChanged) where a layer below is not the one its
/// child was made from; others name the file that they are about.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Chain> {
    // What the user says is raw is no layer of a tree, whatever its guest wrote.
    if options.is_guarded() && matches!(options.format, None | Some(Format::Qcow2)) {
        heal::heal(&follow(path)?)?;
    }
    Walk::begin(path, options, &refuse_head)?.down_to_the_base().map(with_space)
}

/// Lets what is kept aside of a disk go where the host has no space for what is written to it.
pub fn with_space(chain: Chain) -> Chain {
    chain.on_full(Box::new(|head| {
        // A throw-away delta is not the disk.
        let own = !head.image.read_only() && same_open_file(&head.path, head).is_ok_and(|o| o);
        own && discard_bare(&head.path).unwrap_or(false)
    }));
    chain
}

/// Refuses to write to the layer at `path`, where it says that others stand on it, or they say so.
fn refuse_head(path: &Path, identity: &Identity) -> Result<()> {
    sealed::refuse(path, identity)?;
    sealed::refuse_unaware(path, identity)
}

/// Removes what is kept aside and has nothing on it, whoever looks at the rest; whether there was
/// anything. What is left of it the next open puts right.
fn discard_bare(path: &Path) -> Result<bool> {
    let Some(family) = Family::read(path)? else { return Ok(false) };
    let bare = release::bare(&family)?;
    let mut run = Run::new(Context::Idle, family);
    let mut any = false;
    for layer in &bare {
        any |= run.quietly(&[Step::Discard(*layer)]).is_ok();
    }
    if any {
        sync_directory(path)?;
    }
    Ok(any)
}

/// Opens the head alone, for writing: nobody else has the disk meanwhile.
pub(crate) fn take_head(path: &Path) -> Result<Layer> {
    take(path, &unprotected())
}

/// As [`take_head`], for changes after which the disk shows what it showed.
pub(crate) fn take_head_same(path: &Path) -> Result<Layer> {
    take(path, &same_contents())
}

fn take(path: &Path, options: &OpenOptions) -> Result<Layer> {
    heal::heal(path)?;
    let head = open_image(path, options)?;
    refuse_head(path, &head.image.identity()?)?;
    Ok(head)
}
