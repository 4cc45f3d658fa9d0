//! Images as commands use them: opened, followed down, copied.

pub mod bitmaps;
pub mod bottom;
pub mod copy;
pub mod data_file;
pub mod open;
pub mod status;
pub mod usage;
pub mod window;
