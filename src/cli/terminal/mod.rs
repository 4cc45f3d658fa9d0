//! What a person at a terminal meets: questions, sizes, progress, stopping.

pub mod ask;
pub mod output;
pub mod size;
pub mod stop;
