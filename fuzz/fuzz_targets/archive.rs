//! `cargo fuzz run archive`: see [`vdisk_fuzz::inside::archive`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vdisk_fuzz::inside::archive(bytes));
