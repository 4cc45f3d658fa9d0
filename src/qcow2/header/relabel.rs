//! Changing what the header says of the layer, and nothing else, while others read the image.
//!
//! Whoever reads an image reads its header once. What stands in it beside the tables' places is
//! nobody's but the label's, so it may change under readers; not under a writer, who keeps the header
//! in memory.

use crate::error::Result;
use crate::image::{Identity, Label};
use crate::qcow2::header::{Header, autoclear};
use crate::storage::Storage;

/// Runs `change` on what the header in `storage` says of the layer, and writes that durably where it
/// is something else. The caller sees to it that nobody else changes the header meanwhile.
///
/// # Errors
/// Those of `change`, and of a header that does not fit into the first cluster: nothing is written.
pub fn change_identity(
    storage: &dyn Storage,
    change: impl FnOnce(&mut Identity) -> Result<()>,
) -> Result<()> {
    let mut header = Header::read(storage)?;
    let before = header.identity()?;
    let mut identity = before.clone();
    change(&mut identity)?;
    if identity == before {
        return Ok(());
    }
    header.autoclear &= !autoclear::CONTENT_ID;
    if identity.vouched && header.version >= 3 {
        header.autoclear |= autoclear::CONTENT_ID;
    }
    header.backing = identity.backing;
    let mut now = vec![0; (header.spill.end - header.spill.start) as usize];
    storage.read_exact_at(header.spill.start, &mut now)?;
    let mut label = identity.label;
    let layout = loop {
        let data = label.as_ref().map(Label::encode).transpose()?;
        header.set_extension(Label::MAGIC, data);
        let clones = label.as_mut().and_then(|label| label.clones.as_mut());
        match header.lay_out(&now) {
            // Less is said of the clones where there is no room.
            Err(_) if clones.is_some_and(|clones| clones.shed()) => {}
            layout => break layout?,
        }
    };
    layout.write(storage)
}
