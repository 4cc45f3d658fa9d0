//! `vdisk attach`: the console of a virtual machine that runs as an instance, the terminal of a container, or its
//! output.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use clap::Args as ClapArgs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use vdisk::instance::{self, Kind, Record, Tail, place};
use vdisk::{Error, ErrorKind, Result};

use super::logs;
use super::switches::CONSOLE;
use crate::cli::terminal::stop;

/// Ctrl-A: the next key is for vdisk.
const ESCAPE: u8 = 1;

/// Connect to the serial console of a virtual machine, or to the terminal or output of a detached container
///
/// Ctrl-A d leaves a virtual machine, and a container with a terminal (`vdisk run -dt`); it goes on. A container
/// is shown from now on until it ends, and the exit status is its command's then. Without a terminal it reads
/// nothing, and Ctrl-C leaves it: `vdisk exec -t` is the way in.
#[derive(ClapArgs)]
pub struct AttachArgs {
    /// Its name, its id or the first digits, or its disk.
    #[arg(value_name = "N")]
    instance: String,
}

pub fn attach(args: &AttachArgs) -> Result<u8> {
    let record = place::find(&args.instance)?;
    let console = place::of(&record)?.join(CONSOLE);
    if record.kind == Kind::Container && console.symlink_metadata().is_err() {
        return show(&record);
    }
    let stream = UnixStream::connect(&console).map_err(|e| {
        let text = format!("{} does not run: {e}", record.name);
        Error::new(ErrorKind::NotFound, text)
    })?;
    let raw = Raw::enter();
    let left = relay(stream).map_err(|e| Error::io("lost the console", e));
    drop(raw);
    match (left?, record.kind) {
        (false, Kind::Container) => {
            instance::ended(&record, &mut |_, _| true)?.ok_or_else(|| lost(&record))
        }
        _ => Ok(0),
    }
}

fn lost(record: &Record) -> Error {
    Error::new(ErrorKind::Io, format!("{} was lost", record.name))
}

/// Shows what a container prints, until it ends or the user leaves it.
fn show(record: &Record) -> Result<u8> {
    let asked = stop::on_signals()?;
    let mut tail = logs::open(record, Tail::at_end)?;
    let mut printed = Ok(());
    let ended = instance::ended(record, &mut |_, _| {
        printed = logs::print(&mut tail);
        printed.is_ok() && !asked.asked()
    });
    printed?;
    match ended {
        Err(e) if e.kind() == ErrorKind::Interrupted => Ok(0),
        ended => {
            logs::print(&mut tail)?;
            ended?.ok_or_else(|| lost(record))
        }
    }
}

/// The user's terminal, given back as it was.
struct Raw(Option<Termios>);

impl Raw {
    fn enter() -> Raw {
        let saved = tcgetattr(std::io::stdin()).ok();
        if let Some(mut raw) = saved.clone() {
            cfmakeraw(&mut raw);
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &raw);
        }
        Raw(saved)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(saved) = &self.0 {
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, saved);
        }
    }
}

/// Both ways, until what runs there ends or the user leaves it; whether he did. An end of what is typed leaves the
/// other way open.
fn relay(mut stream: UnixStream) -> std::io::Result<bool> {
    let stdin = std::io::stdin();
    let (mut typing, mut escaped, mut buffer) = (true, false, [0; 4096]);
    loop {
        let mut fds = vec![PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        if typing {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(false));
        let (shown, typed) = (ready.next() == Some(true), ready.next() == Some(true));
        if shown {
            let length = match stream.read(&mut buffer) {
                Ok(0) => return Ok(false),
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return Ok(false),
                length => length?,
            };
            let mut out = std::io::stdout();
            out.write_all(buffer.get(..length).unwrap_or_default()).and_then(|()| out.flush())?;
        }
        if typed {
            let length = nix::unistd::read(&stdin, &mut buffer)?;
            typing = length > 0;
            let Some(keys) = meant(buffer.get(..length).unwrap_or_default(), &mut escaped) else {
                return Ok(true);
            };
            stream.write_all(&keys)?;
        }
    }
}

/// The keys that are for the guest; nothing where the user leaves.
fn meant(typed: &[u8], escaped: &mut bool) -> Option<Vec<u8>> {
    let mut keys = Vec::with_capacity(typed.len());
    for &key in typed {
        match (std::mem::take(escaped), key) {
            (false, ESCAPE) => *escaped = true,
            (true, b'd') => return None,
            (true, ESCAPE) | (false, _) => keys.push(key),
            (true, _) => keys.extend([ESCAPE, key]),
        }
    }
    Some(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_pass_but_for_those_that_leave() {
        let mut escaped = false;
        assert_eq!(meant(b"ab\x01", &mut escaped), Some(b"ab".to_vec()));
        assert_eq!(meant(b"\x01\x01xc", &mut escaped), Some(b"\x01\x01xc".to_vec()));
        assert_eq!(meant(b"a\x01d", &mut escaped), None);
    }
}
