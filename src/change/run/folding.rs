//! The steps that move what one layer holds into its neighbours, and layers from one to another.

use std::path::Path;

use crate::block::BlockDevice;
use crate::chain::{Chain, Layer};
use crate::change::live::fold::Taker;
use crate::change::live::handle::WriteHandle;
use crate::change::run::chains::Unused;
use crate::change::run::fold::{Meter, Source, UNFINISHED};
use crate::change::run::layer::{open_frozen, unprotected};
use crate::change::run::step::Method;
use crate::change::run::{Run, bitmaps, fold};
use crate::error::{Error, Result};
use crate::family::cost::{data_bytes, look};
use crate::family::tree::Member;
use crate::image::{Backing, Id, Identity, Image, Parent};
use crate::open::{OpenOptions, gate, open_image, open_layers, sameness};
use crate::progress::Progress;

/// Two layers that stay open, and out of others' reach, from the one's taking in what the other holds
/// until it has the other's name.
pub(super) enum Folded {
    Idle {
        upper: Layer,
        /// `None` once it is closed.
        lower: Option<Box<Chain>>,
    },
    Held {
        _upper: WriteHandle,
        lower: WriteHandle,
    },
}

impl Folded {
    fn lower(&self) -> Option<std::sync::Arc<dyn Image>> {
        match self {
            Folded::Idle { lower, .. } => lower.as_ref().map(|chain| chain.head().image),
            Folded::Held { lower, .. } => Some(lower.layer().image.clone()),
        }
    }

    /// Closes what took in the other: it writes what is left to be written while it has its own name.
    pub fn close_lower(&mut self) {
        if let Folded::Idle { lower, .. } = self {
            *lower = None;
        }
    }

    /// Whether the label says what the files look like when this goes.
    pub fn notes_sight(&self) -> bool {
        matches!(self, Folded::Held { .. })
    }
}

impl Run<'_> {
    pub(super) fn take_bitmaps(&mut self, from: Id, into: &[Id]) -> Result<()> {
        let (layer, on) = (self.member(from)?.clone(), self.members(into)?);
        let taken = bitmaps::of(&layer)?;
        if taken.is_empty() {
            return Ok(());
        }
        on.iter().try_for_each(|child| {
            self.let_have(&child.path);
            bitmaps::take_up(self.context, &taken, child)
        })
    }

    pub(super) fn fold_up(
        &mut self,
        from: Id,
        into: &[Id],
        method: Method,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let (layer, on) = (self.member(from)?.clone(), self.members(into)?);
        on.iter().for_each(|child| self.let_have(&child.path));
        let share = method == Method::Share;
        match (self.context.held_on(&layer.path), method) {
            (Some(held), Method::Batches) => held.fold_up_in_batches(&layer, &on, progress),
            (Some(held), _) => held.fold_up(&layer, &on, share, progress),
            (None, Method::Batches) => up_in_batches(&layer, &on, progress),
            (None, _) => on.iter().try_for_each(|child| up(child, &layer, share, progress)),
        }
    }

    pub(super) fn fold_down(
        &mut self,
        from: Id,
        into: Id,
        in_batches: bool,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let (child, layer) = (self.member(from)?.clone(), self.member(into)?.clone());
        self.let_have(&child.path);
        if let Some(held) = self.context.held_on(&layer.path) {
            let (upper, lower) = held.fold_down(&layer, &child, in_batches, progress)?;
            self.folded = Some(Folded::Held { _upper: upper, lower });
            return Ok(());
        }
        // Held for writing also where it is only read: nobody may change it meanwhile.
        let options = OpenOptions { same_contents: true, ..unprotected() };
        let upper = open_image(&child.path, &options)?;
        // Its own bitmaps stay what they are until it has all of the child's.
        let options = OpenOptions { unrecorded: true, ..unprotected() };
        let lower = open_layers(&layer.path, &options)?;
        sameness::begin_rewrite(&upper)?;
        let mut meter = Meter::new(progress, data_bytes(&*upper.image)?, UNFINISHED);
        fold::down(&upper, in_batches, &lower, &mut meter, &mut |_| Ok(()))?;
        lower.flush()?;
        self.folded = Some(Folded::Idle { upper, lower: Some(Box::new(lower)) });
        Ok(())
    }

    pub(super) fn take_label(&mut self, from: Id, into: Id) -> Result<()> {
        let (child, layer) = (self.member(from)?.clone(), self.member(into)?.clone());
        let open = || Error::invalid("is not open for taking another's label").at_path(&layer.path);
        let folded = self.folded.as_ref().ok_or_else(open)?;
        let image = folded.lower().ok_or_else(open)?;
        let identity = match folded {
            Folded::Idle { upper, .. } => take_label(&*upper.image, &layer, &*image)?,
            Folded::Held { .. } => take_label(&*look(&child)?.image, &layer, &*image)?,
        };
        self.family.relabel(&layer.path, identity);
        Ok(())
    }

    pub(super) fn move_back(&mut self, layer: Id, onto: Id) -> Result<()> {
        let (member, merged) = (self.member(layer)?.clone(), self.member(onto)?.clone());
        if member.parent() == Some(onto) {
            return Ok(());
        }
        let below = open_frozen(&merged.path)?;
        let vouched = below.image.identity()?.vouched;
        self.let_have(&member.path);
        let into = match self.context.held_on(&member.path) {
            Some(held) => held.taker(&member.path, None)?,
            None => Taker::Beside(Unused::alone(&member)?),
        };
        let identity = put_on(into.chain(), &below, &merged, vouched)?;
        drop(into);
        self.note(layer, identity)
    }
}

/// Copies into `child` what only `layer` holds.
fn up(child: &Member, layer: &Member, share: bool, progress: &mut Progress<'_>) -> Result<()> {
    let (unused, below) = Unused::on(child, layer)?;
    fold::up(unused.chain(), &Source::below(&below, share), progress)?;
    unused.chain().flush()
}

/// Moves what a layer holds into those on it, batch by batch.
fn up_in_batches(layer: &Member, on: &[Member], progress: &mut Progress<'_>) -> Result<()> {
    let lower = open_image(&layer.path, &unprotected())?;
    let chains = on.iter().map(|child| Unused::over(child, &lower));
    let chains = chains.collect::<Result<Vec<Unused>>>()?;
    let total = data_bytes(&*lower.image)?.saturating_mul(chains.len() as u64);
    let mut meter = Meter::new(progress, total, UNFINISHED);
    let chains: Vec<&Chain> = chains.iter().map(Unused::chain).collect();
    fold::up_in_batches(&chains, &lower, &mut meter, &mut |_| Ok(()))
}

/// Makes `image`, the layer `layer`, say of itself what `upper` says, which it took in; returns that.
fn take_label(upper: &dyn Image, layer: &Member, image: &dyn Image) -> Result<Identity> {
    bitmaps::take_over(upper, image).map_err(|e| e.at_path(&layer.path))?;
    let mut identity = upper.identity()?;
    identity.backing = image.backing();
    if let Some(label) = &mut identity.label {
        label.parent = layer.label.parent;
    }
    image.set_identity(&identity).map_err(|e| e.at_path(&layer.path))?;
    Ok(identity)
}

/// Makes the head of `chain` hold what `merged`, open as `below`, holds, and stand on it; returns what it
/// says then.
fn put_on(chain: &Chain, below: &Layer, merged: &Member, vouched: bool) -> Result<Identity> {
    fold::up(chain, &Source::beside(below), &mut |_, _| true)?;
    chain.flush()?;
    let head = chain.head();
    let mut own = head.image.identity()?;
    let name = gate::record(Path::new(merged.path.file_name().unwrap_or_default()))?;
    own.backing = Some(Backing { name, format: Some(below.format.name().to_owned()) });
    if let Some(label) = &mut own.label {
        let content = if vouched { merged.label.content } else { Id::nil() };
        label.parent = Some(Parent { layer: merged.label.layer, content, stamp: None });
    }
    head.image.set_identity(&own).map_err(|e| e.at_path(&head.path))?;
    Ok(own)
}
