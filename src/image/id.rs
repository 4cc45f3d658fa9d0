//! How disks, layers and their contents are told apart.

use uuid::Uuid;

/// A random 128-bit id.
pub type Id = Uuid;
