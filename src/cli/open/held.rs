//! Handing a command over to the process that holds the disk.

use std::path::Path;

use serde_json::Value;
use vdisk::control::{self, Request};
use vdisk::{Error, ErrorKind, Result};

use super::jail;
use crate::cli::terminal::output::Progress;
use crate::cli::terminal::stop::Stop;

/// Asks the process that holds `disk`; `None` where none does that could be asked. A command that is in its
/// jail already, and is said again, asks nobody: whoever has the disk by now has it locked.
pub fn ask(disk: &Path, request: &Request) -> Result<Option<Value>> {
    if jail::is_closed() {
        return Ok(None);
    }
    control::ask(disk, request, &mut |_, _| true)
}

/// As [`ask`], for what may take long: shows how far it is, and cancels it where the user says so.
pub fn ask_long(
    disk: &Path,
    request: &Request,
    doing: &'static str,
    stop: &Stop,
) -> Result<Option<Value>> {
    if jail::is_closed() {
        return Ok(None);
    }
    let mut bar: Option<Progress> = None;
    control::ask(disk, request, &mut |done, total| {
        if total > 0 {
            bar.get_or_insert_with(|| Progress::new(doing, total)).at(done);
        }
        !stop.asked()
    })
}

/// A number of an answer.
pub fn number(answer: &Value, key: &str) -> Result<u64> {
    answer.get(key).and_then(Value::as_u64).ok_or_else(|| {
        let text = format!("the process that holds the disk does not say '{key}'");
        Error::new(ErrorKind::Io, text)
    })
}
