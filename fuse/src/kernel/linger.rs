//! How a thread that has answered looks out for the next request for a moment before it goes to
//! sleep. To be woken on another processor takes longer than most answers, most of all in a
//! virtual machine, and a program that works on files asks again at once. Whether it pays is
//! learnt from what came: who asks seldom costs nothing. Where others want the processor, it does not
//! pay: who sleeps is let in at once when he is woken, who looks out waits for his turn. Knows no
//! request.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::near::ready;

/// How long to look out.
const LOOK: Duration = Duration::from_micros(200);
/// So much trust at most, and what a look that was in vain takes of it.
const MOST: u32 = 16;
const IN_VAIN: u32 = 4;

/// How long a step of looking out takes at most where nobody else wants the processor.
const STEP: Duration = Duration::from_micros(40);
/// How long nobody is to look out after somebody did: at first, and as long as that goes on.
const SHY: Duration = Duration::from_millis(20);
const SHIEST: Duration = Duration::from_secs(1);

/// Whether somebody looks out; one at a time does.
#[derive(Debug, Default)]
pub(crate) struct Lookout {
    taken: AtomicBool,
    /// Where there is one processor only, it is the one that the next request comes from.
    alone: bool,
}

impl Lookout {
    pub(crate) fn new() -> Lookout {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Lookout { taken: AtomicBool::new(false), alone: processors < 2 }
    }
}

/// What one thread has learnt.
#[derive(Debug, Default)]
pub(crate) struct Linger {
    trust: u32,
    slept: Option<Instant>,
    /// When to look out again, and how long to wait when the next look is disturbed.
    again: Option<Instant>,
    shy: Duration,
}

impl Linger {
    /// Looks out for something to read where that is worth it. Whether or not there is, the caller
    /// then reads, and says so with [`came`](Linger::came).
    pub(crate) fn look(&mut self, lookout: &Lookout, device: BorrowedFd<'_>) {
        let start = Instant::now();
        self.slept = Some(start);
        if lookout.alone || self.trust == 0 || self.again.is_some_and(|again| start < again) {
            return;
        }
        if lookout.taken.swap(true, Ordering::Acquire) {
            return;
        }
        let seen = watch(device, start);
        lookout.taken.store(false, Ordering::Release);
        self.learn(seen);
    }

    fn learn(&mut self, seen: Seen) {
        match seen {
            Seen::Request => self.shy = Duration::ZERO,
            Seen::Nothing => {
                self.trust = self.trust.saturating_sub(IN_VAIN);
                // Already held against it.
                self.slept = None;
            }
            Seen::Others => {
                self.shy = (self.shy * 2).clamp(SHY, SHIEST);
                self.again = Some(Instant::now() + self.shy);
                self.slept = None;
            }
        }
    }

    /// A request has been read.
    pub(crate) fn came(&mut self) {
        if self.slept.take().is_some_and(|slept| slept.elapsed() < LOOK) {
            self.trust = (self.trust + 1).min(MOST);
        }
    }
}

/// What a look has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Request,
    Nothing,
    /// That somebody else has used this processor meanwhile.
    Others,
}

/// Looks out from `start` on.
fn watch(device: BorrowedFd<'_>, start: Instant) -> Seen {
    let mut last = start;
    loop {
        let there = ready(device);
        let now = Instant::now();
        if now - last > STEP {
            return Seen::Others;
        }
        if there {
            return Seen::Request;
        }
        if now - start >= LOOK {
            return Seen::Nothing;
        }
        last = now;
        // Whoever has something to do on this processor goes first.
        rustix::thread::sched_yield();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn nobody_looks_out_for_what_seldom_comes() {
        let (mut read, mut write) = std::io::pipe().unwrap();
        let lookout = Lookout { taken: AtomicBool::new(false), alone: false };
        let mut linger = Linger::default();
        write.write_all(b"x").unwrap();
        for _ in 0..MOST {
            linger.look(&lookout, read.as_fd());
            linger.came();
        }
        assert!(linger.trust > 0, "what is there at once is trusted");
        read.read_exact(&mut [0; 1]).unwrap();
        // Some looks may be disturbed.
        for _ in 0..10_000 {
            linger.again = None;
            linger.look(&lookout, read.as_fd());
            std::thread::sleep(LOOK);
            linger.came();
            if linger.trust == 0 {
                break;
            }
        }
        assert_eq!(linger.trust, 0);
        assert!(!lookout.taken.load(Ordering::Acquire));
    }

    #[test]
    fn where_others_want_the_processor_nobody_looks_out_for_longer_and_longer() {
        let mut linger = Linger { trust: MOST, ..Linger::default() };
        for shy in [SHY, SHY * 2, SHY * 4] {
            linger.learn(Seen::Others);
            assert_eq!(linger.shy, shy);
            assert!(linger.again.is_some());
        }
        for _ in 0..10 {
            linger.learn(Seen::Others);
        }
        assert_eq!(linger.shy, SHIEST);
        linger.learn(Seen::Request);
        linger.learn(Seen::Others);
        assert_eq!(linger.shy, SHY);
        assert_eq!(linger.trust, MOST, "who asks is not to blame");
    }
}
