//! Images of other programs' formats.

pub mod check;
pub mod create;
pub mod info;
pub mod write;
