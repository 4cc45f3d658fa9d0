//! The files of disks as trees: who stands on whom, by what their labels say, and what that costs.
//!
//! It reads headers and tables, moves no guest byte and changes no tree.

pub(crate) mod beside;
pub(crate) mod cost;
pub(crate) mod dropped;
mod exclusive;
pub mod forest;
pub(crate) mod names;
mod own;
pub(crate) mod scan;
pub mod sealed;
pub mod standing;
pub mod tree;

pub use beside::clones_of;
pub use names::frozen_path;
pub use own::{Own, own};
pub use sealed::refuse_sealed;
