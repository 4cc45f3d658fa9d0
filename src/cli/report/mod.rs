//! Verbs that say what a disk is and holds: one file each.

pub mod check;
pub mod compare;
pub mod info;
pub mod map;
pub mod picture;
pub mod tree;
