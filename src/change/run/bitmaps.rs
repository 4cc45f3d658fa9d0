//! Bitmaps of layers that become one: what each of them says goes where its contents go.
//!
//! A bitmap lives in the layer whose writes it records. When a snapshot is taken, the new head gets the
//! head's bitmaps with all that they say. When a layer is folded into one on it, that one's bitmaps
//! first take in what the layer's say: from then on it can do without it, whenever the rest is done.

use crate::change::run::context::Context;
use crate::error::{ErrorKind, Result};
use crate::family::cost::look;
use crate::family::tree::Member;
use crate::image::{Bitmap, Image};
use crate::open::sameness::Rewriting;

/// The bitmaps of a layer.
pub(crate) fn of(layer: &Member) -> Result<Vec<Bitmap>> {
    look(layer)?.image.bitmaps().map_err(|e| e.at_path(&layer.path))
}

/// Makes the bitmaps of `child` say what those of the layer below it, `below`, say, too.
pub(super) fn take_up(context: Context<'_>, below: &[Bitmap], child: &Member) -> Result<()> {
    let open = context.open(&child.path)?;
    // The head in use is written meanwhile; nobody else stands on it.
    let head = context.held().filter(|held| held.number_of(&child.path) == Some(0));
    let rewriting = head.is_none().then(|| Rewriting::begin(&open)).transpose()?;
    let _alone = head.map(|held| held.chain().layers_alone());
    let own = open.image.bitmaps()?;
    let is_late = |b: &Bitmap| b.records && own.iter().all(|o| o.name != b.name);
    // In one step. What recorded nothing of what was done above, a way back to the layer below among it, can
    // only call all of the disk written.
    let all = std::iter::once(0..open.image.size());
    let more = below.iter().map(|b| match is_late(b) {
        true => Bitmap { written: all.clone().collect(), ..b.clone() },
        false => b.clone(),
    });
    let added = open.image.add_to_bitmaps(&more.collect::<Vec<_>>());
    supported(added).map_err(|e| e.at_path(&child.path))?;
    // Others may stand on it: it says what it looks like once it is closed.
    drop(open);
    drop(rewriting);
    Ok(())
}

/// Gives `image`, which took in what `upper` holds, the bitmaps of that.
pub(crate) fn take_over(upper: &dyn Image, image: &dyn Image) -> Result<()> {
    supported(image.replace_bitmaps(&upper.bitmaps()?))
}

/// Lets all that records writes call all of the disk written: what it shows may be anything by now.
pub(crate) fn count_all(image: &dyn Image) -> Result<()> {
    let all = |b: Bitmap| Bitmap { written: std::iter::once(0..image.size()).collect(), ..b };
    let recording = image.bitmaps()?.into_iter().filter(|b| b.records);
    image.add_to_bitmaps(&recording.map(all).collect::<Vec<_>>())
}

/// The plan has said what becomes of bitmaps in an image that can have none.
fn supported(done: Result<()>) -> Result<()> {
    match done {
        Err(e) if e.kind() == ErrorKind::Unsupported => Ok(()),
        done => done,
    }
}

/// The names of the bitmaps that are lost where `from` go into `into`.
pub(crate) fn lost(from: &[&Member], into: &[&Member]) -> Result<Vec<String>> {
    let mut old = false;
    for member in into {
        let version = look(member)?.image.details().and_then(|d| d.version);
        old |= version == Some(2);
    }
    let mut names = Vec::new();
    for member in from.iter().filter(|_| old) {
        names.extend(names_of(member)?);
    }
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

/// The names of a layer's bitmaps that say something.
pub(crate) fn names_of(member: &Member) -> Result<Vec<String>> {
    Ok(look(member)?.image.bitmaps()?.into_iter().map(|b| b.name).collect())
}
