//! `cargo fuzz run foreign`: see [`vdisk_fuzz::targets::foreign`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vdisk_fuzz::targets::foreign(bytes));
