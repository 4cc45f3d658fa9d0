//! What a client asks for: checked against what was agreed on and against the disk, before
//! anything is done.

use super::handshake::{MAX_BLOCK, Terms};
use super::reply::Failure;
use crate::block::{BlockDevice, check_range};
use crate::nbd::wire::{self, Request, command, error};

/// Requires that `request` may be carried out on `device`.
///
/// # Errors
/// The failure to be told.
pub fn check(request: &Request, terms: Terms, device: &dyn BlockDevice) -> Result<(), Failure> {
    let (flags, needs_range, writes) = match request.command {
        command::READ if terms.structured => (wire::DF, true, false),
        command::READ => (0, true, false),
        command::WRITE => (0, true, true),
        command::FLUSH => (0, false, false),
        command::TRIM => (0, true, true),
        command::CACHE => (0, true, false),
        command::WRITE_ZEROES => (wire::NO_HOLE, true, true),
        command::BLOCK_STATUS if !terms.contexts.is_empty() => (wire::REQ_ONE, true, false),
        command::BLOCK_STATUS => {
            return Err(Failure::new(error::INVAL, "no metadata context was agreed on"));
        }
        _ => return Err(Failure::new(error::INVAL, "this command is not known here")),
    };
    if request.flags & !(flags | wire::FUA) != 0 {
        return Err(Failure::new(error::INVAL, "a flag that does not belong to this command"));
    }
    if writes && device.read_only() {
        return Err(Failure::new(error::PERM, "the export is read-only"));
    }
    if !needs_range {
        return Ok(());
    }
    check_range(request.offset, u64::from(request.len), device.size()).map_err(|e| {
        // What reaches past the end of a disk that should grow is told as a lack of space.
        let grows = matches!(request.command, command::WRITE | command::WRITE_ZEROES);
        Failure::new(if grows { error::NOSPC } else { error::INVAL }, e.message())
    })?;
    let carries = matches!(request.command, command::READ | command::WRITE);
    if carries && request.len > MAX_BLOCK {
        let text = format!("{MAX_BLOCK} bytes are the most for one request");
        return Err(Failure::new(error::INVAL, text));
    }
    if request.command == command::BLOCK_STATUS && request.len == 0 {
        return Err(Failure::new(error::INVAL, "block status of no bytes"));
    }
    Ok(())
}
