//! Checking a disk in use. While its head is looked at, its user's requests wait.

use std::time::Duration;

use crate::block::BlockDevice;
use crate::chain::{Chain, Layer};
use crate::change::live::Live;
use crate::error::Result;
use crate::image::{Check, Repair};

/// A flush that was under way when the head came to rest may take so often so long.
const LOOKS: usize = 4;
const PATIENCE: Duration = Duration::from_millis(20);

impl Live {
    /// Checks the head and, where `whole`, the layers below it that hold anything to be checked.
    /// Nothing is mended.
    ///
    /// # Errors
    /// As [`Image::check`](crate::image::Image::check).
    pub fn check(&self, whole: bool) -> Result<Vec<(Layer, Check)>> {
        let _turn = self.begin("check".to_owned())?;
        // What is written now is not written while requests wait.
        self.chain().flush()?;
        let head = self.chain().head();
        let check = self.chain().check_head().map_err(|e| e.at_path(&head.path))?;
        let mut found = vec![(head, check)];
        let lower = self.chain().all_layers().split_off(1);
        for layer in lower.into_iter().filter(|l| whole && l.image.capabilities().check.is_some()) {
            let check = layer.image.check(Repair::None).map_err(|e| e.at_path(&layer.path))?;
            found.push((layer, check));
        }
        Ok(found)
    }
}

impl Chain {
    fn check_head(&self) -> Result<Check> {
        let _publishing = self.begin_publishing();
        let layers = self.layers_alone();
        let head = &layers.head.image;
        for _ in 1..LOOKS {
            let check = head.check(Repair::None)?;
            if check.is_clean() {
                return Ok(check);
            }
            // Somebody may just be giving back what was freed before.
            std::thread::sleep(PATIENCE);
        }
        head.check(Repair::None)
    }
}
