//! `cargo fuzz run luks`: see [`vdisk_fuzz::targets::luks`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vdisk_fuzz::targets::luks(bytes));
