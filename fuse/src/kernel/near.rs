//! How a thread that answers comes to the processor of the program that asks. To be woken on another
//! processor takes many times as long as most answers do, there and back, most of all in a virtual
//! machine; two that take turns on one processor need not be woken at all.
//!
//! To be there is not enough: the scheduler puts who is woken on a processor that is idle, and that of
//! whoever wakes him is not, unless all that runs there lets everybody else go first (`SCHED_IDLE`). So
//! the thread does, for as long as it follows a program: that goes on in its place once it has its answer,
//! and when it waits again the thread finds the next request without having slept.
//!
//! Who lets everybody go first may be kept waiting by anybody. The [crew](super::crew) sees to it that no
//! request waits for one that is, see [`Place::recall`], and that nobody follows while it does not look, see
//! [`Place::rest`]. Knows no request.

use std::os::fd::BorrowedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_setfl};
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
    /// Whether it is bound to the processor of a program, and lets everybody go first.
    follows: AtomicBool,
    /// How often it was made to rest: a rest that was still going on when it began to follow leaves it
    /// neither here nor there.
    rests: AtomicU32,
    /// Whether it hands over an answer: then all that is left to do is to come back.
    hands_over: AtomicBool,
    recalled: AtomicBool,
}

impl Place {
    /// Whether it lets everybody go first, so that it may be kept waiting.
    pub(crate) fn follows(&self) -> bool {
        self.follows.load(Ordering::SeqCst)
    }

    /// Whether it hands over an answer to a program that it follows.
    pub(crate) fn hands_over(&self) -> bool {
        self.hands_over.load(Ordering::SeqCst)
    }

    /// Lets a thread that is kept waiting run where and as any other does, and follow nobody for a while.
    pub(crate) fn recall(&self) {
        if self.follows() {
            self.recalled.store(true, Ordering::SeqCst);
        }
        self.rest();
    }

    /// Lets the thread run where and as any other does. One that begins to follow meanwhile finds that out with
    /// its next request; until it comes to that, who finds that it has not moved calls again.
    pub(crate) fn rest(&self) {
        let Some((thread, free)) = self.thread.get() else { return };
        self.follows.store(false, Ordering::SeqCst);
        let _ = sys::yield_always(Some(*thread), false);
        let _ = sched_setaffinity(Some(*thread), free);
        self.rests.fetch_add(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
impl Place {
    /// As if this thread followed a program.
    pub(crate) fn follow_here(&self) {
        self.thread.set((gettid(), sched_getaffinity(None).unwrap())).unwrap();
        self.follows.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_recalled(&self) -> bool {
        self.recalled.load(Ordering::SeqCst)
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

/// Who has made a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asker {
    /// The thread that waits for the answer; 0 where none does.
    pub(crate) thread: u32,
    /// Whether it can be looked at now.
    pub(crate) shown: bool,
}

/// What one thread has learnt.
pub(crate) struct Near<'a> {
    place: &'a Place,
    /// What it reads its requests from: as long as it follows, without waiting for one.
    device: BorrowedFd<'a>,
    /// Where it may be; `None` where it follows nobody.
    free: Option<CpuSet>,
    /// Whose processor it is on, and how often it had been made to rest before.
    at: Option<usize>,
    rests: u32,
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
    pub(crate) fn new(place: &'a Place, device: BorrowedFd<'a>, allowed: bool) -> Near<'a> {
        let free = if allowed { sched_getaffinity(None).ok() } else { None };
        let free = free.filter(|free| free.count() > 1);
        if let Some(free) = free {
            let _ = place.thread.set((gettid(), free));
        }
        Near {
            place,
            device,
            free,
            at: None,
            rests: 0,
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

    /// Whether it is where the program is.
    pub(crate) fn settled(&self) -> bool {
        self.at.is_some()
    }

    /// Waits for a request, where none was there.
    pub(crate) fn wait(&mut self) {
        // As long as this thread runs the program does not, or is on another processor.
        self.strayed = true;
        let mut asked = [PollFd::from_borrowed_fd(self.device, PollFlags::IN)];
        // An error is for the read to find.
        let _ = poll(&mut asked, None);
    }

    /// Somebody has made a request of `len` bytes.
    pub(crate) fn came(&mut self, asker: Asker, len: usize) {
        if self.at.is_some() && !self.undisturbed() {
            self.leave();
        }
        if self.place.recalled.swap(false, Ordering::SeqCst) {
            self.shy = (self.shy * 2).clamp(SHY, SHIEST);
            (self.again, self.well) = (Some(Instant::now() + self.shy), 0);
        }
        if self.free.is_none() || asker.thread == 0 {
            return;
        }
        if len > LARGE {
            self.row = 0;
            self.speak_against();
        } else if asker.thread == self.caller {
            self.row = self.row.saturating_add(1);
        } else {
            (self.caller, self.row) = (asker.thread, 1);
            self.speak_against();
        }
        self.wait = self.wait.saturating_sub(1);
        let due = asker.shown && (self.at.is_none() || self.strayed && self.wait == 0);
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
        self.rests = self.place.rests.load(Ordering::SeqCst);
        self.place.follows.store(true, Ordering::SeqCst);
        let there = sched_setaffinity(None, &set).is_ok()
            && sys::yield_always(None, true).is_ok()
            && fcntl_setfl(self.device, OFlags::NONBLOCK).is_ok();
        (self.at, self.wait, self.waited) = (Some(cpu), 0, 0);
        if !there || !self.undisturbed() {
            self.leave();
        }
    }

    /// Whether nobody has made this thread rest since it began to follow.
    fn undisturbed(&self) -> bool {
        self.place.follows() && self.place.rests.load(Ordering::SeqCst) == self.rests
    }

    /// Is anywhere again.
    pub(crate) fn leave(&mut self) {
        if self.at.is_some() {
            self.place.rest();
            let _ = fcntl_setfl(self.device, OFlags::empty());
        }
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
        self.place.hands_over.store(true, Ordering::SeqCst);
        write();
        self.place.hands_over.store(false, Ordering::SeqCst);
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
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    fn own() -> u32 {
        gettid().as_raw_nonzero().get().cast_unsigned()
    }

    fn by(thread: u32) -> Asker {
        Asker { thread, shown: true }
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
        let (device, _asker) = std::io::pipe().unwrap();
        let mut near = Near::new(&place, device.as_fd(), true);
        for _ in 1..ROW {
            near.came(by(own()), 64);
            assert_eq!(may_be(), all);
        }
        near.came(Asker { thread: own(), shown: false }, 64);
        assert_eq!(may_be(), all, "who cannot be looked at is not");
        near.came(by(own()), 64);
        assert_eq!(may_be(), 1);
        let mut yields = false;
        near.hand_over(16, || yields = place.hands_over());
        assert!(yields && place.follows() && !place.hands_over());
        near.hand_over(LARGE + 1, || ());
        near.came(by(0), 64);
        assert_eq!(may_be(), 1, "one large answer, and one that nobody waits for, change nothing");
        for other in 0..AGAINST {
            near.came(by(u32::MAX - other), 64);
        }
        assert_eq!(may_be(), all);
        (0..ROW).for_each(|_| near.came(by(own()), 64));
        assert_eq!(may_be(), 1);
        (0..AGAINST).for_each(|_| near.came(by(own()), LARGE + 1));
        assert_eq!(may_be(), all, "much to copy is copied elsewhere");
        (0..ROW).for_each(|_| near.came(by(own()), 64));
        assert_eq!(may_be(), 1);
        for _ in 0..AGAINST {
            near.came(by(own()), 64);
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
        let (device, _asker) = std::io::pipe().unwrap();
        let mut near = Near::new(&place, device.as_fd(), true);
        (0..ROW).for_each(|_| near.came(by(own()), 64));
        assert_eq!(may_be(), 1);
        place.recall();
        assert_eq!(may_be(), all);
        // Longer than this test takes.
        near.shy = Duration::from_secs(3600);
        (0..ROW * 2).for_each(|_| near.came(by(own()), 64));
        assert!(near.again.is_some());
        near.again = None;
        (0..ROW).for_each(|_| near.came(by(own()), 64));
        assert_eq!(may_be(), 1);
    }

    #[test]
    fn who_follows_goes_last_and_waits_for_no_request_until_it_is_to_rest() {
        if !can_follow() {
            return;
        }
        let (place, all) = (Place::default(), may_be());
        let (device, mut asker) = std::io::pipe().unwrap();
        let mut near = Near::new(&place, device.as_fd(), true);
        (0..ROW).for_each(|_| near.came(by(own()), 64));
        assert!(near.settled() && place.follows() && !sys::runs_as_others());
        let read = || rustix::io::read(device.as_fd(), &mut [0; 1]);
        assert_eq!(read(), Err(rustix::io::Errno::AGAIN));
        asker.write_all(b"x").unwrap();
        near.wait();
        assert_eq!(read(), Ok(1));
        place.rest();
        assert!(sys::runs_as_others() && !place.follows());
        assert_eq!(may_be(), all);
        near.came(by(own()), 64);
        assert!(!near.settled() && !ready(device.as_fd()));
        (1..ROW).for_each(|_| near.came(by(own()), 64));
        assert!(near.settled(), "who rested is not to be shy");
        // Somebody began to make it rest before it followed, and ended afterwards.
        sys::yield_always(None, false).unwrap();
        place.rests.fetch_add(1, Ordering::SeqCst);
        near.came(by(own()), 64);
        assert!(!near.settled() && !place.follows());
        (1..ROW).for_each(|_| near.came(by(own()), 64));
        assert!(near.settled() && !sys::runs_as_others());
        near.leave();
        assert!(sys::runs_as_others() && !near.settled());
        // As long as nobody asks, it sleeps.
        assert!(!rustix::fs::fcntl_getfl(device.as_fd()).unwrap().contains(OFlags::NONBLOCK));
    }

    #[test]
    fn who_may_not_come_back_stays_as_it_is() {
        let (place, all) = (Place::default(), may_be());
        let (device, _asker) = std::io::pipe().unwrap();
        let mut near = Near::new(&place, device.as_fd(), false);
        (0..ROW * 2).for_each(|_| near.came(by(own()), 64));
        place.recall();
        assert_eq!(may_be(), all);
        let mut yields = true;
        near.hand_over(16, || yields = place.hands_over());
        assert!(!yields);
    }
}
