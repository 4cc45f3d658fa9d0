//! Any bytes as an image of each foreign format: opened, mapped and read.
//!
//! `cargo fuzz run foreign`, with the unpacked fixtures of `testdata/formats` as a corpus.
#![no_main]

use std::io::IoSliceMut;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use vdisk::addr::GuestOffset;
use vdisk::formats::{vdi::Vdi, vhd::{SizeBy, Vhd}, vhdx::Vhdx, vmdk::Plan};
use vdisk::image::{Image, Mapping};
use vdisk::storage::{MemoryStorage, Storage};

fuzz_target!(|bytes: &[u8]| {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(bytes.to_vec()));
    let _ = Vdi::open(storage.clone()).map(|image| walk(&image));
    let _ = Vhd::open(storage.clone(), SizeBy::Creator).map(|image| walk(&image));
    let _ = Vhdx::open(storage.clone()).map(|image| walk(&image));
    let Ok(plan) = Plan::read(storage.clone()) else { return };
    // Every file that a descriptor names is the image itself.
    let files: Vec<_> = plan.files().iter().map(|_| storage.clone()).collect();
    let _ = plan.open(&files).map(|image| walk(&image));
});

/// A damaged size may promise exabytes: a bounded number of extents, the beginning of each.
fn walk(image: &dyn Image) {
    let mut at = 0;
    for _ in 0..256 {
        if at >= image.size() {
            break;
        }
        let Ok(extent) = image.map(GuestOffset(at), image.size() - at) else { break };
        assert!(extent.start.0 == at && extent.len > 0 && extent.len <= image.size() - at);
        if extent.mapping != Mapping::Unallocated {
            let mut buf = vec![0; extent.len.min(4096) as usize];
            let _ = image.read(&extent, extent.start, &mut [IoSliceMut::new(&mut buf)]);
        }
        at += extent.len;
    }
}
