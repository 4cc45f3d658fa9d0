//! A disk and what it stands on: clones and how a base knows of them, another base or none, and writing
//! a disk into its base.

pub(crate) mod clone;
pub mod commit;
pub(crate) mod marks;
pub mod preview;
pub mod rebase;
pub mod roll;
