//! The terminal while a guest has it: keys go to the guest as they are.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::error::{Error, Result};

/// A terminal in raw mode; when it is dropped, also by a panic, its settings are as they were.
pub struct Raw {
    terminal: OwnedFd,
    before: Termios,
}

impl Raw {
    /// Takes the terminal behind `fd`; `None` when it is not one.
    pub fn take(fd: BorrowedFd<'_>) -> Result<Option<Raw>> {
        let Ok(before) = tcgetattr(fd) else { return Ok(None) };
        let terminal =
            fd.try_clone_to_owned().map_err(|e| Error::io("cannot hold the terminal", e))?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(terminal.as_fd(), SetArg::TCSANOW, &raw)
            .map_err(|e| Error::io("cannot set the terminal to raw mode", e.into()))?;
        Ok(Some(Raw { terminal, before }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone has no settings to restore.
        let _ = tcsetattr(self.terminal.as_fd(), SetArg::TCSANOW, &self.before);
    }
}
