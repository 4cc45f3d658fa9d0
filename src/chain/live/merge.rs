//! Merging a snapshot of a disk in use, behind its user's reads and writes.
//!
//! *Up*, into the layer above: what only the snapshot's layer holds is copied. Where the layer above
//! is the head, each cluster is copied under its in-flight entry, so that no write of the guest is
//! lost; where it is frozen, the copy goes into its file by a second way in, and the chain reads on
//! through the first, which stays right: nothing that it maps moves.
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
use std::time::{Duration, Instant};

use super::rest::Rest;
use super::second::{Alone, Second, reopen};
use super::{Live, Turn};
use crate::block::BlockDevice;
use crate::chain::cost::{data_bytes, look};
use crate::chain::fold::{self, Meter, Source};
use crate::chain::merge::{Progress, UNFINISHED, Wishes, on_open, plan_merge, take_place};
use crate::chain::open::OpenOptions;
use crate::chain::reach::Reach;
use crate::chain::tree::Member;
use crate::chain::{Chain, Layer};
use crate::error::{Error, Result};
use crate::storage::draft::{rename, sync_directory};

/// Bytes that are copied at a time: the guest waits for no more than that.
const CHUNK: u64 = 256 << 10;
/// How often somebody who slows a merge down looks whether it is to stop.
const NAP: Duration = Duration::from_millis(20);
/// What a merge that copies all first leaves where it did not end.
const UNCHANGED: &str = "the disk and its snapshots are as they were";

/// Says how far a merge is, slows it down and stops it.
struct Pace<'a, 'p> {
    turn: &'a Turn<'a>,
    progress: &'a mut Progress<'p>,
    rate: Option<u64>,
    since: Instant,
    /// Bytes of the parts of the work that came before this one, and of this one.
    before: u64,
    done: u64,
}

impl Pace<'_, '_> {
    /// Notes that `done` bytes of this part were copied, and waits as long as the rate asks; `false`
    /// where it is to stop.
    fn goes_on(&mut self, done: u64, total: u64) -> bool {
        if done < self.done {
            // Another part has begun.
            self.before += self.done;
        }
        self.done = done;
        loop {
            self.turn.at(done, total);
            if !(self.progress)(done, total) {
                return false;
            }
            let Some(rate) = self.rate.filter(|r| *r > 0) else { return true };
            let due = Duration::from_secs_f64((self.before + done) as f64 / rate as f64);
            let early = due.saturating_sub(self.since.elapsed());
            if early.is_zero() {
                return true;
            }
            std::thread::sleep(early.min(NAP));
        }
    }
}

/// A chain whose head takes in what another layer holds.
pub(in crate::chain) enum Taker {
    /// The disk in use.
    Head(Arc<Chain>),
    /// A frozen layer that the disk in use stands on.
    Frozen(Frozen),
    /// A layer that nobody uses.
    Beside(Chain),
}

/// A chain on a layer's second way in.
pub(in crate::chain) struct Frozen {
    // Goes first: then the layer is closed, and others may have it.
    chain: Chain,
    _second: Second,
}

impl Taker {
    pub fn chain(&self) -> &Chain {
        match self {
            Taker::Head(chain) => chain,
            Taker::Frozen(frozen) => &frozen.chain,
            Taker::Beside(chain) => chain,
        }
    }
}

impl Live {
    /// Merges the snapshot `name` into a neighbour: the name goes, no change is lost. At most `rate`
    /// bytes are copied in a second, if that is given. `tree` is that of the plan that was shown.
    ///
    /// # Errors
    /// As for an idle disk; [`ErrorKind::Interrupted`](crate::ErrorKind::Interrupted) where
    /// `progress` asked to stop.
    pub fn merge(
        &self,
        name: &str,
        wishes: Wishes,
        (rate, tree): (Option<u64>, Option<u64>),
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        self.change(format!("merge of snapshot '{name}'"), |turn| {
            let plan = plan_merge(self.path(), name, Wishes { in_use: true, ..wishes })?;
            plan.check_tree(tree)?;
            let since = Instant::now();
            let mut pace = Pace { turn, progress, rate, since, before: 0, done: 0 };
            plan.execute_in(&Reach::Held(self), &mut |done, total| pace.goes_on(done, total))
        })
    }

    /// The layers, and the place among them of the one in the file at `path`.
    fn find(&self, path: &Path) -> Result<(Vec<Layer>, usize)> {
        let number = self.number_of(path);
        let gone =
            || Error::corrupt("is not the layer that the disk in use stands on").at_path(path);
        Ok((self.chain.all_layers(), number.ok_or_else(gone)?))
    }

    /// The layer at `path`, of the disk in use, on those that it stands on; `lower` in the place of
    /// the one right below it.
    pub(in crate::chain) fn taker(&self, path: &Path, lower: Option<&Layer>) -> Result<Taker> {
        let (layers, number) = self.find(path)?;
        self.touch();
        if number == 0 {
            return Ok(Taker::Head(self.chain.clone()));
        }
        let second = Second::open(&layers[number], true)?;
        let mut below = layers[number + 1..].to_vec();
        if let (Some(first), Some(lower)) = (below.first_mut(), lower) {
            *first = lower.clone();
        }
        let chain = Chain::new(second.layer().clone(), below, OpenOptions::CACHE / 2);
        Ok(Taker::Frozen(Frozen { chain, _second: second }))
    }

    fn takers(&self, on: &[&Member], lower: &Layer) -> Result<Vec<Taker>> {
        let taker = |child: &&Member| match self.number_of(&child.path) {
            Some(_) => self.taker(&child.path, Some(lower)),
            None => on_open(child, lower).map(Taker::Beside),
        };
        on.iter().map(taker).collect()
    }

    /// Makes the layers `on` it hold what only `layer` holds, `share` as the host can.
    pub(in crate::chain) fn fold_up(
        &self,
        layer: &Member,
        on: &[&Member],
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
        for taker in on {
            for taker in self.takers(&[*taker], lower)? {
                fold::up_metered(taker.chain(), &Source::below(lower, share), &mut meter)?;
                taker.chain().flush()?;
                taker.chain().flush()?;
            }
        }
        Ok(())
    }

    /// Moves what `layer` holds into those `on` it, batch by batch.
    pub(in crate::chain) fn rise(
        &self,
        layer: &Member,
        on: &[&Member],
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let (layers, number) = self.find(&layer.path)?;
        self.touch();
        let second = Second::open(&layers[number], false)?;
        let lower = second.layer();
        let takers = self.takers(on, lower)?;
        let total = data_bytes(&*lower.image)?.saturating_mul(takers.len() as u64);
        let mut meter = Meter::new(progress, total, UNFINISHED).behind_others(CHUNK);
        let chains: Vec<&Chain> = takers.iter().map(Taker::chain).collect();
        fold::up_in_batches(&chains, lower, &mut meter, &mut |_| self.show_again(number - 1))
    }

    /// Folds the frozen layer `child`, the only one on `layer`, into it.
    pub(in crate::chain) fn fold_down(
        &self,
        layer: &Member,
        child: &Member,
        in_batches: bool,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let (layers, number) = self.find(&layer.path)?;
        if number < 2 || self.number_of(&child.path) != Some(number - 1) {
            let message = "is not made of the layers that its files name; reopen it";
            return Err(Error::corrupt(message).at_path(self.path()));
        }
        self.touch();
        // Both stay locked until the name is the other's: nobody begins to read by the old one.
        let upper = Second::open(&layers[number - 1], true)?;
        let lower = Second::open(&layers[number], false)?;
        let below = layers[number + 1..].to_vec();
        let chain = Chain::new(lower.layer().clone(), below, OpenOptions::CACHE / 2);
        let total = data_bytes(&*upper.layer().image)?;
        let mut meter = Meter::new(progress, total, UNFINISHED).behind_others(CHUNK);
        let above = &layers[number - 1];
        fold::down((upper.layer(), in_batches), &chain, &mut meter, &mut |end| {
            self.show_below(number, Rest::of(above, end))
        })?;
        chain.flush()?;
        take_place(&*look(child)?.image, layer, &*lower.layer().image)?;
        drop(chain);
        rename(&layer.path, &child.path)?;
        sync_directory(self.path())
    }

    /// Lets the disk's user see what layer `number` has taken in, and nothing any more of where that
    /// came from.
    fn show_again(&self, number: usize) -> Result<()> {
        let Some(below) = number.checked_sub(1) else {
            // The head is what it writes itself.
            self.chain.wait_for_requests();
            return Ok(());
        };
        let mut lower = self.chain.all_layers().split_off(1);
        lower[below] = reopen(&lower[below])?;
        self.chain.replace_lower(lower);
        Ok(())
    }

    /// Lets the disk's user see what layer `number` has taken in, and of the layer above only `rest`.
    fn show_below(&self, number: usize, rest: Layer) -> Result<()> {
        let mut lower = self.chain.all_layers().split_off(1);
        lower[number - 1] = reopen(&lower[number - 1])?;
        lower[number - 2] = rest;
        self.chain.replace_lower(lower);
        Ok(())
    }
}
