//! `cargo fuzz run nbd_server_says`: see [`vdisk_fuzz::peers::nbd_server_says`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vdisk_fuzz::peers::nbd_server_says(bytes));
