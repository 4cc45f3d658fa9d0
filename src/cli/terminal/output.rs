//! What commands print: text, JSON, and progress on a terminal.

use std::io::{ErrorKind, Write};
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use vdisk::{Error, Result};

/// Writes to standard output. A reader that has seen enough is no failure.
pub fn text(text: &str) -> Result<()> {
    bytes(text.as_bytes())
}

/// As [`text`], for what need not be text.
pub fn bytes(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(Error::io("standard output could not be written", e))
        }
        _ => Ok(()),
    }
}

/// Writes a value as JSON to standard output.
pub fn json(value: &impl Serialize) -> Result<()> {
    text(&(serde_json::to_string_pretty(value).map_err(no_json)? + "\n"))
}

/// A path as JSON shows it, which knows no other text than UTF-8: bytes that are none are replaced.
pub fn path(path: impl AsRef<Path>) -> String {
    path.as_ref().to_string_lossy().into_owned()
}

/// A value as JSON in one line.
pub fn json_line(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(no_json)
}

fn no_json(error: serde_json::Error) -> Error {
    Error::invalid(format!("the report cannot be written as JSON: {error}"))
}

/// A progress bar over bytes on standard error, if that is a terminal. It shows up when the command
/// takes a while, and is gone when it is dropped.
pub struct Progress(ProgressBar);

impl Progress {
    /// A bar of `total` bytes.
    pub fn new(doing: &'static str, total: u64) -> Progress {
        let bar = ProgressBar::new(total).with_message(doing);
        let shape = "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {eta}";
        if let Ok(style) = ProgressStyle::with_template(shape) {
            bar.set_style(style);
        }
        Progress(bar)
    }

    /// Says how many bytes there are to be done, where that was not known before.
    pub fn of(&self, total: u64) {
        if self.0.length() != Some(total) {
            self.0.set_length(total);
            self.0.set_position(0);
        }
    }

    /// Says how many bytes are done; threads may say so in any order.
    pub fn at(&self, done: u64) {
        if done > self.0.position() {
            self.0.set_position(done);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
