//! How a thread that answers comes to the processor of the program that asks. To be woken on another
//! processor takes many times as long as most answers do, there and back, most of all in a virtual
//! machine; two that take turns on one processor need not be woken at all.
//!
//! To be there is not enough: the scheduler puts who is woken on a processor that is idle, and that of
//! whoever wakes him is not, unless all that runs there lets everybody else go first (`SCHED_IDLE`). So
//! the thread does, for as long as it hands over an answer: the program goes on in its place, and once
//! that waits again the thread finds the next request without having slept.
//!
//! Who lets everybody go first may be kept waiting by anybody. The [crew](super::crew) sees to it that no
//! request waits for one that is, see [`Place::recall`]. Knows no request.

use std::os::fd::BorrowedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{CpuSet, Pid, gettid, sched_getaffinity, sched_setaffinity};

use crate::sys;

/// A program is followed from its request of this number in a row on.
const ROW: u32 = 3;
/// After so many requests in a row that speak against it, it is followed no longer.
const AGAINST: u32 = 4;
/// What takes longer to copy than to wake somebody is copied on two processors, in bytes.
const LARGE: usize = 64 << 10;
/// After how many requests at most to look again where a program is that was found where it had been.
const SELDOM: u32 = 256;
/// After so many answers all was well.
const WELL: u32 = 256;
/// How long nobody is followed after a thread had to be called back: at first, and as long as that goes on.
const SHY: Duration = Duration::from_millis(20);
const SHIEST: Duration = Duration::from_secs(1);

/// What others see of a thread, and do to it.
#[derive(Debug, Default)]
pub(crate) struct Place {
    /// The thread, and where it may be; nothing where it never follows anybody.
    thread: OnceLock<(Pid, CpuSet)>,
    /// Whether it is bound to the processor of a program.
    follows: AtomicBool,
    /// Whether it lets everybody go first at this moment.
    yields: AtomicBool,
    recalled: AtomicBool,
}

impl Place {
    /// Whether it lets everybody go first at this moment.
    pub(crate) fn yields(&self) -> bool {
        self.yields.load(Ordering::SeqCst)
    }

    /// Lets the thread run where and as any other does. For a moment it may still be about to let
    /// everybody go first: who finds that it has not moved calls again.
    pub(crate) fn recall(&self) {
        let Some((thread, free)) = self.thread.get() else { return };
        if self.follows.load(Ordering::SeqCst) {
            self.recalled.store(true, Ordering::SeqCst);
            let _ = sys::yield_always(Some(*thread), false);
            let _ = sched_setaffinity(Some(*thread), free);
        }
    }
}

/// Whether something can be read.
pub(crate) fn ready(device: BorrowedFd<'_>) -> bool {
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut asked = [PollFd::from_borrowed_fd(device, PollFlags::IN)];
    // An error is for the read to find.
    poll(&mut asked, Some(&at_once)).map_or(true, |ready| ready > 0)
}

/// Whether threads of this process may let everybody go first and come back: an ordinary user's may only
/// do the former, which a thread finds out that is lost by it. One to whom the user has given another
/// policy keeps that.
pub(crate) fn allowed() -> bool {
    if !sys::runs_as_others() {
        return false;
    }
    let trial = || sys::yield_always(None, true).and_then(|()| sys::yield_always(None, false));
    let trial = std::thread::Builder::new().spawn(move || trial().is_ok());
    trial.is_ok_and(|trial| trial.join().unwrap_or(false))
}

/// What one thread has learnt.
pub(crate) struct Near<'a> {
    place: &'a Place,
    /// Where it may be; `None` where it follows nobody.
    free: Option<CpuSet>,
    /// Whose processor it is on.
    at: Option<usize>,
    /// Who asked last, and how often in a row.
    caller: u32,
    row: u32,
    against: u32,
    /// Whether the program seems to be elsewhere, after how many requests to look, and how many that
    /// were last.
    strayed: bool,
    wait: u32,
    waited: u32,
    /// Answers handed over since it was called back last.
    well: u32,
    again: Option<Instant>,
    shy: Duration,
}

impl<'a> Near<'a> {
    /// Of this thread.
    pub(crate) fn new(place: &'a Place, allowed: bool) -> Near<'a> {
        let free = if allowed { sched_getaffinity(None).ok() } else { None };
        let free = free.filter(|free| free.count() > 1);
        if let Some(free) = free {
            let _ = place.thread.set((gettid(), free));
        }
        Near {
            place,
            free,
            at: None,
            caller: 0,
            row: 0,
            against: 0,
            strayed: false,
            wait: 0,
            waited: 0,
            well: 0,
            again: None,
            shy: Duration::ZERO,
        }
    }

    /// Whether it is where the program is; to be asked before the next request is waited for.
    pub(crate) fn settled(&mut self, device: BorrowedFd<'_>) -> bool {
        if self.at.is_some() && !ready(device) {
            // As long as this thread runs the program does not, or is on another processor.
            self.strayed = true;
        }
        self.at.is_some()
    }

    /// A thread, 0 where none waits that can be looked at, has made a request of `len` bytes.
    pub(crate) fn came(&mut self, caller: u32, len: usize) {
        if self.free.is_none() || caller == 0 {
            return;
        }
        if self.place.recalled.swap(false, Ordering::SeqCst) {
            self.leave();
            self.shy = (self.shy * 2).clamp(SHY, SHIEST);
            (self.again, self.well) = (Some(Instant::now() + self.shy), 0);
        }
        if len > LARGE {
            self.row = 0;
            self.speak_against();
        } else if caller == self.caller {
            self.row = self.row.saturating_add(1);
        } else {
            (self.caller, self.row) = (caller, 1);
            self.speak_against();
        }
        self.wait = self.wait.saturating_sub(1);
        let due = self.at.is_none() || self.strayed && self.wait == 0;
        if self.row >= ROW && due && self.again.is_none_or(|again| Instant::now() >= again) {
            self.follow();
        }
    }

    fn speak_against(&mut self) {
        self.against += 1;
        if self.against >= AGAINST && self.at.is_some() {
            self.leave();
        }
    }

    /// Goes to the processor that the program is on.
    fn follow(&mut self) {
        let Some(free) = &self.free else { return };
        self.strayed = false;
        let there = processor(self.caller).filter(|cpu| free.is_set(*cpu));
        if there.is_some() && there == self.at {
            self.waited = (self.waited * 2).clamp(1, SELDOM);
            self.wait = self.waited;
            return;
        }
        let Some(cpu) = there else { return self.leave() };
        let mut set = CpuSet::new();
        set.set(cpu);
        self.place.follows.store(true, Ordering::SeqCst);
        match sched_setaffinity(None, &set) {
            Ok(()) => (self.at, self.wait, self.waited) = (Some(cpu), 0, 0),
            Err(_) => self.leave(),
        }
    }

    /// Is anywhere again.
    fn leave(&mut self) {
        if let Some(free) = &self.free {
            let _ = sched_setaffinity(None, free);
        }
        self.place.follows.store(false, Ordering::SeqCst);
        (self.at, self.row, self.strayed) = (None, 0, false);
    }

    /// Hands over an answer of `len` bytes. Who waits for it is not always known: a program that closes a file
    /// waits for writes that the kernel makes in nobody's name.
    pub(crate) fn hand_over(&mut self, len: usize, write: impl FnOnce()) {
        if len > LARGE {
            self.row = 0;
            self.speak_against();
        } else if self.row > 1 {
            self.against = 0;
        }
        if self.at.is_none() {
            return write();
        }
        self.place.yields.store(true, Ordering::SeqCst);
        let _ = sys::yield_always(None, true);
        write();
        let _ = sys::yield_always(None, false);
        self.place.yields.store(false, Ordering::SeqCst);
        self.well = self.well.saturating_add(1);
        if self.well >= WELL {
            self.shy = Duration::ZERO;
        }
    }
}

/// The processor that a thread is on, or was last: proc_pid_stat(5). The kernel lets nobody see that of one that is
/// just becoming another program: who looks waits until it is.
fn processor(thread: u32) -> Option<usize> {
    /// Fields between the name and that.
    const BEFORE: usize = 36;
    let text = std::fs::read(format!("/proc/{thread}/stat")).ok()?;
    // A name may have any bytes in it, and ends with the last parenthesis.
    let end = text.iter().rposition(|byte| *byte == b')')?;
    let fields = std::str::from_utf8(text.get(end + 1..)?).ok()?;
    fields.split_ascii_whitespace().nth(BEFORE)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> u32 {
        gettid().as_raw_nonzero().get().cast_unsigned()
    }

    fn can_follow() -> bool {
        let can = allowed() && may_be() > 1;
        if !can {
            eprintln!("SKIPPED: may not come back, or has one processor only");
        }
        can
    }

    fn may_be() -> u32 {
        sched_getaffinity(None).unwrap().count()
    }

    #[test]
    fn the_processor_of_a_thread_is_found_whatever_it_is_called() {
        let named = std::thread::Builder::new().name("a) R 1 (b".into());
        named
            .spawn(|| {
                let mut one = CpuSet::new();
                let all = sched_getaffinity(None).unwrap();
                let last = (0..CpuSet::MAX_CPU).rfind(|cpu| all.is_set(*cpu)).unwrap();
                one.set(last);
                sched_setaffinity(None, &one).unwrap();
                assert_eq!(processor(own()), Some(last));
            })
            .unwrap()
            .join()
            .unwrap();
        assert_eq!(processor(u32::MAX), None);
    }

    #[test]
    fn who_asks_in_a_row_is_followed_until_others_do() {
        if !can_follow() {
            return;
        }
        let (place, all) = (Place::default(), may_be());
        let mut near = Near::new(&place, true);
        for _ in 1..ROW {
            near.came(own(), 64);
            assert_eq!(may_be(), all);
        }
        near.came(own(), 64);
        assert_eq!(may_be(), 1);
        let mut yields = false;
        near.hand_over(16, || yields = place.yields());
        assert!(yields && !place.yields());
        near.hand_over(LARGE + 1, || ());
        near.came(0, 64);
        assert_eq!(may_be(), 1, "one large answer, and one that nobody waits for, change nothing");
        for other in 0..AGAINST {
            near.came(u32::MAX - other, 64);
        }
        assert_eq!(may_be(), all);
        (0..ROW).for_each(|_| near.came(own(), 64));
        assert_eq!(may_be(), 1);
        (0..AGAINST).for_each(|_| near.came(own(), LARGE + 1));
        assert_eq!(may_be(), all, "much to copy is copied elsewhere");
        (0..ROW).for_each(|_| near.came(own(), 64));
        assert_eq!(may_be(), 1);
        for _ in 0..AGAINST {
            near.came(own(), 64);
            near.hand_over(LARGE + 1, || ());
        }
        assert_eq!(may_be(), all, "also where it is in the answers");
    }

    #[test]
    fn who_was_called_back_follows_nobody_for_a_while() {
        if !can_follow() {
            return;
        }
        let (place, all) = (Place::default(), may_be());
        let mut near = Near::new(&place, true);
        (0..ROW).for_each(|_| near.came(own(), 64));
        assert_eq!(may_be(), 1);
        place.recall();
        assert_eq!(may_be(), all);
        // Longer than this test takes.
        near.shy = Duration::from_secs(3600);
        (0..ROW * 2).for_each(|_| near.came(own(), 64));
        assert!(near.again.is_some());
        near.again = None;
        (0..ROW).for_each(|_| near.came(own(), 64));
        assert_eq!(may_be(), 1);
    }

    #[test]
    fn who_may_not_come_back_stays_as_it_is() {
        let (place, all) = (Place::default(), may_be());
        let mut near = Near::new(&place, false);
        (0..ROW * 2).for_each(|_| near.came(own(), 64));
        place.recall();
        assert_eq!(may_be(), all);
        let mut yields = true;
        near.hand_over(16, || yields = place.yields());
        assert!(!yields);
    }
}
