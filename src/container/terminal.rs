//! The user's terminal, passed on to a terminal of the container's own: job control works inside,
//! and the program never holds the user's terminal itself.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::getpid;
use rustix::pty::{ptsname, unlockpt};
use rustix::stdio::{stdin, stdout};
use rustix::termios::{
    LocalModes, OptionalActions, SpecialCodeIndex, Termios, Winsize, isatty, tcgetattr, tcgetpgrp,
    tcgetwinsize, tcsetattr, tcsetwinsize,
};
use vdisk_fuse::apart::Apart;

use super::seats::Seats;
use super::supervise::takes_default_action;
use super::wire;

/// The size of a terminal at which nobody sits.
const SIZE: Winsize = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };

/// Whether the user sits at both ends of the program.
pub(super) fn wanted() -> bool {
    isatty(stdin()) && isatty(stdout())
}

/// A running relay. When dropped, it prints what is left and gives the user's terminal back as it
/// was.
#[derive(Debug)]
pub(super) struct Relay {
    master: File,
    name: String,
    /// How the user's terminal was, where he has one.
    saved: Option<Termios>,
    stop: Option<UnixStream>,
    threads: Vec<JoinHandle<()>>,
}

impl Relay {
    /// Makes a terminal in the container whose process 1 is `init`, which must still be ours: the
    /// path goes through its root directory. Who sits at `seats`, where there are such, types there; the
    /// user of this process else.
    pub(super) fn start(init: i32, seats: Option<Arc<Seats>>) -> io::Result<Relay> {
        let master = open(init)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?.to_string_lossy().into_owned();
        let saved = if seats.is_some() { None } else { tcgetattr(stdin()).ok() };
        let (stop, stopped) = UnixStream::pair()?;
        let mut relay = Relay { master, name, saved, stop: Some(stop), threads: Vec::new() };
        match seats {
            Some(_) => tcsetwinsize(&relay.master, SIZE)?,
            None => relay.resize(),
        }
        if let Some(mut raw) = relay.saved.clone() {
            raw.make_raw();
            tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        }
        let (typed, ends) = (relay.master.try_clone()?, stopped.try_clone()?);
        let heard = seats.clone();
        relay.spawn("terminal input", move || match heard {
            Some(seats) => seats.hear(&ends, |keys| press(&typed, keys, init).is_ok()),
            None => type_in(typed, &ends, init),
        })?;
        let shown = relay.master.try_clone()?;
        relay.spawn("terminal output", move || show(shown, &stopped, seats.as_deref()))?;
        Ok(relay)
    }

    fn spawn(&mut self, name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.threads.push(thread::Builder::new().name(name.into()).spawn(run)?);
        Ok(())
    }

    /// The terminal's path in the container.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Gives the container's terminal the size of the user's.
    pub(super) fn resize(&self) {
        // A terminal without a size is a terminal all the same.
        if let Ok(size) = tcgetwinsize(stdin()) {
            let _ = tcsetwinsize(&self.master, size);
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop = None;
        for thread in self.threads.drain(..) {
            // A relay that panicked has said so.
            let _ = thread.join();
        }
        // Nobody is left to hear that the terminal is gone.
        if let Some(saved) = &self.saved {
            let _ = tcsetattr(stdin(), OptionalActions::Now, saved);
        }
    }
}

/// Opens a terminal in the container. The way there leads through its root directory, which this
/// process may serve itself.
fn open(init: i32) -> io::Result<File> {
    let multiplexer = format!("/proc/{init}/root/dev/pts/ptmx");
    let (ours, theirs) = UnixStream::pair()?;
    let opened = Apart::here().run(&[theirs.as_fd()], || {
        let master = OpenOptions::new().read(true).write(true).open(multiplexer)?;
        wire::send_open(&theirs, master.as_fd())
    });
    opened.flatten()?;
    Ok(wire::receive_open(&ours)?.into())
}

/// From the user to the program, until the relay stops.
fn type_in(mut master: File, stopped: &UnixStream, init: i32) {
    let mut buffer = [0; 4096];
    while let Ok([typed, false]) = ready([stdin(), stopped.as_fd()], PollTimeout::NONE) {
        if typed {
            let Ok(length @ 1..) = rustix::io::read(stdin(), &mut buffer) else {
                // What is no terminal ends without a key that says so.
                if let (false, Ok(modes)) = (isatty(stdin()), tcgetattr(&master)) {
                    let _ = master.write_all(&[modes.special_codes[SpecialCodeIndex::VEOF]]);
                }
                return;
            };
            if press(&master, buffer.get(..length).unwrap_or_default(), init).is_err() {
                return;
            }
        }
    }
}

/// Presses keys at the program's terminal.
fn press(mut master: &File, keys: &[u8], init: i32) -> io::Result<()> {
    let meant = meant_for_init(master, keys, init);
    master.write_all(keys)?;
    if let Some(signal) = meant {
        // To this process, which does with it what it does with all signals.
        let _ = kill(getpid(), signal);
    }
    Ok(())
}

/// The signal that these keys are in the container's terminal, where its process 1 is among those
/// that it is for and would die of it if it were not process 1, to which the kernel does not send it.
fn meant_for_init(master: &File, typed: &[u8], init: i32) -> Option<Signal> {
    let modes = tcgetattr(master).ok()?;
    let keys =
        [(SpecialCodeIndex::VINTR, Signal::SIGINT), (SpecialCodeIndex::VQUIT, Signal::SIGQUIT)];
    let (_, signal) = keys.into_iter().find(|(key, _)| {
        let code = modes.special_codes[*key];
        code != 0 && typed.contains(&code)
    })?;
    let in_foreground = || tcgetpgrp(master).is_ok_and(|group| group.as_raw_pid() == init);
    let signals = modes.local_modes.contains(LocalModes::ISIG);
    (signals && in_foreground() && takes_default_action(init, signal as i32)).then_some(signal)
}

/// From the program to the user, and to who sits there, until the program's side is closed and all is shown.
fn show(mut master: File, stopped: &UnixStream, seats: Option<&Seats>) {
    let mut buffer = [0; 4096];
    let mut stopping = false;
    loop {
        // After the end: what is there, but no waiting for more.
        let wait = if stopping { PollTimeout::ZERO } else { PollTimeout::NONE };
        let Ok([shown, stop]) = ready([master.as_fd(), stopped.as_fd()], wait) else { return };
        if shown {
            let Ok(length @ 1..) = master.read(&mut buffer) else { return };
            let bytes = buffer.get(..length).unwrap_or_default();
            if let Some(seats) = seats {
                seats.show(bytes);
            }
            if io::stdout().write_all(bytes).and_then(|()| io::stdout().flush()).is_err() {
                return;
            }
        } else if stopping {
            return;
        }
        stopping |= stop;
    }
}

/// Which of two descriptors have something to read, or an end to tell.
fn ready(fds: [BorrowedFd<'_>; 2], wait: PollTimeout) -> io::Result<[bool; 2]> {
    let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    match poll(&mut fds, wait) {
        Ok(_) => Ok(fds.map(|fd| fd.any().unwrap_or(false))),
        Err(nix::Error::EINTR) => Ok([false, false]),
        Err(error) => Err(error.into()),
    }
}
