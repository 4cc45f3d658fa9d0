//! `blkdebug`: faults on demand.

pub mod events;
pub mod faults;
pub mod faulty;
