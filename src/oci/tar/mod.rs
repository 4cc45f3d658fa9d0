//! Tar streams: a layer's onto the files of a file system, and files into one.

mod ahead;
mod archive;
mod decompress;
mod gather;
mod pack;
mod unpack;

pub use ahead::Ahead;
pub use archive::{Archive, Kind};
pub use decompress::plain;
pub use gather::{Gather, gather};
pub use pack::{pack_all, pack_changes};
pub use unpack::{Unpacked, unpack};
