//! The names of images, as users write them.

pub mod name;
pub mod nbd;
pub mod tree;
