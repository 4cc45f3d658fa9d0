//! Labels that an older vdisk wrote over several sectors, in one piece.

use std::sync::Arc;

use vdisk::internals::image::{Id, Image as _, Label, Role};
use vdisk::internals::qcow2::{self, CreateOptions, Image, Repair};
use vdisk::internals::storage::{MemoryStorage, Storage};

use crate::internal::WRITABLE;

const SECTOR: u64 = 512;
/// Bytes of the header before its extensions.
const HEADER: u64 = 112;

fn label(layer: Id, description: usize) -> Label {
    let description = "w".repeat(description);
    Label { layer, role: Role::Snapshot, name: "monday".into(), description, ..Label::new() }
}

/// An image whose only extension is the label.
fn old_image(label: &Label) -> Arc<MemoryStorage> {
    let storage = Arc::new(MemoryStorage::default());
    drop(qcow2::create(storage.clone(), &CreateOptions::new(1 << 20)).unwrap());
    let data = label.encode().unwrap();
    let mut area = [Label::MAGIC.to_be_bytes(), (data.len() as u32).to_be_bytes()].concat();
    area.extend_from_slice(&data);
    area.resize(area.len().next_multiple_of(8) + 8, 0);
    storage.write_all_at(HEADER, &area).unwrap();
    storage
}

fn told(storage: &Arc<MemoryStorage>) -> Label {
    let image = Image::open(storage.clone(), qcow2::OpenOptions::default()).unwrap();
    image.identity().unwrap().label.unwrap()
}

#[test]
fn a_label_in_one_piece_is_read_and_what_replaces_it_too() {
    let old = label(Id::new_v4(), 900);
    let storage = old_image(&old);
    assert_eq!(told(&storage), old);
    for description in [1000, 0, 10, 999, 500] {
        let image = Image::open(storage.clone(), WRITABLE).unwrap();
        let mut identity = image.identity().unwrap();
        let new = label(old.layer, description);
        identity.label = Some(new.clone());
        image.set_identity(&identity).unwrap();
        assert_eq!(image.identity().unwrap().label, Some(new.clone()));
        drop(image);
        assert_eq!(told(&storage), new);
    }
}

#[test]
fn a_label_that_was_torn_between_sectors_is_found_and_keeps_who_the_layer_is() {
    let layer = Id::new_v4();
    let (before, after) = (old_image(&label(layer, 20)), old_image(&label(layer, 900)));
    let mut first = [0; SECTOR as usize];
    after.read_exact_at(0, &mut first).unwrap();
    before.write_all_at(0, &first).unwrap();
    let image = Image::open(before.clone(), WRITABLE).unwrap();
    assert!(image.identity().is_err());
    let check = |repair| vdisk::internals::image::Checked::check(&image, repair).unwrap();
    assert_eq!(check(Repair::None).corruptions, 1);
    assert_eq!(check(Repair::Leaks).corruptions, 1);
    let mended = check(Repair::All);
    assert_eq!((mended.corruptions, mended.corruptions_fixed), (0, 1));
    assert!(mended.messages[0].contains("monday"), "{:?}", mended.messages);
    drop(image);
    let label = told(&before);
    assert_eq!((label.layer, label.name.as_str()), (layer, "monday"));
    assert_eq!((label.role, label.description.as_str()), (Role::Snapshot, ""));
}
