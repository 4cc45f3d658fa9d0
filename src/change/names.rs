//! The names that snapshots may have.

use crate::error::{Error, ErrorKind, Result};
use crate::family::tree::Family;
use crate::image::Label;

/// Refuses a name that no snapshot may have.
pub(crate) fn check(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > Label::MAX_NAME || name.chars().any(char::is_control) {
        let message = format!(
            "'{}' is no name for a snapshot: 1 to {} bytes, without control characters",
            name.escape_debug(),
            Label::MAX_NAME
        );
        return Err(Error::invalid(message));
    }
    Ok(())
}

/// The same, and one that a snapshot of the disk has.
pub(crate) fn check_new(family: &Family, name: &str) -> Result<()> {
    check(name)?;
    if family.snapshots().any(|m| m.label.name == name) {
        let message = format!("has a snapshot '{name}' already");
        return Err(Error::new(ErrorKind::Exists, message).at_path(&family.head.path));
    }
    Ok(())
}
