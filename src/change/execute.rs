//! Executing a plan: of an idle disk, or beside the user of one that this process holds.

use crate::change::base::marks::Bases;
use crate::change::open::take_head;
use crate::change::plan::Plan;
use crate::change::run::Run;
use crate::change::run::context::Context;
use crate::change::run::step::Step;
use crate::error::Result;
use crate::family::tree::Family;
use crate::progress::Progress;
use crate::storage::Turn;

impl Plan {
    /// Does it. `progress` is told the bytes that are moved.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`](crate::ErrorKind::Busy) where the tree is another than the plan was made for;
    /// [`ErrorKind::InUse`](crate::ErrorKind::InUse) names who holds the disk;
    /// [`ErrorKind::Interrupted`](crate::ErrorKind::Interrupted) where `progress` asked to stop: the tree
    /// is then as it was, or is finished by the next open for writing.
    pub fn execute(&self, progress: &mut Progress<'_>) -> Result<()> {
        let _turn = Turn::take(&self.disk)?;
        if self.resumes() {
            return Run::new(Context::Idle, Family::of(&self.disk)?).steps(&self.steps, progress);
        }
        // Before the family is read: then nobody else changes it any more.
        let head = take_head(&self.disk)?;
        let family = Family::of(&self.disk)?;
        self.check_family(&family)?;
        let bases = Bases::several(&family);
        let done = Run::new(Context::Idle, family).holding(head).steps(&self.steps, progress);
        bases.leave(&self.disk);
        done
    }

    /// As [`execute`](Plan::execute), in the process that holds the disk and keeps all others out by that.
    /// What moves the head is not for a disk in use.
    pub(crate) fn execute_in(
        &self,
        context: Context<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let family = Family::of(&self.disk)?;
        if !self.resumes() {
            self.check_family(&family)?;
        }
        Run::new(context, family).steps(&self.steps, progress)
    }

    /// Whether it goes on with what healing the disk would go on with: whoever heals it meanwhile has
    /// done some of it.
    fn resumes(&self) -> bool {
        matches!(self.steps[..], [Step::Resume(_)])
    }
}
