//! Valid images of every shape: what mutations start from.

use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use vdisk::internals::addr::{GuestOffset, Unit};
use vdisk::internals::image::{Compress as _, Identity, Image as _, Label};
use vdisk::internals::luks::{self, Passphrase};
use vdisk::internals::qcow2::{
    self, Compression, CreateOptions, DataFile, Encryption, Image, Method, NewSnapshot, OpenOptions,
};
use vdisk::internals::storage::{MemoryStorage, Storage};

use crate::dice::Dice;

/// The guest disk's size in bytes.
pub const SIZE: u64 = 200 << 10;

/// An image, and what it is.
pub struct Shape {
    pub name: &'static str,
    pub bytes: Vec<u8>,
}

pub fn passphrase() -> Passphrase {
    Passphrase::new(b"open sesame".to_vec().into())
}

/// What opens any image: also one that mutation has made an encrypted one, or given a data file.
pub fn opening(read_only: bool) -> OpenOptions {
    let data_file: Arc<dyn Storage> = Arc::new(MemoryStorage::new(vec![7; SIZE as usize]));
    OpenOptions {
        read_only,
        cache: 0,
        data_file: Some(data_file),
        passphrase: Some(passphrase()),
        ..OpenOptions::default()
    }
}

/// All shapes, the same each time but for ids and keys.
pub fn all() -> Vec<Shape> {
    let plain = |bits| CreateOptions { cluster: Unit::from_bits(bits), ..CreateOptions::new(SIZE) };
    let quick = luks::Options { iter_time: Duration::from_millis(1), ..luks::Options::default() };
    let encrypted = |method| Some(Encryption { passphrase: passphrase(), method });
    let data_file = |raw| {
        let storage = Arc::new(MemoryStorage::default());
        Some(DataFile { name: "data".to_owned(), raw, storage })
    };
    let zstd = Compression::Zstd;
    let make = [
        ("version 2", CreateOptions { version: 2, ..plain(12) }),
        ("version 3", plain(16)),
        ("small clusters", plain(9)),
        ("64-bit refcounts", CreateOptions { refcount_bits: 64, ..plain(9) }),
        ("1-bit refcounts", CreateOptions { refcount_bits: 1, ..plain(12) }),
        ("lazy refcounts", CreateOptions { lazy_refcounts: true, refcount_bits: 8, ..plain(10) }),
        ("extended L2", CreateOptions { extended_l2: true, ..plain(14) }),
        ("zstd", CreateOptions { compression: zstd, ..plain(12) }),
        ("extended zstd", CreateOptions { compression: zstd, extended_l2: true, ..plain(14) }),
        ("data file", CreateOptions { data_file: data_file(false), ..plain(12) }),
        ("raw data file", CreateOptions { data_file: data_file(true), ..plain(12) }),
        ("aes", CreateOptions { encryption: encrypted(Method::Aes), ..plain(12) }),
        ("luks", CreateOptions { encryption: encrypted(Method::Luks(quick)), ..plain(12) }),
    ];
    let shape =
        |(name, options): (&'static str, CreateOptions)| Shape { name, bytes: fill(&options) };
    make.into_iter().map(shape).collect()
}

/// An image with a bit of everything that its shape allows.
fn fill(options: &CreateOptions) -> Vec<u8> {
    let mut dice = Dice::new(7);
    let storage = Arc::new(MemoryStorage::default());
    let mut image = qcow2::create(storage.clone(), options).unwrap();
    let unit = options.cluster.bytes();
    for round in 0..3 {
        for _ in 0..6 {
            let at = dice.below(SIZE / unit) * unit;
            let bytes = vec![dice.next() as u8; unit.min(SIZE - at) as usize];
            write(&image, at, &bytes);
            let at = GuestOffset(dice.below(SIZE / unit) * unit);
            let _ = image.zero(at, unit.min(SIZE - at.0), dice.once_in(2));
        }
        for _ in 0..3 {
            let at = dice.below(SIZE / unit) * unit;
            let bytes: Vec<u8> = (0..unit.min(SIZE - at)).map(|i| (i / 9) as u8).collect();
            let _ = image.write_compressed(GuestOffset(at), &bytes);
        }
        let name = format!("number {round}");
        let _ = image.add_bitmap(&name, Some(512), round == 1);
        let _ = image.create_snapshot(&NewSnapshot { name, ..NewSnapshot::default() });
    }
    label(&image);
    drop(image);
    storage.to_vec()
}

fn write(image: &Image, at: u64, bytes: &[u8]) {
    let place = image.prepare(GuestOffset(at), bytes.len() as u64).unwrap();
    // It may begin before, where parts of the cluster move along: they are not of interest.
    let len = place.len().min(bytes.len() as u64) as usize;
    place.write(0, &[IoSlice::new(&bytes[..len])]).unwrap();
    place.commit().unwrap();
}

fn label(image: &Image) {
    let label = Label { description: "to be damaged".to_owned(), ..Label::new() };
    // Headers in the smallest clusters have no room.
    let _ = image.set_identity(&Identity { label: Some(label), vouched: true, backing: None });
}
