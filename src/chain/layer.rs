//! One open layer of a chain.

use std::path::PathBuf;
use std::sync::Arc;

use crate::formats::Format;
use crate::image::Image;
use crate::storage::FileStorage;

/// One open layer.
#[derive(Clone)]
pub struct Layer {
    /// The file's name, as it was opened.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// What it maps.
    pub image: Arc<dyn Image>,
    /// The open file.
    pub file: Arc<FileStorage>,
}
