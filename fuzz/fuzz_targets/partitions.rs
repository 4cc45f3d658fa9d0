//! `cargo fuzz run partitions`: see [`vdisk_fuzz::inside::partitions`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vdisk_fuzz::inside::partitions(bytes));
