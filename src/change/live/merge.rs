//! Merging a snapshot of a disk in use: how fast that goes.

use std::time::{Duration, Instant};

use crate::change::live::{Live, Turn};
use crate::change::merge::{Wishes, plan_merge};
use crate::change::run::context::Context;
use crate::error::Result;
use crate::progress::Progress;

/// How often somebody who slows a merge down looks whether it is to stop.
const NAP: Duration = Duration::from_millis(20);

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
        rate: Option<u64>,
        tree: Option<u64>,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        self.change(format!("merge of snapshot '{name}'"), |turn| {
            let plan = plan_merge(self.path(), name, Wishes { in_use: true, ..wishes })?;
            plan.check_tree(tree)?;
            let since = Instant::now();
            let mut pace = Pace { turn, progress, rate, since, before: 0, done: 0 };
            plan.execute_in(Context::Held(&self.held), &mut |done, total| pace.goes_on(done, total))
        })
    }
}
