//! `cargo fuzz run fat`: see [`vdisk_fuzz::inside::fat`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vdisk_fuzz::inside::fat(bytes));
