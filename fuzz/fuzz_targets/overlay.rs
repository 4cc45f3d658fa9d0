//! `cargo fuzz run overlay`: see [`vdisk_fuzz::overlay::overlay`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vdisk_fuzz::overlay::overlay(bytes));
