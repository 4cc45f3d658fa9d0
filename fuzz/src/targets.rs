//! One body for each target: any bytes, used as what they claim to be. What comes of it is not the
//! question, but it returns, and what only looks changes nothing.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

use vdisk::internals::addr::{GuestOffset, Unit};
use vdisk::internals::formats::vhd::{SizeBy, Vhd};
use vdisk::internals::formats::{
    parallels::Parallels, qcow::Qcow, qed::Qed, vdi::Vdi, vhdx::Vhdx, vmdk::Plan,
};
use vdisk::internals::image::{Compress as _, Image as _, Mapping};
use vdisk::internals::qcow2::{
    self, Amend, Compression, CreateOptions, Image, NewSnapshot, OpenOptions, Repair,
};
use vdisk::internals::storage::{MemoryStorage, Storage};

use crate::dice::Dice;
use crate::mutation::{get, put};
use crate::shapes::opening;

/// A body: it is given any bytes.
pub type Target = fn(&[u8]);

/// The targets whose bytes are a qcow2 image.
pub const QCOW2: [(&str, Target); 8] = [
    ("open", open),
    ("read", read),
    ("check", check),
    ("repair", repair),
    ("snapshots", snapshots),
    ("bitmaps", bitmaps),
    ("change", change),
    ("write", write),
];

/// What is done to an image that is open for writing.
type Step<'a> = &'a dyn Fn(&mut Image) -> vdisk::Result<()>;

/// What an image may grow to: offsets in it may lie anywhere, and no file here is sparse.
const ROOM: usize = 64 << 20;

fn memory(bytes: &[u8]) -> Arc<MemoryStorage> {
    Arc::new(MemoryStorage::with_room(bytes.to_vec(), ROOM))
}

fn image(storage: &Arc<MemoryStorage>, read_only: bool) -> vdisk::Result<Image> {
    Image::open(storage.clone(), opening(read_only))
}

/// Each step on an image opened anew.
fn take(storage: &Arc<MemoryStorage>, steps: &[Step<'_>]) {
    for step in steps {
        let _ = image(storage, false).and_then(|mut image| step(&mut image));
    }
}

/// Opens it, and asks what it is. What is refused is not written.
pub fn open(bytes: &[u8]) {
    let storage = memory(bytes);
    if let Ok(image) = image(&storage, true) {
        let _ = (image.details(), image.identity(), image.backing(), image.allocated());
    }
    assert!(storage.to_vec() == bytes, "a look has changed the file");
    let dirty = get(bytes, 72) & 1 != 0;
    if image(&storage, false).is_err() && !dirty {
        assert!(storage.to_vec() == bytes, "it was refused, and changed all the same");
    }
}

/// Goes through the disk, and reads its beginning.
pub fn read(bytes: &[u8]) {
    let storage = memory(bytes);
    let Ok(image) = image(&storage, true) else { return };
    walk(&image);
    assert!(storage.to_vec() == bytes, "reading has changed the file");
}

/// A damaged size may promise exabytes: a bounded number of extents, the beginning of each.
fn walk(image: &dyn vdisk::internals::image::Image) {
    let mut at = 0;
    for _ in 0..512 {
        if at >= image.size() {
            break;
        }
        let Ok(extent) = image.map(GuestOffset(at), image.size() - at) else {
            // Go on behind what is damaged.
            at = at.saturating_add(image.cluster().bytes());
            continue;
        };
        assert!(extent.start.0 == at && extent.len > 0 && extent.len <= image.size() - at);
        if extent.mapping != Mapping::Unallocated {
            let mut buf = vec![0; extent.len.min(4096) as usize];
            let _ = image.read(&extent, extent.start, &mut [IoSliceMut::new(&mut buf)]);
        }
        at += extent.len;
    }
}

/// Checks it, as QEMU's tool does and as a user of the command does.
pub fn check(bytes: &[u8]) {
    let storage = memory(bytes);
    let Ok(image) = image(&storage, true) else { return };
    let _ = Image::check(&image, Repair::None);
    let _ = vdisk::internals::image::Checked::check(&image, Repair::None);
    assert!(storage.to_vec() == bytes, "a check has changed the file");
}

/// Repairs it. What a repair calls right stays right, and can be used.
pub fn repair(bytes: &[u8]) {
    for whole in [true, false] {
        let storage = memory(bytes);
        let options = OpenOptions { repair: true, ..opening(false) };
        let Ok(image) = Image::open(storage.clone(), options) else { continue };
        let check = match whole {
            true => vdisk::internals::image::Checked::check(&image, Repair::All),
            false => Image::check(&image, Repair::All),
        };
        drop(image);
        if !whole || !check.is_ok_and(|check| check.is_clean()) {
            continue;
        }
        match self::image(&storage, false) {
            Ok(image) => {
                let again = vdisk::internals::image::Checked::check(&image, Repair::None).unwrap();
                assert!(again.is_clean(), "a repaired image is not right: {:#?}", again.messages);
            }
            Err(error) => panic!("a repaired image cannot be opened: {error}"),
        }
    }
}

/// Lists, reads and changes internal snapshots.
pub fn snapshots(bytes: &[u8]) {
    let storage = memory(bytes);
    let list = image(&storage, true).and_then(|image| image.snapshots()).unwrap_or_default();
    for one in list.iter().take(4) {
        let old = Image::open_snapshot(storage.clone(), opening(true), &one.id());
        let _ = old.map(|old| walk(&old));
    }
    assert!(storage.to_vec() == bytes, "a look has changed the file");
    let Some(id) = list.first().map(|one| one.id().into_owned()) else { return };
    take(
        &storage,
        &[
            &|image| image.rename_snapshot(&id, "another"),
            &|image| image.create_snapshot(&NewSnapshot::default()).map(drop),
            &|image| image.apply_snapshot(&id),
            &|image| image.delete_snapshot(&id),
        ],
    );
}

/// Lists, reads and changes bitmaps.
pub fn bitmaps(bytes: &[u8]) {
    let storage = memory(bytes);
    let list = image(&storage, true).and_then(|image| image.bitmaps()).unwrap_or_default();
    let Some(name) = list.first().map(|one| one.name.clone()) else { return };
    let ranges = image(&storage, true).and_then(|image| image.bitmap_ranges(&name));
    assert!(storage.to_vec() == bytes, "a look has changed the file");
    let ranges = ranges.unwrap_or_default();
    take(
        &storage,
        &[
            &|image| image.add_bitmap("another", None, true),
            &|image| image.merge_bitmap("another", &ranges),
            &|image| image.enable_bitmap(&name, true),
            &|image| image.clear_bitmap(&name),
            &|image| image.remove_bitmap(&name),
        ],
    );
}

/// Makes it larger, smaller, and of another width and version.
pub fn change(bytes: &[u8]) {
    let storage = memory(bytes);
    let Ok(size) = image(&storage, true).map(|image| image.size()) else { return };
    let version = |version| Amend { version: Some(version), ..Amend::default() };
    let bits = Amend { refcount_bits: Some(32), ..Amend::default() };
    let larger = size.saturating_add(64 << 10);
    take(
        &storage,
        &[
            &|image| image.resize(larger),
            &|image| image.amend(&bits),
            &|image| image.resize(size / 2 / 512 * 512),
            &|image| image.amend(&version(2)),
            &|image| image.amend(&version(3)),
        ],
    );
}

/// Writes, zeroes and discards.
pub fn write(bytes: &[u8]) {
    let storage = memory(bytes);
    let Ok(image) = image(&storage, false) else { return };
    let sum = bytes.iter().fold(7u64, |sum, byte| sum.wrapping_mul(31) ^ u64::from(*byte));
    let mut dice = Dice::new(sum);
    let unit = image.granularity().bytes();
    for _ in 0..24 {
        let most = image.size().clamp(1, 256 << 10);
        let at = GuestOffset(dice.below(most) / unit * unit);
        let len = (unit * (1 + dice.below(4))).min(image.size().saturating_sub(at.0));
        let data = vec![dice.next() as u8; len.min(1 << 20) as usize];
        let _ = match dice.below(5) {
            0 => image.discard(at, len, dice.once_in(2)),
            1 => image.zero(at, len, dice.once_in(2)),
            2 => image.flush(),
            3 => image.write_compressed(at, &data).map(drop),
            _ => image.prepare(at, data.len() as u64).and_then(|place| {
                let len = place.len().min(data.len() as u64) as usize;
                place.write(0, &[IoSlice::new(&data[..len])])?;
                place.commit()
            }),
        };
    }
}

/// Bytes as a compressed cluster: the first says how it is compressed, and the cluster's size.
pub fn compressed(bytes: &[u8]) {
    let Some((first, packed)) = bytes.split_first() else { return };
    let compression = if first & 1 == 0 { Compression::Zlib } else { Compression::Zstd };
    let cluster = Unit::from_bits([9, 12, 16, 21][usize::from(first >> 1 & 3)]);
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions { cluster, compression, ..CreateOptions::new(cluster.bytes()) };
    let image = qcow2::create(storage.clone(), &options).unwrap();
    image.write_compressed(GuestOffset(0), &vec![1; cluster.bytes() as usize]).unwrap();
    drop(image);
    let mut file = storage.to_vec();
    let entry = get(&file, get(&file, 40)) & 0x00ff_ffff_ffff_fe00;
    let offset_bits = 62 - (cluster.bits() - 8);
    let host = get(&file, entry) & ((1 << offset_bits) - 1);
    // All that a descriptor can ask for.
    let sectors = ((1u64 << (62 - offset_bits)) - 1) << offset_bits;
    put(&mut file, entry, &(1 << 62 | sectors | host).to_be_bytes());
    file.truncate(host as usize);
    file.extend_from_slice(packed);
    file.resize(file.len().next_multiple_of(512), 0);
    read(&file);
}

/// Bytes as an image of each foreign format.
pub fn foreign(bytes: &[u8]) {
    let storage: Arc<dyn Storage> = memory(bytes);
    let _ = Vdi::open(storage.clone()).map(|image| walk(&image));
    let _ = Vhd::open(storage.clone(), SizeBy::Creator).map(|image| walk(&image));
    let _ = Vhdx::open(storage.clone()).map(|image| walk(&image));
    let _ = Qcow::open(storage.clone()).map(|image| walk(&image));
    let _ = Qed::open(storage.clone()).map(|image| walk(&image));
    let _ = Parallels::open(storage.clone()).map(|image| walk(&image));
    let Ok(plan) = Plan::read(storage.clone()) else { return };
    // Every file that a descriptor names is the image itself.
    let files: Vec<_> = plan.files().iter().map(|_| storage.clone()).collect();
    let _ = plan.open(&files).map(|image| walk(&image));
}

/// Bytes as a LUKS header, and the cipher that it names over a sector.
pub fn luks(bytes: &[u8]) {
    let Ok(header) = vdisk::internals::luks::Header::parse(bytes) else { return };
    let rounds = (0..8).filter_map(|n| header.slot(n)?.0).max().unwrap_or(0);
    // More is slow, not wrong.
    if rounds.max(header.digest_iterations()) > 1000 {
        return;
    }
    if let Ok(cipher) = header.unlock(bytes, b"open sesame") {
        let _ = cipher.encrypt(0, &mut [0; 512]);
    }
}
