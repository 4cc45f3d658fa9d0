//! How many of a server's threads wait for requests at a time: one, as long as one keeps up. A
//! program that waits for each answer is served fastest by the thread that served it last, whose
//! caches are warm; the kernel hands requests to waiting threads in turn. Others come in where one
//! is held up, by a disk or a large copy, or where all that wait are busy for a while. Knows no
//! request.

use std::cell::OnceCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::near::Place;

/// How often it is looked at what the threads do, while they do anything.
const TICK: Duration = Duration::from_millis(2);
/// After so many looks in a row that found all of them busy, one more comes in; after so many that
/// did not, one leaves.
const FEW: u32 = 8;
/// After so many looks that found nothing done, nobody looks until something is.
const MANY: u32 = 10;

/// The threads of a server.
pub(crate) struct Crew {
    members: Vec<Member>,
    /// How many are to wait for requests or work on one.
    wanted: AtomicUsize,
    /// How many do.
    on_duty: AtomicUsize,
    /// Whether nobody looks.
    dozing: AtomicBool,
    /// How many have failed.
    failed: AtomicUsize,
    ended: AtomicBool,
    gate: Mutex<()>,
    /// For those who wait to come in.
    enter: Condvar,
    /// For who looks.
    look: Condvar,
}

#[derive(Default)]
struct Member {
    /// What it is at: even while it waits for a request, odd while it works on one; a new number
    /// with each.
    at: AtomicU64,
    place: Place,
}

/// A thread on duty.
pub(crate) struct Duty<'a> {
    crew: &'a Crew,
    number: usize,
}

impl Crew {
    /// Of `threads` threads, at least one.
    pub(crate) fn new(threads: usize) -> Crew {
        Crew {
            members: (0..threads.max(1)).map(|_| Member::default()).collect(),
            wanted: AtomicUsize::new(1),
            on_duty: AtomicUsize::new(0),
            dozing: AtomicBool::new(false),
            failed: AtomicUsize::new(0),
            ended: AtomicBool::new(false),
            gate: Mutex::new(()),
            enter: Condvar::new(),
            look: Condvar::new(),
        }
    }

    /// Where thread `number` stands with the programs that it answers.
    pub(crate) fn place(&self, number: usize) -> Option<&Place> {
        self.members.get(number).map(|member| &member.place)
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until thread `number` is wanted; `None` at the end.
    pub(crate) fn enter(&self, number: usize) -> Option<Duty<'_>> {
        let mut gate = self.lock();
        while !self.ended.load(Ordering::Acquire) {
            if self.on_duty.load(Ordering::Acquire) < self.wanted.load(Ordering::Acquire) {
                self.on_duty.fetch_add(1, Ordering::AcqRel);
                return Some(Duty { crew: self, number });
            }
            gate = self.enter.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    /// A thread goes for good: as nothing comes any more, or as it failed and leaves the work to the
    /// others, as long as there are any.
    pub(crate) fn gone(&self, failed: bool) {
        if !failed || self.failed.fetch_add(1, Ordering::AcqRel) + 1 == self.members.len() {
            self.end();
        }
    }

    fn end(&self) {
        let _gate = self.lock();
        self.ended.store(true, Ordering::Release);
        self.enter.notify_all();
        self.look.notify_all();
    }

    /// Looks after the others until the end. `waiting` says whether a request waits for a thread.
    pub(crate) fn look_after(&self, waiting: &dyn Fn() -> bool) {
        let mut seen = vec![0; self.members.len()];
        let (mut extra, mut busy, mut calm, mut still) = (0, 0, 0, 0);
        while !self.ended.load(Ordering::Acquire) {
            self.pause();
            let (mut held_up, mut working, mut changed) = (0, 0, false);
            let waits = OnceCell::new();
            let waiting = || *waits.get_or_init(waiting);
            for (member, seen) in self.members.iter().zip(&mut seen) {
                let now = member.at.load(Ordering::SeqCst);
                let works = !now.is_multiple_of(2);
                let place = &member.place;
                let kept = now == *seen
                    && match (works, place.follows()) {
                        (true, _) if !place.hands_over() => true,
                        (false, false) => false,
                        // It may only let a program go first, which is well unless somebody waits for it.
                        _ => waiting(),
                    };
                if kept {
                    place.recall();
                }
                held_up += usize::from(kept && works);
                working += usize::from(works && now != *seen);
                changed |= now != *seen;
                *seen = now;
            }
            // Those that are held up aside, one is there in any case, and more where all are busy and
            // that is not enough.
            let all = working > extra && waiting();
            (busy, calm) = if all { (busy + 1, 0) } else { (0, calm + 1) };
            if busy >= FEW {
                (extra, busy) = ((extra + 1).min(self.members.len()), 0);
            } else if calm >= FEW {
                (extra, calm) = (extra.saturating_sub(1), 0);
            }
            self.want((1 + extra + held_up).min(self.members.len()));
            still = if changed || held_up > 0 { 0 } else { still + 1 };
            if still >= MANY {
                still = 0;
                self.doze(&seen);
            }
        }
    }

    /// Waits for the next look, or the end.
    fn pause(&self) {
        let gate = self.lock();
        if !self.ended.load(Ordering::Acquire) {
            drop(self.look.wait_timeout(gate, TICK));
        }
    }

    fn want(&self, wanted: usize) {
        if self.wanted.swap(wanted, Ordering::AcqRel) < wanted {
            let _gate = self.lock();
            self.enter.notify_all();
        }
    }

    /// Waits until somebody has begun to work since what was `seen`.
    fn doze(&self, seen: &[u64]) {
        // Whom nobody looks after must not wait for everybody.
        self.members.iter().filter(|member| member.place.follows()).for_each(|m| m.place.rest());
        let mut gate = self.lock();
        self.dozing.store(true, Ordering::SeqCst);
        while self.dozing.load(Ordering::SeqCst)
            && !self.ended.load(Ordering::Acquire)
            && self.members.iter().zip(seen).all(|(member, seen)| member.is_at(*seen))
        {
            gate = self.look.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        self.dozing.store(false, Ordering::SeqCst);
    }
}

impl Member {
    fn is_at(&self, seen: u64) -> bool {
        self.at.load(Ordering::SeqCst) == seen
    }
}

impl Duty<'_> {
    fn step(&self) {
        if let Some(member) = self.crew.members.get(self.number) {
            member.at.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// It has got a request.
    pub(crate) fn begin(&self) {
        self.step();
        if self.crew.dozing.load(Ordering::SeqCst) {
            let _gate = self.crew.lock();
            self.crew.look.notify_all();
        }
    }

    /// It has answered. False where it is not needed any more.
    pub(crate) fn done(&self) -> bool {
        self.step();
        self.crew.on_duty.load(Ordering::Acquire) <= self.crew.wanted.load(Ordering::Acquire)
    }
}

impl Drop for Duty<'_> {
    fn drop(&mut self) {
        let _gate = self.crew.lock();
        self.crew.on_duty.fetch_sub(1, Ordering::AcqRel);
        // It may have been one too many who left.
        self.crew.enter.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn where_one_is_held_up_another_comes_in_and_at_the_end_all_go() {
        let crew = Crew::new(3);
        let (here, came) = mpsc::channel();
        std::thread::scope(|scope| {
            let crew = &crew;
            scope.spawn(|| crew.look_after(&|| false));
            for number in 0..3 {
                let here = here.clone();
                scope.spawn(move || {
                    let Some(duty) = crew.enter(number) else { return };
                    duty.begin();
                    here.send(number).unwrap();
                    // Held up until the end.
                    while !crew.ended.load(Ordering::Acquire) {
                        std::thread::sleep(TICK);
                    }
                    duty.done();
                });
            }
            let patience = Duration::from_secs(60);
            let mut all: Vec<usize> =
                (0..3).map(|_| came.recv_timeout(patience).unwrap()).collect();
            all.sort_unstable();
            assert_eq!(all, [0, 1, 2]);
            crew.end();
        });
    }

    #[test]
    fn who_lets_a_program_go_first_is_called_back_where_somebody_waits_and_rests_where_nobody_looks()
     {
        for waits in [false, true] {
            let crew = Crew::new(1);
            let place = crew.place(0).unwrap();
            place.follow_here();
            std::thread::scope(|scope| {
                scope.spawn(|| crew.look_after(&|| waits));
                while place.follows() {
                    std::thread::sleep(TICK);
                }
                crew.end();
            });
            assert_eq!(place.is_recalled(), waits);
        }
    }

    #[test]
    fn as_long_as_one_keeps_up_it_is_alone() {
        let crew = Crew::new(2);
        std::thread::scope(|scope| {
            let crew = &crew;
            scope.spawn(|| crew.look_after(&|| false));
            let duty = crew.enter(0).unwrap();
            let second = scope.spawn(|| crew.enter(1).is_some());
            for _ in 0..50 {
                duty.begin();
                assert!(duty.done());
                std::thread::sleep(TICK / 4);
            }
            assert_eq!(crew.on_duty.load(Ordering::Acquire), 1);
            drop(duty);
            assert!(second.join().unwrap());
            crew.end();
        });
    }
}
