//! How far a command is, as `-p` shows it.

use std::io::Write as _;

use vdisk::qcow2::{AmendPart, AmendProgress};

/// A percentage that is printed where it changes enough.
pub struct Progress {
    shown: bool,
    /// Percent that it has to move before it is printed again.
    step: f32,
    current: f32,
    last: f32,
}

impl Progress {
    /// Nothing is printed yet, and never unless it is `shown`.
    pub fn new(shown: bool, step: f32) -> Progress {
        Progress { shown, step, current: 0.0, last: 0.0 }
    }

    /// Nothing is done yet, and that is printed, where it is `shown`.
    pub fn begin(shown: bool, step: f32) -> Progress {
        let mut progress = Progress::new(shown, step);
        progress.at(0.0);
        progress
    }

    /// `percent` of all is done.
    pub fn at(&mut self, percent: f32) {
        self.current = percent.min(100.0);
        let moved = (self.current - self.last).abs() > self.step;
        if moved || self.current == 100.0 || self.current == 0.0 {
            self.last = self.current;
            if self.shown {
                print!("    ({:.2}/100%)\r", self.current);
                let _ = std::io::stdout().flush();
            }
        }
    }

    /// `percent` more of all is done.
    pub fn more(&mut self, percent: f32) {
        self.at(self.current + percent);
    }

    /// Nothing more is printed on this line.
    pub fn end(&mut self) {
        if self.shown {
            println!();
        }
    }
}

/// The parts of a change of an image as one percentage. How long those parts take that have not
/// begun is guessed from those that have.
pub struct Parts {
    count: u64,
    completed: u64,
    work_completed: u64,
    last: Option<(AmendPart, u64)>,
}

impl Parts {
    /// A change of so many parts.
    pub fn new(count: u64) -> Parts {
        Parts { count, completed: 0, work_completed: 0, last: None }
    }

    /// What this step of one part is of the whole, in percent.
    pub fn percent(&mut self, step: AmendProgress) -> f32 {
        if let Some((_, work)) = self.last.filter(|(part, _)| *part != step.part) {
            self.work_completed += work;
            self.completed += 1;
        }
        self.last = Some((step.part, step.total));
        let work = self.work_completed + step.total;
        let open = self.count.saturating_sub(self.completed + 1);
        let total = work + work * open / (self.completed + 1);
        100.0 * (self.work_completed + step.done) as f32 / total.max(1) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_have_not_begun_count_as_much_as_those_before() {
        let step = |part, done| AmendProgress { part, done, total: 4 };
        let mut parts = Parts::new(2);
        assert_eq!(parts.percent(step(AmendPart::Upgrade, 2)), 25.0);
        assert_eq!(parts.percent(step(AmendPart::Upgrade, 4)), 50.0);
        assert_eq!(parts.percent(step(AmendPart::RefcountWidth, 1)), 62.5);
        assert_eq!(parts.percent(step(AmendPart::RefcountWidth, 4)), 100.0);
    }
}
