//! What steers a running guest: for a signal, for a control socket, for whoever keeps instances.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::console::Console;
use super::control::{Control, Ended};
use super::power::Power;
use crate::error::{Error, Result};

/// A guest's switches. It outlives the guest, and then has no effect.
#[derive(Clone)]
pub struct Handle {
    control: Arc<Control>,
    power: Arc<Power>,
    console: Arc<Console>,
}

impl Handle {
    pub(super) fn new(control: Arc<Control>, power: Arc<Power>, console: Arc<Console>) -> Handle {
        Handle { control, power, console }
    }

    /// Ends the guest at once, as by pulling its plug; what it has written is kept.
    pub fn kill(&self) {
        self.control.end(Ok(Ended::Stopped));
    }

    /// Ends the guest at once with a failure that its runner reports.
    pub fn fail(&self, error: Error) {
        self.control.end(Err(error));
    }

    /// Presses the power button: a guest that listens to it (systemd, acpid) shuts down by itself.
    pub fn press_power_button(&self) {
        self.power.press();
    }

    /// Stops all processors; returns when they stand still. The console, and what devices have under
    /// way, go on.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`](crate::ErrorKind::InUse) where a processor does not come to a stop within
    /// 10 seconds; then none stands.
    pub fn pause(&self) -> Result<()> {
        self.control.pause()
    }

    /// Lets the processors go on.
    pub fn resume(&self) {
        self.control.resume();
    }

    /// Whether the processors stand still.
    pub fn paused(&self) -> bool {
        self.control.paused()
    }

    /// Whether the guest has ended.
    pub fn over(&self) -> bool {
        self.control.over()
    }

    /// Lets a stream hear the serial console from now on, and type there, until it is closed, does not
    /// keep up with what is printed, or the guest ends. There may be several at once.
    pub fn attach(&self, stream: UnixStream) -> Result<()> {
        self.console.attach(stream, Arc::clone(&self.control))
    }
}
