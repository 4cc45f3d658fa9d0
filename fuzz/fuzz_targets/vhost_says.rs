//! `cargo fuzz run vhost_says`: see [`vdisk_fuzz::peers::vhost_says`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vdisk_fuzz::peers::vhost_says(bytes));
