//! `cargo fuzz run compressed`: see [`vdisk_fuzz::targets::compressed`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vdisk_fuzz::targets::compressed(bytes));
