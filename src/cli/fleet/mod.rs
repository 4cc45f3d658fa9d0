//! Many instances by one command: started (`--count`), put on another image and back (`vdisk roll`).

pub mod again;
mod glob;
mod health;
pub mod many;
mod report;
pub mod roll;
mod target;
mod work;
