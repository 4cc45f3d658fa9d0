//! A guest's devices under a guest that does anything: see `vdisk::internals::vm::drive`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Err(error) = vdisk::internals::vm::drive(bytes) {
        panic!("{error}");
    }
});
