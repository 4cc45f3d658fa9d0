//! Printing for the whole program, in place of the standard library's macros of these names: those
//! panic where a reader has gone away, as `… | head` does.
//!
//! A reader of standard output who has seen enough ends nothing: the command goes on, and its status
//! says how it went. A standard output that cannot be written for another reason, such as a full
//! disk, is a failure that [`finish`] tells. Messages that nobody can read are lost.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::sync::Mutex;

/// Why standard output lacks something, once it does.
static LOST: Mutex<Option<io::Error>> = Mutex::new(None);

macro_rules! print {
    ($($arg:tt)*) => { $crate::say::out(format_args!($($arg)*)) };
}

macro_rules! println {
    () => { $crate::say::out_line(format_args!("")) };
    ($($arg:tt)*) => { $crate::say::out_line(format_args!($($arg)*)) };
}

macro_rules! eprint {
    ($($arg:tt)*) => { $crate::say::message(format_args!($($arg)*)) };
}

macro_rules! eprintln {
    () => { $crate::say::message_line(format_args!("")) };
    ($($arg:tt)*) => { $crate::say::message_line(format_args!($($arg)*)) };
}

/// What `print!` does.
pub fn out(text: Arguments<'_>) {
    note(io::stdout().lock().write_fmt(text));
}

/// What `println!` does.
pub fn out_line(text: Arguments<'_>) {
    let mut out = io::stdout().lock();
    note(out.write_fmt(text).and_then(|()| out.write_all(b"\n")));
}

/// What `eprint!` does.
pub fn message(text: Arguments<'_>) {
    let _ = io::stderr().lock().write_fmt(text);
}

/// What `eprintln!` does.
pub fn message_line(text: Arguments<'_>) {
    let mut out = io::stderr().lock();
    let _ = out.write_fmt(text).and_then(|()| out.write_all(b"\n"));
}

fn note(done: io::Result<()>) {
    if let Err(error) = done
        && error.kind() != ErrorKind::BrokenPipe
    {
        LOST.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error);
    }
}

/// Writes out what still waits.
///
/// # Errors
/// Why a part of standard output could not be written, other than for want of a reader.
pub fn finish() -> io::Result<()> {
    note(io::stdout().lock().flush());
    LOST.lock().unwrap_or_else(|e| e.into_inner()).take().map_or(Ok(()), Err)
}
