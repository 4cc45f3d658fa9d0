//! The names of images, as users write them.

pub mod credentials;
pub mod name;
pub mod nbd;
pub mod tree;
