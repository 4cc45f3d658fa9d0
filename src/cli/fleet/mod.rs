//! Many instances by one command: started (`--count`), put on another image and back (`vdisk roll`).

pub mod again;
pub mod disk;
mod glob;
mod health;
pub mod many;
mod report;
pub mod roll;
mod target;
mod work;
