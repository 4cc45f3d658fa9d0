//! The guest's first serial port (0x3f8), connected to two files of the host.
//!
//! It knows bytes in and bytes out, not who reads them.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd as Room};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::bus::BusDevice;
use super::control::{Control, Ended};
use super::power::Power;
use crate::error::{Error, Result};

/// First port.
pub const BASE: u64 = 0x3f8;
/// Number of ports.
pub const LEN: u64 = 8;
/// Its line to the interrupt controller.
pub const IRQ: u32 = 4;

/// Ctrl-A: the next key is for vdisk.
const ESCAPE: u8 = 1;

/// Where a guest's console is connected.
pub struct Streams {
    /// What is typed.
    pub input: OwnedFd,
    /// What is printed.
    pub output: OwnedFd,
}

/// Signals an event.
pub struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Signals that the guest has read all that was typed.
struct Events {
    room: Arc<Room>,
}

impl SerialEvents for Events {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // A full counter says the same.
        let _ = self.room.write(1);
    }
}

/// Who listens besides the console's own file.
type Listeners = Arc<Mutex<Vec<UnixStream>>>;

/// Writes to a file that may be slow, and gives up when the guest is over.
struct Output {
    file: OwnedFd,
    control: Arc<Control>,
    listeners: Listeners,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // One that does not keep up, or is gone, is no listener any more: the guest waits for none.
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain_mut(|listener| listener.write_all(bytes).is_ok());
        drop(listeners);
        wait(&[(&self.file, PollFlags::POLLOUT), (self.control.wake(), PollFlags::POLLIN)])?;
        if self.control.over() {
            return Ok(bytes.len());
        }
        Ok(nix::unistd::write(&self.file, bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits until one of these is ready, and says which are.
fn wait<const N: usize>(files: &[(&dyn AsFd, PollFlags); N]) -> nix::Result<[bool; N]> {
    let mut fds = files.map(|(file, flags)| PollFd::new(file.as_fd(), flags));
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
            // Errors and hang-ups show when the file is used.
            Ok(_) => return Ok(fds.map(|fd| fd.any().unwrap_or(true))),
        }
    }
}

/// The serial port.
pub struct Console {
    serial: Mutex<Serial<Line, Events, Output>>,
    irq: EventFd,
    room: Arc<Room>,
    listeners: Listeners,
}

impl Console {
    /// A port that prints to `output`.
    pub fn new(output: OwnedFd, control: Arc<Control>) -> Result<Console> {
        let failed = |e| Error::io("cannot make an event", e);
        let irq = EventFd::new(EFD_CLOEXEC).map_err(failed)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let room = Arc::new(Room::from_flags(flags).map_err(|e| failed(e.into()))?);
        let listeners = Listeners::default();
        let serial = Serial::with_events(
            Line(irq.try_clone().map_err(failed)?),
            Events { room: Arc::clone(&room) },
            Output { file: output, control, listeners: Arc::clone(&listeners) },
        );
        Ok(Console { serial: Mutex::new(serial), irq, room, listeners })
    }

    /// Signalled when the guest's interrupt is to be raised.
    pub fn irq(&self) -> &EventFd {
        &self.irq
    }

    /// Lets a stream hear what is printed from now on, and type, until it is closed, does not keep up,
    /// or the guest ends. There may be several.
    pub fn attach(self: &Arc<Console>, stream: UnixStream, control: Arc<Control>) -> Result<()> {
        let failed = |e| Error::io("cannot attach to the console", e);
        stream.set_nonblocking(true).map_err(failed)?;
        let typed = stream.try_clone().map_err(failed)?;
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
        self.feed(typed.into(), None, control).map(drop)
    }

    /// Feeds the port from `input` in a thread, until its end or the guest's. With the power button as
    /// `keys`, Ctrl-A x ends the guest, Ctrl-A p presses the button and Ctrl-A Ctrl-A is a Ctrl-A.
    pub fn feed(
        self: &Arc<Console>,
        input: OwnedFd,
        keys: Option<Arc<Power>>,
        control: Arc<Control>,
    ) -> Result<JoinHandle<()>> {
        let console = Arc::clone(self);
        let escape = keys.map(|power| Escape { pending: false, power });
        std::thread::Builder::new()
            .name("console".into())
            .spawn(move || {
                // Whatever ends the input, the guest goes on without.
                let _ = console.pump(&input, escape, &control);
            })
            .map_err(|e| Error::io("cannot start the console's thread", e))
    }

    fn pump(
        &self,
        input: &OwnedFd,
        mut escape: Option<Escape>,
        control: &Control,
    ) -> nix::Result<()> {
        loop {
            let room = self.serial().fifo_capacity();
            if room == 0 {
                wait(&[(&*self.room, PollFlags::POLLIN), (control.wake(), PollFlags::POLLIN)])?;
                // Not an error: it wakes without a count when the guest is over.
                let _ = self.room.read();
            } else {
                wait(&[(input, PollFlags::POLLIN), (control.wake(), PollFlags::POLLIN)])?;
            }
            if control.over() {
                return Ok(());
            }
            if room == 0 {
                continue;
            }
            let mut bytes = vec![0; room];
            let len = match nix::unistd::read(input, &mut bytes) {
                Ok(0) => return Ok(()),
                Ok(len) => len,
                Err(Errno::EINTR | Errno::EAGAIN) => continue,
                Err(error) => return Err(error),
            };
            bytes.truncate(len);
            if let Some(escape) = &mut escape
                && escape.filter(&mut bytes)
            {
                control.end(Ok(Ended::Stopped));
            }
            // A port in loop-back mode takes nothing from outside, as a real one does.
            let _ = self.serial().enqueue_raw_bytes(&bytes);
        }
    }

    fn serial(&self) -> MutexGuard<'_, Serial<Line, Events, Output>> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Console {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut serial = self.serial();
        for byte in data {
            *byte = serial.read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut serial = self.serial();
        for byte in data {
            // A console that nobody listens to loses what is printed; the guest goes on.
            let _ = serial.write(offset as u8, *byte);
        }
    }
}

/// Finds the keys that are not for the guest.
struct Escape {
    pending: bool,
    power: Arc<Power>,
}

impl Escape {
    /// Takes them out; `true` when the guest is to end.
    fn filter(&mut self, bytes: &mut Vec<u8>) -> bool {
        let mut end = false;
        bytes.retain(|byte| {
            let escaped = std::mem::replace(&mut self.pending, false);
            match (escaped, *byte) {
                (false, ESCAPE) => {
                    self.pending = true;
                    false
                }
                (true, b'x') => {
                    end = true;
                    false
                }
                (true, b'p') => {
                    self.power.press();
                    false
                }
                (true, ESCAPE) | (false, _) => true,
                (true, _) => false,
            }
        });
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_ends_the_guest_and_ctrl_a_twice_is_one() {
        let control = Arc::new(Control::new().unwrap());
        let mut escape = Escape { pending: false, power: Arc::new(Power::new(control)) };
        let mut bytes = b"a\x01\x01b\x01".to_vec();
        assert!(!escape.filter(&mut bytes));
        assert_eq!(bytes, b"a\x01b");
        let mut bytes = b"xz".to_vec();
        assert!(escape.filter(&mut bytes));
        assert_eq!(bytes, b"z");
    }
}
