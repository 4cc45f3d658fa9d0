//! From a name to an open layer or disk: the gate, the walk down, the formats, the search for a base
//! that was moved, and whether it is the one it was.
//!
//! Only this room names concrete formats. It knows no tree of snapshots and changes none.

pub mod create;
mod data_file;
pub mod disk;
pub(crate) mod fingerprint;
mod foreign;
pub(crate) mod gate;
mod options;
pub(crate) mod parent;
pub mod sameness;
mod search;
pub(crate) mod walk;

pub use create::{create, create_on, create_raw, create_raw_on, create_with_data, ephemeral};
pub use data_file::open_data_file;
pub use disk::{Peek, open_file, open_guessed, open_image, peek, probe, probe_named};
pub use fingerprint::keeping_time;
pub use foreign::{open_vmdk, open_vmdk_to_write};
pub use gate::{Format, MAX_DEPTH, follow_links, resolve};
pub use options::OpenOptions;
pub(crate) use walk::open_layers;
pub use walk::{Guard, Walk};
