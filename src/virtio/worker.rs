//! A thread that serves one queue, so that a guest's processor never waits for a disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use super::ring::{Ring, Serve};
use super::{ActiveQueue, Interrupt, Memory};
use crate::error::{Error, Result};
use crate::jail;

/// A running thread; it ends when this is stopped or dropped.
pub(super) struct Worker {
    stop: Arc<AtomicBool>,
    kick: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts to serve `active` in a thread of that name.
    pub(super) fn start(
        name: &str,
        active: ActiveQueue,
        memory: Arc<Memory>,
        serve: impl Serve + Send + 'static,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Worker> {
        let failed = |error| Error::io("cannot start a device's worker thread", error);
        let ActiveQueue { index, queue, kick } = active;
        let stop = Arc::new(AtomicBool::new(false));
        let queue = Served {
            ring: Ring::new(index, queue, memory, Arc::clone(&interrupt)),
            kick: kick.try_clone().map_err(failed)?,
            stop: Arc::clone(&stop),
            serve,
            alarm: Alarm(interrupt),
        };
        let thread = std::thread::Builder::new()
            .name(format!("{name}-{index}"))
            .spawn(move || queue.run())
            .map_err(failed)?;
        Ok(Worker { stop, kick, thread: Some(thread) })
    }

    /// Returns when the request at work is done and the thread has ended.
    pub(super) fn stop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // An eventfd refuses a write only when its counter is full: then the thread wakes anyway.
        let _ = self.kick.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic has been reported on stderr and to the driver by then; tests are to fail of it.
            let ended = thread.join();
            debug_assert!(ended.is_ok(), "a device's thread died");
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Tells the driver when the thread dies of a panic, rather than let it wait for ever.
struct Alarm(Arc<dyn Interrupt>);

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.needs_reset();
        }
    }
}

struct Served<S> {
    ring: Ring,
    kick: EventFd,
    stop: Arc<AtomicBool>,
    serve: S,
    alarm: Alarm,
}

impl<S: Serve> Served<S> {
    fn run(mut self) {
        jail::narrow(jail::Thread::Queue);
        loop {
            match self.kick.read() {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => return self.alarm.0.needs_reset(),
            }
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            if self.ring.drain(&self.stop, &mut self.serve).is_err() {
                return self.alarm.0.needs_reset();
            }
        }
    }
}
