//! `cargo fuzz run filesystem`: see [`vdisk_fuzz::inside::filesystem`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vdisk_fuzz::inside::filesystem(bytes));
