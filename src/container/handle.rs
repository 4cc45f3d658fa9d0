//! What steers a container from another thread than the one that runs it: signals, its end, pauses.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Error, ErrorKind, Result};

/// How long an order may take to be carried out.
const TO_OBEY: Duration = Duration::from_secs(30);

/// A container's switches. It outlives the container, and then says that it has ended.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Orders>);

#[derive(Debug)]
struct Orders {
    state: Mutex<State>,
    /// Readable while orders wait.
    wake: EventFd,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<(Order, SyncSender<Result<()>>)>,
    over: bool,
}

/// What can be asked of who runs the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    Signal(i32),
    Kill,
    Pause,
    Resume,
}

impl Handle {
    pub(super) fn new() -> Result<Handle> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| Error::io("cannot make an event", e.into()))?;
        Ok(Handle(Arc::new(Orders { state: Mutex::default(), wake })))
    }

    /// Does to the program what this signal does to one that is not process 1.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where the container has ended: so of all orders.
    pub fn signal(&self, number: i32) -> Result<()> {
        self.give(Order::Signal(number))
    }

    /// Ends all processes at once.
    ///
    /// # Errors
    /// As [`signal`](Handle::signal).
    pub fn kill(&self) -> Result<()> {
        self.give(Order::Kill)
    }

    /// Stops all processes; returns when they stand still.
    ///
    /// # Errors
    /// Where they do not come to a stop within 10 seconds: then all go on.
    pub fn pause(&self) -> Result<()> {
        self.give(Order::Pause)
    }

    /// Lets all processes go on.
    ///
    /// # Errors
    /// As [`signal`](Handle::signal).
    pub fn resume(&self) -> Result<()> {
        self.give(Order::Resume)
    }

    fn give(&self, order: Order) -> Result<()> {
        let (told, heard) = sync_channel(1);
        {
            let mut state = self.state();
            if state.over {
                return Err(ended());
            }
            state.queue.push_back((order, told));
        }
        // A full counter wakes as well.
        let _ = self.0.wake.write(1);
        match heard.recv_timeout(TO_OBEY) {
            Ok(done) => done,
            Err(RecvTimeoutError::Disconnected) => Err(ended()),
            Err(RecvTimeoutError::Timeout) => {
                Err(Error::new(ErrorKind::InUse, "the container does not answer"))
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable while orders wait.
    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        self.0.wake.as_fd()
    }

    /// The orders that wait, and where to say what became of them.
    pub(super) fn take(&self) -> VecDeque<(Order, SyncSender<Result<()>>)> {
        let _ = self.0.wake.read();
        std::mem::take(&mut self.state().queue)
    }

    /// Refuses all orders from now on.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.over = true;
        state.queue.clear();
    }
}

fn ended() -> Error {
    Error::new(ErrorKind::NotFound, "the container has ended")
}
