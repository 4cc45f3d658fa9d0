//! The interpreter of steps: the one place where a tree is changed, of an idle disk and of one in use,
//! for a plan and for what heals an interrupted one.
//!
//! It carries the family along: read once, under the lock of whoever may change it, and kept up with each
//! step. It knows no verb and no reason.

mod act;
pub(crate) mod bitmaps;
pub(crate) mod chains;
pub(crate) mod context;
pub(crate) mod fold;
mod folding;
pub(crate) mod head;
pub(crate) mod layer;
pub(crate) mod step;

use std::path::{Path, PathBuf};

use crate::chain::Layer;
use crate::change::event::drop_rest;
use crate::change::live::handle::OpenLayer;
use crate::change::release::{Next, Seen, let_go, next_unnamed};
use crate::change::run::layer::same_open_file;
use crate::change::{release, strategy};
use crate::error::{Error, ErrorKind, Result};
use crate::family::tree::{Family, Member};
use crate::family::{dropped, frozen_path};
use crate::image::{Bitmap, Id};
use crate::progress::Progress;

use context::Context;
use folding::Folded;
pub(crate) use head::Ready;
use step::{Step, Which};

/// A change of a tree under way.
pub(crate) struct Run<'a> {
    context: Context<'a>,
    family: Family,
    /// The head of an idle disk, until a step opens it itself: nobody else has the disk.
    head: Option<Layer>,
    /// Whether the head's file says that it is a frozen layer, and still has the head's name.
    demoted: bool,
    /// What the new head will stand on.
    below: Option<Layer>,
    /// A new head that was made ready, on a layer of another disk.
    ready: Option<Ready>,
    /// The bitmaps that it will have.
    bitmaps: Vec<Bitmap>,
    /// A layer that took in another, whose name it is about to take.
    folded: Option<Folded>,
}

impl<'a> Run<'a> {
    /// A change of the disk whose family this is, read when nobody else could change it any more.
    pub fn new(context: Context<'a>, family: Family) -> Run<'a> {
        let (head, below, ready, folded) = (None, None, None, None);
        Run { context, family, head, demoted: false, below, ready, bitmaps: Vec::new(), folded }
    }

    /// The same while the head of an idle disk is open for writing.
    pub fn holding(self, head: Layer) -> Run<'a> {
        Run { head: Some(head), ..self }
    }

    /// The same with a head that is ready to take the place of the one before.
    pub fn with_head(self, ready: Ready) -> Run<'a> {
        Run { ready: Some(ready), ..self }
    }

    /// The family as it is by now.
    pub fn family(&self) -> &Family {
        &self.family
    }

    /// Does the steps, one after the other, until one fails: what stands then, each step's doc says.
    pub fn steps(&mut self, steps: &[Step], progress: &mut Progress<'_>) -> Result<()> {
        let done = steps.iter().try_for_each(|step| self.step(step, progress));
        if done.is_err() {
            // What others may have again.
            self.folded = None;
        }
        done
    }

    /// As [`steps`](Run::steps), telling nobody.
    pub fn quietly(&mut self, steps: &[Step]) -> Result<()> {
        self.steps(steps, &mut |_, _| true)
    }

    fn step(&mut self, step: &Step, progress: &mut Progress<'_>) -> Result<()> {
        match step {
            Step::Claim { layer, unless_cloned } => self.claim(*layer, *unless_cloned),
            Step::Hold(layer) => self.hold(*layer),
            Step::HoldHead => self.hold_head(),
            Step::PutHead => self.put_head(),
            Step::ReadBitmaps => self.read_bitmaps(),
            Step::Demote(demote) => self.demote(demote),
            Step::Promote => self.promote(),
            Step::NewHead { on, bitmaps } => self.new_head(*on, *bitmaps),
            Step::Label(relabel) => self.label(relabel),
            Step::Rename { layer, name } => {
                self.relabel(*layer, |label| label.name.clone_from(name))
            }
            Step::ForgetClones(layer) => self.forget_clones(*layer),
            Step::NewId => self.new_id(),
            Step::BecomeHead => self.become_head(),
            Step::TakeBitmaps { from, into } => self.take_bitmaps(*from, into),
            Step::BecomeAccessibleAs { layer, like } => self.become_accessible_as(*layer, *like),
            Step::FoldUp { from, into, method } => self.fold_up(*from, into, *method, progress),
            Step::FoldDown { from, into, in_batches } => {
                self.fold_down(*from, *into, *in_batches, progress)
            }
            Step::TakeLabel { from, into } => self.take_label(*from, *into),
            Step::TakeName { file, over } => self.take_name(file, over),
            Step::MoveOff { layer, off } => self.move_off(*layer, *off),
            Step::MoveBack { layer, onto } => self.move_back(*layer, *onto),
            Step::Remove(layer) => self.remove(*layer),
            Step::Discard(layer) => self.discard(*layer),
            Step::SyncNames => self.sync_names(),
            Step::Stamp(layer) => self.note_stamp(*layer),
            Step::Reload => self.context.reload(),
            Step::Fold(fold) => self.steps(&strategy::steps(&self.family, fold)?, progress),
            Step::Resume(layer) => {
                let steps = strategy::resume(&self.family, *layer, self.context.in_use())?;
                self.steps(&steps, progress)
            }
            Step::DropRest(first) => self.drop_rest(*first, progress),
            Step::RefuseLeft(layers) => self.refuse_left(layers),
            Step::LetGo(which) => self.let_go(which, progress),
            Step::Collect { fold } => self.collect(*fold, progress),
            Step::IfPossible(steps) => match self.steps(steps, progress) {
                Err(e) if is_for_later(&e) => self.look_again(),
                done => done,
            },
        }
    }

    fn drop_rest(&mut self, first: Id, progress: &mut Progress<'_>) -> Result<()> {
        // Somebody may have made a clone since it was read.
        self.look_again()?;
        let Some(kept) = self.member(first)?.label.kept.clone() else { return Ok(()) };
        self.steps(&drop_rest(&self.family, first, &kept), progress)
    }

    fn let_go(&mut self, which: &Which, progress: &mut Progress<'_>) -> Result<()> {
        let all = || dropped::events(&self.family).into_iter().map(|e| e.kept.event);
        let events: Vec<u64> = match which {
            Which::All => all().collect(),
            Which::Events(events) => events.clone(),
            Which::AllBut(event) => all().filter(|e| e != event).collect(),
            Which::Overdue => dropped::overdue(&self.family),
        };
        events.into_iter().try_for_each(|event| {
            let steps = let_go(&self.family, event)?;
            self.steps(&steps, progress)
        })
    }

    fn collect(&mut self, fold: bool, progress: &mut Progress<'_>) -> Result<()> {
        let mut seen = Seen::default();
        // Whatever goes or is folded makes the tree another one.
        loop {
            match next_unnamed(&self.family, &mut seen, fold)? {
                Next::Gone(steps) => self.steps(&steps, progress)?,
                Next::Fold(layer) => {
                    let steps = release::fold(&self.family, layer, self.context.in_use());
                    // Where it cannot be folded it stays as it is: the disk is right with it.
                    match steps.and_then(|steps| self.steps(&steps, progress)) {
                        Err(e) if matches!(e.kind(), ErrorKind::NoSpace | ErrorKind::InUse) => {
                            self.look_again()?;
                        }
                        done => done?,
                    }
                }
                Next::Nothing => return Ok(()),
            }
        }
    }

    /// Reads the family anew: a step that failed may have been done.
    fn look_again(&mut self) -> Result<()> {
        self.family = Family::of(self.disk())?;
        Ok(())
    }

    fn member(&self, layer: Id) -> Result<&Member> {
        self.family
            .member(layer)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, "has lost a layer").at_path(self.disk()))
    }

    fn members(&self, layers: &[Id]) -> Result<Vec<Member>> {
        layers.iter().map(|layer| self.member(*layer).cloned()).collect()
    }

    fn path(&self, layer: Id) -> Result<PathBuf> {
        self.member(layer).map(|m| m.path.clone())
    }

    fn disk(&self) -> &Path {
        &self.family.head.path
    }

    fn open(&mut self, layer: Id) -> Result<OpenLayer> {
        let path = self.path(layer)?;
        self.let_have(&path);
        self.context.open(&path)
    }

    /// Lets go of the head where a step is about to open its file.
    fn let_have(&mut self, path: &Path) {
        if self.head.as_ref().is_some_and(|head| same_open_file(path, head).unwrap_or(true)) {
            self.head = None;
        }
    }

    /// Notes that another file has the head's name: where the one before was demoted, it is a frozen layer.
    fn head_replaced(&mut self) {
        if std::mem::take(&mut self.demoted) {
            let old = self.family.head.clone();
            let path = frozen_path(&old.path, old.label.layer);
            self.family.put(Member { path, ..old });
        }
    }
}

/// Whether that is why something is left for later: there is no room for it, or somebody looks at a layer.
/// The disk is right as it is.
pub(crate) fn is_for_later(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::InUse | ErrorKind::Busy)
}
