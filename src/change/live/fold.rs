//! Folding a layer of a disk in use into its neighbour, behind its user's reads and writes.
//!
//! *Up*, into the layer above: what only the snapshot's layer holds is copied. Where the layer above
//! is the head, each cluster is copied under its in-flight entry, so that no write of the guest is
//! lost; where it is frozen, the copy goes into its file through a second handle, and the chain reads on
//! through its own, which stays right: nothing that it maps moves.
//!
//! *Down*, from the frozen layer above into the snapshot's: only whole clusters are written that the
//! layer above hides. What the chain reads of the layer itself stands where it stood.
//!
//! *In batches*, what was copied is given back where it came from. Before that, the chain is made to
//! read it from where it is now, and whoever reads it from where it was has finished: a request
//! keeps the layers from being exchanged until its last byte is read.
//!
//! The files say when a merge is done; the layers in memory follow them. What a crash leaves at any
//! point, the next open finishes, as for an idle disk.

use std::path::Path;
use std::sync::Arc;

use crate::block::BlockDevice;
use crate::chain::{Chain, Layer};
use crate::change::live::handle::{Alone, WriteHandle, reopen};
use crate::change::live::held::Held;
use crate::change::live::tail::Tail;
use crate::change::run::chains::Unused;
use crate::change::run::fold;
use crate::change::run::fold::{Meter, Source, UNFINISHED};
use crate::error::{Error, Result};
use crate::family::cost::data_bytes;
use crate::family::tree::Member;
use crate::open::OpenOptions;
use crate::progress::Progress;

/// Bytes that are copied at a time: the guest waits for no more than that.
const CHUNK: u64 = 256 << 10;
/// What a merge that copies all first leaves where it did not end.
const UNCHANGED: &str = "the disk and its snapshots are as they were";

/// A chain whose head takes in what another layer holds.
pub(crate) enum Taker {
    /// The disk in use.
    Head(Arc<Chain>),
    /// A frozen layer that the disk in use stands on.
    Frozen(Frozen),
    /// A layer that nobody uses.
    Beside(Unused),
}

/// A chain on a layer's second handle.
pub(crate) struct Frozen {
    // Goes first: then the layer is closed, and others may have it.
    chain: Chain,
    _handle: WriteHandle,
}

impl Taker {
    pub fn chain(&self) -> &Chain {
        match self {
            Taker::Head(chain) => chain,
            Taker::Frozen(frozen) => &frozen.chain,
            Taker::Beside(unused) => unused.chain(),
        }
    }
}

impl Held {
    /// The layers, and the place among them of the one in the file at `path`.
    fn find(&self, path: &Path) -> Result<(Vec<Layer>, usize)> {
        let number = self.number_of(path);
        let gone =
            || Error::corrupt("is not the layer that the disk in use stands on").at_path(path);
        Ok((self.chain().all_layers(), number.ok_or_else(gone)?))
    }

    /// The layer at `path`, of the disk in use, on those that it stands on; `lower` in the place of
    /// the one right below it.
    pub(crate) fn taker(&self, path: &Path, lower: Option<&Layer>) -> Result<Taker> {
        let (layers, number) = self.find(path)?;
        self.touch();
        if number == 0 {
            return Ok(Taker::Head(self.chain().clone()));
        }
        let handle = WriteHandle::open(&layers[number], true)?;
        let mut below = layers[number + 1..].to_vec();
        if let (Some(first), Some(lower)) = (below.first_mut(), lower) {
            *first = lower.clone();
        }
        let chain = Chain::new(handle.layer().clone(), below, OpenOptions::CACHE / 2);
        Ok(Taker::Frozen(Frozen { chain, _handle: handle }))
    }

    fn takers(&self, on: &[Member], lower: &Layer) -> Result<Vec<Taker>> {
        let taker = |child: &Member| match self.number_of(&child.path) {
            Some(_) => self.taker(&child.path, Some(lower)),
            None => Unused::over(child, lower).map(Taker::Beside),
        };
        on.iter().map(taker).collect()
    }

    /// Makes the layers `on` it hold what only `layer` holds, `share` as the host can.
    pub(crate) fn fold_up(
        &self,
        layer: &Member,
        on: &[Member],
        share: bool,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let (layers, number) = self.find(&layer.path)?;
        let lower = &layers[number];
        // Nobody begins to read it meanwhile.
        let _alone = Alone::with(lower)?;
        let each = data_bytes(&*lower.image)?;
        let total = each.saturating_mul(on.len() as u64);
        let mut meter = Meter::new(progress, total, UNCHANGED).behind_others(CHUNK);
        // One at a time: of a frozen one the file is closed before its own children are opened.
        for child in on {
            for taker in self.takers(std::slice::from_ref(child), lower)? {
                fold::up_metered(taker.chain(), &Source::below(lower, share), &mut meter)?;
                taker.chain().flush()?;
                taker.chain().flush()?;
            }
        }
        Ok(())
    }

    /// Moves what `layer` holds into those `on` it, batch by batch.
    pub(crate) fn fold_up_in_batches(
        &self,
        layer: &Member,
        on: &[Member],
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let (layers, number) = self.find(&layer.path)?;
        self.touch();
        let handle = WriteHandle::open(&layers[number], false)?;
        let lower = handle.layer();
        let takers = self.takers(on, lower)?;
        let total = data_bytes(&*lower.image)?.saturating_mul(takers.len() as u64);
        let mut meter = Meter::new(progress, total, UNFINISHED).behind_others(CHUNK);
        let chains: Vec<&Chain> = takers.iter().map(Taker::chain).collect();
        fold::up_in_batches(&chains, lower, &mut meter, &mut |_| self.show_again(number - 1))
    }

    /// Folds the frozen layer `child`, the only one on `layer`, into it. Both stay open, the upper one
    /// first: nobody begins to read by the name that is about to be the other's.
    pub(crate) fn fold_down(
        &self,
        layer: &Member,
        child: &Member,
        in_batches: bool,
        progress: &mut Progress<'_>,
    ) -> Result<(WriteHandle, WriteHandle)> {
        let (layers, number) = self.find(&layer.path)?;
        if number < 2 || self.number_of(&child.path) != Some(number - 1) {
            let message = "is not made of the layers that its files name; reopen it";
            return Err(Error::corrupt(message).at_path(self.path()));
        }
        self.touch();
        let upper = WriteHandle::open(&layers[number - 1], true)?;
        let lower = WriteHandle::open(&layers[number], false)?;
        let below = layers[number + 1..].to_vec();
        let chain = Chain::new(lower.layer().clone(), below, OpenOptions::CACHE / 2);
        let total = data_bytes(&*upper.layer().image)?;
        let mut meter = Meter::new(progress, total, UNFINISHED).behind_others(CHUNK);
        let above = &layers[number - 1];
        fold::down(upper.layer(), in_batches, &chain, &mut meter, &mut |end| {
            self.show_below(number, Tail::of(above, end))
        })?;
        chain.flush()?;
        drop(chain);
        Ok((upper, lower))
    }

    /// Lets the disk's user see what layer `number` has taken in, and nothing any more of where that
    /// came from.
    fn show_again(&self, number: usize) -> Result<()> {
        let Some(below) = number.checked_sub(1) else {
            // The head is what it writes itself.
            self.chain().wait_for_requests();
            return Ok(());
        };
        let mut lower = self.chain().all_layers().split_off(1);
        lower[below] = reopen(&lower[below])?;
        self.chain().replace_lower(lower);
        Ok(())
    }

    /// Lets the disk's user see what layer `number` has taken in, and of the layer above only `rest`.
    fn show_below(&self, number: usize, rest: Layer) -> Result<()> {
        let mut lower = self.chain().all_layers().split_off(1);
        lower[number - 1] = reopen(&lower[number - 1])?;
        lower[number - 2] = rest;
        self.chain().replace_lower(lower);
        Ok(())
    }
}
