//! How a caller is told how far a long work is, and stops it.

/// Told the bytes done and to be done, and now and then nothing new; `false` asks to stop.
pub type Progress<'a> = dyn FnMut(u64, u64) -> bool + Send + 'a;
