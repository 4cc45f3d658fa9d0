//! Asking an instance's keeper.

use serde_json::Value;

use super::place;
use super::record::Record;
use crate::change::merge::Progress;
use crate::control::{Order, Request, ask_at, result_of};
use crate::error::{Error, ErrorKind, Result};

/// Asks the keeper of an instance.
///
/// # Errors
/// [`ErrorKind::NotFound`] where it does not run.
pub fn ask(record: &Record, order: Order, progress: &mut Progress<'_>) -> Result<Value> {
    let request = Request::Instance { order };
    let asked = ask_at(&place::socket(record), &request)?;
    let answer = asked.map(|connection| result_of(connection, progress)).transpose()?.flatten();
    // One that is about to be gone hears and has nothing to say any more.
    answer.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("{} does not run", record.name)))
}

/// Waits for an instance's end; its exit status, or nothing where its process was lost.
pub fn ended(record: &Record, progress: &mut Progress<'_>) -> Result<Option<u8>> {
    match ask(record, Order::Ended, progress) {
        Ok(answer) => {
            Ok(answer.get("status").and_then(Value::as_u64).and_then(|s| s.try_into().ok()))
        }
        Err(e) if e.kind() == ErrorKind::Interrupted => Err(e),
        // It has ended, just before it could be asked or while it was.
        Err(e) => match place::find(&record.id) {
            Ok(now) if now.lives() => Err(e),
            Ok(now) => Ok(now.status.filter(|_| now.phase == super::Phase::Exited)),
            Err(_) => Ok(None),
        },
    }
}
