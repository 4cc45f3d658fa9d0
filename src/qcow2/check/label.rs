//! The header's label: whether it is whole, and what is left of one that is not.
//!
//! A label that was written in one piece over several sectors may be torn by a power cut; one in two
//! parts may have lost its rest. Its front stands in one sector, and says who the layer is.

use super::{Check, Repair};
use crate::error::{ErrorKind, Result};
use crate::image::{Clones, Id, Label, PartialLabel, Role};
use crate::qcow2::header::extension;
use crate::qcow2::header::layout::SECTOR;
use crate::qcow2::header::{Header, autoclear};
use crate::qcow2::image::Image;

/// What the user has to know of a layer that nobody knows by its label any more.
const DROPPED: &str = "nothing of it could be read: it is dropped. The layer is no snapshot, base or \
                       clone to vdisk any more, only a file that stands where it stood";

impl Image {
    /// Says that the label is damaged, or makes of it what can be made.
    pub(super) fn check_label(&self, check: &mut Check, repair: Repair) -> Result<()> {
        let header = self.header();
        let Some(label) = header.extension(Label::MAGIC) else { return Ok(()) };
        match Label::decode(label) {
            Err(error) if error.kind() == ErrorKind::Corrupt => {}
            _ => return Ok(()),
        }
        if repair != Repair::All {
            check.corruption(
                "the header's vdisk label is damaged: --repair all makes of it what can be made"
                    .to_owned(),
            );
            return Ok(());
        }
        let left = match Label::partial(label) {
            Some(left) => Some(left),
            None => self.torn_label(&header)?,
        };
        let Some(left) = left else {
            check.say(format!("Repairing the header's vdisk label: {DROPPED}"));
            check.corruptions_fixed += 1;
            return self.put_label(None);
        };
        let lost = if left.named { "its description" } else { "its name, its description" };
        let (mended, backing) = mended(left);
        let named = match mended.role {
            Role::Snapshot => format!(" (snapshot '{}')", mended.name),
            _ => String::new(),
        };
        check.say(format!(
            "Repairing the header's vdisk label: the layer is known again{named}; {lost} and what it \
             remembered besides its ids are lost, also whether clones stand on it"
        ));
        check.corruptions_fixed += 1;
        self.put_label(Some((mended, backing)))
    }

    /// What the first sector holds of a label that goes on past it.
    fn torn_label(&self, header: &Header) -> Result<Option<PartialLabel>> {
        let mut sector = vec![0; self.storage.len()?.min(SECTOR) as usize];
        self.storage.read_exact_at(0, &mut sector)?;
        let mut found = None;
        let area = sector.get(header.fixed_len()..).unwrap_or_default();
        extension::each(area, |magic, place| {
            // One that ends in the sector was not torn: what is wrong with it can be anywhere.
            if magic == Label::MAGIC && place.end > area.len() {
                found = area.get(place.start + extension::HEAD..).and_then(Label::torn);
            }
        });
        Ok(found)
    }

    fn put_label(&self, new: Option<(Label, Option<String>)>) -> Result<()> {
        let (label, backing) = new.unzip();
        let label = label.map(|label| label.encode()).transpose()?;
        self.update_header(|h| {
            if label.is_none() {
                h.autoclear &= !autoclear::CONTENT_ID;
            }
            h.set_extension(Label::REST_MAGIC, None);
            h.set_extension(Label::MAGIC, label);
            // The base's name may have gone with the rest; who else changed it left a name.
            if let (Some(name), Some(recorded)) = (backing.flatten(), &mut h.backing)
                && recorded.name.chars().any(char::is_control)
            {
                recorded.name = name;
            }
        })
    }
}

/// The label that a layer gets of what is left, and its base's name.
fn mended(left: PartialLabel) -> (Label, Option<String>) {
    let PartialLabel { mut label, named, backing } = left;
    let (name, layer) = (label.name.is_empty(), label.layer);
    let stand_in = || format!("recovered-{}", &Id::simple(layer).to_string()[..8]);
    match label.role {
        // What it was kept for is lost: it must not go with that.
        Role::Dropped | Role::Dropping | Role::Returning => {
            (label.role, label.name) = (Role::Snapshot, stand_in());
        }
        Role::Snapshot if !named || name => label.name = stand_in(),
        _ => {}
    }
    if matches!(label.role, Role::Snapshot | Role::Base) {
        // Who stands on it stood in what is lost: somebody may, until the user says that nobody does.
        label.clones = Some(Clones { more: true, ..Clones::default() });
    }
    (label, backing)
}
