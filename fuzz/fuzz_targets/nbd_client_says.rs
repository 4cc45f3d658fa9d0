//! `cargo fuzz run nbd_client_says`: see [`vdisk_fuzz::peers::nbd_client_says`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vdisk_fuzz::peers::nbd_client_says(bytes));
