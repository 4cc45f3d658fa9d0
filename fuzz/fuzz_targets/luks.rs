//! Any bytes as a LUKS header, and the cipher that it names over a sector.
//!
//! `cargo fuzz run luks`, with the first 256 KiB of a volume of qemu-img's as a corpus, its rounds of
//! hashing (offsets 164 and 212) set to 10.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vdisk::luks::Header;

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = Header::parse(bytes) else { return };
    let rounds = (0..8).filter_map(|n| header.slot(n)?.0).max().unwrap_or(0);
    // More is slow, not wrong.
    if rounds.max(header.digest_iterations()) <= 1000 {
        if let Ok(cipher) = header.unlock(bytes, b"") {
            let mut sector = [0; 512];
            let _ = cipher.encrypt(0, &mut sector);
        }
    }
});
